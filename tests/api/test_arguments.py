"""Arguments of models and requests: a value without a meaning is refused at once, by the argument's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler import (
    DoesNotFit,
    InvalidModel,
    InvalidSettings,
    ModelSpec,
    PythonModel,
    Scheduler,
    Settings,
    UnsupportedOption,
)
from tests.support.leaks import no_leaks

MAKE: dict[str, Callable[[Any], object]] = {
    "a file": lambda name: ModelSpec(name, "a.gguf"),
    "an object": lambda name: PythonModel(name, load=object),
}


@pytest.mark.parametrize("name", [None, 5, "", b"a", Path("a")])
@pytest.mark.parametrize("make", MAKE)
def test_a_name_that_is_no_text_is_refused_at_once(make: str, name: Any) -> None:
    """A model's name that is no text is refused when the model is made."""
    with pytest.raises(InvalidSettings, match="name") as refused:
        MAKE[make](name)
    assert (refused.value.name, refused.value.value) == ("name", name)


@pytest.mark.parametrize("path", [None, 5, "", b"a.gguf"])
def test_a_path_that_is_none_is_refused_at_once(path: Any) -> None:
    """A path that is no text and no `Path` is refused at once."""
    with pytest.raises(InvalidSettings, match="path"):
        ModelSpec("a", path)
    assert ModelSpec("a", Path("/a.gguf")).path == "/a.gguf"  # type: ignore[arg-type]  # paths are made texts


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler; nothing is loaded here."""
    with no_leaks(), Scheduler(Settings(gpus=False)) as scheduler:
        yield scheduler


@pytest.mark.parametrize("option", ["adapters", "projectors"])
@pytest.mark.parametrize("value", ["/b.gguf", Path("/b.gguf"), ["/b.gguf"], (Path("/b.gguf"),)])
def test_one_file_beside_the_model_needs_no_tuple(option: str, value: Any) -> None:
    """One adapter or projector may be given as a text, without a tuple."""
    assert getattr(ModelSpec("a", "/a.gguf", **{option: value}), option) == ("/b.gguf",)


@pytest.mark.parametrize("option", ["adapters", "projectors"])
@pytest.mark.parametrize("value", [5, b"/b.gguf", [5], [None], ("",), ""])
def test_files_beside_the_model_that_are_none_are_refused(scheduler: Scheduler, option: str, value: Any) -> None:
    """A file beside the model that is no path is refused by the option's name."""
    for ask in (
        lambda: ModelSpec("a", "/a.gguf", **{option: value}),
        lambda: scheduler.fit("/a.gguf", **{option: value}),
    ):
        with pytest.raises(UnsupportedOption, match="a path, or several") as refused:
            ask()
        assert refused.value.name == option


@pytest.mark.parametrize("value", ["false", 1, 0])
def test_embedding_is_true_or_false(scheduler: Scheduler, value: Any) -> None:
    """`embedding` has to be true or false, because any text would count as true."""
    with pytest.raises(UnsupportedOption, match="embedding"):
        ModelSpec("a", "/a.gguf", embedding=value)
    with pytest.raises(UnsupportedOption, match="embedding"):
        scheduler.fit("/a.gguf", embedding=value)


def test_what_makes_another_model_may_be_left_open_like_all_else(scheduler: Scheduler) -> None:
    """Arguments that make another model may be None, which is as if they were not named."""
    for ask in ({}, {"adapters": None, "projectors": None, "embedding": None}):
        with pytest.raises(InvalidModel, match="cannot be loaded"):
            scheduler.fit(os.devnull, **ask)  # type: ignore[arg-type]  # mypy reads it as of one type


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load", None),
        ("load", 5),
        ("unload", 5),
        ("memory", "5MiB"),
        ("memory", {5: 5}),
        ("memory", None),
        ("pin", "x"),
    ],
)
def test_an_object_is_checked_when_it_is_made(name: str, value: Any) -> None:
    """An object's arguments are checked when it is made, and not when it is first loaded."""
    with pytest.raises(InvalidSettings) as refused:
        PythonModel("a", **{"load": object, name: value})
    assert refused.value.name == name


def test_a_pin_is_true_or_false() -> None:
    """A pin has to be true or false, because any text would count as true."""
    with pytest.raises(InvalidSettings, match="pin"):
        ModelSpec("a", "/a.gguf", pin="x")  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("make", MAKE)
def test_a_name_that_nobody_could_be_told_is_refused(make: str) -> None:
    """A model's name that cannot be encoded is refused, because it goes into recordings and events."""
    with pytest.raises(InvalidSettings, match=r"'a\\udcff': it must be a text that can be written as UTF-8"):
        MAKE[make]("a\udcff")


def test_too_much_for_the_programs_own_is_answered_with_what_helps(scheduler: Scheduler) -> None:
    """The refusal of too much memory of the program's own advises what helps, and no smaller model."""
    with pytest.raises(DoesNotFit, match=r"larger than the memory there is; reserve less$"):
        scheduler.reserve("cpu", "900TiB")


def test_a_callback_that_cannot_be_called_is_refused_at_once(scheduler: Scheduler) -> None:
    """A callback that cannot be called is refused at once, and not in the log when it is called."""
    with scheduler.acquire(PythonModel("a", load=object)) as lease:
        for listen in (lease.on_lost, lease.on_wanted):
            with pytest.raises(InvalidSettings, match="callable"):
                listen(5)  # type: ignore[arg-type]  # on purpose


def test_a_path_that_the_engine_cannot_be_told_is_refused_at_once(scheduler: Scheduler, tmp_path: Path) -> None:
    """A path that the engine cannot be passed is refused at once, also where a link leads to it."""
    file = tmp_path / os.fsdecode(b"m\xff.gguf")
    file.touch()
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    for path in (file, link):
        with pytest.raises(InvalidModel, match="not UTF-8; rename it"):
            scheduler.acquire(path)


@pytest.mark.parametrize("device", [["cpu"], None, 0, ""])
def test_a_device_that_is_no_text_is_refused_at_once(scheduler: Scheduler, device: Any) -> None:
    """A device that is no text is refused at once, because decisions look it up."""
    with pytest.raises(InvalidSettings, match="device"):
        scheduler.reserve(device, "1MiB")
    with scheduler.reserve("cpu", "1MiB"):
        pass


@pytest.mark.parametrize("value", [{"num_ctx": 5}, None, "num_ctx"])
def test_options_are_a_kind_of_their_own(value: Any) -> None:
    """Options have to be an `Options`, and the refusal says how to make them."""
    with pytest.raises(InvalidSettings, match=r"options cannot be .*Options\(num_ctx="):
        ModelSpec("a", "/a.gguf", options=value)


@pytest.mark.parametrize("value", [{"max_queue": 3}, {}, Settings, "4GiB"])
def test_settings_are_a_kind_of_their_own(value: Any) -> None:
    """Settings have to be a `Settings`, also where another value is empty."""
    with pytest.raises(InvalidSettings, match=r"settings cannot be .*Scheduler\(max_queue="):
        Scheduler(value)


@pytest.mark.parametrize(
    "make", [lambda: ModelSpec("a", "a.gguf"), lambda: ModelSpec("a", "/a.gguf", adapters="b.gguf")]
)
def test_a_relative_path_in_a_working_folder_that_is_gone_is_refused(
    make: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path in a deleted working folder is refused with advice."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for make in (lambda: ModelSpec("a", "a.gguf"), lambda: ModelSpec("a", "/a.gguf", adapters="b.gguf")):
        with pytest.raises(InvalidModel, match=r"the working folder is gone; name it by its absolute path$"):
            make()
