"""The lives of objects by name: an object that comes with another `load` under a known name is another model."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import isfunction, ismethod
from types import CellType, FunctionType
from typing import Any

from fsm.machine.request import ModelId
from scheduler.engines.python import PythonModel

_MOST_NAMES = 4096  # that are remembered


class ObjectLives:
    """Tells whether the `load` of a name is the one that came before; no object and no `load` is kept alive by it."""

    def __init__(self) -> None:
        self._lives = itertools.count(2)
        self._known: dict[str, _Life] = {}  # by name, the one that was met longest ago first
        self._lock = threading.RLock()  # a signal handler may come in between

    def current(self, model: PythonModel) -> PythonModel:
        """Return the model as the life that its name has now."""
        known = self._known.get(model.name)
        return model if known is None else _as_life(model, known.number)

    def meet(self, model: PythonModel) -> tuple[PythonModel, ModelId | None]:
        """Return the model as its life, and the identity of the life that ends with it, if one does."""
        with self._lock:
            before = self._known.pop(model.name, None)
            ended = before is not None and not before.has(model.load)
            number = 1 if before is None else next(self._lives) if ended else before.number
            self._known[model.name] = _Life(number, model.load)
            if len(self._known) > _MOST_NAMES:
                del self._known[next(iter(self._known))]
        past = _as_life(model, before.number).id if before is not None and ended else None
        return _as_life(model, number), past


class _Life:
    """One life of a name: its number, and what its `load` was."""

    def __init__(self, number: int, load: Callable[[], object]) -> None:
        self.number = number
        self._code = _code_of(load)
        self._load: Callable[[], object | None]
        try:
            self._load = weakref.WeakMethod(load) if ismethod(load) else weakref.ref(load)
        except TypeError:  # of a kind that no weak reference is made to
            self._load = lambda: None

    def has(self, load: Callable[[], object]) -> bool:
        """Return whether `load` does the same; where the earlier one is gone, its code alone is compared."""
        earlier = self._load()
        if earlier is None:
            return self._code is not None and self._code == _code_of(load)
        return _same(earlier, load)


def _as_life(model: PythonModel, number: int) -> PythonModel:
    if model.life == number:
        return model
    other = replace(model)
    object.__setattr__(other, "life", number)
    return other


def _code_of(load: Any) -> object:
    """Return the code that a callable runs; None where that is not known."""
    while isinstance(load, partial):
        load = load.func
    return getattr(load, "__code__", None) or getattr(vars(type(load)).get("__call__"), "__code__", None)


def _same(one: Any, other: Any) -> bool:
    """Tell whether two callables do the same: one function, or the same code with the same values around it.

    A program may make its objects anew for each request, with a function or a partial of its own each time.
    """
    if one is other:
        return True
    if isinstance(one, partial) and isinstance(other, partial):
        return _same(one.func, other.func) and _alike((one.args, one.keywords), (other.args, other.keywords))
    if ismethod(one) and ismethod(other):
        return one.__func__ is other.__func__ and _alike(one.__self__, other.__self__)
    if isfunction(one) and isfunction(other):
        return one.__code__ == other.__code__ and _alike(_around(one), _around(other))
    return _alike(one, other)


def _around(function: FunctionType) -> tuple[object, ...]:
    return function.__defaults__, function.__kwdefaults__, *map(_content, function.__closure__ or ())


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _alike(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, or plain objects of one class with equal attributes."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(map(_alike, one, other))
    try:
        if one is other or bool(one == other):
            return True
        plain = type(one) is type(other) and getattr(type(one), "__eq__") is object.__eq__  # noqa: B009  # for mypy
        return plain and hasattr(one, "__dict__") and bool(vars(one) == vars(other))
    except Exception:  # arrays, and objects of the user's own
        return False
