"""Loads of one model in programs that share a store: what each program expects, and what the model takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from fsm.domain.options import Options
from scheduler import Scheduler, Settings
from scheduler.engines.interface import Endpoint
from tests.support.waiting import assert_soon
from tests.tools.memory.measure import ask, fill
from tests.tools.memory.rows import Row

LIMIT_S = 600.0
SMALL_PROMPTS = 16  # each takes an eighth of a context


@dataclass(frozen=True, slots=True)
class Life:
    """One program in which a model was loaded once; bytes of the host."""

    expected_bytes: int  # by `fit`, before the load
    measured: bool  # the expected bytes are marked as measured
    promised_bytes: int  # by the account, from the launch on
    taken_bytes: int  # the most resident bytes, by psutil
    held_bytes: int  # by the account, at the end
    load_s: float

    @property
    def off(self) -> float:
        """The part by which the expected bytes are above the taken ones."""
        return self.expected_bytes / self.taken_bytes - 1


def live(store: Path, model: Path, row: Row, *, fills: bool) -> Life:
    """Load a model in a new program, fill its contexts and its prompt cache if it `fills`, and end the program."""
    options = {name: value for name, value in asdict(row.options).items() if value is not None}
    arguments = json.dumps([str(store), str(model), options, row.embedding, fills])
    program = [sys.executable, "-m", "tests.support.lives", arguments]
    done = subprocess.run(program, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return Life(**json.loads(done.stdout.splitlines()[-1]))


def _live(store: str, model: str, options: dict[str, object], embedding: bool, fills: bool) -> Life:
    row = Row(model, Options(**options), embedding)  # type: ignore[arg-type]  # as they were written
    settings = Settings(gpus=False, cpu_threads=1, probe_interval="1h", measurement_file=store)
    with Scheduler(settings) as scheduler:
        asking = {**options, "embedding": embedding}
        fit = scheduler.fit(model, **asking)  # type: ignore[arg-type]  # as they were written
        with scheduler.acquire(model, **asking) as lease:  # type: ignore[arg-type]  # as they were written
            taken_bytes = resident_bytes(lease.pid)
            for _ in fill_all(Endpoint(lease.url, lease.api_key), row) if fills else ():
                taken_bytes = max(taken_bytes, resident_bytes(lease.pid))
        if fills:
            assert_soon(lambda: scheduler.status().runners[0].settled)
        (runner,) = scheduler.status().runners
        assert runner.load_s is not None
        return Life(
            fit.devices[0].takes_bytes,
            fit.measured,
            runner.promised_bytes["cpu"],
            taken_bytes,
            runner.held_bytes["cpu"],
            runner.load_s,
        )


def fill_all(endpoint: Endpoint, row: Row) -> Iterator[None]:
    """Fill a context to its last token and then the prompt cache; yield after each request."""
    tokens = [5 + position % 199 for position in range((row.options.num_ctx or 0) - 1)]
    if row.embedding:
        ask(endpoint, "/v1/embeddings", {"input": tokens})
    else:
        ask(endpoint, "/completion", {"prompt": tokens[:-8], "n_predict": 64, "ignore_eos": True})
    yield
    yield from fill(endpoint, row)
    for number in range(0 if row.embedding else SMALL_PROMPTS):  # the prompt cache takes no prompt larger than itself
        small = [50 + number, *(3 + (number + 2) * position % 199 for position in range(len(tokens) // 8))]
        ask(endpoint, "/completion", {"prompt": small, "n_predict": 2})
        yield


def resident_bytes(pid: int | None) -> int:
    """Return the bytes that a process and its children occupy."""
    process = psutil.Process(pid)
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            total += child.memory_info().rss
    return int(total)


if __name__ == "__main__":
    print(json.dumps(asdict(_live(*json.loads(sys.argv[1])))))
