"""The command `loadmaster`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Never

from scheduler.errors import InvalidSettings, SchedulerError
from scheduler.settings import parse_bytes, parse_duration

PROGRAM = "loadmaster"
WRONG_USE = 2
LONGEST_KEEP_ALIVE_S = 60.0  # the demonstration waits for it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; what the user did wrong is one line on standard error, status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show is no reason to fail
    chosen = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = chosen.run
    try:
        return run(chosen)
    except SchedulerError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, `| head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> Never:
        """Exit with the status of wrong use."""
        self.exit(WRONG_USE, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, description="Loads models on demand, keeps them warm, shares them by lease, and evicts them."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands.add_parser("demo", help="run real models in too little memory and show what happens"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs several models, asked by several clients, in memory that does not hold them all; shows every runner as "
        "it loads, serves, rests and leaves, and ends with a summary and a timeline. Uses no GPU."
    )
    option = parser.add_argument
    option("--models", type=Path, metavar="DIR", help="use the GGUF files in DIR instead of the small model")
    option("--out", type=Path, default=Path("build"), metavar="DIR", help="where timeline.svg goes (default: build)")
    option("--memory-limit", metavar="SIZE", help="memory for all models, like 2GiB (default: about half of them fit)")
    option("--keep-alive", default="1.5s", metavar="TIME", help="keep-alive of the last act (default: 1.5s)")
    option("--requests", type=int, default=9, metavar="N", help="requests when everybody asks at once (default: 9)")
    parser.set_defaults(run=_demo)


def _demo(chosen: argparse.Namespace) -> int:
    from scheduler.demo import DemoOptions, run_demo  # here, since nothing else needs what it imports

    limit = None if chosen.memory_limit is None else parse_bytes(chosen.memory_limit, name="--memory-limit")
    keep_alive_s = parse_duration(chosen.keep_alive, name="--keep-alive")
    if keep_alive_s > LONGEST_KEEP_ALIVE_S:
        raise InvalidSettings("--keep-alive", chosen.keep_alive, "at most 1m, since the demonstration waits for it")
    if chosen.requests < 0:
        raise InvalidSettings("--requests", chosen.requests, "a whole number of at least 0")
    return run_demo(DemoOptions(chosen.models, chosen.out, limit, keep_alive_s, chosen.requests))


def _version() -> str:
    try:
        return metadata.version(PROGRAM)
    except metadata.PackageNotFoundError:  # run from its source
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
