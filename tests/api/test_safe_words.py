"""Control characters in names, files and the words of engines: none reaches a terminal, whatever tells them."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from fsm.machine.request import ModelId
from fsm.messages.reasons import FailureReason, InfeasibleReason, ProcessExited, TransitionReason, WaitReason
from scheduler import PythonModel, Scheduler, SchedulerError, Settings
from scheduler.cli import main as cli
from scheduler.cli.demo.models import DemoError
from scheduler.cli.demo.report import Record
from scheduler.cli.demo.view import LiveView, PlainView
from scheduler.errors import wording
from scheduler.errors.formatting import one_line, printable, shown
from scheduler.recording.replay import RecordingError
from scheduler.recording.timeline import Timeline
from scheduler.testing import FakeMachine
from tests.api.test_errors import EXAMPLES
from tests.support.reasons import every
from tests.support.tiny_models import write_tiny_model

TITLE, UP, CSI, TURNED = "\x1b]0;OWNED\x07", "\x1b[1A", "\x9b2J", "\u202e"
EVIL = f"a{TITLE}{UP}{CSI}{TURNED}\rb"


def is_safe(text: str) -> bool:
    """Return whether a text holds only what a terminal shows, line breaks and tabs."""
    return all(one.isprintable() or one in "\n\t" for one in text)


def test_u64_what_shows_nothing_is_escaped_and_what_shows_something_stays() -> None:
    """Escapes are those of Python; letters of all alphabets, their spaces and line breaks stay."""
    assert printable(EVIL) == r"a\x1b]0;OWNED\x07\x1b[1A\x9b2J\u202e\rb"
    assert printable("große 模型 \u00a0\u3000é") == "große 模型 \u00a0\u3000é"
    assert (printable("a\nb"), shown("a\n\tb\r"), one_line("a\n\n b\r\n")) == (r"a\nb", "a\n\tb\\r", "a; b")
    assert is_safe(printable("\udc80\U000e0001"))


ERRORS = [error for error, _, _ in EXAMPLES] + [DemoError(""), RecordingError("", 1, "")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_u64_no_error_tells_a_control_character(error: SchedulerError) -> None:
    """Each text of each error may hold control characters: they are in the field, and escaped in the message."""
    hostile = {each.name: EVIL for each in fields(error) if isinstance(getattr(error, each.name), str)}
    changed = copy.copy(error)
    for name, value in hostile.items():
        setattr(changed, name, value)
    assert is_safe(str(changed)) and is_safe(repr(changed))
    assert all(getattr(changed, name) == EVIL for name in hostile)


def hostile(reason: Any) -> Any:
    """Return a reason whose texts hold control characters."""
    texts = {each.name: EVIL for each in fields(reason) if type(getattr(reason, each.name)) is str}
    return replace(reason, **texts)


@pytest.mark.parametrize("union", [WaitReason, TransitionReason, InfeasibleReason])
def test_u64_no_reason_tells_a_control_character(union: Any) -> None:
    """Names, and the words of engines, are escaped in the words of every reason."""
    words: dict[Any, Any] = {
        WaitReason: lambda reason: wording.wait_reason(reason, lambda _: EVIL),
        TransitionReason: lambda reason: wording.transition_reason(reason, lambda _: EVIL, ModelId("")),
        InfeasibleReason: lambda reason: wording.infeasible_reason(reason, lambda _: EVIL),
    }
    for reason in every(union):
        assert is_safe(words[union](hostile(reason) if hasattr(reason, "__dataclass_fields__") else reason))
    for reason in every(FailureReason):
        assert is_safe(wording.failure_reason(hostile(reason)))
    assert is_safe(wording.revoke_reason(ProcessExited(1, EVIL, True))) and is_safe(wording.problem(EVIL))


def test_u64_logs_warnings_events_and_statuses_are_safe(caplog: pytest.LogCaptureFixture) -> None:
    """A model with a hostile name, whose engine says hostile words, is told of safely by all that people read."""
    caplog.set_level(logging.DEBUG, "loadmaster")
    with FakeMachine(memory="8GiB") as fake:
        fake.model(EVIL, size="1GiB")
        events = fake.scheduler.events()
        with fake.scheduler.acquire(f"/models/{EVIL}.gguf") as lease:
            assert is_safe(repr(lease)) and is_safe(str(fake.scheduler.fit(f"/models/{EVIL}.gguf", num_ctx=512)))
            fake.crash(EVIL, EVIL)
        fake.fail_load(EVIL, EVIL)
        with pytest.raises(SchedulerError) as caught:
            fake.scheduler.acquire(f"/models/{EVIL}.gguf")
        assert is_safe(str(caught.value))
    assert all(is_safe(getattr(entry, "reason", "")) for entry in events)
    assert len(caplog.records) > 10 and all(each.getMessage().isprintable() for each in caplog.records)


def test_u64_a_lost_lease_is_warned_of_safely() -> None:
    """The warning about a lease that was never released escapes the model's name."""
    with Scheduler(Settings(gpus=False, measurement_file=None)) as scheduler:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            scheduler.acquire(PythonModel(EVIL, load=object))
        (warning,) = [each for each in warned if each.category is ResourceWarning]
    assert "never released" in str(warning.message) and is_safe(str(warning.message))


def test_u64_a_traceback_in_the_log_is_safe(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback of an exception whose text holds control characters is escaped, with its lines as they are."""
    try:
        raise RuntimeError(EVIL)
    except RuntimeError:
        logging.getLogger("loadmaster").exception("of %s", EVIL)
    text = logging.Formatter().format(caplog.records[-1])
    assert is_safe(text) and "Traceback" in text and text.count("\n") > 2


@pytest.mark.parametrize("live", [False, True])
def test_u64_the_demonstration_shows_names_safely(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of models in the demonstration's lines and tables are escaped, and are no markup either."""
    monkeypatch.setenv("TERM", "xterm")
    output, record = io.StringIO(), Record(0.0, (), Timeline(0.0, str))
    view = LiveView(record, output) if live else PlainView(record, output)
    if isinstance(view, LiveView):
        view._console._force_terminal, view._console.is_interactive, view._console.width = True, True, 200
    view.say(f"{EVIL} [/bold]")
    with FakeMachine(memory="8GiB", auto_advance=False) as fake:
        fake.model(f"[x]{EVIL}", size="1GiB", load="9s")
        waiting = fake.scheduler.submit(f"/m/[x]{EVIL}.gguf")
        view.show(1.0, fake.scheduler.status())
        waiting.cancel()
    view.close()
    told = output.getvalue()
    assert "OWNED" in told and "[/bold]" in told and ("[x]" in told) == live
    assert not any(each in told for each in (TITLE, CSI, TURNED, "\x1b]0"))


def test_u64_commands_show_the_text_of_files_safely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A listing, its JSON and a fit of a file that names a hostile architecture or file name are safe."""
    folder = tmp_path / f"mo{CSI}dels"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "arch.gguf", f"llama{EVIL}")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    write_tiny_model(folder / f"na{CSI}{TURNED}me.gguf")
    monkeypatch.setenv("LOADMASTER_MODELS", str(folder))
    monkeypatch.setenv("LOADMASTER_GPUS", "off")
    monkeypatch.setenv("LOADMASTER_MEASUREMENT_FILE", "none")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "none"))
    for arguments in (["models"], ["models", "--json"], ["fit", str(folder / f"na{CSI}{TURNED}me.gguf")],
                      ["fit", "--json", str(folder / f"na{CSI}{TURNED}me.gguf")], ["fit", f"no{EVIL}"]):  # fmt: skip
        cli.main(arguments)
        told = capsys.readouterr()
        assert is_safe(told.out) and is_safe(told.err) and (told.out or told.err)
        if "--json" in arguments:
            assert CSI in json.dumps(json.loads(told.out), ensure_ascii=False)  # it means what it is
