"""`python -m tests.tools.race`: one sequence of requests through loadmaster and its peers; writes build/race.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.tools.bench.cold import model_path
from tests.tools.race import report
from tests.tools.race.contestants import Contestant, Course, loadmaster, reference, room_for_all
from tests.tools.race.ray_nodes import no_cluster, two_nodes
from tests.tools.race.ray_serve import find_ray, ray_serve
from tests.tools.race.router import find_binary, over_http, router
from tests.tools.race.trace import Answered, Ask, a_trace, clock, figures, loads_one_by_one, run_clients

EXPONENT = 1.0
ONE_THREAD = ("--threads", "1")
LOOK = 10  # requests between two progress lines
Say = Callable[[str], None]


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    """Return every contestant, with the reason where one cannot take part."""
    binary, no_binary = find_binary(arguments.llama_server)
    python, no_ray = find_ray(arguments.ray_python)
    return [
        Contestant("a", "loadmaster", "", loadmaster),
        Contestant("a1", "loadmaster over HTTP", "", over_http),
        Contestant("a2", "loadmaster, this llama-server", no_binary, partial(loadmaster, llama_server=binary)),
        Contestant("b", "llama-server's router", no_binary, partial(router, binary=binary)),
        Contestant("b1", "router, 1 thread a child", no_binary, partial(router, binary=binary, more=ONE_THREAD)),
        Contestant("c", "Ray Serve, multiplexed", no_ray, partial(ray_serve, python=python)),
        Contestant("c2", "the same, 2 replicas", no_ray, partial(ray_serve, python=python, replicas=2)),
        Contestant("f", "loadmaster, 2 nodes of Ray", no_cluster(), two_nodes),
        Contestant("d", "the reference's order", "", reference),
        Contestant("e", "ours, with room for all", "", room_for_all),
    ]


def lay_out(source: Path, folder: Path, count: int) -> tuple[str, ...]:
    """Put one file under several names, as files of their own; return the names."""
    names = tuple(f"model-{number}" for number in range(1, count + 1))
    for name in names:
        target = folder / f"{name}.gguf"
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copyfile(source, target)
    return names


def run_one(one: Contestant, course: Course, trace: Sequence[Ask], clients: int, say: Say) -> dict[str, Any]:
    """Return the figures of one contestant's run, which begins with nothing loaded; its start is not counted."""

    def told(done: int) -> None:
        if done % LOOK == 0 or done == len(trace):
            say(f"{one.name}: {done} of {len(trace)} requests answered in {clock() - begin:.1f} s")

    with one.open(course) as opened:
        begin = clock()
        answers: list[Answered] = run_clients(trace, clients, opened.ask, clock, told)
        seconds = clock() - begin
        return {**figures(answers, opened.loads(), seconds), **opened.details()}


def race(
    field: Sequence[Contestant], course: Course, trace: Sequence[Ask], clients: int, rounds: int, say: Say
) -> dict[str, list[dict[str, Any]]]:
    """Run all contestants in turns, so that other load of the machine hits all alike; return the figures by key."""
    results: dict[str, list[dict[str, Any]]] = {one.key: [] for one in field}
    for number in range(rounds):
        turn = number % len(field) if field else 0
        for one in (*field[turn:], *field[:turn]):
            results[one.key].append(run_one(one, course, trace, clients, say))
    return results


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.race", description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--room", type=int, default=2, help="models that may be loaded at once")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", default="16,64", help="of every answer; a race for each number")
    parser.add_argument("--only", default="", help="those who take part, as in a,b1")
    parser.add_argument("--model", type=Path, help="a GGUF file in place of the packaged model")
    parser.add_argument("--llama-server", metavar="PATH", help="else LLAMA_SERVER, else what is on PATH")
    parser.add_argument("--ray-python", metavar="PATH", help="a Python that has Ray Serve; else RAY_PYTHON, else this")
    parser.add_argument("--output", type=Path, default=Path("build/race.json"))
    return parser.parse_args(arguments)


def chosen(field: Sequence[Contestant], only: str, say: Say) -> list[Contestant]:
    """Return the contestants that take part, and print a line for each that cannot."""
    keys = [key for key in only.split(",") if key] or [one.key for one in field]
    if unknown := [key for key in keys if key not in {one.key for one in field}]:
        raise SystemExit(f"there is no contestant {unknown[0]!r}; there are {', '.join(one.key for one in field)}")
    able = []
    for one in field:
        if one.key in keys and one.missing:
            say(f"skipped: {one.name} ({one.key}): {one.missing}")
        elif one.key in keys:
            able.append(one)
    return able


def main(arguments: Sequence[str] | None = None) -> int:
    """Race, print the tables, write the file."""
    asked = parse(sys.argv[1:] if arguments is None else arguments)
    say = partial(print, flush=True)
    field = chosen(contestants(asked), asked.only, say)
    found: dict[str, Any] = {"machine": machine(), "asked": {k: str(v) for k, v in vars(asked).items()}, "races": []}
    with TemporaryDirectory(prefix="race-models-") as folder:
        names = lay_out(asked.model or model_path(), Path(folder), asked.models)
        trace = a_trace(asked.requests, names, exponent=EXPONENT, seed=asked.seed)
        least = {rule: loads_one_by_one(trace, asked.room, foresight=rule == "belady") for rule in ("lru", "belady")}
        say(
            f"{len(trace)} requests for {len(names)} models, Zipf {EXPONENT}, seed {asked.seed}, {asked.clients} "
            f"clients, room for {asked.room}; one by one it takes {least['lru']} loads by least recent use and "
            f"{least['belady']} by Belady's rule"
        )
        for tokens in map(int, asked.tokens.split(",")):
            say(f"\nanswers of {tokens} tokens")
            course = Course(Path(folder), names, asked.room, tokens)
            results = race(field, course, trace, asked.clients, asked.rounds, say)
            found["races"].append({"tokens": tokens, "loads_one_by_one": least, **tell(results, field, say)})
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(found, indent=2) + "\n")
    say(f"\nwritten to {asked.output}")
    return 0


def tell(results: dict[str, list[dict[str, Any]]], field: Sequence[Contestant], say: Say) -> dict[str, Any]:
    """Print the table and the aims of one race; return the aims with the figures."""
    say("\n" + report.table(results, {one.key: f"{one.key} {one.name}" for one in field}))
    aims = report.aims(results)
    for aim in aims:
        say(f"{'met' if aim['met'] else 'MISSED'}: {aim['aim']}: {aim['measured']} (at most {aim['limit']})")
    for key, runs in results.items():
        for text in sorted({text for run in runs for text in run["error_texts"]}):
            say(f"an error of {key}: {text}")
    return {"results": results, "aims": aims}


def machine() -> dict[str, Any]:
    """Return the machine that was measured on."""
    return {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
    }


if __name__ == "__main__":
    sys.exit(main())
