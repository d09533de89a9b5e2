"""What clients may ask for: values that are locked, and floors and ceilings, for all models or one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from operator import or_
from typing import Any

from scheduler.config.quantities import parse_duration
from scheduler.errors.exceptions import InvalidSettings, UnsupportedOption
from scheduler.runtime.request_parser import AcquireOptions, check_option

_LOADING = """
    num_ctx num_batch num_gpu main_gpu num_thread num_parallel use_mmap flash_attention cache_type_k cache_type_v
    draft_num_predict context_shift
"""
LOAD_OPTIONS = frozenset(_LOADING.split())
TIMING = ("keep_alive", "priority", "timeout")
ALL = "*"  # the name that stands for every model
_DURATIONS = ("keep_alive", "timeout")
_NO_NUMBERS = ("use_mmap", "flash_attention", "context_shift", "cache_type_k", "cache_type_v")
_ALLOWED = (
    'rules by the names of models, "*" for all: {"*": {"num_ctx": {"max": 8192}, "keep_alive": {"lock": "1h"}}}; '
    'a rule has "lock", or "min" and "max"'
)
_FORMS = ({"lock"}, {"min"}, {"max"}, {"min", "max"})


class _Open(Enum):
    """No lock; the same in every process."""

    OPEN = "open"


_OPEN = _Open.OPEN


@dataclass(frozen=True, slots=True)
class Rule:
    """What clients may name for one option: nothing beside a locked value, or what lies between two others."""

    lock: Any = _OPEN  # what counts whatever a client names; None: as if no client named it
    least: Any = None
    most: Any = None

    def takes(self, name: str, value: Any) -> bool:
        """Tell whether a client may name this value; one that is no value at all is the scheduler's to refuse."""
        if self.lock is not _OPEN:
            return False
        try:
            number = _number(name, value)
            return (self.least is None or _number(name, self.least) <= number) and (
                self.most is None or number <= _number(name, self.most)
            )
        except (InvalidSettings, TypeError):
            return True

    def words(self) -> str:
        """Return the rule in words."""
        if self.lock is not _OPEN:
            return "it is locked"
        limits = {"at least": self.least, "at most": self.most}
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)


Rules = Mapping[str, Mapping[str, Rule]]


def parse_rules(name: str, value: Any) -> Rules:
    """Return rules by model and option; raises `InvalidSettings`."""
    if not isinstance(value, Mapping):
        raise InvalidSettings(name, value, _ALLOWED)
    return {str(model): _rules_of(f"{name}.{model}", rules) for model, rules in value.items()}


def apply_rules(rules: Rules, names: tuple[str, ...], asking: AcquireOptions) -> tuple[AcquireOptions, tuple[str, ...]]:
    """Return what counts of a client's keywords, and what does not, in words; `names` are those of the model.

    What a client names beyond a rule counts as not named, so that it reloads nothing.
    """
    left: dict[str, Any] = {**asking}
    ignored: list[str] = []
    for option, rule in reduce(or_, (dict(rules.get(name, {})) for name in (ALL, *names))).items():
        if option in left and left[option] != rule.lock and not rule.takes(option, left[option]):
            ignored.append(f"{option}={str(left.pop(option))[:40]} ({rule.words()})")
        if rule.lock is not _OPEN and rule.lock is not None:
            left[option] = rule.lock
    return left, tuple(ignored)  # type: ignore[return-value]  # a part of what it was


def _rules_of(name: str, value: Any) -> Mapping[str, Rule]:
    if not isinstance(value, Mapping):
        raise InvalidSettings(name, value, _ALLOWED)
    found: dict[str, Rule] = {}
    for option, rule in value.items():
        if option not in LOAD_OPTIONS and option not in TIMING:
            known = ", ".join((*TIMING, *sorted(LOAD_OPTIONS)))
            raise InvalidSettings(f"{name}.{option}", rule, f"a rule for one of {known}")
        if isinstance(rule, Rule):  # it has been parsed before
            found[option] = rule
            continue
        if not isinstance(rule, Mapping) or {*rule} not in _FORMS:
            raise InvalidSettings(f"{name}.{option}", rule, _ALLOWED)
        found[option] = _rule(f"{name}.{option}", option, rule)
    return found


def _rule(name: str, option: str, rule: Mapping[str, Any]) -> Rule:
    if "lock" in rule:
        return Rule(_locked(name, option, rule["lock"]))
    if option in _NO_NUMBERS:
        raise InvalidSettings(name, rule, 'a rule with "lock", since it has no number')
    limits = [_limit(name, option, limit) for limit in rule.values() if limit is not None]
    if {*rule} == {"min", "max"} and limits != sorted(limits):
        raise InvalidSettings(name, rule, "limits with values in between")
    return Rule(least=rule.get("min"), most=rule.get("max"))


def _locked(name: str, option: str, value: Any) -> Any:
    """Return the value that is locked; None, which a file writes as "none", is locked as not named."""
    if value in (None, "none"):
        return None
    if option in TIMING:
        if option not in _DURATIONS and not isinstance(value, int):
            raise InvalidSettings(name, value, "a whole number")
        _limit(name, option, value)
        return value
    try:
        check_option(option, value)
    except UnsupportedOption as error:
        raise InvalidSettings(name, value, f"a value that the option can have ({error.reason})") from None
    return value


def _limit(name: str, option: str, value: Any) -> float:
    try:
        return _number(option, value)
    except (InvalidSettings, TypeError):
        raise InvalidSettings(name, value, "a duration" if option in _DURATIONS else "a number") from None


def _number(option: str, value: Any) -> float:
    if option in _DURATIONS:
        return parse_duration(value, name=option)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(option)
    return value
