"""The timeline: spans from hand-made transitions, and what is written in the picture of them."""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path

import pytest

from fsm.machine.request import ModelId
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, UNLOADED, RunnerId, RunnerState
from scheduler.recording.timeline import COLOURS, Span, Timeline

NAMES = {ModelId("/models/a.gguf"): "chat", ModelId("/models/b.gguf"): "coder"}


def a_timeline() -> Timeline:
    """Return a timeline in which runner 1 lives from 100 to 106 s, and runner 2 is loaded at 104 s and still ready."""
    timeline = Timeline(100.0, name=lambda id: NAMES[id])
    first, second = (RunnerId(1), ModelId("/models/a.gguf")), (RunnerId(2), ModelId("/models/b.gguf"))
    timeline.add(100.0, *first, LOADING)
    timeline.add(101.0, *first, READY)
    timeline.add(102.0, *first, IDLE)
    timeline.add(103.0, *second, LOADING)
    timeline.add(104.0, *second, READY)
    timeline.add(105.0, *first, EXPIRING)
    timeline.add(106.0, *first, UNLOADED)
    return timeline


def written(path: Path) -> list[str]:
    """Return every text in an SVG file."""
    root = xml.etree.ElementTree.parse(path).getroot()
    return ["".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_state_lasts_until_the_next_one() -> None:
    """Each transition ends one span and begins the next, in seconds from the beginning."""
    assert a_timeline().spans(110.0)[:4] == (
        Span(RunnerId(1), "chat", LOADING, 0.0, 1.0),
        Span(RunnerId(1), "chat", READY, 1.0, 2.0),
        Span(RunnerId(1), "chat", IDLE, 2.0, 5.0),
        Span(RunnerId(1), "chat", EXPIRING, 5.0, 6.0),
    )


def test_a_state_that_goes_on_ends_now() -> None:
    """A runner that still serves has a span up to the moment that is asked for."""
    assert a_timeline().spans(110.0)[-1] == Span(RunnerId(2), "coder", READY, 4.0, 10.0)


def test_an_unloaded_runner_has_no_more_spans() -> None:
    """An unloaded runner has no further span."""
    assert all(span.state is not UNLOADED for span in a_timeline().spans(110.0))


def test_runners_come_in_the_order_in_which_they_were_started() -> None:
    """Each runner has one row, in the order of the launches."""
    assert [span.runner for span in a_timeline().spans(110.0)] == [1, 1, 1, 1, 2, 2]


def test_no_span_ends_before_it_begins() -> None:
    """A moment that has passed gives empty spans and no negative ones."""
    assert all(span.end_s >= span.start_s for span in a_timeline().spans(100.0))


def test_every_state_that_lasts_has_a_colour_of_its_own() -> None:
    """Every state but the final one has a colour of its own."""
    assert set(COLOURS) == set(RunnerState) - {UNLOADED}
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_the_picture_names_models_and_states(tmp_path: Path) -> None:
    """The rows of a picture are named by model and runner and its legend by state, in text that can be searched."""
    a_timeline().draw(tmp_path / "timeline.svg", 110.0, title="What they did")
    texts = written(tmp_path / "timeline.svg")
    assert {"chat · 1", "coder · 2", "loading", "ready", "idle", "expiring", "What they did"} <= set(texts)


def test_the_picture_shows_memory_against_its_limit(tmp_path: Path) -> None:
    """Where memory was noted, a second plot shows it with its limit."""
    timeline = a_timeline()
    timeline.add_memory(101.0, 300 << 20, 200 << 20)
    timeline.draw(tmp_path / "timeline.svg", 110.0, limit_bytes=512 << 20)
    assert {"promised", "resident", "limit", "MiB"} <= set(written(tmp_path / "timeline.svg"))


def test_the_same_entries_give_the_same_picture(tmp_path: Path) -> None:
    """The same entries give the same picture, byte by byte."""
    for name in ("one.svg", "other.svg"):
        a_timeline().draw(tmp_path / name, 110.0)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_the_picture_has_the_format_of_its_ending(tmp_path: Path, ending: str) -> None:
    """The picture has the format of its file's ending, and missing folders are made."""
    file = tmp_path / "new" / "folder" / f"timeline.{ending}"
    a_timeline().draw(file, 110.0)
    beginnings = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
    assert file.read_bytes().startswith(beginnings[ending])


def test_an_empty_timeline_can_be_drawn(tmp_path: Path) -> None:
    """A timeline without entries can be drawn."""
    Timeline(100.0).draw(tmp_path / "timeline.svg", 100.0)
    assert "seconds" in written(tmp_path / "timeline.svg")
