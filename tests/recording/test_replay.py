"""Recordings and replays: what is written while the core decides, and that a replay decides the same."""

from __future__ import annotations

import json
import math
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from numpy import float32, float64

from fsm.core import Core
from fsm.eviction.policies import POLICIES, Candidate, EvictionPolicy, LeastRecentlyUsed
from fsm.machine.request import ModelId, RequestId
from fsm.machine.runner import RunnerId
from fsm.messages.commands import Command, Stop
from fsm.messages.events import Cancel, Close, Configure, Event, Inspected, Pin, Progress, Tick
from scheduler.cli.main import WRONG_USE, main
from scheduler.config.settings import SMALLEST_RECORD_BYTES
from scheduler.recording import recorder
from scheduler.recording.codec import encode, schema
from scheduler.recording.recorder import Recorder
from scheduler.recording.replay import Difference, RecordingError, Replay, ReplayedStep, ReplayStarted
from scheduler.recording.timeline import Timeline
from tests.recording.test_codec import Walk
from tests.support.leaks import no_leaks
from tests.support.pool import PoolUnderTest, a_pool, acquire, cancel, exited, loaded, preload, release
from tests.support.waiting import assert_soon

ROOT = Path(__file__).resolve().parents[2]
OLDER = Path(__file__).with_name("recording_of_schema_298106b1.jsonl")
LIMIT = 64 * 2**20
NOBODY_SEES_S = 600.0


def name_of(model: ModelId) -> str:
    return Path(model).stem


class Recorded:
    """A core that is stepped through a recorder."""

    def __init__(self, core: Core, writer: Recorder) -> None:
        self.core, self.step = core, writer.step

    def __getattr__(self, name: str) -> object:
        return getattr(self.core, name)

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self if name in ("core", "step") else self.core, name, value)


@contextmanager
def recording(path: Path, core: Core, limit: int = LIMIT) -> Iterator[Recorder]:
    """Record a core until the block ends, when everything is written and nothing is left over."""
    with no_leaks():
        writer = Recorder(path, limit, core, name_of)
        try:
            yield writer
        finally:
            assert writer.close(20.0)


@contextmanager
def recorded_pool(path: Path, capacity: str = "12GiB", policy: EvictionPolicy | None = None) -> Iterator[PoolUnderTest]:
    """Yield a core under test with room for two models of 5 GiB, recorded from its first event on."""
    pool = a_pool(capacity, each="5GiB", policy=policy)
    with recording(path, pool.core) as writer:
        pool.core = Recorded(pool.core, writer)  # type: ignore[assignment]  # it does the same
        yield pool


def moments(path: Path) -> list[ReplayedStep]:
    """Replay a file and return its steps."""
    return [moment for moment in Replay(path) if isinstance(moment, ReplayedStep)]


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "incident.jsonl"


@pytest.fixture
def incident(file: Path) -> Path:
    """Record an eviction, a crash, a refusal and a cancelled request."""
    with recorded_pool(file, policy=POLICIES["lru"]) as pool:
        pool.idle("/models/a.gguf").ready("/models/b.gguf", lease=2)
        pool.feed(acquire("/models/c.gguf", 3), exited(1), loaded(3))
        pool.feed(exited(2, -9, "killed by SIGKILL\nlast words"), preload("/models/d.gguf", 4), cancel(4))
        pool.declare("/models/big.gguf", "40GiB").feed(acquire("/models/big.gguf", 5), release(3))
    return file


# -- the same decisions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_is_recorded_and_replays_exactly(seed: int, file: Path) -> None:
    """Every event with its time and every command is recorded, and the replay's last state is equal in every part."""
    walk, told, said = Walk(seed), [], []
    core = Core(walk.scenario.limits)
    with recording(file, core) as writer:

        def step(now: float, event: Event) -> Sequence[Command]:
            said.append(list(writer.step(now, event)))
            return said[-1]

        told += [walk.step(core, step) for _ in range(300)]
        assert writer.problems == ()
    again = moments(file)
    assert [(moment.at, moment.event) for moment in again] == told
    assert [list(moment.commands) for moment in again] == said and sum(map(len, said)) > 100
    last = next(each.core for each in list(Replay(file)) if isinstance(each, ReplayStarted))
    for line in last._state.groups.values():
        line.told = None  # only kept where a listener needs it
    assert encode(last.checkpoint()) == encode(core.checkpoint())


def test_a_rotated_file_replays_by_itself(file: Path) -> None:
    """FILE and FILE.1 each begin with a state and together have the last steps without a gap."""
    walk, said, limit = Walk(0), [], 192 * 1024
    core = Core(walk.scenario.limits)
    with recording(file, core, limit) as writer:

        def step(now: float, event: Event) -> Sequence[Command]:
            said.append(list(writer.step(now, event)))
            return said[-1]

        for count in range(2000):
            walk.step(core, step)
            if count % 25 == 24:
                assert_soon(lambda: not writer._queue)
    parts = [Path(f"{file}.1"), file]
    assert sum(part.stat().st_size for part in parts) <= limit
    last = [list(moment.commands) for part in parts for moment in moments(part)]
    assert 100 < len(last) < len(said) and last == said[-len(last) :]
    assert all(header["missing"] == 0 for part in parts for header in lines_of(part) if "kind" in header)


def test_a_flood_of_steps_does_not_exceed_the_limit(file: Path) -> None:
    """Steps that come faster than a new file can begin are left out and counted, and the rest replays."""
    core = Core(Walk(0).scenario.limits)
    with recording(file, core, SMALLEST_RECORD_BYTES) as writer:
        for flood in range(5):
            for step in range(1000):
                writer.step(float(flood), Cancel(RequestId(step)))
            assert_soon(lambda: not writer._queue)
            sizes = [part.stat().st_size for part in (file, Path(f"{file}.1")) if part.exists()]
            assert sum(sizes) <= SMALLEST_RECORD_BYTES
        (problem,) = writer.problems
    missing = sum(header["missing"] for header in lines_of(file) if "kind" in header)
    assert "came faster than they could be written" in problem and missing > 0 and moments(file)


def test_a_file_that_was_there_is_kept(incident: Path, file: Path) -> None:
    """A file of an earlier run is kept under another name, and only this user can read either."""
    before = file.read_bytes()
    with recorded_pool(file) as pool:
        pool.ready("/models/e.gguf")
    assert Path(f"{file}.1").read_bytes() == before and "e.gguf" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


class Moody:
    """A policy that is neither pure nor reliable."""

    name = "moody"

    def __init__(self) -> None:
        self.chance = random.Random(3)

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        if self.chance.random() < 0.2:
            raise RuntimeError(f"not now, at {id(self)}")
        chosen = list(candidates)
        self.chance.shuffle(chosen)
        return chosen[: self.chance.randint(0, len(chosen) + 1)]


def test_the_choices_of_a_policy_of_the_users_own_are_inputs(file: Path) -> None:
    """The choices of a user's policy are recorded, and are replayed without it."""
    walk = Walk(0)
    core = Core(walk.scenario.limits, Moody())
    with recording(file, core) as writer:
        for _ in range(400):
            walk.step(core, writer.step)
            core.copy().step(core._state.now + 1, Tick())  # a copy of the core is not recorded
    replay = Replay(file)
    considered = [one for moment in replay if isinstance(moment, ReplayedStep) for one in moment.considered]
    assert any("RuntimeError" in one.failure for one in considered) and sum(not one.failure for one in considered) > 5
    header = lines_of(file)[0]
    assert (header["policy"], header["own_policy"], replay.steps) == ("moody", True, 400)
    assert core.policy.name == "moody"


def test_the_costs_that_a_policy_of_the_users_own_names_are_inputs(file: Path) -> None:
    """The costs that a user's policy returns are recorded, and the replay chooses the same victims."""

    class Priced(LeastRecentlyUsed):
        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            return [replace(one, cost_s=10.0 if one.model == "a" else 0.5) for one in candidates]

    with recorded_pool(file, policy=Priced()) as pool:
        pool.idle("a").idle("b").feed(acquire("c", 3))
        assert pool.life("a").current and not pool.life("b").current
    considered = [one for moment in moments(file) if isinstance(moment, ReplayedStep) for one in moment.considered]
    assert {one.model: one.cost_s for one in considered[0].candidates} == {"a": 10.0, "b": 0.5}


@pytest.mark.parametrize("cost", [True, Fraction(3, 2), Decimal("1.5"), float32(1.5), float64(1.5), 10**41])
def test_costs_of_any_kind_of_number_are_recorded(cost: Any, file: Path) -> None:
    """Costs of any type of number are recorded as floats."""

    class Priced(LeastRecentlyUsed):
        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            return [replace(one, cost_s=cost) for one in candidates]

    with recorded_pool(file, policy=Priced()) as pool:
        pool.idle("a").idle("b").feed(acquire("c", 3))
    considered = [one for moment in moments(file) for one in moment.considered]
    assert {one.cost_s for one in considered[0].candidates} == {float(cost)}


def test_what_came_before_a_step_that_cannot_be_written_is_kept(file: Path) -> None:
    """Steps before one that cannot be written are written, although they wait in one batch."""
    core = Core(Walk(0).scenario.limits)
    with recording(file, core) as writer:
        for step in range(20):
            writer.step(float(step), Cancel(RequestId(step)))
        writer.step(20.0, Progress(object()))  # type: ignore[arg-type]  # no JSON has such a runner
        assert_soon(lambda: "cannot be recorded" in "".join(writer.problems))
    assert len(moments(file)) == 20


def test_a_policy_that_would_end_the_program_is_a_policy_that_raised(file: Path) -> None:
    """A policy that raises SystemExit is recorded as one that raised, and is passed over in the replay."""

    class Leaving(LeastRecentlyUsed):
        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            raise SystemExit(1)

    with recorded_pool(file, policy=Leaving()) as pool:
        pool.idle("a").idle("b").feed(acquire("c", 3))
    considered = [one for moment in moments(file) for one in moment.considered]
    assert considered[0].failure == "SystemExit(1)"


def test_a_recording_leaves_ids_and_names_as_they_are(file: Path) -> None:
    """Ids and names that look like a runner's address are recorded as they are."""

    class Raising(LeastRecentlyUsed):
        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            raise RuntimeError("nothing at http://127.0.0.1:8080/health")

    one, other, third = (f"http://localhost:{port}/m" for port in (8001, 8002, 8003))
    with recorded_pool(file, policy=Raising()) as pool:
        pool.idle(one).idle(other).feed(acquire(third, 3))
    replay = Replay(file)
    assert [
        moment.considered[0].failure for moment in replay if isinstance(moment, ReplayedStep) and moment.considered
    ] == ["RuntimeError('nothing at http://..."]
    assert {one, other, third} <= set(replay.names) and "127.0.0.1" not in file.read_text()


@pytest.mark.parametrize("how", [RuntimeError, SystemExit])
def test_a_policy_that_raises_what_cannot_tell_itself_is_recorded(how: type[BaseException], file: Path) -> None:
    """A policy whose exception has a repr that raises is recorded with the exception's type."""

    class Mute(Exception):
        def __repr__(self) -> str:
            raise how

    class Raising(LeastRecentlyUsed):
        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            raise Mute

    with recorded_pool(file, policy=Raising()) as pool:
        pool.idle("a").idle("b").feed(acquire("c", 3))
    considered = [one for moment in moments(file) for one in moment.considered]
    assert considered[0].failure == "Mute"


@pytest.mark.parametrize("cost", [10**400, "much", math.nan, math.inf])
def test_a_cost_that_is_no_number_of_seconds_is_a_policy_that_raised(cost: Any, file: Path) -> None:
    """A cost that is no finite number is recorded as a policy that raised, and is passed over in the replay."""

    class Priced(LeastRecentlyUsed):
        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            return [replace(one, cost_s=cost) for one in candidates]

    with recorded_pool(file, policy=Priced()) as pool:
        pool.idle("a").idle("b").feed(acquire("c", 3))
    considered = [one for moment in moments(file) for one in moment.considered]
    assert considered[0].failure


# -- decisions that differ ---------------------------------------------------------------------------------------------


def altered(path: Path, change: Callable[[dict[str, object]], bool]) -> int:
    """Change the first line that `change` changes; return its number."""
    lines = lines_of(path)
    number = next(number for number, line in enumerate(lines, 1) if change(line))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return number


def another_placement(line: dict[str, object]) -> bool:
    launches = [one for one in line.get("commands", ()) if one["is"] == "Launch"]
    for launch in launches:
        launch["placement"]["bytes"][0][1] += 1
    return bool(launches)


def test_a_decision_that_differs_is_told_with_its_line(incident: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first decision that differs is printed with its line, event and both command lists; the status is 1."""
    number = altered(incident, another_placement)
    with pytest.raises(Difference) as found:
        moments(incident)
    assert found.value.line == number and isinstance(found.value.event, Inspected)
    assert found.value.expected != found.value.got and "Launch" in found.value.expected
    assert main(["replay", str(incident)]) == 1
    output = capsys.readouterr().out
    assert f"DIFFERS   at line {number}" in output and "expected" in output and "The same" not in output
    assert main(["replay", "--json", str(incident)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["same"] is False and told["difference"]["line"] == number


@pytest.mark.parametrize("change", [lambda choices: choices.append([1]), lambda choices: choices.pop()])
def test_a_policy_that_is_asked_more_or_less_often_differs(change: Callable[[list[object]], None], file: Path) -> None:
    """A replay differs where a policy is asked more or less often, even with the same commands."""
    with recorded_pool(file, policy=Moody()) as pool:
        pool.ready("a", lease=1).ready("b", lease=2).feed(acquire("c", 3), acquire("d", 4), release(1))

    def alter(line: dict[str, object]) -> bool:
        choices = line.get("choices")
        asked_twice = isinstance(choices, list) and len(choices) > 1  # one choice is left for the second question
        if asked_twice:
            change(choices)
        return asked_twice

    number = altered(file, alter)
    with pytest.raises(Difference, match="policy") as found:
        moments(file)
    assert found.value.line == number


def test_a_step_that_failed_is_recorded_and_fails_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that raised is recorded and raises again in the replay, or differs once the core is mended."""

    def broken(core: Core, timeout_s: float) -> None:
        raise AssertionError("a defect")

    with monkeypatch.context() as patch, recorded_pool(file) as pool:
        patch.setattr(Core, "_close", broken)
        pool.ready("a")
        with pytest.raises(AssertionError, match="a defect"):
            pool.feed(Close(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(Core, "_close", broken)
        assert moments(file)[-1].raised == "AssertionError('a defect')"
    with pytest.raises(Difference, match="a defect"):
        moments(file)


# -- files that are cut, damaged or of another program -----------------------------------------------------------------


def test_a_file_that_is_cut_anywhere_replays_up_to_there(incident: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is cut in a line replays up to that line and says so; its first line is needed."""
    whole = incident.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    every = len(moments(incident))
    for size in {*range(ends[0], len(whole), 97), ends[1], ends[1] + 1, len(whole) - 1}:
        incident.write_bytes(whole[:size])
        replay = Replay(incident)
        assert len([each for each in replay if isinstance(each, ReplayedStep)]) == sum(end <= size for end in ends) - 1
        assert replay.cut == (size not in ends)
    assert main(["replay", str(incident)]) == 0
    assert "the last line is cut short" in capsys.readouterr().out
    assert every == len(ends) - 1
    for size in (0, 1, ends[0] - 1):
        incident.write_bytes(whole[:size])
        with pytest.raises(RecordingError, match=r"it is empty|ends before its first header"):
            moments(incident)


@pytest.mark.parametrize(
    ("edit", "line", "said"),
    [
        (lambda lines: lines[:3] + lines[4:], 4, "step 4 is missing before it"),
        (lambda lines: lines[:1] + lines[5:], 2, "steps 2 to 5 are missing before it"),
        (lambda lines: lines[:5] + lines[4:], 6, "step 5 comes again, where step 6 is due"),
        (lambda lines: lines + lines, None, "step 2 comes again"),
        (lambda lines: [*lines, lines[0].replace('"step":2,', '"step":99,')], None, "to 98 are missing before it"),
    ],
)  # fmt: skip
def test_a_line_that_is_missing_or_comes_again_is_told(
    edit: Callable[[list[str]], list[str]], line: int | None, said: str, incident: Path
) -> None:
    """A missing or repeated line is reported by the numbers of the steps."""
    whole = incident.read_text().splitlines(keepends=True)
    incident.write_text("".join(edit(whole)))
    with pytest.raises(RecordingError, match=said) as refused:
        moments(incident)
    assert refused.value.line == (line or len(whole) + 1)


def test_a_step_has_one_number_in_the_core_the_recording_and_the_story(
    incident: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step has one number in the decision log, in the recording and in the replay."""
    replayed = moments(incident)
    assert [moment.step for moment in replayed] == list(range(2, len(replayed) + 2))
    entries = [(entry.step, moment.step) for moment in replayed for entry in moment.entries]
    assert len(entries) > 20 and all(noted == recorded for noted, recorded in entries)
    story = json.loads(told(incident, capsys, "--json"))["story"]
    evicts = next(one for one in story if "c evicts: a" in one["text"])
    (moment,) = [one for one in replayed if one.step == evicts["step"]]
    assert Stop(RunnerId(1)) in moment.commands and isinstance(moment.event, Inspected)


DEEP = '{"kind":' + "[" * 100_000 + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello\n", "line 1: it is not JSON"), ("[]\n", "not an object"), ("{}\n", "not a recording"),
        (DEEP, "line 1: "),
        ('{"kind": "loadmaster recording"}\n', "of format None"), ("\x00\xff\n", "line 1: it is not JSON"),
        ('{"kind": "loadmaster recording", "format": 2}\n', "of format 2"),
        ('{"kind": "loadmaster recording", "format": 1}\n', "'policy'"), ('{"at": NaN}\n', "NaN is not a number"),
        ('{"at": ' + "9" * 99 + "}\n", "too many digits"), ("x" * (recorder.LONGEST_LINE + 5), "longer than"),
    ],
)  # fmt: skip
def test_a_foreign_file_is_refused_in_one_line(
    text: str, said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of another program is refused in one line with the file, the line and the reason, and status 2."""
    file.write_text(text, encoding="latin-1")
    assert main(["replay", str(file)]) == WRONG_USE
    output = capsys.readouterr()
    assert said in output.err and str(file) in output.err and output.err.count("\n") == 1 and len(output.err) < 600


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"event": {"is": "Evil"}}, "Evil"), ({"event": None}, "expected one of"), ({"at": "now"}, "no time"),
        ({"at": None}, "no time"), ({"commands": {}}, "'commands'"), ({"commands": [{"is": "Tick"}]}, "Tick"),
        ({"names": [["a"]]}, "not a model and its name"), ({"raised": 7}, "'raised'"),
        ({"kind": "other"}, "of format"),
    ],
)  # fmt: skip
def test_a_line_that_means_nothing_is_refused(change: dict[str, object], said: str, incident: Path) -> None:
    """A line of an unknown kind or with wrong types is refused."""
    number = altered(incident, lambda line: "event" in line and line.update(change) is None)
    with pytest.raises(RecordingError, match=said) as refused:
        moments(incident)
    assert refused.value.line == number


def test_a_state_that_is_none_of_a_core_is_refused(incident: Path) -> None:
    """A state that cannot be decoded is refused with its line and the reason."""
    altered(incident, lambda line: line["state"]["state"].update(queued="7") is None)  # type: ignore[index]
    with pytest.raises(RecordingError, match="line 1: its state is not one of a core: "):
        moments(incident)


def test_a_state_that_breaks_an_invariant_is_replayed(incident: Path) -> None:
    """It shows how a core that has gone wrong went on: the replay compares decisions, and judges no state."""
    altered(incident, lambda line: line["state"]["state"].update(queued=1) is None)  # type: ignore[index]
    assert moments(incident)


@pytest.mark.parametrize("kept", ["its header", "its steps"])
def test_a_recording_of_another_version_is_refused_with_that_version(
    kept: str, incident: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recording of another version that cannot be read is refused with that version, like a damaged file."""
    lines = OLDER.read_text().splitlines(keepends=True)
    version, schema_then = "0.1.0", json.loads(lines[0])["schema"]
    if kept == "its steps":  # of a version with the same states and other events
        header = json.loads(incident.read_text().splitlines()[0])
        lines[0] = json.dumps(header | {"schema": schema_then, "version": "0.0.9", "step": 1}) + "\n"
        version = "0.0.9"
    incident.write_text("".join(lines))
    assert main(["replay", str(incident)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"line {1 if kept == 'its header' else 2}: it was recorded by version {version} of loadmaster" in said
    assert f"(schema {schema_then}) this version cannot read (schema {schema()}): replay it with the version" in said


def test_a_recording_of_another_version_that_can_be_read_is_replayed_with_a_note(
    incident: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recording of another version that can be read is replayed with a note that decisions may differ."""
    text = incident.read_text()
    incident.write_text(text.replace(schema(), "00000000").replace('"version":"', '"version":"0.0.9, not ', 1))
    assert main(["replay", str(incident)]) == 0
    shown = capsys.readouterr().out
    assert "by version 0.0.9, not " in shown and "a version that decides by other rules than this one" in shown


def test_a_damaged_file_never_breaks_the_replay(incident: Path) -> None:
    """A file with changed, missing and repeated bytes replays, differs or is refused, and never raises otherwise."""
    whole, chance = incident.read_bytes(), random.Random(5)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            at, size = chance.randrange(len(whole)), chance.choice((1, 1, 2, 40))
            damaged[at : at + size] = chance.choice(
                (b"", bytes([chance.randrange(256)]), b"9", damaged[at : at + size] * 2)
            )
        incident.write_bytes(damaged)
        try:
            moments(incident)
        except (RecordingError, Difference) as error:
            assert str(error)


def test_a_file_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file and a folder are refused in one line."""
    for path, said in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "Is a directory")):
        assert main(["replay", str(path)]) == WRONG_USE
        assert said in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_story_that_cannot_be_printed_is_no_verdict(arguments: list[str], incident: Path) -> None:
    """A narrative that cannot be printed ends with one line and another status than a decision that differs."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "scheduler.cli", "replay", *arguments, incident],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    said = "loadmaster: its output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (WRONG_USE, said)


# -- the narrative -----------------------------------------------------------------------------------------------------


def test_the_story_says_who_asked_what_was_decided_and_why(incident: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The narrative has names, victims with reasons, runners that stay and why, waits, and a process's last output."""
    assert main(["replay", str(incident)]) == 0
    output = capsys.readouterr().out
    for said in (
        "request 3 asks for c", "runner 1 of a: idle → expiring, c needs its memory",
        "runner 2 of b with 5 GiB (1 lease): it is in use", "runner 1 of a with 5 GiB: evicted",
        "request 3 waits for memory being freed", "the process of runner 2 of b is gone: killed by SIGKILL",
        "last words", "request 2 loses its lease", "request 4 wants loaded d", "request 4 leaves",
        "request 5 is refused: 'big' needs", "request 3 releases c", "evicted for other models: 1", "The same",
    ):  # fmt: skip
        assert said in output, f"{said!r} is missing: {output}"
    assert "/models/" not in output


def test_the_story_does_nothing_to_a_terminal(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The narrative shows control characters escaped, and markup as it is written."""
    with recorded_pool(file) as pool:
        pool.ready("/models/\x1b[2J[red]evil\u202e.gguf", lease=1)
        pool.feed(exited(1, 1, "\x1b]0;title\x07\r\n\x1b[31mwords"))
    assert main(["replay", str(file)]) == 0
    output = capsys.readouterr().out
    assert "[red]evil" in output and "words" in output
    assert not set(output) & {"\x1b", "\x07", "\r", "\u202e"}


def test_the_story_as_json_has_every_wait(incident: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The narrative as JSON has every wait, and the timeline is drawn beside it."""
    picture = tmp_path / "folder" / "timeline.svg"
    assert main(["replay", str(incident), "--json", "--timeline", str(picture)]) == 0
    told = json.loads(capsys.readouterr().out)
    answers = {request["id"]: (request["model"], request["answer"]) for request in told["requests"]}
    assert answers[3] == ("c", "granted") and answers[2] == ("b", "lost") and answers[4] == ("d", "cancelled")
    assert answers[5] == ("big", "DoesNotFit") and (told["same"], told["cut"]) == (True, False)
    waits = next(request["waits"] for request in told["requests"] if request["id"] == 3)
    assert [wait["for"] for wait in waits][-1] == "its model to load"
    assert "b · 2" in picture.read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("picture", "name a file that ends in .svg, .png or .pdf"), ("picture.xyz", "that ends in .svg, .png or .pdf"),
        ("folder.svg", "it is a folder"), ("file/picture.svg", "its folder cannot be made: "),
    ],
)  # fmt: skip
def test_a_timeline_that_cannot_be_drawn_is_told_before_the_story(
    name: str, said: str, incident: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A timeline that cannot be drawn is refused before the narrative, with what to do."""
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["replay", str(incident), "--timeline", str(tmp_path / name)]) == WRONG_USE
    output = capsys.readouterr()
    assert said in output.err and name in output.err and output.err.count("\n") == 1 and output.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_timeline_that_needs_what_is_not_installed_says_so_first(
    incident: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A timeline without matplotlib is refused before the narrative, with what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["replay", str(incident), "--timeline", str(tmp_path / "picture.svg")]) == WRONG_USE
    output = capsys.readouterr()
    assert "pip install 'loadmaster[plot]'" in output.err and output.out == ""


def test_a_verdict_is_told_although_the_timeline_fails(
    incident: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verdict of a replay is printed although drawing the timeline fails."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Timeline, "draw", fails)
    assert main(["replay", str(incident), "--timeline", str(tmp_path / "picture.svg")]) == WRONG_USE
    output = capsys.readouterr()
    assert "The same" in output.out and "No space left" in output.err and "the timeline is in" not in output.out


def test_a_part_of_a_recording_begins_with_what_was_there(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of a recording begins with the runners and requests that were there."""
    pool = a_pool("12GiB", each="5GiB").ready("a", lease=1).ready("b", lease=2)
    pool.feed(acquire("c", 3))
    with recording(file, pool.core) as writer:
        pool.core = Recorded(pool.core, writer)  # type: ignore[assignment]  # it does the same
        pool.feed(release(1), exited(1), loaded(3))
    assert main(["replay", str(file)]) == 0
    output = capsys.readouterr().out
    assert "it begins with runner 1 of a ready, runner 2 of b ready and 1 waiting" in output
    assert "request 1 releases a" in output and "request 3 is granted runner 3 of c" in output


def told(file: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["replay", *options, str(file)]) == 0
    return capsys.readouterr().out


def test_who_still_waits_at_the_end_has_waited_until_then(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A request that waits at the end has waited until then, and the longest wait comes first."""
    with recorded_pool(file) as pool:
        pool.ready("a", lease=1).ready("b", lease=2)
        pool.feed(acquire("c", 3))
        pool.advance("20s")
        pool.feed(acquire("d", 4))
        pool.advance("1s")
        pool.feed(cancel(4))
        pool.advance("30s")
        pool.feed(cancel(99))
    said = told(file, capsys)
    assert "1 left, 1 still waiting" in said
    assert "Waits     request 3 for c: 51.000 s (0.000 s for its model's metadata, 51.000 s for " in said
    assert "to become idle), and still waits" in said
    waits = {one["id"]: one["waited_s"] for one in json.loads(told(file, capsys, "--json"))["requests"]}
    assert waits[3] == 51.0 and waits[4] == 1.0


def test_why_nobody_else_goes_is_told_as_it_was_decided(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The narrative of a wait has why each other runner stays, pinned ones too, and why no other device is used."""
    with recorded_pool(file, "16GiB", POLICIES["lru"]) as pool:
        for number, model in enumerate("abp", 1):
            pool.feed(acquire(model, number))
            pool.advance("30s")  # the load takes so long
            pool.feed(loaded(number))
        pool.advance("2h")
        pool.feed(Pin(ModelId("p")), release(1))
        pool.advance("0.2s")
        pool.feed(release(2), release(3), acquire("c", 9))
        pool.declare("/models/big.gguf", "40GiB").feed(acquire("/models/big.gguf", 10))
    said = told(file, capsys)
    assert "runner 1 of a with 5 GiB: it is to be evicted in " in said
    assert "runner 2 of b with 5 GiB: it was used a moment ago; runner 3 of p with 5 GiB: it is pinned" in said
    assert "request 10 is refused" in said and "not on cpu: " in said


def test_a_load_that_makes_place_is_given_up_for_others(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A load that is stopped for its load slot is told like an eviction for memory."""
    pool = a_pool("12GiB", each="5GiB", max_host_loads=1)
    with recording(file, pool.core) as writer:
        pool.core = Recorded(pool.core, writer)  # type: ignore[assignment]  # it does the same
        pool.feed(acquire("a", 1), cancel(1), acquire("b", 2))
    said = told(file, capsys)
    assert "runner 1 of a: loading → expiring, b needs its load slot" in said
    assert "evicted for other models: 1" in said


def test_a_wait_from_before_a_file_is_not_booked_on_its_first_reason(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wait that began before the file is not counted under the first reason in the file."""
    pool = a_pool("12GiB", each="5GiB").ready("a", lease=1).ready("b", lease=2)
    pool.feed(acquire("c", 3))
    pool.advance("100s")
    pool.feed(release(1))
    pool.advance("2s")
    with recording(file, pool.core) as writer:
        pool.core = Recorded(pool.core, writer)  # type: ignore[assignment]  # it does the same
        pool.advance("1s")
        pool.feed(exited(1), loaded(3))
    said = told(file, capsys)
    assert "after 103.000 s: 100.000 s for what is not in this file, 3.000 s for a to leave" in said


def test_what_was_answered_in_a_gap_does_not_wait(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that was granted in a gap of the recording does not wait after it, and its release is told."""
    monkeypatch.setattr(recorder, "_RETRY_S", 0.0)
    with recorded_pool(file) as pool:
        pool.ready("a", lease=1).ready("b", lease=2).feed(acquire("c", 3), acquire("c", 4), acquire("c", 5))
        writer = pool.core.step.__self__  # type: ignore[attr-defined]  # through it each step goes
        assert_soon(lambda: not writer._queue)
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "_ready", lambda *_: False)  # as where the disk is full
            pool.feed(cancel(4), release(1), exited(1), loaded(3), release(5))
            writer._header_due, writer._missing = True, 6
        pool.feed(release(3))
    said = told(file, capsys)
    assert "6 steps are missing here" in said and "0 still waiting, 2 answered while nothing was recorded" in said
    assert "request 3 releases c" in said


def test_what_is_done_twice_is_told_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A late release or cancel is not told."""
    with recorded_pool(file) as pool:
        pool.ready("a", lease=1).feed(release(1), release(1), cancel(1))
    assert told(file, capsys).count("releases") == 1


def test_only_limits_that_change_are_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Changes of limits are told as people write them, and unchanged limits are not."""
    with recorded_pool(file) as pool:
        pool.feed(Configure(1_234_567, pool.core._state.config.max_runners, math.inf))
        pool.feed(Configure(1_234_567, pool.core._state.config.max_runners, math.inf))
    said = told(file, capsys)
    assert said.count("limits change: max_queue 1234567, keep_alive forever\n") == 1 == said.count("limits change")
