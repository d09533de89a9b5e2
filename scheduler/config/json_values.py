"""Statuses, fits and events as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


def json_value(value: object, *, defaults: bool = True) -> Any:
    """Return a value as the standard of JSON has it: dataclasses and mappings as objects, an infinite time as None.

    Without `defaults`, fields that have their default value are left out.
    """
    if is_dataclass(value):
        told = {each.name: getattr(value, each.name) for each in fields(value)}
        left_out = {each.name for each in fields(value) if not defaults and told[each.name] == each.default}
        return {name: json_value(each, defaults=defaults) for name, each in told.items() if name not in left_out}
    if isinstance(value, Mapping):
        return {str(key): json_value(each, defaults=defaults) for key, each in value.items()}
    if isinstance(value, tuple):
        return [json_value(each, defaults=defaults) for each in value]
    if isinstance(value, Enum):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value
