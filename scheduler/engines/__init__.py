"""Engines, which load placed models and run them, and the interface by which other packages bring theirs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.engines.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """Return a public name, imported with its first use: the modules of this package need none of the others."""
        if name != "__all__" and name not in __getattr__("__all__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module("scheduler.engines.public"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
