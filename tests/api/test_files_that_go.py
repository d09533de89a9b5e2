"""Models whose files are deleted or replaced while they are loaded, as real children serve them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fsm.machine.request import ModelId
from scheduler import InvalidModel, Lease, ModelNotFound, ModelSpec, Scheduler
from scheduler.engines.llama import LlamaEngine
from scheduler.models.catalog import Catalog
from scheduler.runtime import past_references
from scheduler.runtime.request_parser import Model, RequestParser
from tests.support.leaks import no_leaks
from tests.support.real import SHORT, settings
from tests.support.stores import hub_repository, ollama_model
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import assert_soon


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have names and links looked up for each request."""
    monkeypatch.setattr("scheduler.runtime.request_parser.LASTING_S", 0.0)


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    """Yield a scheduler that finds models by name in a folder, a store and a cache of this test's."""
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with no_leaks(), Scheduler(settings(models=str(tmp_path / "models"), num_ctx=256)) as scheduler:
        yield scheduler


# -- files that are gone -----------------------------------------------------------------------------------------------

Placed = tuple[Model, Callable[[], object]]  # what a request names, and what takes the model away


def in_a_folder(place: Path) -> Placed:
    file = write_tiny_model(place / "models" / "chat.gguf")
    return "chat", file.unlink


def in_ollamas_store(place: Path) -> Placed:
    manifest = ollama_model(place / "ollama", "registry.ollama.ai/library/chat:latest", a_file(place))
    return "chat", manifest.unlink


def in_ollamas_store_without_its_blob(place: Path) -> Placed:
    ollama_model(place / "ollama", "registry.ollama.ai/library/chat:latest", a_file(place))
    return "chat", lambda: shutil.rmtree(place / "ollama" / "blobs")


def in_the_hubs_cache(place: Path) -> Placed:
    hub_repository(place / "hub", "user/chat", {"chat-Q8_0.gguf": a_file(place)})
    return "user/chat", lambda: shutil.rmtree(place / "hub")


def by_its_path(place: Path) -> Placed:
    file = write_tiny_model(place / "chat.gguf")
    return str(file), file.unlink


def by_a_path_from_the_working_folder(place: Path) -> Placed:
    file = write_tiny_model(place / "models" / "chat.gguf")
    return "models/chat.gguf", file.unlink


def by_a_link(place: Path) -> Placed:
    link = place / "link.gguf"
    link.symlink_to(write_tiny_model(place / "chat.gguf"))
    return link, link.unlink


def by_a_specification(place: Path) -> Placed:
    link = place / "link.gguf"
    link.symlink_to(write_tiny_model(place / "chat.gguf"))
    return ModelSpec("chat", str(link)), link.unlink


def a_file(place: Path) -> bytes:
    return write_tiny_model(place / "written.gguf").read_bytes()


PLACES = [
    in_a_folder,
    in_ollamas_store,
    in_ollamas_store_without_its_blob,
    in_the_hubs_cache,
    by_its_path,
    by_a_path_from_the_working_folder,
    by_a_link,
    by_a_specification,
]


@pytest.mark.parametrize("put", PLACES)
def test_u37_a_loaded_model_is_found_although_it_is_gone(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], Placed]
) -> None:
    """U37: a model that is loaded is served, previewed, pinned and expired by its name after its file is gone."""
    monkeypatch.chdir(tmp_path)
    model, take_away = put(tmp_path)
    with scheduler.acquire(model, keep_alive=-1) as lease:
        runner = lease.runner
    scheduler.pin(model)
    take_away()
    scheduler.preload(model).result(60)
    with scheduler.acquire(model, timeout=60, num_ctx=128) as lease:
        assert lease.runner == runner and lease.complete("a", max_tokens=1) is not None
    assert scheduler.fit(model).verdict == "warm"
    scheduler.unpin(model)
    assert not scheduler.status().runners[0].pinned
    scheduler.pin(model)
    assert scheduler.status().runners[0].pinned
    scheduler.unpin(model)
    scheduler.expire(model)
    assert_soon(lambda: not scheduler.status().runners)
    if put not in (by_a_link, by_a_specification):  # a link's own file is still there, but has another name
        for ask in (scheduler.acquire, scheduler.fit):
            with pytest.raises((ModelNotFound, InvalidModel)):
                ask(model)


def test_u37_what_was_loaded_without_what_is_asked_for_is_not_found(scheduler: Scheduler, tmp_path: Path) -> None:
    """U37: a request that the runner does not serve would need a load, and is refused; the runner stays."""
    model, take_away = in_a_folder(tmp_path)
    with scheduler.acquire(model) as lease:
        take_away()
        for ask in (scheduler.acquire, scheduler.fit):
            with pytest.raises(ModelNotFound):
                ask(model, num_ctx=512)
        assert lease.complete("a", max_tokens=1) is not None
    assert scheduler.fit(model).verdict == "warm"


def test_u37_a_name_that_leads_to_another_file_is_that_file(scheduler: Scheduler, tmp_path: Path) -> None:
    """U37: a name that was moved means the new file, and not the model that is still loaded."""
    link = tmp_path / "models" / "chat.gguf"
    link.symlink_to(write_tiny_model(tmp_path / "models" / "old.gguf"))
    scheduler.acquire("chat", keep_alive=-1).release()
    link.unlink()
    link.symlink_to(write_tiny_model(tmp_path / "models" / "new.gguf", seed=1))
    assert scheduler.fit("chat").verdict != "warm"
    scheduler.expire("chat")
    assert [each.state for each in scheduler.status().runners] == ["idle"]


def test_u37_references_are_kept_for_as_long_as_their_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """U37: any number of other names does not make a loaded model unknown, and none of them is kept for ever."""
    monkeypatch.setattr(past_references, "MOST_REFERENCES", 9)
    files = [write_tiny_model(tmp_path / f"{number}.gguf") for number in range(30)]
    loaded = ModelId(str(files[0]))
    parser = RequestParser(Catalog([]), lambda model: None, pin=lambda model: None, in_use=lambda: frozenset({loaded}))
    links = [tmp_path / f"link{number}.gguf" for number in range(30)]
    for link, file in zip(links, files, strict=True):
        link.symlink_to(file)
        parser.parse_cached(str(link), {})
        link.unlink()
    assert parser.identity(str(links[0]), {}) == loaded
    assert parser.identity(str(links[1]), {}) == str(links[1])
    assert len(parser._past._led_to) <= 9


# -- files that are replaced -------------------------------------------------------------------------------------------


def answer_of(lease: Lease) -> str:
    return lease.complete("abc", **SHORT)


def replace(file: Path, seed: int) -> None:
    """Put another model under a path, as a download does: written beside it, and moved."""
    write_tiny_model(file.with_suffix(".new"), seed=seed).replace(file)


@pytest.mark.parametrize("pinned", [False, True])
def test_u38_a_replaced_file_is_served_at_the_next_request(scheduler: Scheduler, tmp_path: Path, pinned: bool) -> None:
    """U38: an idle runner of a file that was replaced leaves, and a request is given the new file, once."""
    file = write_tiny_model(tmp_path / "models" / "chat.gguf", seed=1)
    spec = ModelSpec("chat", str(file), pin=pinned, keep_alive=-1)
    with scheduler.acquire(spec) as lease:
        before, old = answer_of(lease), lease.runner
    replace(file, 2)
    assert scheduler.fit(spec).verdict != "warm"
    with scheduler.acquire(spec, timeout=60) as lease:
        assert answer_of(lease) != before and lease.runner != old
        new = lease.runner
    with scheduler.acquire(spec, timeout=60) as lease:
        assert lease.runner == new


def test_u38_a_file_that_is_replaced_while_it_is_inspected_is_loaded_again(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U38: a runner whose file came after its inspection, by which it was placed, counts as one of another file."""
    file, inspect = write_tiny_model(tmp_path / "models" / "chat.gguf", seed=1), LlamaEngine.inspect

    def replaced(*arguments: Any) -> Any:
        found = inspect(*arguments)
        replace(file, 2)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(LlamaEngine, "inspect", replaced)
        with scheduler.acquire("chat") as lease:
            first = lease.runner
    runners = []
    for _ in range(2):
        with scheduler.acquire("chat", timeout=60) as lease:
            runners.append(lease.runner)
    assert runners[0] == runners[1] != first


def test_u38_a_runner_in_use_finishes_its_leases_first(scheduler: Scheduler, tmp_path: Path) -> None:
    """U38: leases are kept, requests meanwhile are served as before, and after the last release the new file counts."""
    file = write_tiny_model(tmp_path / "models" / "chat.gguf", seed=1)
    with scheduler.acquire("chat") as lease:
        before = answer_of(lease)
        replace(file, 2)
        with scheduler.acquire("chat", timeout=60) as other:
            assert other.runner == lease.runner and answer_of(other) == before
        assert answer_of(lease) == before and not lease.lost
    with scheduler.acquire("chat", timeout=60) as lease:
        assert answer_of(lease) != before


@pytest.mark.parametrize("part", ["adapters", "projectors"])
def test_u38_the_files_beside_a_model_are_looked_at_too(tmp_path: Path, part: str) -> None:
    """U38: an adapter, a projector or a further part of a split file that was replaced counts like the model's own."""
    file, beside = write_tiny_model(tmp_path / "m.gguf"), tmp_path / "beside.gguf"
    beside.write_bytes(b"1")
    spec = ModelSpec("m", str(file), **{part: (str(beside),)})  # type: ignore[arg-type]  # one of two
    before = spec.file_states()
    assert before is not None and spec.file_states() == before
    beside.unlink()
    assert spec.file_states() is None
    beside.write_bytes(b"1")
    assert spec.file_states() != before


def test_u38_a_file_that_was_not_touched_is_loaded_once(scheduler: Scheduler, tmp_path: Path) -> None:
    """U38: looking at files costs no load where nothing has changed, nor where a file is only read or linked to."""
    file = write_tiny_model(tmp_path / "models" / "chat.gguf")
    runners = set()
    for _ in range(3):
        with scheduler.acquire("chat") as lease:
            runners.add(lease.runner)
        file.read_bytes()
        (tmp_path / "link.gguf").unlink(missing_ok=True)
        (tmp_path / "link.gguf").hardlink_to(file)
    assert len(runners) == 1


def test_u38_a_new_file_that_cannot_be_loaded_is_told(scheduler: Scheduler, tmp_path: Path) -> None:
    """U38: where the new file is no model, the request is told so, and the next good file is served."""
    file = write_tiny_model(tmp_path / "models" / "chat.gguf", seed=1)
    scheduler.acquire("chat").release()
    file.write_bytes(b"GGUF")
    with pytest.raises(InvalidModel):
        scheduler.acquire("chat", timeout=60)
    replace(file, 3)
    scheduler.acquire("chat", timeout=60).release()
