"""Every named property, and the page that lists them.

`python -m fsm.verification.properties > docs/invariants.md` writes it again.

The properties are beside their checks: of a state in `state_invariants`, of a transition in `transition_invariants`,
`service_guarantees` and `plan_invariants`, of a trace in `trace_auditor`; properties that only a search can ask are in
`model_checker`. `property` says how a property is added.
"""

from __future__ import annotations

from fsm.verification import (
    model_checker,
    plan_invariants,
    service_guarantees,
    state_invariants,
    trace_auditor,
    transition_invariants,
)
from fsm.verification.property import ASKED_BY, PROPERTIES, Kind, Property

MODULES = (
    state_invariants,
    transition_invariants,
    service_guarantees,
    plan_invariants,
    trace_auditor,
    model_checker,
)  # that have checks, as they are listed

# The layers that ask properties, by the names that `Checks` are given.
LAYERS = {
    "search": "`loadmaster explore` asks after every event of its scenarios, in every order of events",
    "simulation": "`make fuzz` asks after every event; `--check-every` says how often for the properties of a state",
    "core tests": "`tests/support/pool.py` asks after every event of every test of the core, and so do the Hypothesis "
    "machines of the core",
    "API tests": "the Hypothesis machine of the public API and the soak ask the core of a running scheduler",
}

PREFACE = """\
# Invariants

The properties of the core that always hold, by name. A property is a property of a *state* of the core, of a
*transition* (the state before, the event, the commands, and the state after), or of a whole *trace* of events and
commands. `make docs` writes this page from the checks in `fsm/`; a test fails when the page differs from them. A
search, a simulation or a test that finds a violation names the property.
"""

KINDS = {
    Kind.state: "## Of a state\n\nThese properties hold between any two steps.\n",
    Kind.transition: "## Of a transition\n\nThese properties hold of each step.\n",
    Kind.trace: "## Of a trace\n\nThese properties hold of all events and commands since the core was made.\n",
}

NOTES = """\
`D01` to `D14` are the defects of the [reference](parity.md) whose mechanism breaks the property. Several layers may ask
one property by different evidence: a search compares two states, a simulation goes by events and commands alone.
"""


def markdown() -> str:
    """Return the page of all properties."""
    asked = "".join(f"* **{layer}**: {text}.\n" for layer, text in LAYERS.items())
    return "\n".join([PREFACE, "Four layers ask the properties:\n", asked, NOTES, *map(_section, Kind)])


def _section(kind: Kind) -> str:
    order = [module.__name__ for module in MODULES]
    properties = sorted(
        (one for one in PROPERTIES.values() if one.kind is kind), key=lambda one: order.index(one.module)
    )
    groups = [KINDS[kind], "| property | what holds | defects | asked by | check |", "| --- | --- | --- | --- | --- |"]
    for one in properties:
        cells = (one.name, one.says, ", ".join(one.ids), _asked_by(one), f"`{one.module.replace('.', '/')}.py`")
        groups.append(f"| {' | '.join(cells)} |")
    return "\n".join(groups) + "\n"


def _asked_by(one: Property) -> str:
    return ", ".join(layer for layer in LAYERS if layer in ASKED_BY[one.name])


if __name__ == "__main__":
    print(markdown(), end="")
