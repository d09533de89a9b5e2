"""The demonstration: its models, its checklist and summary, and one real run with tiny models."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsm.machine.request import ModelId, RequestId
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, UNLOADED, RunnerId, RunnerState
from fsm.messages.decision_log import Decision, Transition
from fsm.messages.reasons import NeededFor, RunnerReason, TransitionReason, Waited
from scheduler.cli.demo.clients import likeness, trimmed
from scheduler.cli.demo.models import MOST_MODELS, DemoError, Player, make_cast, players_in
from scheduler.cli.demo.report import (
    Answer,
    Checklist,
    Feature,
    Measured,
    Record,
    missing,
    quantiles,
    summary,
    wait_text,
)
from scheduler.models.model_spec import ModelSpec
from scheduler.recording.timeline import Timeline
from tests.support.tiny_models import write_tiny_model

MIB = 1024 * 1024
MODEL = ModelId("/models/chat.gguf")
FOR_ANOTHER = NeededFor(ModelId("/models/b.gguf"))
PLENTY = 1 << 40


def player(name: str, size_mib: int) -> Player:
    """Return a model of which only the size matters."""
    return Player(ModelSpec(name, f"/models/{name}.gguf"), size_mib * MIB)


def change(
    at: float,
    source: RunnerState | None,
    destination: RunnerState,
    why: TransitionReason = RunnerReason.granted,
    *,
    runner: int = 1,
    leases: int = 0,
) -> Transition:
    """Return a transition of a runner of the model `chat`."""
    return Transition(at, RunnerId(runner), MODEL, "", source, destination, why, leases)


def granted(at: float, request: int, *, runner: int = 1) -> Decision:
    """Return a granted lease."""
    return Decision(at, "granted", MODEL, Waited(0.0), RequestId(request), RunnerId(runner))


def seen(*entries: Transition | Decision) -> dict[Feature, float]:
    """Return what a checklist has seen after these entries."""
    checklist = Checklist()
    for entry in entries:
        checklist.note(entry)
    return checklist.seen_at


def a_record(*entries: Transition | Decision) -> Record:
    """Return a record of one model from 100 s on."""
    record = Record(100.0, [player("chat", 200)], Timeline(100.0))
    for entry in entries:
        record.add_entry(entry)
    return record


# -- which models take part -------------------------------------------------------------------------------------------


def test_about_half_of_the_models_fit() -> None:
    """Of four models of one size two fit in any order, and three do not."""
    chosen = make_cast([player(name, 100) for name in "abcd"], None, PLENTY)
    assert 225 * MIB <= chosen.limit_bytes < 303 * MIB
    assert len(chosen.residents) == 2
    assert chosen.newcomer is not None and chosen.newcomer not in chosen.residents


@pytest.mark.parametrize("sizes", [(100, 100), (10, 500, 20), (300, 40, 40, 40), (1, 2, 3, 4, 5, 6)])
def test_the_newcomer_never_fits_beside_the_residents(sizes: tuple[int, ...]) -> None:
    """The newcomer never fits beside the residents, predicted or measured, and always fits alone."""
    chosen = make_cast([player(f"m{number}", size) for number, size in enumerate(sizes)], None, PLENTY)
    residents_bytes = sum(one.predicted_bytes for one in chosen.residents)
    if chosen.newcomer is not None:
        assert chosen.newcomer.predicted_bytes * 1.03 > chosen.limit_bytes - residents_bytes
        assert chosen.newcomer.predicted_bytes * 1.25 <= chosen.limit_bytes
    assert residents_bytes <= chosen.limit_bytes


def test_a_single_model_stays_alone() -> None:
    """A single model has no newcomer."""
    only = player("a", 100)
    chosen = make_cast([only], None, PLENTY)
    assert (chosen.residents, chosen.newcomer) == ((only,), None)


def test_a_wide_limit_leaves_no_newcomer() -> None:
    """Where all models fit at once, there is no newcomer."""
    chosen = make_cast([player(name, 100) for name in "abc"], 10_000 * MIB, PLENTY)
    assert (len(chosen.residents), chosen.newcomer) == (3, None)


def test_the_limit_stays_within_what_is_available() -> None:
    """The limit is at most the available memory, although half of the models would need more."""
    chosen = make_cast([player(name, 100) for name in "abcdef"], None, 150 * MIB)
    assert chosen.limit_bytes <= 150 * MIB
    assert len(chosen.residents) == 1


@pytest.mark.parametrize(("limit_bytes", "available_bytes"), [(110 * MIB, PLENTY), (None, 110 * MIB)])
def test_a_model_that_does_not_even_fit_alone_is_named(limit_bytes: int | None, available_bytes: int) -> None:
    """A model that does not fit alone is refused before anything begins, with what it needs."""
    with pytest.raises(DemoError, match=r"large needs 125 MiB and there are 110 MiB"):
        make_cast([player("small", 10), player("large", 100)], limit_bytes, available_bytes)


def test_the_smallest_models_of_a_large_folder_play(tmp_path: Path) -> None:
    """The smallest models of a large folder take part, and the others are named."""
    for number in range(MOST_MODELS + 1):
        write_tiny_model(tmp_path / f"m{number}.gguf", layers=1, width=64 + 64 * number)
    players, notes = players_in(tmp_path)
    assert {one.name for one in players} == {f"m{number}" for number in range(MOST_MODELS)}
    assert notes == (f"m{MOST_MODELS} is left out: the {MOST_MODELS} smallest play",)


def test_a_broken_file_is_left_out(tmp_path: Path) -> None:
    """A broken file is left out and named, and the other models take part."""
    write_tiny_model(tmp_path / "good.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    players, notes = players_in(tmp_path)
    assert [one.name for one in players] == ["good"]
    assert len(notes) == 1 and notes[0].startswith("bad.gguf is left out: ")


def test_a_folder_of_nothing_but_broken_files_is_refused(tmp_path: Path) -> None:
    """A folder of broken files only is refused."""
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    with pytest.raises(DemoError, match=r"bad\.gguf"):
        players_in(tmp_path)


# -- what was seen ----------------------------------------------------------------------------------------------------


def test_a_load_that_is_waited_for_is_a_cold_start() -> None:
    """A load that a request waits for is a cold start."""
    assert seen(change(1.0, None, LOADING), change(2.0, LOADING, READY)) == {Feature.cold_start: 2.0}


def test_a_second_grant_while_leased_is_sharing() -> None:
    """A second grant while the first lease is held is sharing."""
    assert seen(granted(1.0, 1), granted(2.0, 2)) == {Feature.shared_lease: 2.0}


def test_a_second_grant_after_a_rest_is_no_sharing() -> None:
    """A second grant after the first lease was released is no sharing."""
    entries = (granted(1.0, 1), change(2.0, READY, IDLE), change(3.0, IDLE, READY), granted(3.0, 2))
    assert Feature.shared_lease not in seen(*entries)


def test_an_idle_runner_that_serves_was_kept() -> None:
    """An idle runner that serves again was kept."""
    assert seen(change(3.0, IDLE, READY)) == {Feature.keep_alive: 3.0}


def test_an_idle_runner_that_leaves_for_another_is_an_eviction() -> None:
    """An idle runner that is stopped for another model is an eviction, by its reason."""
    assert seen(change(3.0, IDLE, EXPIRING, FOR_ANOTHER)) == {Feature.eviction: 3.0}


def test_a_keep_alive_that_is_over_is_an_expiry() -> None:
    """A runner whose keep-alive ends is an expiry, by its reason."""
    assert seen(change(3.0, IDLE, EXPIRING, RunnerReason.keep_alive_over)) == {Feature.expiry: 3.0}


def test_a_busy_runner_that_leaves_is_a_drain_once_it_has_left() -> None:
    """A busy runner that is evicted counts as a drain once it has been stopped."""
    begins = change(3.0, READY, EXPIRING, FOR_ANOTHER, leases=1)
    assert seen(begins) == {}
    assert seen(begins, change(5.0, EXPIRING, UNLOADED)) == {Feature.drain: 3.0}


def test_a_runner_that_is_stopped_at_the_end_is_neither() -> None:
    """A runner that is stopped by the close, or a load that is stopped for its load slot, is no feature."""
    for why in (RunnerReason.closing, NeededFor(ModelId("/models/b.gguf"), load_slot=True)):
        assert seen(change(3.0, IDLE, EXPIRING, why), change(4.0, EXPIRING, UNLOADED)) == {}


def test_only_the_first_time_counts() -> None:
    """The checklist has when a feature was first seen."""
    assert seen(change(3.0, IDLE, READY), change(9.0, IDLE, READY)) == {Feature.keep_alive: 3.0}


# -- the summary ------------------------------------------------------------------------------------------------------


def an_answer(asked_at: float, granted_at: float, error: str = "") -> Answer:
    """Return an answer of runner 1."""
    return Answer("client 1", "chat", RunnerId(1), asked_at, granted_at, granted_at + 1.0, "text", error)


def test_a_request_that_waited_for_the_load_is_cold() -> None:
    """A request that waited for a load is cold, and one after the load is warm."""
    record = a_record(change(100.0, None, LOADING), change(102.0, LOADING, READY))
    assert record.cold(an_answer(100.0, 102.0))
    assert not record.cold(an_answer(103.0, 103.0))


def test_the_summary_keeps_cold_and_warm_apart() -> None:
    """Cold and warm waits have percentiles of their own."""
    record = a_record(change(100.0, None, LOADING), change(102.0, LOADING, READY))
    record.answers += [an_answer(100.0, 102.0), an_answer(103.0, 103.00005)]
    lines = summary(record, 110.0, [], complete=True)
    assert "  requests    2: 1 cold, 1 warm, 0 failed" in lines
    assert "  cold waits  p50 2.00 s, p95 2.00 s" in lines
    assert "  warm waits  p50 50 µs, p95 50 µs" in lines


def test_the_summary_counts_loads_and_evictions() -> None:
    """The summary counts loads and evictions, and names evictions of busy runners."""
    record = a_record(
        change(100.0, None, LOADING),
        change(101.0, LOADING, READY),
        change(102.0, READY, EXPIRING, FOR_ANOTHER, leases=1),
    )
    lines = summary(record, 110.0, [], complete=True)
    assert "  loads       1" in lines
    assert "  evictions   1, 1 of them of a busy runner" in lines


def test_the_summary_compares_predicted_and_measured_memory() -> None:
    """The summary compares predicted and measured memory of models that were loaded."""
    record = a_record()
    assert any(
        line.startswith("  chat") and line.endswith("never loaded")
        for line in summary(record, 110.0, [], complete=True)
    )
    record.measured["chat"] = Measured(private_bytes=90 * MIB, shared_bytes=60 * MIB)
    lines = summary(record, 110.0, [], complete=True)
    words = next(line.split() for line in lines if line.startswith("  chat"))
    assert words == ["chat", "200.0", "MiB", "150.0", "MiB", "90.0", "60.0", "MiB", "75", "%", "of", "it"]


def test_n14_the_summary_says_where_a_prediction_was_replaced() -> None:
    """N14: the summary marks a model of which a runner filled a context."""
    record = a_record()
    for measured in (Measured(90 * MIB, 60 * MIB), Measured(50 * MIB, 60 * MIB, settled=True)):
        record.add_measured("chat", measured)
    line = next(line for line in summary(record, 110.0, [], complete=True) if line.startswith("  chat"))
    assert "150.0 MiB" in line and line.endswith("75 % of it, and replaced it")


def test_what_was_not_seen_is_marked() -> None:
    """A feature that was not seen is marked as missing, unless it cannot be seen with these models."""
    record = a_record(change(102.0, LOADING, READY))
    expected = [Feature.cold_start, Feature.keep_alive]
    lines = summary(record, 110.0, expected, complete=True)
    assert any(line.startswith("  ✓   2.00 s  cold start") for line in lines)
    assert any(line.startswith("  ✗ NOT SEEN  keep-alive") for line in lines)
    assert any(line.startswith("  –") and "drain" in line for line in lines)
    assert missing(record, expected) == [Feature.keep_alive]


def test_failures_are_listed() -> None:
    """Failures are listed with the client, the model and the reason."""
    record = a_record()
    record.answers.append(an_answer(100.0, 100.0, "it broke"))
    assert "  failed: client 1 requested chat: it broke" in summary(record, 110.0, [], complete=True)


def test_percentiles_of_one_value_are_that_value() -> None:
    """Every percentile of one value is that value."""
    assert quantiles([3.0]) == (3.0, 3.0)


def test_percentiles_lie_between_the_extremes() -> None:
    """The median of 0 … 100 is 50, and the 95th percentile is 95."""
    assert quantiles([float(value) for value in range(101)]) == (50.0, 95.0)


@pytest.mark.parametrize(
    ("wait_s", "text"), [(0.000012, "12 µs"), (0.0021, "2.1 ms"), (0.25, "0.25 s"), (12.3, "12.30 s")]
)
def test_waits_are_given_in_fitting_units(wait_s: float, text: str) -> None:
    """Waits are printed in fitting units, from microseconds up."""
    assert wait_text(wait_s) == text


def test_answers_are_shown_without_what_a_terminal_would_obey() -> None:
    """Answers are printed on one line without control characters, and cut where they are long."""
    assert trimmed("one\n\x1b[31mtwo\t three") == "one [31mtwo three"
    assert len(trimmed("word " * 100)) == 100


def test_likeness_is_the_cosine() -> None:
    """The likeness of parallel vectors is 1, and that of orthogonal ones 0."""
    assert likeness([1.0, 0.0], [2.0, 0.0]) == pytest.approx(1.0)
    assert likeness([1.0, 0.0], [0.0, 3.0]) == pytest.approx(0.0)
    assert likeness([0.0, 0.0], [1.0, 1.0]) == 0.0


# -- a real run -------------------------------------------------------------------------------------------------------


def demo_command(folder: Path, *arguments: str) -> list[str]:
    """Return the command with the models of `folder / "models"` and its results in `folder / "out"`."""
    places = ["--models", str(folder / "models"), "--out", str(folder / "out")]
    return [sys.executable, "-m", "scheduler.cli", "demo", *places, "--keep-alive", "0.2s", *arguments]


def write_models(folder: Path, count: int) -> None:
    """Write so many models of one size into `folder / "models"`."""
    (folder / "models").mkdir()
    for number in range(count):
        write_tiny_model(folder / "models" / f"model-{number}.gguf", seed=number)


def without_matplotlib(folder: Path) -> dict[str, str]:
    """Return an environment in which matplotlib cannot be imported."""
    (folder / "hidden").mkdir()
    (folder / "hidden" / "matplotlib.py").write_text("raise ImportError('hidden by a test')\n")
    return {**os.environ, "PYTHONPATH": str(folder / "hidden")}


def test_everything_is_seen_with_models_of_the_users_own(tmp_path: Path) -> None:
    """With a user's own models every feature is seen, in plain lines, and the timeline is drawn."""
    write_models(tmp_path, 3)
    command = demo_command(tmp_path, "--requests", "3")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert result.stdout.count("  ✓ ") == len(Feature)
    assert re.search(r"model-\d · \d +idle → expiring +model-\d needs its memory", result.stdout)
    picture = (tmp_path / "out" / "timeline.svg").read_text()
    assert all(name in picture for name in ("model-0 · ", "model-1 · ", "loading", "expiring"))


def test_a_single_model_shows_what_it_can(tmp_path: Path) -> None:
    """A single model shows what it can, and without matplotlib there is no picture and no failure."""
    write_models(tmp_path, 1)
    command = demo_command(tmp_path, "--requests", "2")
    environment = without_matplotlib(tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("  ✓ ") == len(Feature) - 2
    assert result.stdout.count("  – ") == 2
    assert result.stdout.endswith("matplotlib is not installed: pip install 'loadmaster[plot]'\n")


def test_ctrl_c_ends_it_with_a_summary_of_what_was_seen(tmp_path: Path) -> None:
    """Ctrl-C ends the demonstration with a summary, without a runner or a traceback left, and with its status."""
    write_models(tmp_path, 2)
    command = demo_command(tmp_path)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    head = ""
    while "4. All are busy" not in head:
        line = process.stdout.readline()
        assert line, head
        head += line
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert "Summary of" in output and "✗ not yet" in output
    assert (tmp_path / "out" / "timeline.svg").exists()


def test_a_terminal_sees_a_live_table_and_the_same_summary(tmp_path: Path) -> None:
    """On a terminal the table is live, and the cursor is shown again at the end."""
    write_models(tmp_path, 1)
    status, output = run_on_a_terminal(demo_command(tmp_path, "--requests", "2"))
    assert status == 0
    assert "\x1b[2K" in output and "leases" in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert "Summary of" in plain and plain.count("  ✓ ") == len(Feature) - 2
    assert f"Timeline: {tmp_path / 'out' / 'timeline.svg'}" in plain


def run_on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Run a command with a terminal of its own; return its exit status and its output."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux's error for a terminal whose other end is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    return process.wait(30), output.decode(errors="replace")
