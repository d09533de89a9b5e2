"""The command `loadmaster`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Never

from scheduler import __version__
from scheduler.cli.serve_settings import Refused, add_flags
from scheduler.config.settings import Settings, parse_duration
from scheduler.config.value_parsers import memory
from scheduler.errors.exceptions import InvalidSettings, SchedulerError
from scheduler.errors.formatting import printable
from scheduler.errors.former_names import warn_of_former_name

PROGRAM = "loadmaster"
WRONG_USE = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SERVER = "http://127.0.0.1:11434"
LONGEST_KEEP_ALIVE_S = 60.0  # the demonstration waits for it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a mistake of the user's is one line on standard error, status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is no reason to fail
    chosen = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = chosen.run
    try:
        status = run(chosen)
        print(end="", flush=True)  # here, where a failure can still be reported
        return status
    except (SchedulerError, Refused) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, for example `| head`
        _say_no_more()
        return 141
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        _say_no_more()
        print(f"{PROGRAM}: its output cannot be written: {error.strerror}", file=sys.stderr)
        return WRONG_USE


def _say_no_more() -> None:
    """Drop the output that is not written yet.

    Else the interpreter tries once more at its end, and reports an error.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line."""

    def error(self, message: str) -> Never:
        """Exit with the status of wrong use."""
        self.exit(WRONG_USE, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, description="Loads models on demand, keeps them warm, shares them by lease, and evicts them."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands.add_parser("serve", help="serve models to clients of OpenAI's, Anthropic's and Ollama's API"))
    _add_demo(commands.add_parser("demo", help="run real models in too little memory and show what happens"))
    _add_models(commands.add_parser("models", help="list the models that have a name, and whether they fit"))
    _add_fit(commands.add_parser("fit", help="show what a model would take of which device, and whether it fits"))
    _add_ps(commands.add_parser("ps", help="show what a server has loaded, and what waits"))
    _add_top(commands.add_parser("top", help="show the same live"))
    _add_replay(commands.add_parser("replay", help="replay a recording: what was decided, and why"))
    _add_explore(commands.add_parser("explore", help="search all states of a small scheduler for errors"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [--config FILE] [--host VALUE] [--port VALUE] [--models DIR ...] [other flags]"
    parser.description = (
        "Serves models over HTTP. Every setting is a flag, a key of the file that --config names, and a variable of "
        "the environment (LOADMASTER_PORT for --port); a flag counts more than the file, and the file more than the "
        "environment. Ctrl-C lets answers finish and then ends it, with status 0; Ctrl-C twice ends it at once. "
        "SIGHUP has it read the file again."
    )
    add_flags(parser)
    parser.set_defaults(run=_serve)


def _serve(chosen: argparse.Namespace) -> int:
    from scheduler.cli.serve import run_serve  # imported here, since no other command needs it

    return run_serve(vars(chosen))


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs several models, used by several clients, in memory that does not hold them all; shows every runner as "
        "it loads, serves, is idle and is unloaded, and ends with a summary and a timeline. Uses no GPU."
    )
    option = parser.add_argument
    option("--models", type=Path, metavar="DIR", help="use the GGUF files in DIR instead of the small model")
    option("--out", type=Path, default=Path("build"), metavar="DIR", help="where timeline.svg goes (default: build)")
    option("--memory-limit", metavar="SIZE", help="memory for all models, like 2GiB (default: about half of them fit)")
    option("--keep-alive", default="1.5s", metavar="TIME", help="keep-alive of the last act (default: 1.5s)")
    option("--requests", type=int, default=9, metavar="N", help="requests of all clients at once (default: 9)")
    parser.set_defaults(run=_demo)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Lists the models in the folders that LOADMASTER_MODELS names, in Ollama's store and in the Hugging Face "
        "cache, each with the name to acquire it by, and whether it would fit into the memory that is free now. With "
        "folders, lists the models in those alone."
    )
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="look in this folder only")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of tables")
    parser.set_defaults(run=_models)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows what a model would take of each device if it were loaded now, whether that fits, and what to change so "
        "that it does. Nothing is loaded. Exits with 0 if it fits, with 1 if it does not."
    )
    parser.add_argument("model", metavar="MODEL", help="the path of a GGUF file, or a name")
    asked = parser.add_argument_group("the request").add_argument
    asked("--num-ctx", type=int, metavar="TOKENS", help="context of one slot")
    asked("--num-parallel", type=int, metavar="N", help="slots, each with a context of its own")
    asked("--num-batch", type=int, metavar="TOKENS", help="tokens of a prompt that are computed at once")
    asked("--num-gpu", type=int, metavar="LAYERS", help="layers on GPUs; negative: automatic, 0: none")
    asked("--require-gpu", action="store_true", help="the whole model on GPUs, or not at all")
    asked("--cache-type", metavar="TYPE", help="type of the KV cache: f16, q8_0, q4_0, …")
    asked("--flash-attention", action=argparse.BooleanOptionalAction, help="whether it is used; default: automatic")
    asked("--mmap", action=argparse.BooleanOptionalAction, help="whether the file is mapped; default: automatic")
    asked("--embedding", action="store_true", help="use the model as an embedder")
    asked("--adapter", action="append", metavar="FILE", help="with a LoRA adapter; may be given several times")
    asked("--projector", action="append", metavar="FILE", help="with a projector, one at most")
    room = parser.add_argument_group("other memory than the machine's").add_argument
    room("--memory-limit", metavar="SIZE", help="host memory that models may take in all, like 2GiB")
    room("--host", metavar="SIZE", help="imagine that the host has this much memory, all of it free")
    imagined = "imagine this GPU, all of it free, in place of the machine's GPUs; may be given several times"
    room("--gpu", action="append", default=[], metavar="NAME=SIZE", help=imagined)
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")
    parser.set_defaults(run=_fit)


def _add_ps(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints the devices, the runners and the queue of a running server. A key that the server asks for is taken "
        "from LOADMASTER_API_KEY."
    )
    _add_url(parser)
    parser.add_argument("--json", action="store_true", help="print the status as JSON instead of tables")
    parser.set_defaults(run=_ps)


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows the devices, the runners, the queue and the last decisions of a running server, live; q or Ctrl-C ends "
        "it. A key that the server asks for is taken from LOADMASTER_API_KEY."
    )
    _add_url(parser)
    parser.set_defaults(run=_top)


def _add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default=SERVER, metavar="URL", help=f"of the server (default: {SERVER})")


def _ps(chosen: argparse.Namespace) -> int:
    from scheduler.cli.top import run_ps  # imported here, since no other command needs it

    return run_ps(chosen.url, as_json=chosen.json)


def _top(chosen: argparse.Namespace) -> int:
    from scheduler.cli.top import run_top  # imported here, since no other command needs it

    return run_top(chosen.url)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs a recording (the setting `recording_file`) through the decisions once more: which requests came, what "
        "was decided and why, and what each request waited for. Exits with 0 if each decision is the recorded one, "
        "with 1 at the first that is not."
    )
    parser.add_argument("recording", type=Path, metavar="FILE", help="the recording, or FILE.1, the one before it")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="draw what each runner did when; svg, png or pdf")
    parser.add_argument("--json", action="store_true", help="print an object instead of text")
    parser.set_defaults(run=_replay)


def _replay(chosen: argparse.Namespace) -> int:
    from scheduler.cli.replay import run_replay  # imported here, since no other command needs it

    return run_replay(chosen)


def _add_explore(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Searches, breadth first, every state that the scheduler's core can reach in small named scenarios. In each "
        "state all invariants must hold, and from each state it must be possible to answer every request and to unload "
        "every runner. Exits with 0 if all holds, else with 1 and the shortest trace to a violation."
    )
    option = parser.add_argument
    option(
        "--scenario", action="append", default=[], metavar="NAME", help="only this scenario; may be given several times"
    )
    option("--most", type=_count, metavar="N", help="most states of each scenario (default: its own number)")
    option("--processes", type=_count, default=2, metavar="N", help="processes that search at a time (default: 2)")
    parser.set_defaults(run=_explore)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _explore(chosen: argparse.Namespace) -> int:
    from scheduler.cli.explore import run_explore  # imported here, since no other command needs it

    return run_explore(chosen)


def _fit(chosen: argparse.Namespace) -> int:
    from scheduler.cli.fit import run_fit  # imported here, since no other command needs it

    return run_fit(chosen)


def _models(chosen: argparse.Namespace) -> int:
    from scheduler.cli.models import run_models  # imported here, since no other command needs it

    return run_models(Settings.from_environment(), chosen.folders, as_json=chosen.json)


def _demo(chosen: argparse.Namespace) -> int:
    from scheduler.cli.demo.main import DemoOptions, run_demo  # imported here, since no other command needs it

    limit = None if chosen.memory_limit is None else memory("--memory-limit", chosen.memory_limit)
    keep_alive_s = parse_duration(chosen.keep_alive, name="--keep-alive")
    if keep_alive_s > LONGEST_KEEP_ALIVE_S:
        raise InvalidSettings("--keep-alive", chosen.keep_alive, "at most 1m, since the demonstration waits for it")
    if chosen.requests < 0:
        raise InvalidSettings("--requests", chosen.requests, "a whole number of at least 0")
    return run_demo(DemoOptions(chosen.models, chosen.out, limit, keep_alive_s, chosen.requests))


class _FormerMain(ModuleType):
    """This module, which programs and installed commands may still call by the former name of its function.

    `from scheduler.cli import main` was the function, and is the module that has its name.
    """

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command as `main` does."""
        warn_of_former_name("scheduler.cli.main", "scheduler.cli.main.main")
        return main(arguments)


sys.modules[__name__].__class__ = _FormerMain
