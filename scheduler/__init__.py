"""Loads models on demand, keeps them loaded, shares them by lease, and evicts them when memory is full."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from scheduler.errors.safe_log import prepare

if TYPE_CHECKING:
    from scheduler.public import *  # noqa: F403

    __version__: str
else:

    def __getattr__(name: str) -> object:
        """Return a public name, imported with its first use: the command's help, for example, needs none of them."""
        if name == "__version__":
            value = _version()
        elif name != "__all__" and name not in __getattr__("__all__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        else:
            value = getattr(import_module("scheduler.public"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})


def _version() -> str:
    """Return the version of the installed distribution; "0+unknown" where the code runs without being installed."""
    from importlib import metadata

    try:
        return metadata.version("loadmaster")
    except metadata.PackageNotFoundError:
        return "0+unknown"


prepare(logging.getLogger("loadmaster"))  # the program says where lines go
