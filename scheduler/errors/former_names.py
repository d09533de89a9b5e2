"""Public names that have been replaced: the former name still works, and warns."""

from __future__ import annotations

import sys
import warnings

_OUR_PACKAGES = ("fsm", "scheduler")


def warn_of_former_name(former: str, name: str) -> None:
    """Issue a `DeprecationWarning` that names the new name, at the first caller outside of these packages.

    A fixed `stacklevel` would not do: settings are read from the environment by the user, by `Scheduler` and by the
    command line, and a warning that is attributed to one of these packages is not shown by default.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OUR_PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{former} is called {name} now; the former name will be removed", DeprecationWarning, level)
