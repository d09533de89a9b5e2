"""A server with real models for clients of other packages; collected where these are installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.http.conftest import serve as serve
from tests.http.conftest import served as served
from tests.support.tiny_models import CALL, END, TEMPLATE_WITH_TOOLS, byte_tokens, write_tiny_model
from tests.support.written_projector import write_projector

collect_ignore_glob = [] if find_spec("anthropic") else ["test_*.py"]

CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"enum": ["Hull", "Lisbon"]}}, "required": ["city"]}
TIDE: dict[str, Any] = {"name": "tide", "description": "when the water is high", "parameters": CITY}

# Calls stand between two characters that no JSON text holds, so that the model ends what a grammar has it begin.
MARK = "\x02"
# It calls a tool where it may. Where a grammar asks for a value it writes 3, an empty text or list, and no field more.
BIASES = {byte_tokens()[ord(MARK)]: 44, END: 42, '"': 40, "}": 38, "]": 38, ",": 36, "3": 34}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `m`, which writes text, `calls`, which calls tools, `sees`, which takes images, and `slow`."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "sees").mkdir()
    write_tiny_model(folder / "m.gguf", context=8192)
    write_tiny_model(
        folder / "calls.gguf", context=16384, template=TEMPLATE_WITH_TOOLS.replace(CALL, MARK), biases=BIASES
    )
    write_tiny_model(folder / "slow.gguf", layers=8, width=512, context=32768, seed=3, biases={END: -40})
    write_tiny_model(folder / "sees" / "sees.gguf", context=1024, sees=True)
    write_projector(folder / "sees" / "mmproj.gguf", 64, image=256)
    return folder
