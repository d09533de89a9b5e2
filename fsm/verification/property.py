"""Named properties of the core, of a state, of a transition or of a trace, and the checks that ask them.

A check is a function with one property: the function's name is the property's name, its docstring is the sentence that
`docs/invariants.md` shows, and its assertions name the runner, request or device in which the property does not hold.

    @of_state(ids=("D04",))
    def a_ready_runner_holds_a_lease(state: CoreState) -> None:
        \"\"\"A runner is ready only while it holds at least one lease.\"\"\"
        for runner in state.runners.values():
            assert runner.state is not READY or runner.leases, f"runner {runner.id}"

Every search, simulation and test that asks the checks of a kind asks an added check too, and names its property.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

Subject = TypeVar("Subject")
Function = Callable[..., None]
Check = TypeVar("Check", bound=Function)


class Kind(Enum):
    """What a property is a property of."""

    state = "state"  # of what is true between two steps
    transition = "transition"  # of the state before a step, its event, its commands, and the state after it
    trace = "trace"  # of all events and commands since the core was made


@dataclass(frozen=True, slots=True)
class Property:
    """A statement that must always hold."""

    name: str  # unique
    kind: Kind
    says: str  # in a sentence
    module: str  # that has its check
    ids: tuple[str, ...] = ()  # defects of the reference whose mechanism breaks it


class Violated(AssertionError):
    """A property does not hold; the message is its name, and where it does not hold."""

    def __init__(self, violated: Property, detail: str = "") -> None:
        super().__init__(f"{violated.name}: {detail}" if detail else violated.name)
        self.property = violated


PROPERTIES: dict[str, Property] = {}  # every one, by name
ASKED_BY: dict[str, dict[str, None]] = {}  # the layers that ask a property, by its name


def declare(
    name: str, kind: Kind, says: str, module: str, *, ids: Sequence[str] = (), asked_by: Sequence[str] = ()
) -> Property:
    """Add a property and return it."""
    assert name not in PROPERTIES, f"there are two properties of one name: {name}"
    assert says, f"a property without a sentence: {name}"
    PROPERTIES[name] = one = Property(name, kind, " ".join(says.split()), module, tuple(ids))
    ASKED_BY[name] = dict.fromkeys(asked_by)
    return one


class Checks(Generic[Subject]):
    """The checks that are asked of one subject, in the order in which they were added; called to decorate a check."""

    def __init__(self, kind: Kind, *asked_by: str) -> None:
        self.kind = kind
        self.asked_by = asked_by  # the layers of tests that ask these checks
        self.always: list[tuple[Property, Function]] = []
        self.by_cause: dict[type, list[tuple[Property, Function]]] = {}  # by the type of event, command or log entry

    def __call__(
        self, *causes: type, ids: Sequence[str] = (), same_as: Function | None = None
    ) -> Callable[[Check], Check]:
        """Add the check that is decorated: of every subject, or once for each cause that is of one of these types.

        A check of every subject is handed the subject; a check of causes is handed the subject and the cause. With
        `same_as` it is another check of a property that has one: the same sentence, told by other evidence.
        """

        def add(check: Check) -> Check:
            if same_as is None:
                one = declare(_words(check), self.kind, check.__doc__ or "", check.__module__, ids=ids)
            else:
                one = PROPERTIES[_words(same_as)]
            ASKED_BY[one.name].update(dict.fromkeys(self.asked_by))
            for checks in [self.by_cause.setdefault(cause, []) for cause in causes] or [self.always]:
                checks.append((one, check))
            return check

        return add

    def remove(self, check: Function) -> None:
        """Take a check out again, and its property with it."""
        del PROPERTIES[_words(check)], ASKED_BY[_words(check)]
        for checks in (self.always, *self.by_cause.values()):
            checks[:] = [entry for entry in checks if entry[1] is not check]

    def ask(self, subject: Subject) -> None:
        """Raise Violated where a property does not hold of `subject`."""
        for one, check in self.always:
            try:
                check(subject)
            except Exception as error:
                raise Violated(one, _said(error)) from error

    def ask_of(self, subject: Subject, cause: object) -> None:
        """Raise Violated where a property does not hold of `subject` because of `cause`."""
        for one, check in self.by_cause.get(type(cause), ()):
            try:
                check(subject, cause)
            except Exception as error:
                raise Violated(one, _said(error)) from error


def _said(error: Exception) -> str:
    """Return what an exception says: an assertion without its type."""
    return str(error) if isinstance(error, AssertionError) else repr(error)


def _words(check: Function) -> str:
    return check.__name__.strip("_").replace("_", " ")
