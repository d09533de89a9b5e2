"""The program of a process that becomes a `llama-server`: it stops itself before that, and goes on after SIGCONT."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scheduler" / "engines"))

import llama_server_child as child

execute = child.execute


def stop_and_execute(protocol: int, order: child.Order) -> None:
    """Stop where a model is to be served, and not where a question is to be answered."""
    if order["key"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    execute(protocol, order)


child.execute = stop_and_execute
child.main()
