"""Signatures with every keyword, for `help()` and editors, where a function takes `**keywords: Unpack[…]`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

Function = TypeVar("Function", bound=Callable[..., Any])


def with_keywords(kind: type, defaults: Mapping[str, object] | None = None) -> Callable[[Function], Function]:
    """Return a decorator that shows the fields of the TypedDict `kind` as the keywords of a function.

    `defaults` has the default to show of each field: None where it has none, and `...` for every field where
    `defaults` is None, as what is not named stays as it is. Only the signature changes: a call is as fast as before.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        shown = [
            each
            for each in signature.parameters.values()
            if each.kind is not each.VAR_KEYWORD
            and (not each.name.startswith("_") or each.kind is each.POSITIONAL_ONLY)
        ]
        for name, hint in get_type_hints(kind).items():
            default = ... if defaults is None else defaults.get(name)
            shown.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]  # see PEP 362
        return function

    return decorate
