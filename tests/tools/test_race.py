"""A small race: it runs, counts what it reports, and repeats its sequence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fsm.core import Core
from fsm.state.core_config import CoreConfig
from tests.support.tiny_models import write_tiny_model
from tests.tools.race import report
from tests.tools.race.__main__ import main
from tests.tools.race.ray_serve import find_ray
from tests.tools.race.router import find_binary
from tests.tools.race.trace import Answered, Ask, a_trace, figures, loads_one_by_one, percentile
from tests.tools.race.virtual import Machine, Track

NAMES = ("a", "b", "c", "d")


def test_a_small_race_is_run_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loadmaster and the reference's order answer every request, each model's weights loaded for real."""
    model = write_tiny_model(tmp_path / "tiny.gguf", context=1024)
    output = tmp_path / "build" / "race.json"
    arguments = ["--model", str(model), "--requests", "8", "--models", "3", "--clients", "2", "--tokens", "4"]
    assert main([*arguments, "--only", "a,d,e", "--output", str(output)]) == 0
    (race,) = json.loads(output.read_text())["races"]
    for key in ("a", "d", "e"):
        (run,) = race["results"][key]
        assert (run["requests"], run["errors"], run["killed"]) == (8, 0, 0), run["error_texts"]
        assert 2 <= run["loads"] <= 8  # the sequence of this seed has more than one model
        assert 0 < run["p50_s"] <= run["p95_s"] <= run["max_s"] <= run["total_s"]
    told = capsys.readouterr().out
    assert "| a loadmaster |" in told and "8 of 8 requests answered" in told


def test_a_peer_that_is_not_there_is_skipped_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that is not installed is skipped with a line that says how to name it."""
    monkeypatch.delenv("LLAMA_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--llama-server PATH" in find_binary(None)[1]
    assert "is no program" in find_binary(str(tmp_path / "nothing"))[1]
    assert "cannot be run" in find_ray(str(tmp_path / "nothing"))[1]
    model = write_tiny_model(tmp_path / "tiny.gguf", context=1024)
    main(["--model", str(model), "--only", "b,b1", "--output", str(tmp_path / "race.json")])
    assert capsys.readouterr().out.count("skipped: ") == 2


def test_a_program_without_router_mode_is_none(tmp_path: Path) -> None:
    """A llama-server without the router mode is no contestant."""
    program = tmp_path / "llama-server"
    program.write_text(f"#!{sys.executable}\nprint('--port N')\n")
    program.chmod(0o755)
    assert "has no router mode" in find_binary(str(program))[1]


def test_a_sequence_follows_from_its_seed() -> None:
    """A sequence is the same for a seed, and its models' popularity falls as in Zipf's law."""
    trace = a_trace(4000, NAMES, exponent=1.0, seed=3)
    assert trace == a_trace(4000, NAMES, exponent=1.0, seed=3) != a_trace(4000, NAMES, exponent=1.0, seed=4)
    counts = sorted((sum(ask.model == name for ask in trace) for name in NAMES), reverse=True)
    weights = [1 / rank for rank in (1, 2, 3, 4)]
    for count, weight in zip(counts, weights, strict=True):
        assert count == pytest.approx(4000 * weight / sum(weights), rel=0.1)


def test_loads_one_by_one_are_those_of_the_textbook() -> None:
    """The loads by least recent use and by Belady's rule are those of a hand-made sequence."""
    trace = [Ask(number, name, "") for number, name in enumerate("abcabcabc")]
    assert loads_one_by_one(trace, 2, foresight=False) == 9
    assert loads_one_by_one(trace, 2, foresight=True) == 6
    assert loads_one_by_one(trace, 3, foresight=False) == 3


def test_figures_are_of_what_was_answered() -> None:
    """Figures are of answered requests, and a request whose runner was killed counts as an error."""
    ask = Ask(0, "a", "")
    answers = [Answered(ask, 0.0, 1.0, 2.0), Answered(ask, 0.0, 1.0, 4.0)]
    failed = [Answered(ask, 0.0, None, 99.0, "500"), Answered(ask, 0.0, None, 99.0, "broke off", True)]
    found = figures([*answers, *failed], loads=3, seconds=5.0)
    assert (found["requests"], found["errors"], found["killed"], found["loads"]) == (4, 2, 1, 3)
    assert (found["p50_s"], found["max_s"], found["wait_p50_s"], found["answer_mean_s"]) == (3.0, 4.0, 1.0, 2.0)
    assert percentile([], 50) == 0.0 and percentile([7.0], 99) == 7.0


def test_aims_are_judged_by_medians_against_the_better_peer() -> None:
    """Aims are judged by medians: the total time by a ratio for each peer, the tail against the better peer."""

    def run(total: float, p95: float, errors: int = 0) -> dict[str, float]:
        others = dict.fromkeys(("loads", "p50_s", "p99_s", "max_s", "killed"), 1)
        return {**others, "total_s": total, "p95_s": p95, "errors": errors}

    results = {"a": [run(30, 1), run(90, 9), run(20, 1)], "b": [run(100, 4)], "b1": [run(50, 2)]}
    found = report.aims(results)
    assert [(aim["measured"], aim["met"]) for aim in found] == [(0.0, True), (0.3, True), (0.6, False), (0.5, True)]
    assert "| 3.33 |" in report.table(results, {key: key for key in results})
    assert report.aims({"b": [run(1, 1)]}) == []


def test_on_virtual_time_everybody_is_answered_and_a_rest_saves_loads() -> None:
    """On virtual time every request is answered, and a grace after last use saves loads."""
    loads = {}
    for name, limits in {
        "ours": CoreConfig(max_runners=2),
        "at once": CoreConfig(max_runners=2, max_wait_s=0.0),
    }.items():
        trace = a_trace(150, NAMES, exponent=1.0, seed=1)
        run = Track(trace, 4, 2, Machine(), Core(limits)).go()
        assert len(run.took_s) == len(trace)
        loads[name] = run.loads
    assert loads["ours"] < 0.9 * loads["at once"]
