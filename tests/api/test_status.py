"""A status as JSON, what counts as a problem, and the HTTP statuses of errors that a retry may mend."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fsm.machine.request import ModelId
from fsm.messages.reasons import RunnerStep, WaitFor, WaitForRunners
from scheduler import (
    AcquireTimeout,
    Decision,
    DoesNotFit,
    Gap,
    LoadFailed,
    LoadTimeout,
    ModelNotFound,
    PythonModel,
    QueueFull,
    RunnerCrashed,
    RunnerStatus,
    Scheduler,
    SchedulerClosed,
    Settings,
    Transition,
    WaitStatus,
)
from scheduler.devices import nvml
from scheduler.devices.nvml import Nvml
from scheduler.errors.kinds import WAIT_KINDS, kind_of
from scheduler.testing import FakeMachine


def parsed(status: Any) -> Any:
    """Return a status as a program reads it that takes only the JSON of the standard."""
    return json.loads(json.dumps(status.to_json(), allow_nan=False))


def test_u56_a_status_is_json_with_every_field() -> None:
    """Each field of the status, its runners, waits and devices is there; infinite times are null."""
    with FakeMachine(memory="8GiB", keep_alive=-1, auto_advance=False) as fake:
        fake.model("a", size="5GiB", load="1s").model("b", size="5GiB")
        first = fake.scheduler.submit("a", num_ctx=512)
        fake.advance("1s")
        waiting = fake.scheduler.submit("b")
        fake.advance("1s")
        status = fake.scheduler.status()
        told = parsed(status)
        (runner,), (wait,) = told["runners"], told["queue"]
        assert runner.keys() == {each.name for each in fields(RunnerStatus)}
        assert wait.keys() == {each.name for each in fields(WaitStatus)}
        assert (runner["model"], runner["state"], runner["options"]["num_ctx"]) == ("a", "ready", 512)
        assert runner["expires_in_s"] is wait["gives_up_in_s"] is None
        assert status.runners[0].expires_in_s == math.inf
        assert (wait["model"], wait["position"]) == ("b", 0)
        assert (wait["waits_for"], wait["waits_for_kind"]) == ("a to become idle", "runners_idle")
        assert {device["id"] for device in told["devices"]} >= {"cpu"} and "held_bytes" in told["devices"][0]
        assert told.keys() == {"runners", "queue", "devices", "problems", "closing", "at"}
        assert told["at"] == fake.now
        waiting.cancel()
        first.result(10).release()


def test_u56_the_status_of_real_devices_and_of_a_closed_scheduler_is_json() -> None:
    """Figures of the machine as it is, of an object and of a scheduler that is closed are JSON too."""
    model = PythonModel("a", load=object, memory={"cpu": "10MiB"})
    with Scheduler(Settings(measurement_file=None)) as scheduler, scheduler.acquire(model):
        (runner,) = parsed(scheduler.status())["runners"]
        assert (runner["pid"], runner["held_bytes"]) == (None, {"cpu": 10 << 20})
    assert parsed(scheduler.status())["closing"] is True


def test_events_are_json_with_names_and_kinds_of_reasons() -> None:
    """Each entry has all its fields; models have their names, reasons are words and a kind, and times may be null."""
    with FakeMachine(memory="8GiB", keep_alive=-1) as fake, fake.scheduler.events() as events:
        fake.model("a", size="5GiB").model("b", size="5GiB").model("huge", size="50GiB")
        fake.scheduler.acquire("a").release()
        with pytest.raises(DoesNotFit):
            fake.scheduler.acquire("huge")
        fake.scheduler.acquire("b").release()
        entries = list(iter(lambda: events.take(0), None))
        told = [json.loads(json.dumps(entry.to_json(fake.scheduler.name), allow_nan=False)) for entry in entries]
    for entry, values in zip(entries, told, strict=True):
        assert values.keys() == {each.name for each in fields(entry)}
    launched = next(one for one in told if one.get("trigger") == "launch")
    assert (launched["model"], launched["source"], launched["destination"]) == ("a", None, "loading")
    expired = next(one for one in told if one.get("trigger") == "expire")
    assert (expired["model"], expired["why"], expired["reason"]) == ("a", "needed_for", "b needs its memory")
    evicts = next(one for one in told if one.get("what") == "evicts")
    assert evicts["runners"][0]["model"] == "a" and evicts["runners"][0]["taken"] is True
    assert evicts["runners"][0]["held_bytes"] == {"cpu": 5 << 30} and evicts["until"] is None
    refused = next(one for one in told if one.get("what") == "rejected")
    assert (refused["model"], refused["why"]) == ("huge", "does_not_fit")
    assert Gap(3).to_json() == {"missed": 3}


def test_a_wait_and_an_entry_name_the_kinds_that_there_are() -> None:
    """What a request can wait for are few words, none of them twice."""
    assert len(set(WAIT_KINDS)) == len(WAIT_KINDS) == len(WaitFor) + len(RunnerStep)
    for reason in (*WaitFor, *(WaitForRunners((), step) for step in RunnerStep)):
        assert kind_of(reason) in WAIT_KINDS


def test_the_model_of_an_entry_can_be_named_again() -> None:
    """The identity of an entry leads to its model, which can be expired by it, until it is forgotten."""
    with FakeMachine(memory="8GiB", keep_alive=-1) as fake, fake.scheduler.events() as events:
        fake.model("a", size="5GiB")
        fake.scheduler.acquire("a").release()
        entry = next(events)
        assert isinstance(entry, Transition | Decision)
        assert fake.scheduler.model(entry.model).name == "a"
        fake.scheduler.expire(fake.scheduler.model(entry.model))
        assert not fake.running
        with pytest.raises(ModelNotFound):
            fake.scheduler.model(ModelId("/none.gguf"))


def a_library(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Nvml:
    """Return a session with a driver's library that cannot be started."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(nvml.pynvml, "nvmlInit", fail)
    return Nvml({})


def test_u56_a_machine_without_an_nvidia_card_has_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No library and no card is what most machines are; a card without the library is a problem."""
    missing = nvml.pynvml.NVMLError(nvml.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    monkeypatch.setattr(nvml, "PCI", tmp_path)
    monkeypatch.setattr(nvml, "CARD", tmp_path / "nvidiactl")
    assert a_library(monkeypatch, missing).read().problems == ()
    others = {"0000:00:01.0": ("0x8086", "0x030000"), "0000:00:02.0": ("0x10de", "0x040300")}  # graphics; sound
    for place, (vendor, kind) in others.items():
        (tmp_path / place).mkdir()
        (tmp_path / place / "vendor").write_text(f"{vendor}\n")
        (tmp_path / place / "class").write_text(f"{kind}\n")
    assert a_library(monkeypatch, missing).read().problems == ()
    (tmp_path / "0000:00:02.0" / "class").write_text("0x030200\n")
    (problem,) = a_library(monkeypatch, missing).read().problems
    assert problem.startswith("no GPU is used: ")


@pytest.mark.parametrize("code", ["NVML_ERROR_DRIVER_NOT_LOADED", "NVML_ERROR_LIB_RM_VERSION_MISMATCH"])
def test_u56_a_library_that_does_not_start_is_a_problem(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that is there and does not start is a problem, whether or not a card is seen."""
    monkeypatch.setattr(nvml, "PCI", tmp_path)
    error = nvml.pynvml.NVMLError(getattr(nvml.pynvml, code))
    assert len(a_library(monkeypatch, error).read().problems) == 1


def test_u56_this_machine_has_no_problems_where_it_has_no_card() -> None:
    """A scheduler on a machine without a card, with GPUs allowed, reports none."""
    if nvml.has_card():
        pytest.skip("this machine has a card")
    with Scheduler(Settings(measurement_file=None)) as scheduler:
        assert scheduler.status().problems == ()


def test_u56_errors_have_the_statuses_that_tell_whether_to_retry() -> None:
    """A time that passed is 504, a runner that is gone 502, and what will be possible later 503, with when."""
    assert AcquireTimeout("a", 1.0, "memory").status == 504
    assert RunnerCrashed("a", 1, "killed").status == 502
    failed = LoadFailed("a", "no tensors", 10.0)
    assert (failed.status, failed.retry_after_s) == (503, 10.0)
    assert (LoadTimeout("a", 300.0).status, SchedulerClosed().status) == (503, 503)
    assert (QueueFull(3, 2.0).status, QueueFull(3, 2.0).retry_after_s) == (503, 2.0)


def test_u56_a_failed_load_says_after_how_long_to_retry() -> None:
    """The back-off that is left is in the error, and shrinks as time passes."""
    with FakeMachine() as fake:
        fake.model("a")
        fake.fail_load("a")
        left = []
        for _ in range(2):
            with pytest.raises(LoadFailed) as caught:
                fake.scheduler.acquire("a")
            left.append(caught.value.retry_after_s)
            fake.advance("4s")
    assert left == [10.0, 6.0]
