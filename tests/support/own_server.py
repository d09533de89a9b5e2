"""Tests over both programs that serve model files: the wheel's llama.cpp, and a `llama-server` that LLAMA_SERVER names.

The fixture `served_by` runs a test once for each; without LLAMA_SERVER the second one is skipped.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from scheduler.engines.llama import LlamaEngine
from scheduler.engines.llama_server import LlamaServerEngine

WHEEL, SERVER = KINDS = ("wheel", "llama-server")


CHOSEN = "TESTED_LLAMA_SERVER"  # set where a server is to serve the models of the test under way, for its children too


def chosen() -> Path | None:
    """Return the `llama-server` that serves the models of the test under way; None: the wheel does."""
    return Path(os.environ[CHOSEN]) if CHOSEN in os.environ else None


def the_server() -> Path:
    """Return the path of the `llama-server` under test; skips the test where there is none."""
    named = os.environ.get("LLAMA_SERVER", "")
    found = shutil.which(named) if named else None
    if found is None:
        pytest.skip(f"no llama-server: {f'{named} is no program' if named else 'name one with LLAMA_SERVER=PATH'}")
    return Path(found).absolute()


def an_engine(**more: Any) -> LlamaEngine:
    """Return an engine of what serves the models of the test under way."""
    return LlamaEngine(**more) if (server := chosen()) is None else LlamaServerEngine(server, **more)
