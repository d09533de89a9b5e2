"""The command `loadmaster replay`: a recording narrated, and checked."""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.text import Text

from scheduler.cli.output import SafeConsole, print_json
from scheduler.errors.formatting import printable
from scheduler.recording.narrative import Narrative, NarrativeLine
from scheduler.recording.replay import Difference, RecordingError, Replay, ReplayStarted
from scheduler.recording.request_history import GRANTED_BEFORE, UNSEEN, Wait

DIFFERS = 1  # the exit status
_LONGEST_SHOWN = 5  # waits in the summary
_PICTURES = (".svg", ".png", ".pdf")
_MOST_SHOWN = 2000  # characters of the expected commands, and of the commands that came instead


def run_replay(chosen: argparse.Namespace) -> int:
    """Replay a recording, print it, and return the exit status: 0 if the commands are the recorded ones, 1 if not."""
    if chosen.timeline is not None:
        _check_place(chosen.timeline)
    replay = Replay(chosen.recording)
    story = Narrative(replay.names)
    out = SafeConsole(soft_wrap=True, highlight=False)
    told: list[NarrativeLine] = []
    notes: list[str] = []
    difference: Difference | None = None
    try:
        for moment in replay:
            if isinstance(moment, ReplayStarted):
                notes += [note for note in _notes(moment, replay) if note not in notes]
            for sentence in story.tell(moment):
                if chosen.json:
                    told.append(sentence)
                else:
                    _print(out, sentence)
    except Difference as found:
        difference = found
    story.finish()
    if replay.cut:
        notes.append("the last line is cut short, as by a program that was killed, and is left out")
    try:
        if chosen.timeline is not None:
            notes += _draw(story, chosen.timeline)
    finally:  # also where the picture cannot be drawn
        if chosen.json:
            print_json(_as_json(replay, story, told, notes, difference))
        else:
            _print_summary(out, replay, story, notes, difference)
    return 0 if difference is None else DIFFERS


def _notes(begun: ReplayStarted, replay: Replay) -> list[str]:
    header = begun.header
    notes = [f"recorded from {printable(header.written)} on by version {printable(header.version)}"]
    if replay.is_of_another_version(header):
        notes.append("it was recorded by a version that decides by other rules than this one, or may do so")
    if header.own_policy:
        notes.append(
            f"the eviction policy {printable(header.policy)!r} was the program's own: its choices are replayed"
        )
    return notes


def _print(out: Console, sentence: NarrativeLine) -> None:
    at = " " * 11 if sentence.detail else f"{sentence.at_s:+10.3f} "
    if not out.is_terminal:  # ten times as fast
        print(at, sentence.text)
        return
    out.print(Text.assemble((at, "dim"), " ", (sentence.text, "dim" if sentence.detail else "")))


def _print_summary(
    out: Console, replay: Replay, story: Narrative, notes: list[str], difference: Difference | None
) -> None:
    waits = list(story.waits.values())
    granted = sum(wait.answer in ("granted", GRANTED_BEFORE, "lost") for wait in waits)
    waiting = sum(not wait.answer for wait in waits)
    out.print()
    left = sum(wait.answer == "cancelled" for wait in waits)
    unseen = sum(wait.answer == UNSEEN for wait in waits)
    refused = len(waits) - granted - waiting - left - unseen
    counts = f"{granted} granted, {refused} refused, {left} left, {waiting} still waiting"
    out.print(f"Requests  {len(waits)}: {counts}" + (f", {unseen} {UNSEEN}" if unseen else ""))
    out.print(f"Loads     {story.loads}; evicted for other models: {story.evictions}")
    longest = sorted((wait for wait in waits if wait.reasons), key=lambda wait: -wait.waited_s)[:_LONGEST_SHOWN]
    for place, wait in enumerate(longest):
        reasons = ", ".join(f"{took_s:.3f} s for {reason}" for reason, took_s in wait.reasons)
        head = "Waits     " if not place else " " * 10
        still = "" if wait.answer else ", and still waits"
        out.print(Text(f"{head}request {wait.request} for {wait.model}: {wait.waited_s:.3f} s ({reasons}){still}"))
    for note in notes:
        out.print(Text(f"Note      {note}"))
    steps = f"{replay.steps} steps, {replay.commands} commands"
    if difference is None:
        out.print(Text(f"The same  {steps}: each decision is the one that was recorded", "green"))
        return
    out.print(Text(f"DIFFERS   at line {difference.line}, after {steps} that are the same", "bold red"))
    for head, text in (("event", repr(difference.event)), ("expected", difference.expected), ("got", difference.got)):
        out.print(Text(f"  {head:<9} {printable(text)[:_MOST_SHOWN]}"))


def _check_place(path: Path) -> None:
    """Raise `RecordingError` where a timeline cannot be drawn to `path`, before the replay begins; make its folder."""
    reason = ""
    if path.suffix.lower() not in _PICTURES:
        reason = f"name a file that ends in {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}"
    elif path.is_dir():
        reason = "it is a folder: name a file in it"
    else:
        try:
            import_module("matplotlib")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                reason = "it may not be written: name a file in another folder"
        except ImportError:
            reason = "a timeline needs matplotlib: pip install 'loadmaster[plot]'"
        except OSError as error:
            reason = f"its folder cannot be made: {error.strerror}"
    if reason:
        raise RecordingError(str(path), 0, reason)


def _draw(story: Narrative, path: Path) -> list[str]:
    """Draw the timeline; return the notes about it."""
    try:
        story.timeline.draw(path, story.end, limit_bytes=story.limit_bytes, title="Runners, as recorded")
    except (OSError, ValueError) as error:  # ValueError: the picture would be too large
        raise RecordingError(str(path), 0, f"it cannot be drawn: {error}") from error
    return [f"the timeline is in {path}"]


def _as_json(
    replay: Replay, story: Narrative, told: list[NarrativeLine], notes: list[str], difference: Difference | None
) -> dict[str, object]:
    found: dict[str, object] = {
        "recording": str(replay.path),
        "same": difference is None,
        "steps": replay.steps,
        "commands": replay.commands,
        "cut": replay.cut,
        "notes": notes,
        "loads": story.loads,
        "evictions": story.evictions,
        "requests": [_wait_as_json(wait) for wait in story.waits.values()],
        "story": [{"at_s": one.at_s, "line": one.line, "step": one.step, "text": one.text} for one in told],
    }
    if difference is not None:
        found["difference"] = {
            "line": difference.line,
            "event": repr(difference.event),
            "expected": difference.expected,
            "got": difference.got,
        }
    return found


def _wait_as_json(wait: Wait) -> dict[str, object]:
    return {
        "id": wait.request,
        "model": wait.model,
        "purpose": wait.purpose,
        "asked_at_s": wait.asked_at_s,
        "answer": wait.answer or None,
        "waited_s": wait.waited_s,
        "waits": [{"for": reason, "s": took_s} for reason, took_s in wait.reasons],
    }
