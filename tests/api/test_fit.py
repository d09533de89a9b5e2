"""What would fit before it is loaded: the command and the method, compared with what is then loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fsm.domain.options import Options
from scheduler import (
    DoesNotFit,
    EngineMissing,
    Fit,
    FitVictim,
    InvalidSettings,
    ModelNotFound,
    ModelSpec,
    PythonModel,
    Scheduler,
    SchedulerClosed,
    Settings,
    UnsupportedOption,
)
from scheduler.cli import main as cli
from scheduler.engines.llama import LlamaEngine
from scheduler.errors.formatting import format_bytes
from tests.e2e.test_real_models import the_real_model
from tests.support.leaks import no_leaks
from tests.support.real import settings
from tests.support.stores import PARAMS, ollama_model
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import assert_soon

MIB = 2**20
LIMIT_S = 60.0  # for a command that takes half a second
MANY_SLOTS = ("--num-ctx", "1024", "--num-parallel", "256")  # 64 MiB of cache for a tiny model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", context=1024)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_leaks():
        yield


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run the command in this process; return its exit status and what it printed."""
    status = cli.main(["fit", *map(str, arguments)])
    return status, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Run the command with --json; return the object, after a check of the exit status."""
    status, output = run(capsys, *arguments, "--json")
    found: dict[str, Any] = json.loads(output)
    assert status == (0 if found["fits"] else 1)
    return found


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_and_then_each_part(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """The command prints a verdict, and a table of the bytes taken by kind, the bytes needed, and the free bytes."""
    found = run_json(capsys, model, "--host", "1GiB")
    (host,) = found["devices"]
    status, output = run(capsys, model, "--host", "1GiB")
    lines = output.splitlines()
    assert (status, lines[0]) == (0, f"tiny fits: {format_bytes(host['takes_bytes'])} of 1 GiB free on the host.")
    table = {line[:20].strip(): line[20:].strip() for line in lines[3:10]}
    assert table == {
        "weights": format_bytes(host["weights_bytes"]),
        "cache": format_bytes(host["cache_bytes"]),
        "compute buffers": format_bytes(host["compute_bytes"]),
        "process and the rest": format_bytes(host["other_bytes"]),
        "takes": format_bytes(host["takes_bytes"]),
        "must be free": format_bytes(host["needed_bytes"]),
        "is free": "1 GiB",
    }
    assert "1 slot of 1024 tokens" in output and "25 % more" in output


def test_the_parts_add_up(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """The bytes taken are the sum of their kinds, and a prediction needs a quarter more."""
    (host,) = run_json(capsys, model, "--host", "1GiB")["devices"]
    parts = [host[f"{kind}_bytes"] for kind in ("weights", "cache", "compute", "other")]
    assert min(parts) > 0 and sum(parts) == host["takes_bytes"]
    assert host["needed_bytes"] == int(host["takes_bytes"] * 1.25)


def test_what_does_not_fit_exits_with_1_and_says_what_to_change(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    """A model that does not fit exits with 1, and the changes are named as options of the command."""
    status, output = run(capsys, model, "--host", "100MiB", *MANY_SLOTS)
    assert status == 1 and output.startswith("tiny does not fit: it is larger than the memory there is (")
    assert "at most 100 MiB can be made free" in output
    assert "  --num-parallel 64 " in output


def test_what_is_advised_fits_when_it_is_followed(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """The command with the advised options exits with 0 and shows the bytes that the advice named."""
    asked = ("--host", "100MiB", *MANY_SLOTS)
    advice = run_json(capsys, model, *asked)["advice"]
    assert advice
    for each in advice:
        flags = [text for name, value in each["options"].items() for text in (f"--{name.replace('_', '-')}", value)]
        again = run_json(capsys, model, *asked, *flags)
        assert again["verdict"] == "fits" and again["devices"] == each["fit"]["devices"]


def test_a_quantised_cache_is_named_by_one_option(capsys: pytest.CaptureFixture[str]) -> None:
    """A quantised cache is advised with one option for keys and values."""
    takes = run_json(capsys, the_real_model(), "--cache-type", "q8_0", "--host", "8GiB")["devices"][0]["takes_bytes"]
    limited = "--host", "8GiB", "--memory-limit", takes * 21 // 20
    status, output = run(capsys, the_real_model(), *limited)
    assert status == 1 and "  --cache-type q8_0 " in output
    assert run(capsys, the_real_model(), *limited, "--cache-type", "q8_0")[0] == 0


def test_where_nothing_helps_that_is_said(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """Where no change helps, the command says so."""
    status, output = run(capsys, model, "--host", "8MiB")
    assert status == 1 and "None of the options that were tried makes it fit" in output


def test_gpus_can_be_imagined(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """GPUs may be given on the command line in place of those that are there."""
    found = run_json(capsys, model, "--gpu", "my card=1GiB", "--host", "1GiB")
    host, card = found["devices"]
    assert (host["id"], card["id"], card["gpu_layers"], found["layers"]) == ("cpu", "my card", 3, 3)
    assert card["weights_bytes"] > 0 and card["cache_bytes"] > 0 == host["cache_bytes"]
    _, output = run(capsys, model, "--gpu", "my card=1GiB")
    assert "on my card" in output and "3 layers" in output


def test_the_largest_of_several_gpus_is_taken(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """Of several GPUs the one with most memory is used, as by the core."""
    found = run_json(capsys, model, "--gpu", "a=1GiB", "--gpu", "b=2GiB")
    assert [device["id"] for device in found["devices"]] == ["cpu", "b"]


def test_a_model_can_be_kept_off_gpus(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """`--num-gpu 0` keeps a model off the GPUs."""
    found = run_json(capsys, model, "--gpu", "a=1GiB", "--num-gpu", "0")
    assert [device["id"] for device in found["devices"]] == ["cpu"]
    assert found["sentence"].startswith("tiny fits: 0 of 3 layers on GPUs, ")
    assert run_json(capsys, model, "--gpu", "a=1GiB", "--num-gpu", "2")["gpu_layers"] == 2


def test_what_goes_to_a_gpu_in_part_is_told_how_all_of_it_would(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    """A model that goes to a GPU in part exits with 0 and is told how it would go whole."""
    whole = run_json(capsys, model, *MANY_SLOTS, "--gpu", "a=8GiB")["devices"][1]["needed_bytes"]
    status, output = run(capsys, model, *MANY_SLOTS, "--gpu", f"a={whole - MIB}")
    assert status == 0 and "of 3 layers on GPUs" in output
    assert "so that the whole model would go to GPUs" in output and "--num-ctx 512" in output


def test_options_change_what_is_taken(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """Each option of the command changes the bytes as in a request."""
    (plain,) = run_json(capsys, model, "--host", "1GiB")["devices"]
    changed = run_json(capsys, model, "--host", "1GiB", "--num-ctx", "512", "--num-parallel", "4", "--num-batch", "64")
    assert [changed["options"][name] for name in ("num_ctx", "num_parallel", "num_batch")] == [512, 4, 64]
    (host,) = changed["devices"]
    assert host["cache_bytes"] == 2 * plain["cache_bytes"] and host["compute_bytes"] < plain["compute_bytes"]
    (other,) = run_json(capsys, model, "--host", "1GiB", "--cache-type", "f32")["devices"]
    assert other["cache_bytes"] > plain["cache_bytes"]
    flags = run_json(capsys, model, "--host", "1GiB", "--no-flash-attention", "--no-mmap")["options"]
    assert (flags["flash_attention"], flags["use_mmap"]) == (False, False)
    assert run_json(capsys, model, "--host", "1GiB", "--embedding")["devices"] != [plain]


def test_files_beside_the_model_count(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """An adapter and a projector are counted, and a missing file is named."""
    for flag in ("--adapter", "--projector"):
        assert cli.main(["fit", str(model), flag, "no/such/file.gguf"]) == cli.WRONG_USE
        assert "no/such/file.gguf" in capsys.readouterr().err


def test_limits_count(capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory limit is the argument's, or else the environment's."""
    assert run(capsys, model, "--memory-limit", "8MiB")[0] == 1
    monkeypatch.setenv("LOADMASTER_MEMORY_LIMIT", "8MiB")
    assert run(capsys, model, "--host", "1GiB")[0] == 1
    assert run(capsys, model, "--host", "1GiB", "--memory-limit", "1GiB")[0] == 0


@pytest.mark.parametrize("arguments", [("--num-gpu", "5"), ("--require-gpu",)])
def test_who_wants_a_gpu_where_there_is_none_is_told_what_acquire_says(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """A required GPU on a machine without one is refused in the words of acquire."""
    monkeypatch.setenv("LOADMASTER_GPUS", "off")
    status, output = run(capsys, model, *arguments)
    assert status == 1 and "makes it fit: ask for it without a GPU (require_gpu, num_gpu)." in output
    assert "smaller model" not in output


def test_a_model_can_be_named(capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be given by a listed name."""
    monkeypatch.setenv("LOADMASTER_MODELS", str(model.parent))
    assert run(capsys, "tiny", "--host", "1GiB")[0] == 0


def test_a_name_brings_its_own_options(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The options of an Ollama model hold unless the command names others."""
    ollama_model(tmp_path, "registry.ollama.ai/library/tiny:latest", model.read_bytes(), (PARAMS, b'{"num_ctx": 512}'))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    assert run_json(capsys, "tiny", "--host", "1GiB")["options"]["num_ctx"] == 512
    assert run_json(capsys, "tiny", "--host", "1GiB", "--num-ctx", "256")["options"]["num_ctx"] == 256


def test_the_engine_need_not_be_installed(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command works without the engine installed."""
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(EngineMissing):
        LlamaEngine().require()
    assert run(capsys, model, "--host", "1GiB")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "24GiB"), "--gpu cannot be '24GiB'"),
        (("--gpu", "a=1GiB", "--gpu", "a=1GiB"), "each name once"),
        (("--gpu", "a=lots"), "--gpu cannot be 'lots'"),
        (("--host", "0"), "--host cannot be '0'"),
        (("--memory-limit", "some"), "--memory-limit cannot be 'some'"),
        (("--num-ctx", "0"), "num_ctx=0"),
        (("--cache-type", "q9"), "cache_type_k='q9'"),
    ],
)
def test_wrong_use_is_one_line_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], model: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Wrong use prints one line that names what was wrong, and exits with 2."""
    assert cli.main(["fit", str(model), *arguments]) == cli.WRONG_USE
    output = capsys.readouterr()
    assert output.out == "" and said in output.err and output.err.count("\n") == 1


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "scheduler.cli", "fit", *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT_S,
    )


def test_it_is_a_program(model: Path, tmp_path: Path) -> None:
    """The program exits with 0 where the model fits, with 1 where it does not, and with 2 for wrong use."""
    fits = command(str(model), "--host", "1GiB")
    assert (fits.returncode, fits.stderr) == (0, "") and fits.stdout.startswith("tiny fits")
    too_large = command(str(model), "--host", "8MiB", "--json")
    assert (too_large.returncode, too_large.stderr) == (1, "")
    assert json.loads(too_large.stdout)["verdict"] == "never"
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, it says")
    broken, missing = command(str(tmp_path / "broken.gguf")), command(str(tmp_path / "none.gguf"))
    assert [broken.returncode, missing.returncode] == [2, 2]
    assert "broken.gguf" in broken.stderr and "none.gguf" in missing.stderr


# -- in a running program ----------------------------------------------------------------------------------------------


def test_what_is_shown_is_what_is_promised(model: Path) -> None:
    """A runner has the options and the reserved bytes that `fit` showed before its load."""
    with Scheduler(settings()) as scheduler:
        fit = scheduler.fit(model, num_ctx=512, num_parallel=2)
        assert (fit.verdict, fit.fits, fit.measured, scheduler.status().runners) == ("fits", True, False, ())
        with scheduler.acquire(model, num_ctx=512, num_parallel=2):
            (runner,) = scheduler.status().runners
            assert replace(runner.options, num_thread=None) == fit.options  # cores are divided at the launch
            assert runner.promised_bytes == {device.id: device.takes_bytes for device in fit.devices}


def test_a_real_model_takes_what_was_shown_give_or_take() -> None:
    """A process that serves SmolLM2 takes at most what was shown, and most of it."""
    with Scheduler(settings()) as scheduler:
        (shown,) = scheduler.fit(the_real_model(), num_ctx=512).devices
        with scheduler.acquire(the_real_model(), num_ctx=512) as lease:
            lease.chat("What is the capital of France?", temperature=0, max_tokens=8)
            (runner,) = scheduler.status().runners
            assert 0.6 * shown.takes_bytes < runner.resident_bytes["cpu"] < 1.1 * shown.takes_bytes
            warm = scheduler.fit(the_real_model(), num_ctx=512)
            assert warm.verdict == "warm"
            assert {each.id: each.takes_bytes for each in warm.devices} == runner.held_bytes


def test_after_one_life_the_measured_figures_are_used(model: Path) -> None:
    """N14: after a load, `fit` shows the measured bytes with a smaller headroom, and says so."""
    with Scheduler(settings()) as scheduler:
        (predicted,) = scheduler.fit(model).devices
        scheduler.acquire(model, keep_alive=0).release()
        assert_soon(lambda: not scheduler.status().runners)
        fit = scheduler.fit(model)
        (measured,) = fit.devices
        assert fit.measured and "as measured before" in str(fit)
        assert measured.needed_bytes < 1.05 * measured.takes_bytes < predicted.needed_bytes


def test_victims_are_named_with_what_they_hold(model: Path) -> None:
    """Victims are named with what they hold and until when they may stay."""
    first = PythonModel("first", load=object, memory={"cpu": "300MiB"})
    with Scheduler(settings(memory_limit="320MiB", min_residency=0, max_wait="2m")) as scheduler:
        scheduler.preload(first).result()
        fit = scheduler.fit(model)
        assert (fit.verdict, fit.victims) == ("evicts", (FitVictim("first", 1, 300 * MIB, 0, 0.0),))
        with scheduler.acquire(first):
            fit = scheduler.fit(model)
            assert fit.victims[0].leases == 1 and 110 < fit.victims[0].leaves_in_s < 121
            assert str(fit).startswith("tiny fits once first (300 MiB, in use, in 2m at most) has left: ")
        assert [runner.model for runner in scheduler.status().runners] == ["first"]


def test_what_never_fits_says_what_acquire_would(model: Path) -> None:
    """A model that never fits has the reason and the figures of acquire's error."""
    with Scheduler(settings(memory_limit="100MiB")) as scheduler:
        fit = scheduler.fit(model, num_ctx=1024, num_parallel=256)
        with pytest.raises(DoesNotFit) as refused:
            scheduler.acquire(model, num_ctx=1024, num_parallel=256)
        assert (fit.verdict, fit.fits, fit.reason) == ("never", False, refused.value.reason)
        assert [each.needed_bytes for each in fit.devices] == [refused.value.needed_bytes]
        with scheduler.acquire(model, **{"num_ctx": 1024, "num_parallel": 256, **fit.advice[0].options}):
            assert scheduler.status().runners[0].promised_bytes == {"cpu": fit.advice[0].fit.devices[0].takes_bytes}


def test_an_object_is_shown_as_declared() -> None:
    """An object has one figure for each device, and no advice."""
    with Scheduler(settings(memory_limit="500MiB")) as scheduler:
        fit = scheduler.fit(PythonModel("object", load=object, memory={"cpu": "2GiB"}))
        assert (fit.verdict, fit.devices[0].other_bytes, fit.advice) == ("never", 2**31, ())


def test_asking_leaves_nothing_behind(model: Path) -> None:
    """A `fit` leaves no runner, no model record and no decision behind."""
    with Scheduler(settings()) as scheduler:
        events = scheduler.events()
        spec = ModelSpec("pinned", str(model), pin=True)
        assert scheduler.fit(spec).model == "pinned"
        assert scheduler.name(spec.id) == spec.id, "the model is registered"
        scheduler.acquire(PythonModel("other", load=object)).release()
        scheduler.close()
        assert {entry.model for entry in events} == {"python:other"}


def test_what_cannot_be_asked_is_refused_as_ever(model: Path) -> None:
    """What acquire refuses, `fit` refuses with the same errors."""
    with Scheduler(settings()) as scheduler:
        with pytest.raises(ModelNotFound):
            scheduler.fit("/no/such/model.gguf")
        with pytest.raises(UnsupportedOption):
            scheduler.fit(model, num_ctx=-1)
    with pytest.raises(SchedulerClosed):
        scheduler.fit(model)


# -- sentences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "sentence"),
    [
        (Fit("a", "waits", Options(), reason="its model to load"), "a waits for its model to load"),
        (Fit("a", "refused", Options(), reason="the queue is full"), "a would be refused: the queue is full"),
        (
            Fit("a", "evicts", Options(), victims=(FitVictim("b", 1, MIB, 0, 0), FitVictim("a", 2, MIB, 1, 90))),
            "a fits once b (1 MiB) and its runner with other options (1 MiB, in use, in 1m30s at most) have left",
        ),
    ],
)
def test_every_verdict_is_a_sentence(fit: Fit, sentence: str) -> None:
    """Every verdict is a sentence, also where nothing is planned yet."""
    assert str(fit) == sentence


def test_json_has_no_number_that_json_has_not() -> None:
    """In JSON, a number that is infinite is null."""
    fit = Fit("a", "evicts", Options(), victims=(FitVictim("b", 1, MIB, 1, math.inf),))
    assert json.loads(json.dumps(fit.to_json(), allow_nan=False))["victims"][0]["leaves_in_s"] is None


@pytest.mark.parametrize(
    "flags", [("--gpu", "card=24"), ("--memory-limit", "8"), ("--host", "64"), ("--gpu", "card=24 bytes")]
)
def test_u55_a_size_that_lost_its_unit_is_refused(model: Path, flags: tuple[str, str], capsys: Any) -> None:
    """A size under 1 MiB is no device's: it is wrong use, and the message names a unit."""
    assert cli.main(["fit", str(model), *flags]) == 2
    told = capsys.readouterr().err
    assert flags[0] in told and "unit" in told


@pytest.mark.parametrize(
    "make",
    [
        lambda: Settings(memory_limit=8),
        lambda: Settings(gpu_reserve="1"),
        lambda: Settings(gpu_limit="card=24"),
        lambda: Settings.from_environment({"LOADMASTER_MEMORY_LIMIT": "24"}),
        lambda: Settings().changed(memory_limit="512 KiB"),
        lambda: PythonModel("a", load=object, memory={"cpu": "24"}),
    ],
)
def test_u55_settings_and_objects_refuse_it_too(make: Callable[[], object]) -> None:
    """Settings of memory, and an object's declared bytes as a bare text, are refused under 1 MiB."""
    with pytest.raises(InvalidSettings, match=r"without a unit|name the unit"):
        make()
    assert Settings(gpu_reserve=0) and PythonModel("a", load=object, memory={"cpu": 24}).memory


def test_u55_a_context_beyond_what_was_trained_is_said(
    model: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A context that is cut to what the model was trained with is told by the command, and logged once."""
    cli.main(["fit", str(model), "--num-ctx", "4096"])
    assert "The model was trained with 1024 tokens: --num-ctx 4096 is cut to that." in capsys.readouterr().out
    cli.main(["fit", str(model), "--num-ctx", "1024"])
    assert "is cut" not in capsys.readouterr().out
    caplog.clear()
    with Scheduler(Settings(gpus=False, measurement_file=None)) as scheduler:
        for num_ctx in (512, 2048, 2048):
            scheduler.fit(model, num_ctx=num_ctx)
    told = [each.getMessage() for each in caplog.records if "trained" in each.getMessage()]
    assert told == ["tiny was trained with 1024 tokens: a num_ctx of 2048 is cut to that"]
