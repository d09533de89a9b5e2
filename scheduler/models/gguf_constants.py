"""The constants of the gguf package, without the rest of it."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def gguf_constants() -> ModuleType:
    """Return the module `gguf.constants`, imported with the first file that is read, by itself where that is possible.

    The package imports its writer, its vocabularies and YAML with it, which takes five times as long.
    """
    package = importlib.util.find_spec("gguf")
    if package is not None and package.origin is not None:
        path = Path(package.origin).with_name("constants.py")
        spec = importlib.util.spec_from_file_location("gguf.constants", path)
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            with suppress(Exception):  # a later version may need its package
                spec.loader.exec_module(module)
                return module
    from gguf import constants

    return constants
