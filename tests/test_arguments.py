"""What models and requests are made with: what means nothing is refused at once, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scheduler import InvalidSettings, ModelSpec, PythonModel

MAKE: dict[str, Callable[[Any], object]] = {
    "a file": lambda name: ModelSpec(name, "a.gguf"),
    "an object": lambda name: PythonModel(name, load=object),
}


@pytest.mark.parametrize("name", [None, 5, "", b"a", Path("a")])
@pytest.mark.parametrize("make", MAKE)
def test_a_name_that_is_no_text_is_refused_at_once(make: str, name: Any) -> None:
    """Later, every message about the model would be a bug in a decision."""
    with pytest.raises(InvalidSettings, match="name") as refused:
        MAKE[make](name)
    assert (refused.value.name, refused.value.value) == ("name", name)


@pytest.mark.parametrize("path", [None, 5, "", b"a.gguf"])
def test_a_path_that_is_none_is_refused_at_once(path: Any) -> None:
    """A `Path` is one."""
    with pytest.raises(InvalidSettings, match="path"):
        ModelSpec("a", path)
    assert ModelSpec("a", Path("/a.gguf")).path == "/a.gguf"  # type: ignore[arg-type]  # paths are made texts
