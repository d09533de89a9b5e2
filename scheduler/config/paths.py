"""The paths of files that one user's programs share."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

import platformdirs

VERSION = 1  # of the table; part of the usual file's name, so that programs of two versions use different files

NO_HOME = Path(os.devnull, "no home folder")  # stands for the usual file where there is no home folder: nothing is kept


def default_measurement_file() -> Path:
    """Return the file that this user's programs share; `NO_HOME` where this user has no home."""
    return _in_cache(f"footprints-{VERSION}.sqlite3")


def default_prompt_folder() -> Path:
    """Return the folder in which each of this user's programs keeps prompts; `NO_HOME` where this user has no home."""
    return _in_cache("prompts")


def _in_cache(name: str) -> Path:
    try:
        return Path(platformdirs.user_cache_path("loadmaster", appauthor=False)) / name
    except RuntimeError:  # as in a container whose user is a number without a name
        return NO_HOME


def shared_lock_folder() -> Path:
    """Return the folder of the locks that this user's programs share.

    The folder must not depend on TMPDIR, which login sessions, services and batch jobs of one user set differently. So
    it is below /tmp where there is one.
    """
    user = str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
    shared = Path("/tmp")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"loadmaster-{user}"
