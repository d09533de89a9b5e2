"""A runner's program that stops itself before it loads, and goes on after SIGCONT."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

CHILD = Path(__file__).parents[2] / "scheduler" / "engines" / "llama_child.py"


def main() -> None:
    """Run the real program, which first makes sure that it ends with its parent."""
    spec = spec_from_file_location("llama_child", CHILD)
    assert spec is not None and spec.loader is not None
    child = sys.modules["llama_child"] = module_from_spec(spec)
    spec.loader.exec_module(child)
    settle = child.settle

    def settle_and_stop() -> None:
        settle()
        os.kill(os.getpid(), signal.SIGSTOP)

    child.settle = settle_and_stop  # type: ignore[attr-defined]  # a module of its own
    child.main()


if __name__ == "__main__":
    main()
