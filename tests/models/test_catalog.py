"""Models by name: folders, Ollama's store and the Hugging Face cache; a name opens nothing outside of them."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm.domain.options import Options
from scheduler import (
    InvalidModel,
    InvalidSettings,
    ModelNotFound,
    ModelSpec,
    Scheduler,
    SchedulerError,
    UnsupportedOption,
)
from scheduler.models.catalog import LISTED_S, MOST_COMPARED, Catalog, KnownNames, Resolver, is_path
from scheduler.models.ollama_model import MANIFEST_BYTES
from scheduler.models.sources import Folder, HuggingFaceCache, OllamaStore, default_resolvers
from scheduler.runtime.request_parser import LASTING_S, RequestParser
from tests.support.gguf_bytes import a_file, number, words
from tests.support.leaks import no_leaks
from tests.support.real import SHORT, settings
from tests.support.stores import (
    ADAPTER,
    MODEL,
    PARAMS,
    PROJECTOR,
    blob_of,
    hub_repository,
    ollama_model,
    write_blob,
    write_manifest,
)
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon

DIGEST = "sha256:" + "0" * 64

HOSTILE = [
    "",
    "-h",
    "--model",
    "..",
    "../secret",
    "../secret.gguf",
    "a/../../secret",
    "a/../../secret.gguf",
    "./secret",
    "a//b",
    "/secret",
    "/etc/passwd",
    "a/",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "a\u202eb",
    "a\ud800b",
    "..\\secret",
    "a\\..\\..\\secret",
    "x" * 513,
    "registry.ollama.ai/../../secret:latest",
    "library/a:../../../secret",
    "user/../secret",
    "hf.co/../..:secret",
    "user/repo/../../../secret.gguf",
]

_opened: list[str] | None = None  # what is opened or listed, while it is a list


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir"):
        _opened.append(os.fsdecode(os.fspath(arguments[0])) if not isinstance(arguments[0], int) else "")  # type: ignore[call-overload]


sys.addaudithook(_note)


@contextmanager
def opened() -> Iterator[list[str]]:
    """Yield the list of what this process opens meanwhile."""
    global _opened
    _opened = noted = []
    try:
        yield noted
    finally:
        _opened = None


@pytest.fixture
def model(tmp_path: Path) -> bytes:
    """Make a tiny model that loads."""
    return write_tiny_model(tmp_path / "tiny.bytes").read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "ollama"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def catalog(folder: Path, store: Path, cache: Path) -> Catalog:
    """Return a catalog of all three kinds, with a model in each and a secret file beside them."""
    (folder.parent / "secret.gguf").write_bytes(b"secret")
    (folder / "chat.gguf").write_bytes(b"chat")
    ollama_model(store, "registry.ollama.ai/library/llama3.2:latest", b"llama")
    hub_repository(cache, "user/repo", {"model-Q4_K_M.gguf": b"hub"})
    return Catalog([Folder(folder), OllamaStore(store), HuggingFaceCache(cache)])


def names_of(resolver: Folder | OllamaStore | HuggingFaceCache) -> list[str]:
    return list(resolver.names())


def found(resolver: Folder | OllamaStore | HuggingFaceCache, name: str) -> str:
    """Return the real path that a name stands for."""
    spec = resolver.find(name)
    assert spec is not None, f"{name} was not found"
    return os.path.realpath(spec.path)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_none_is_refused_before_anything_is_opened(catalog: Catalog, name: str) -> None:
    """A text that cannot be a name is refused with status 400 and the reason, and no file or folder is opened."""
    with opened() as noted, pytest.raises(UnsupportedOption, match="name") as refused:
        catalog.find(name)
    assert noted == [] and refused.value.status == 400


@given(st.text(st.sampled_from("ab./\\-:~\0 é*[]?"), max_size=12) | st.text(max_size=8))
def test_no_text_leads_out_of_the_roots(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Any text leads to a model inside the roots, or to one of the errors that say why not."""
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    (root / "in").mkdir(parents=True, exist_ok=True)
    (root / "a.gguf").touch()
    (root / "in" / "b.gguf").touch()
    try:
        spec = Catalog([Folder(root / "in"), OllamaStore(root / "in"), HuggingFaceCache(root / "in")]).find(name)
    except (UnsupportedOption, ModelNotFound):
        return
    assert spec.path == str(root / "in" / "b.gguf")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("/models/a.gguf", True),
        ("~/a.gguf", True),
        ("./a", True),
        ("../a", True),
        ("models/../a", True),
        ("there.gguf", True),
        ("models/there", True),
        ("missing.gguf", False),
        ("models/missing", False),
        ("models", False),
        ("models/inner", False),
        ("there", False),
        ("llama3.2:1b", False),
    ],
)
def test_what_is_a_path_and_what_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, is_one: bool
) -> None:
    """A relative path is a path if the file exists and has a separator or the ending, and a folder is no model."""
    (tmp_path / "models" / "inner").mkdir(parents=True)
    for file in ("there.gguf", "models/there", "there"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    assert is_path(text) is is_one


def test_a_name_that_is_unknown_says_where_was_looked_and_what_is_like_it(
    catalog: Catalog, folder: Path, store: Path, cache: Path
) -> None:
    """An unknown name is refused with status 404, the places that were searched, and suggestions."""
    with pytest.raises(ModelNotFound) as refused:
        catalog.find("lama3.2")
    error = refused.value
    assert error.looked_in == (
        f"the folder {folder}",
        f"Ollama's store {store}",
        f"the Hugging Face cache {cache}",
    )
    assert (error.path, error.suggestions, error.status) == ("lama3.2", ("llama3.2:latest",), 404)
    assert "did you mean 'llama3.2:latest'?" in str(error)


class Shelf:
    """A resolver of a user."""

    location = "the shelf"

    def __init__(self, **models: Path) -> None:
        self.models = models
        self.asked = self.listed = 0  # how many times

    def find(self, name: str) -> ModelSpec | None:
        self.asked += 1
        return ModelSpec(name, str(self.models[name])) if name in self.models else None

    def names(self) -> Iterable[str]:
        self.listed += 1
        return [*self.models, "bad\x1bname"]


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_names_that_are_suggested_are_listed_once_for_many_who_ask(tmp_path: Path) -> None:
    """Names for suggestions are listed once for many unknown names, and new names are suggested soon after."""
    clock, shelf = Clock(), Shelf()
    catalog = Catalog([shelf], clock=clock)

    def suggested() -> tuple[str, ...]:
        with pytest.raises(ModelNotFound) as refused:
            catalog.find("chatt")
        return refused.value.suggestions

    assert suggested() == ()
    shelf.models["chat"] = tmp_path / "chat.gguf"
    assert suggested() == () and shelf.listed == 1
    clock.now = LISTED_S
    assert suggested() == ("chat",)


def test_a_resolver_of_ones_own_is_asked_first(catalog: Catalog, tmp_path: Path) -> None:
    """A user's resolver is asked first, and the names that it lists are suggested if they can be names."""
    catalog.add(Shelf(chat=tmp_path / "mine.gguf", other=tmp_path / "other.gguf"))
    assert catalog.find("chat").path == str(tmp_path / "mine.gguf")
    assert [name for name, _ in catalog.listing()] == ["chat", "other", "llama3.2:latest", "user/repo"]
    assert catalog.places[0] == "the shelf"


class Aliases(Shelf):
    """A resolver that lists only the names that the catalog finds."""

    def __init__(self, catalog: Catalog) -> None:
        super().__init__()
        self.catalog = catalog

    def names(self) -> Iterable[str]:
        for name in ("chat", "none"):
            with suppress(ModelNotFound):
                yield f"my-{self.catalog.find(name).name}"


def test_a_resolver_may_ask_the_catalog_for_the_names_that_it_lists(catalog: Catalog) -> None:
    """A resolver may ask the catalog for the names that it lists, also while names are listed for a suggestion."""
    catalog.add(Aliases(catalog))
    refused: list[ModelNotFound] = []

    def ask() -> None:
        try:
            catalog.find("my-chatt")
        except ModelNotFound as error:
            refused.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert [error.suggestions[0] for error in refused] == ["my-chat"]


@pytest.mark.parametrize("added", [None, "models/", Path("models"), Shelf, object()])
def test_what_is_no_resolver_is_refused_when_it_is_added(catalog: Catalog, added: Any) -> None:
    """A value that is no resolver is refused when it is added, with where folders are given."""
    with pytest.raises(InvalidSettings, match=r"resolver cannot be .* find\(name\).*Settings\(models=") as refused:
        catalog.add(added)
    assert refused.value.name == "resolver"
    assert catalog.find("chat")


class Placeless(Shelf):
    """A resolver that cannot say where it looks."""

    @property
    def location(self) -> str:  # type: ignore[override]  # a property in place of an attribute
        raise LookupError("no place")


@pytest.mark.parametrize(("place", "told"), [(Path("/srv/models"), "/srv/models"), (5, "5"), (None, "Shelf")])
def test_a_place_is_told_as_a_text(catalog: Catalog, place: Any, told: str) -> None:
    """A resolver's place is told as a text, whatever type it has."""
    shelf = Shelf()
    shelf.location = place
    catalog.add(shelf)
    assert catalog.places[0] == told
    with pytest.raises(ModelNotFound, match=told):
        catalog.find("nothing")


class Former:
    """A user's resolver that was written when `location` was called `place`."""

    place = "the old shelf"

    def find(self, name: str) -> ModelSpec | None:
        raise ModelNotFound(name, suggestions=("chat",))

    def names(self) -> Iterable[str]:
        return ()


class FormerProtocol(Former, Resolver):
    """A resolver with `place` that names the protocol as its base."""


@pytest.mark.parametrize("kind", [Former, FormerProtocol])
def test_a_resolver_with_a_place_is_taken_with_one_warning(catalog: Catalog, kind: type[Former]) -> None:
    """A resolver with `place` is added with one warning at the line that adds it, and then serves without any."""
    told = f"{kind.__name__}.place is called {kind.__name__}.location now"
    with pytest.warns(DeprecationWarning, match=told) as caught:
        catalog.add(cast(Resolver, kind()))
    with pytest.warns(DeprecationWarning, match=told) as caught_too:
        Catalog([cast(Resolver, kind())])
    assert [each.filename for each in (*caught, *caught_too)] == [__file__, __file__]
    with warnings.catch_warnings(action="error"):
        assert catalog.places[0] == "the old shelf"
        with pytest.raises(ModelNotFound, match=r"in the old shelf; .*did you mean 'chat'"):
            catalog.find("chatt")


def test_the_former_name_of_suggestions_is_taken_with_one_warning() -> None:
    """The former name of suggestions warns once, as an argument of an error and as its attribute."""
    with pytest.warns(DeprecationWarning, match=r"ModelNotFound\(suggestions=…\)") as caught:
        error = ModelNotFound("chatt", ("the shelf",), closest=("chat",))
    assert error.suggestions == ("chat",)
    with pytest.warns(DeprecationWarning, match=r"ModelNotFound\.suggestions") as caught_too:
        assert error.closest == ("chat",)
    assert [each.filename for each in (*caught, *caught_too)] == [__file__, __file__]


def test_a_resolver_that_cannot_say_where_it_looks_does_not_stand_in_the_way(catalog: Catalog) -> None:
    """A resolver that cannot say where it looks is told by its type."""
    catalog.add(Placeless())
    assert catalog.find("chat") and catalog.places[0] == "Placeless"
    with pytest.raises(ModelNotFound, match="in Placeless; the folder"):
        catalog.find("nothing")


@pytest.mark.parametrize("found", ["/chat.gguf", Path("/chat.gguf"), {"path": "/chat.gguf"}, 5])
def test_what_a_resolver_finds_is_a_model_or_nothing(catalog: Catalog, found: Any) -> None:
    """A resolver's result that is neither a model nor None is told like a failure, and the next resolver is asked."""
    shelf = Shelf()
    shelf.find = lambda name: found  # type: ignore[method-assign]  # on purpose
    catalog.add(shelf)
    assert catalog.find("chat").name == "chat"
    with pytest.raises(ModelNotFound, match=r"the shelf, which failed with TypeError: find\(\) .*, and no ModelSpec;"):
        catalog.find("nothing")


def test_by_default_folders_are_asked_first_then_ollama_then_hugging_face(tmp_path: Path) -> None:
    """Folders are asked before Ollama's store, which OLLAMA_MODELS names, and before the Hugging Face cache."""
    places = Catalog(default_resolvers([tmp_path], {"OLLAMA_MODELS": "/somewhere"})).places
    assert places[:2] == (f"the folder {tmp_path}", "Ollama's store /somewhere")
    assert places[2].startswith("the Hugging Face cache /") and len(places) == 3
    assert f"Ollama's store {Path.home()}/.ollama/models" in Catalog(default_resolvers([], {})).places


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_names_its_files_by_their_path_inside(folder: Path) -> None:
    """A folder's names are its files' paths inside it, one for a split model, without projectors and hidden folders."""
    for file in ("a.gguf", "in/b.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "in/mmproj-a.gguf",
                 ".cache/c.gguf", "notes.txt"):  # fmt: skip
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    assert names_of(Folder(folder)) == ["a", "big", "in/b"]
    assert found(Folder(folder), "in/b") == found(Folder(folder), "in/b.gguf") == str(folder / "in/b.gguf")
    assert found(Folder(folder), "big") == str(folder / "big-00001-of-00002.gguf")
    assert Folder(folder).find("notes.txt") is None
    assert Folder(folder).find("in") is None


def test_a_link_inside_a_folder_is_followed(folder: Path) -> None:
    """A link inside a folder is followed where it leads to a file inside."""
    (folder / "a.gguf").touch()
    (folder / "in").mkdir()
    (folder / "in" / "b.gguf").symlink_to("../a.gguf")
    assert found(Folder(folder), "in/b") == str(folder / "a.gguf")


def test_the_folder_itself_may_be_a_link(folder: Path) -> None:
    """The folder itself may be a link, because roots are real paths."""
    (folder / "a.gguf").touch()
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert found(Folder(link), "a") == str(folder / "a.gguf")


def test_a_link_out_of_a_folder_is_refused_and_does_not_tell_what_is_there(folder: Path) -> None:
    """A link out of a folder is refused with one reason, whether its target exists or not, and nothing is opened."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "there.gguf").write_bytes(b"secret")
    (folder / "there.gguf").symlink_to(outside / "there.gguf")
    (folder / "missing.gguf").symlink_to(outside / "missing.gguf")
    (folder / "link").symlink_to(outside)
    reasons = set()
    with opened() as noted:
        for name in ("there", "missing", "link/there", "link/missing", "link/there.gguf"):
            with pytest.raises(InvalidModel) as refused:
                Catalog([Folder(folder)]).find(name)
            reasons.add(refused.value.reason)
            assert refused.value.path.startswith(str(folder))
    assert reasons == {f"it leads out of {folder}; only what lies inside has a name"}
    assert [path for path in noted if path.startswith(str(outside))] == []


def test_a_part_that_leads_out_of_a_folder_is_refused(folder: Path) -> None:
    """A split model with a part that leads out of its folder is refused."""
    (folder / "big-00001-of-00002.gguf").touch()
    (folder.parent / "secret.gguf").touch()
    (folder / "big-00002-of-00002.gguf").symlink_to(folder.parent / "secret.gguf")
    with pytest.raises(InvalidModel, match="leads out of"):
        Folder(folder).find("big")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_refused(folder: Path, make: object) -> None:
    """A folder or a pipe that is named like a model is refused."""
    make(folder / "a.gguf")  # type: ignore[operator]
    with pytest.raises(InvalidModel, match="not a regular file"):
        Folder(folder).find("a")


def test_a_folder_that_is_not_there_has_no_models(tmp_path: Path) -> None:
    """A folder that does not exist has no models, and listing it says so."""
    catalog, unlisted = Catalog([Folder(tmp_path / "no")]), dict[str, str]()
    assert (list(catalog.listing(unlisted)), Folder(tmp_path / "no").find("a")) == ([], None)
    assert "FileNotFoundError" in unlisted[f"the folder {tmp_path / 'no'}"]


def test_what_cannot_be_listed_of_a_folder_does_not_hide_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subfolder that cannot be listed is told at the end, after the names of the others."""
    for name in ("a", "b", "c"):
        (folder / name).mkdir()
        (folder / name / "m.gguf").touch()
    scan = os.scandir

    def refuse(path: str) -> Any:
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("os.scandir", refuse)
    unlisted: dict[str, str] = {}
    assert [name for name, _ in Catalog([Folder(folder)]).listing(unlisted)] == ["a/m", "c/m"]
    assert "PermissionError" in unlisted[f"the folder {folder}"]


def write_eyes(path: Path, width: int = 64) -> Path:
    """Write the header of a projector that ends in `width`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = [words("general.architecture", "clip"), words("general.type", "mmproj")]
    path.write_bytes(a_file([*keys, number("clip.vision.projection_dim", width)]))
    return path


def write_text(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tiny_model(path)


def projector_of(folder: Path, name: str) -> str | None:
    """Return the name of the projector that a folder's model comes with."""
    spec = Folder(folder).find(name)
    assert spec is not None
    return Path(spec.projectors[0]).relative_to(folder).as_posix() if spec.projectors else None


@pytest.mark.parametrize(
    ("files", "name", "projector"),
    [
        ("g/gemma-3-4b-it-Q4_K_M g/mmproj-model-f16", "g/gemma-3-4b-it-Q4_K_M", "g/mmproj-model-f16"),
        ("g/gemma-Q4_K_M g/gemma-Q8_0 g/mmproj-F16 g/mmproj-Q8_0", "g/gemma-Q8_0", "g/mmproj-Q8_0"),
        ("g/gemma-Q4_K_M g/mmproj-BF16 g/mmproj-F16 g/mmproj-F32", "g/gemma-Q4_K_M", "g/mmproj-F16"),
        ("gemma-Q4_K_M qwen-Q4_K_M mmproj-gemma-f16", "gemma-Q4_K_M", "mmproj-gemma-f16"),
        ("gemma-Q4_K_M qwen-Q4_K_M mmproj-gemma-f16", "qwen-Q4_K_M", None),
        ("gemma-Q4_K_M qwen-Q4_K_M mmproj-f16", "gemma-Q4_K_M", None),
        ("gemma-Q4_0 gemma-it-Q4_0 gemma-it.mmproj-f16", "gemma-Q4_0", None),
        ("gemma-Q4_0 gemma-it-Q4_0 gemma-it.mmproj-f16", "gemma-it-Q4_0", "gemma-it.mmproj-f16"),
        ("g/Q8_0/big-Q8_0-00001-of-00002 g/mmproj-F16", "g/Q8_0/big-Q8_0", "g/mmproj-F16"),
        ("g/in/big-Q8_0 g/mmproj-F16", "g/in/big-Q8_0", None),
        ("m x mmproj-other-f16", "m", None),
    ],
)
def test_u33_a_projector_in_a_folder_comes_with_its_model(
    folder: Path, files: str, name: str, projector: str | None
) -> None:
    """U33: of the projectors beside a model its own comes along, and nobody else's."""
    for file in files.split():
        (write_eyes if "mmproj" in file else write_text)(folder / f"{file}.gguf")
    found = projector_of(folder, name)
    assert found == (f"{projector}.gguf" if projector else None)


def test_u33_a_projector_that_does_not_fit_stays_where_it_is(folder: Path, tmp_path: Path) -> None:
    """U33: a projector for a wider model, a file that is none, and a link that leads out, do not come along."""
    write_text(folder / "wide" / "m.gguf"), write_eyes(folder / "wide" / "mmproj.gguf", 4096)
    write_text(folder / "none" / "m.gguf"), write_text(folder / "none" / "mmproj.gguf")
    write_text(folder / "torn" / "m.gguf"), (folder / "torn" / "mmproj.gguf").write_bytes(b"GGUF")
    assert [projector_of(folder, f"{each}/m") for each in ("wide", "none", "torn")] == [None] * 3
    write_text(folder / "out" / "m.gguf")
    (folder / "out" / "mmproj.gguf").symlink_to(write_eyes(tmp_path / "eyes.gguf"))
    with pytest.raises(InvalidModel, match="leads out of"):
        Folder(folder).find("out/m")


# -- Ollama ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("llama3.2", "registry.ollama.ai/library/llama3.2:latest"),
        ("llama3.2:1b", "registry.ollama.ai/library/llama3.2:1b"),
        ("library/llama3.2:1b", "registry.ollama.ai/library/llama3.2:1b"),
        ("registry.ollama.ai/library/llama3.2:1b", "registry.ollama.ai/library/llama3.2:1b"),
        ("user/model:tag", "registry.ollama.ai/user/model:tag"),
        ("hf.co/user/repo-GGUF:Q4_K_M", "hf.co/user/repo-GGUF:Q4_K_M"),
        ("registry.example.com/team/model", "registry.example.com/team/model:latest"),
    ],
)
def test_an_ollama_name_is_found_as_ollama_finds_it(store: Path, name: str, place: str) -> None:
    """Host, namespace and tag of an Ollama name have Ollama's defaults."""
    ollama_model(store, "registry.ollama.ai/library/other:latest", b"another")
    ollama_model(store, place, b"the model")
    spec = OllamaStore(store).find(name)
    assert spec is not None and (spec.name, spec.path) == (name, blob_of(store, b"the model"))


def test_ollamas_models_are_listed_as_ollama_lists_them(store: Path) -> None:
    """Ollama's models are listed without default hosts and namespaces and with tags."""
    for place in ("registry.ollama.ai/library/llama3.2:1b", "registry.ollama.ai/me/mine:latest", "hf.co/a/b:Q8_0"):
        ollama_model(store, place, b"a model")
    (store / "manifests/registry.ollama.ai/library/llama3.2/.DS_Store").touch()
    assert names_of(OllamaStore(store)) == ["hf.co/a/b:Q8_0", "llama3.2:1b", "me/mine:latest"]


def test_adapters_projectors_and_load_time_parameters_come_with_an_ollama_model(store: Path) -> None:
    """Adapters, projectors and load-time parameters come with an Ollama model; sampling parameters do not."""
    params = {"num_ctx": 8192, "num_thread": 0, "num_gpu": 7, "use_mmap": False, "temperature": 0.1, "stop": ["x"]}
    ollama_model(
        store, "registry.ollama.ai/library/a:latest", b"model",
        (ADAPTER, b"adapter"), (PROJECTOR, b"projector"), (PARAMS, json.dumps(params).encode()),
    )  # fmt: skip
    spec = OllamaStore(store).find("a")
    assert spec is not None
    assert (spec.adapters, spec.projectors) == ((blob_of(store, b"adapter"),), (blob_of(store, b"projector"),))
    assert spec.options == Options(num_ctx=8192, num_gpu=7, use_mmap=False)


def layer(digest: object, kind: str = MODEL) -> dict[str, object]:
    return {"mediaType": kind, "digest": digest}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe\xfd", "no JSON"),
        (b"[" * 100_000, "too deeply nested"),
        (b" " * (MANIFEST_BYTES + 1), "larger than"),
        ([], "no list of layers"),
        ({}, "no list of layers"),
        ({"layers": {}}, "no list of layers"),
        ({"layers": ["x"]}, "no list of layers"),
        ({"layers": []}, "names no GGUF file"),
        ({"layers": [layer(DIGEST, "application/vnd.ollama.image.tensor")]}, "names no GGUF file"),
        ({"layers": [layer(DIGEST), layer(DIGEST)]}, "several model files"),
        ({"layers": [layer(DIGEST), *[layer(DIGEST, PARAMS)] * 100]}, "more than 16"),
        ({"layers": [layer(DIGEST)]}, "is missing"),
        ({"layers": [layer(None)]}, "no sha256 digest"),
        ({"layers": [layer(7)]}, "no sha256 digest"),
        ({"layers": [layer([DIGEST])]}, "no sha256 digest"),
        ({"layers": [layer("")]}, "no sha256 digest"),
        ({"layers": [layer("../../../secret.gguf")]}, "no sha256 digest"),
        ({"layers": [layer("sha256:../../../secret.gguf")]}, "no sha256 digest"),
        ({"layers": [layer("sha256-/etc/passwd")]}, "no sha256 digest"),
        ({"layers": [layer(DIGEST + "\n")]}, "no sha256 digest"),
        ({"layers": [layer(DIGEST + "/../../../secret.gguf")]}, "no sha256 digest"),
        ({"layers": [layer(DIGEST.upper())]}, "no sha256 digest"),
        ({"layers": [layer("sha512:" + "0" * 64)]}, "no sha256 digest"),
        ({"layers": [layer("sha256:" + "٠" * 64)]}, "no sha256 digest"),
    ],
)
def test_a_hostile_manifest_is_refused_by_file_and_reason(store: Path, content: object, reason: str) -> None:
    """A hostile manifest is refused with its file and the reason, as in CVE-2024-37032, and opens nothing outside."""
    (store.parent / "secret.gguf").write_bytes(b"secret")
    manifest = write_manifest(store, "registry.ollama.ai/library/a:latest", content)
    with opened() as noted, pytest.raises(InvalidModel, match=reason) as refused:
        OllamaStore(store).find("a")
    assert refused.value.path == str(manifest)
    assert set(noted) <= {str(manifest)}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(DIGEST),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["layers", "mediaType", "digest"]), inner | st.just(MODEL))
        ),
        max_leaves=20,
    )
)
def test_any_json_is_a_manifest_or_refused(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    """Any JSON is a manifest or is refused with InvalidModel."""
    store = tmp_path_factory.getbasetemp() / "any-json"
    write_manifest(store, "registry.ollama.ai/library/a:latest", {"layers": content})
    with pytest.raises(InvalidModel):
        OllamaStore(store).find("a")


@pytest.mark.parametrize(
    "params", [b"", b"[]", b'{"num_ctx": "x"}', b'{"num_ctx": 1e999}', b'{"num_gpu": true}', b'{"use_mmap": 1}',
               b'{"num_ctx": 99999999999}', b'{"num_ctx": 1.5}']
)  # fmt: skip
def test_parameters_that_mean_nothing_are_refused(store: Path, params: bytes) -> None:
    """Parameters without a meaning are refused by their file."""
    ollama_model(store, "registry.ollama.ai/library/a:latest", b"model", (PARAMS, params))
    with pytest.raises(InvalidModel) as refused:
        OllamaStore(store).find("a")
    assert refused.value.path == blob_of(store, params)


@pytest.mark.parametrize("where", ["manifest", "manifest's folder", "blob", "blobs"])
def test_a_link_out_of_ollamas_store_is_refused(store: Path, where: str) -> None:
    """A link that leads out of Ollama's store is refused, wherever in the store it is."""
    outside = store.parent / "outside"
    manifest = ollama_model(store, "registry.ollama.ai/library/a:latest", b"model")
    blob = Path(blob_of(store, b"model"))
    moved = {"manifest": manifest, "manifest's folder": manifest.parent, "blob": blob, "blobs": blob.parent}[where]
    moved.rename(outside)
    moved.symlink_to(outside)
    with pytest.raises(InvalidModel, match="leads out of"):
        OllamaStore(store).find("a")


def test_a_manifest_may_be_a_link_to_a_blob(store: Path) -> None:
    """A manifest may be a link inside the store."""
    manifest = ollama_model(store, "registry.ollama.ai/library/a:latest", b"model")
    digest = write_blob(store, manifest.read_bytes()).replace(":", "-")
    manifest.unlink()
    manifest.symlink_to(os.path.relpath(store / "blobs" / digest, manifest.parent))
    assert found(OllamaStore(store), "a") == blob_of(store, b"model")


# -- Hugging Face ------------------------------------------------------------------------------------------------------

SEVERAL = {"m-Q4_K_M.gguf": b"4", "m-Q8_0.gguf": b"8", "README.md": b"read me"}


def test_the_caches_of_these_tests_are_what_the_hubs_client_makes_of_them(cache: Path) -> None:
    """The hub's client finds the files of these tests' caches, and reports no problem."""
    snapshot = hub_repository(cache, "user/repo", SEVERAL)
    assert huggingface_hub.scan_cache_dir(cache).warnings == []
    cached = huggingface_hub.try_to_load_from_cache("user/repo", "m-Q8_0.gguf", cache_dir=cache)
    assert cached == str(snapshot / "m-Q8_0.gguf")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("user/repo", "m-Q4_K_M.gguf"),
        ("hf.co/user/repo", "m-Q4_K_M.gguf"),
        ("user/repo:Q8_0", "m-Q8_0.gguf"),
        ("user/repo:q8_0", "m-Q8_0.gguf"),
        ("user/repo/m-Q8_0.gguf", "m-Q8_0.gguf"),
        ("user/one", "sub/only.gguf"),
        ("user/split:IQ2_XXS", "IQ2_XXS/m-00001-of-00002.gguf"),
    ],
)
def test_a_hub_name_is_found_in_what_was_downloaded(cache: Path, name: str, file: str) -> None:
    """A hub name finds a file by repository, quantisation or file, and the usual quantisation of several."""
    hub_repository(cache, "user/repo", SEVERAL)
    hub_repository(cache, "user/one", {"sub/only.gguf": b"1"})
    hub_repository(
        cache, "user/split",
        {"IQ2_XXS/m-00001-of-00002.gguf": b"a", "IQ2_XXS/m-00002-of-00002.gguf": b"b", "m-Q8_0.gguf": b"c"},
    )  # fmt: skip
    spec = HuggingFaceCache(cache).find(name)
    assert spec is not None and spec.path.endswith(f"/{file}") and spec.name == name


def test_each_model_of_the_hub_is_listed_by_its_shortest_name(cache: Path) -> None:
    """Each model of the hub is listed by its shortest name, which finds one file."""
    hub_repository(cache, "user/repo", SEVERAL)
    hub_repository(cache, "user/one", {"only-F16.gguf": b"1", "mmproj-only-F16.gguf": b"2"})
    hub_repository(
        cache, "user/odd", {"a.gguf": b"3", "b-Q8_0.gguf": b"4", "c-Q8_0.gguf": b"5", "UD-Q4_K_XL.gguf": b"6"}
    )
    hub_repository(cache, "user/none", {"model.safetensors": b"7"})
    resolver = HuggingFaceCache(cache)
    names = names_of(resolver)
    assert names == [
        "user/odd:UD-Q4_K_XL", "user/odd/a.gguf", "user/odd/b-Q8_0.gguf", "user/odd/c-Q8_0.gguf",
        "user/one", "user/repo:Q4_K_M", "user/repo:Q8_0",
    ]  # fmt: skip
    assert len({found(resolver, name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["user/repo:Q6_K", "user/repo:Q8", "user/repo/m.gguf"])
def test_a_hub_name_that_does_not_tell_lists_those_that_would(cache: Path, name: str) -> None:
    """A hub name that fits several files is refused with the names that fit one."""
    hub_repository(cache, "user/repo", {"m-Q5_K_M.gguf": b"5", "m-Q8_0.gguf": b"8"})
    with pytest.raises(ModelNotFound, match="where user/repo is, but") as refused:
        Catalog([HuggingFaceCache(cache)]).find(name)
    assert refused.value.suggestions[:2] == ("user/repo:Q5_K_M", "user/repo:Q8_0")


@pytest.mark.parametrize(
    ("files", "tag", "file"),
    [
        ("A-Q8_0 A-imatrix", None, "A-Q8_0"),
        ("A-Q8_0 imatrix_A", None, "A-Q8_0"),
        ("A-Q4_0 mtp-A-Q4_K_M eagle3-A-Q8_0 dflash-A-Q8_0 dspark-A-Q8_0", None, "A-Q4_0"),
        ("A-Q4_0 mtp-A-Q8_0", "Q8_0", None),
        ("A-F16 A-Q8_0", None, "A-Q8_0"),
        ("A-F16 A-Q8_0 A-Q4_K_M", None, "A-Q4_K_M"),
        ("A-F16 A-Q6_K", None, "A-F16"),
        ("A-Q8_0 A-UD-Q4_K_XL", "Q4_K_XL", "A-UD-Q4_K_XL"),
        ("A-Q8_0 UD-Q4_K_XL/A-UD-Q4_K_XL-00001-of-00002 UD-Q4_K_XL/A-UD-Q4_K_XL-00002-of-00002", "q4_k_xl",
         "UD-Q4_K_XL/A-UD-Q4_K_XL-00001-of-00002"),
        ("A-Q8_0 B-Q8_0", "Q8_0", "A-Q8_0"),
        ("A-Q8_0 A-Q4_K_M", "Q4_K", None),
        ("mmproj-F16 A-MTP-BF16", None, "A-MTP-BF16"),
    ],
)  # fmt: skip
def test_u32_the_hubs_model_is_chosen_as_llama_cpp_chooses(
    cache: Path, files: str, tag: str | None, file: str | None
) -> None:
    """U32: files that are no models are passed over, and of the others the one counts that llama.cpp takes."""
    snapshot = hub_repository(cache, "user/repo", {f"{each}.gguf": each.encode() for each in files.split()})
    resolver, name = HuggingFaceCache(cache), f"user/repo:{tag}" if tag else "user/repo"
    if file is None:
        with pytest.raises(ModelNotFound):
            resolver.find(name)
        return
    spec = resolver.find(name)
    assert spec is not None and spec.path == str(snapshot / f"{file}.gguf")
    names = names_of(resolver)
    assert not any("imatrix" in each or "3-A" in each or "mtp-A" in each for each in names)
    assert len({found(resolver, each) for each in names}) == len(names)


def test_u32_files_that_belong_to_a_model_have_no_name_in_a_folder(folder: Path) -> None:
    """U32: a folder lists no importance matrix and no draft model, and a file of any name is found by its own."""
    for file in ("A-Q8_0", "A-imatrix", "mtp-A", "A-eagle3-Q8_0", "dflash-A", "dspark-A", "MTP-B"):
        (folder / f"{file}.gguf").touch()
    assert names_of(Folder(folder)) == ["A-Q8_0", "MTP-B"]
    assert found(Folder(folder), "mtp-A") == str(folder / "mtp-A.gguf")


def test_a_projector_comes_with_its_hub_model(cache: Path) -> None:
    """A hub model comes with its projector, in 16 bits where there are several."""
    snapshot = hub_repository(cache, "user/eyes", {"m.gguf": b"m", "mmproj-BF16.gguf": b"b", "mmproj-F16.gguf": b"f"})
    spec = HuggingFaceCache(cache).find("user/eyes")
    assert spec is not None
    assert (spec.path, spec.projectors) == (str(snapshot / "m.gguf"), (str(snapshot / "mmproj-F16.gguf"),))


@pytest.mark.parametrize("file", ["m.gguf", "mmproj-F16.gguf"])
def test_a_link_out_of_the_hubs_cache_is_refused(cache: Path, file: str) -> None:
    """A file of the hub's cache that is no link to a blob of its repository is refused."""
    snapshot = hub_repository(cache, "user/repo", {"m.gguf": b"m", "mmproj-F16.gguf": b"f"})
    (cache.parent / "secret.gguf").write_bytes(b"secret")
    (snapshot / file).unlink()
    (snapshot / file).symlink_to(cache.parent / "secret.gguf")
    with pytest.raises(InvalidModel, match="leads out of"):
        HuggingFaceCache(cache).find("user/repo")


def test_the_version_that_main_was_counts(cache: Path) -> None:
    """A name stands for the version that main was at its last download, and is looked for again after another one."""
    resolver = HuggingFaceCache(cache)
    hub_repository(cache, "user/repo", {"m.gguf": b"old"}, commit="a" * 40)
    assert Path(found(resolver, "user/repo")).read_bytes() == b"old"
    with opened() as noted:
        assert Path(found(resolver, "user/repo")).exists()
    assert noted == []
    hub_repository(cache, "user/repo", {"m.gguf": b"new"}, commit="b" * 40)
    assert Path(found(resolver, "user/repo")).read_bytes() == b"new"


def test_a_file_that_was_downloaded_later_is_found(cache: Path) -> None:
    """A name that was not found is looked for again."""
    resolver = HuggingFaceCache(cache)
    hub_repository(cache, "user/repo", {"m-Q4_K_M.gguf": b"4"})
    with pytest.raises(ModelNotFound):
        resolver.find("user/repo:Q8_0")
    hub_repository(cache, "user/repo", {"m-Q8_0.gguf": b"8"})
    assert Path(found(resolver, "user/repo:Q8_0")).read_bytes() == b"8"


def test_without_its_library_the_hub_says_how_to_look_there(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the hub's library, a name that looks like the hub's is refused with how to install it."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    catalog = Catalog([Folder(folder), HuggingFaceCache(cache)])
    with pytest.raises(ModelNotFound, match=r"pip install 'loadmaster\[hub\]'"):
        catalog.find("user/repo:Q8_0")
    with pytest.raises(ModelNotFound) as refused:
        catalog.find("chat")
    assert refused.value.looked_in == (f"the folder {folder}",)
    assert catalog.places == (f"the folder {folder}",)


@pytest.mark.parametrize("there", ["nothing", "a file"])
def test_a_cache_that_is_none_has_no_models(cache: Path, there: str) -> None:
    """A cache that does not exist or is no folder has no models."""
    if there == "a file":
        cache.touch()
    assert (names_of(HuggingFaceCache(cache)), HuggingFaceCache(cache).find("user/repo")) == ([], None)


# -- identity ----------------------------------------------------------------------------------------------------------


def test_n01_the_real_file_is_the_identity(folder: Path, store: Path, cache: Path) -> None:
    """N01: a path, a link, a folder's name, an Ollama tag and a hub file that lead to one file are one model."""
    ollama_model(store, "registry.ollama.ai/library/a:latest", b"model")
    blob = Path(blob_of(store, b"model"))
    snapshot = hub_repository(cache, "user/repo", {"m.gguf": b"other"})
    (snapshot / "m.gguf").unlink()
    (snapshot / "m.gguf").symlink_to(blob)
    (folder / "linked.gguf").symlink_to(blob)
    top = folder.parent  # a root of them all, so that links between them stay inside
    specs = [
        ModelSpec("by path", str(blob)),
        ModelSpec("by link", str(folder / "linked.gguf")),
        Folder(top).find("models/linked"),
        OllamaStore(store).find("a"),
        Folder(top).find(f"hub/models--user--repo/snapshots/{snapshot.name}/m"),
    ]
    assert {spec.id if spec else None for spec in specs} == {str(blob)}


def test_n01_a_hard_link_is_a_model_of_its_own(folder: Path) -> None:
    """N01: a hard link is a model of its own, as the demonstration needs it."""
    (folder / "a.gguf").touch()
    os.link(folder / "a.gguf", folder / "b.gguf")
    assert ModelSpec("a", str(folder / "a.gguf")).id != ModelSpec("b", str(folder / "b.gguf")).id


def test_n01_what_belongs_to_a_model_is_part_of_its_identity(folder: Path) -> None:
    """N01: adapters and projectors are part of a model's identity by their real files, and so is embedding."""
    (folder / "link").symlink_to(folder / "adapter")
    plain = ModelSpec("a", "/m")
    adapted = ModelSpec("a", "/m", adapters=(str(folder / "adapter"),))
    assert ModelSpec("b", "/m", adapters=(str(folder / "link"),)).id == adapted.id
    assert len({plain.id, adapted.id, ModelSpec("a", "/m", projectors=("/p",)).id,
                ModelSpec("a", "/m", adapters=("/p",)).id, ModelSpec("a", "/m", embedding=True).id}) == 5  # fmt: skip


def test_n01_a_split_model_keeps_names_by_which_its_parts_are_found(cache: Path) -> None:
    """N01: a split model of the hub's cache keeps the path by which its parts are found, and not its identity's."""
    snapshot = hub_repository(cache, "user/repo", {"m-00001-of-00002.gguf": b"1", "m-00002-of-00002.gguf": b"2"})
    first = snapshot / "m-00001-of-00002.gguf"
    spec = ModelSpec("m", str(first)).resolved()
    assert (spec.path, spec.id) == (str(first), os.path.realpath(first))


# -- asking a scheduler ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(chat=tmp_path / "old.gguf")


@pytest.fixture
def parser(shelf: Shelf, clock: Clock) -> RequestParser:
    return RequestParser(Catalog([shelf]), lambda model: None, pin=lambda model: None, clock=clock)


def test_a_warm_name_is_not_looked_up_again_for_a_while(parser: RequestParser, shelf: Shelf, clock: Clock) -> None:
    """A name is looked up again after a while only, for each set of keyword arguments."""
    first = parser.parse_cached("chat", {})
    clock.now = 0.99 * LASTING_S
    assert parser.parse_cached("chat", {}) is first and shelf.asked == 1


def test_a_name_that_was_moved_leads_to_the_new_file_after_a_short_time(
    parser: RequestParser, shelf: Shelf, clock: Clock, tmp_path: Path
) -> None:
    """A name that was moved leads to the new file after two seconds, as a new model."""
    first = parser.parse_cached("chat", {"num_ctx": 512})
    shelf.models["chat"] = tmp_path / "new.gguf"
    clock.now = LASTING_S
    second = parser.parse_cached("chat", {"num_ctx": 512})
    assert (first.spec.model, second.spec.model) == (str(tmp_path / "old.gguf"), str(tmp_path / "new.gguf"))


@pytest.mark.parametrize("kind", ["path", "spec"])
def test_a_link_that_was_moved_leads_to_the_new_file_after_a_short_time(
    parser: RequestParser, clock: Clock, tmp_path: Path, kind: str
) -> None:
    """A link that was moved leads to the new file after two seconds, for paths and for specs."""
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "old.gguf")
    model = str(link) if kind == "path" else ModelSpec("m", str(link))
    parser.parse_cached(model, {})
    link.unlink()
    link.symlink_to(tmp_path / "new.gguf")
    clock.now = LASTING_S
    question = parser.parse_cached(model, {})
    assert isinstance(question.model, ModelSpec)
    assert question.spec.model == question.model.path == str(tmp_path / "new.gguf")


def test_a_relative_path_that_is_not_there_was_looked_for_in_the_working_folder_too(parser: RequestParser) -> None:
    """A text that is not found is told with the working folder, whether a path or a name was meant."""
    with pytest.raises(ModelNotFound) as refused:
        parser.parse_cached("models/chat.gguf", {})
    assert refused.value.looked_in == ("the working folder", "the shelf")


@pytest.mark.parametrize("model", ["", "-chat", "chat\n", b"chat"])
def test_what_is_neither_path_nor_name_is_refused(parser: RequestParser, model: str) -> None:
    """A text that is neither a path nor a name is refused with status 400 before anything is requested."""
    with pytest.raises(UnsupportedOption):
        parser.parse_cached(model, {})


def test_models_are_acquired_by_folder_name_and_by_ollama_name(
    tmp_path: Path, folder: Path, store: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N01: a model acquired by an Ollama name has its parameters, and a link to its file shares its runner."""
    ollama_model(store, "registry.ollama.ai/library/tiny:latest", model, (PARAMS, b'{"num_ctx": 256}'))
    (folder / "chat.gguf").write_bytes(model)
    (folder / "same.gguf").symlink_to("chat.gguf")
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    with no_leaks(), Scheduler(settings(models=[folder])) as scheduler:
        with scheduler.acquire("chat") as chat, scheduler.acquire("same") as same:
            assert (chat.model, same.model, chat.runner) == ("chat", "same", same.runner)
            assert chat.complete("a", **SHORT)
        with scheduler.acquire("tiny") as lease:
            assert lease.complete("a", **SHORT)
            assert [each.options.num_ctx for each in scheduler.status().runners if each.id == lease.runner] == [256]
        with pytest.raises(ModelNotFound) as refused:
            scheduler.acquire("tinny")
        assert refused.value.suggestions == ("tiny:latest",)


def test_a_tag_that_is_moved_is_served_from_its_new_file(
    tmp_path: Path, store: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag that was moved is soon served from its new file, while the old file's runner is warm."""
    ollama_model(store, "registry.ollama.ai/library/tiny:latest", model)
    other = write_tiny_model(tmp_path / "other.bytes", seed=1).read_bytes()
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    with Scheduler(settings()) as scheduler:
        with scheduler.acquire("tiny") as lease:
            old = lease.runner
        ollama_model(store, "registry.ollama.ai/library/tiny:latest", other)

        def moved() -> bool:
            with scheduler.acquire("tiny") as lease:
                return lease.runner != old

        assert_soon(moved)
        assert moved()


def test_a_resolver_is_added_to_a_scheduler(tmp_path: Path, model: bytes) -> None:
    """A resolver is added to a scheduler by `scheduler.catalog`."""
    (tmp_path / "mine.gguf").write_bytes(model)
    with Scheduler(settings()) as scheduler:
        scheduler.catalog.add(Shelf(mine=tmp_path / "mine.gguf"))
        with scheduler.acquire("mine", num_ctx=128) as lease:
            assert lease.model == "mine"


def test_an_error_of_the_catalogs_is_one_of_ours(catalog: Catalog) -> None:
    """Errors of the catalog are `SchedulerError`s."""
    for name in ("nothing", "../nothing", "user/repo:Q1_0"):
        with pytest.raises(SchedulerError):
            catalog.find(name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"path": "/m/x|embedding"}, {"path": "/m/x", "embedding": True}),
        ({"path": "/m/x|/m/a"}, {"path": "/m/x", "adapters": "/m/a"}),
        ({"path": "/m/x|projector:/m/a"}, {"path": "/m/x", "projectors": "/m/a"}),
        ({"path": "/m/x", "adapters": "/m/a|/m/b"}, {"path": "/m/x", "adapters": ("/m/a", "/m/b")}),
        ({"path": "/m/x|", "adapters": "/m/a"}, {"path": "/m/x||/m/a"}),
        ({"path": "/m/x||", "adapters": "/m/a"}, {"path": "/m/x|", "adapters": "/|/m/a"}),
    ],
    ids=["embedding", "an adapter", "a projector", "two adapters", "at the end", "doubled"],
)
def test_u70_no_name_of_a_file_looks_like_another_part_of_an_identity(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    """A file's name may have what separates the parts of an identity: the models are two all the same."""
    assert ModelSpec("a", **one).id != ModelSpec("a", **other).id


def test_u70_every_identity_tells_its_parts() -> None:
    """Of all files with names of a few awkward characters, with and without adapters, no two have one identity."""
    names = ["/m" + "".join(each) for length in (1, 2, 3) for each in itertools.product("|/a", repeat=length)]
    paths = sorted({os.path.realpath(name) for name in names})
    adapters: list[tuple[str, ...]] = [(), *((path,) for path in paths)]
    specs = [ModelSpec("a", *each) for each in itertools.product(paths, adapters, [()], [False, True])]
    assert len({spec.id for spec in specs}) == len({(spec.path, spec.adapters, spec.embedding) for spec in specs})


class Crowded:
    """A resolver that lists so many names and finds none."""

    location = "a store"

    def __init__(self, count: int) -> None:
        self.listed = [
            f"organisation-{number % 97}/some-model-{number}-instruct:Q{number % 8}_K_M" for number in range(count)
        ]

    def find(self, name: str) -> None:
        return None

    def names(self) -> list[str]:
        return self.listed


def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the texts that are compared exactly from now on."""
    texts: list[str] = []

    def closest(word: str, possibilities: list[str], n: int) -> list[str]:
        texts.extend(possibilities)
        return get_close_matches(word, possibilities, n)

    monkeypatch.setattr("scheduler.models.catalog.difflib.get_close_matches", closest)
    return texts


@pytest.mark.parametrize("count", [100, 5000])
def test_u66_an_unknown_name_is_compared_with_a_few_names(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names there are, an unknown name is compared exactly with those alone that have most in common."""
    catalog, texts = Catalog([Crowded(count)]), compared(monkeypatch)
    with pytest.raises(ModelNotFound) as told:
        catalog.find("organisation-7/some-modle-7-instruct:Q7_K_M")
    assert told.value.suggestions[0] == "organisation-7/some-model-7-instruct:Q7_K_M"
    assert 0 < len(texts) <= MOST_COMPARED


def test_u66_what_is_closest_to_an_unknown_name_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is asked for again and again is compared once, and again when other names are listed."""
    now = [0.0]
    store = Crowded(100)
    catalog, texts = Catalog([store], clock=lambda: now[0]), compared(monkeypatch)
    for _ in range(3):
        with pytest.raises(ModelNotFound):
            catalog.find("some-model-8-instrukt")
        now[0] += 2 * LISTED_S
    assert 0 < len(texts) <= MOST_COMPARED
    store.listed = ["some-model-8-instruct"]
    with pytest.raises(ModelNotFound) as told:
        catalog.find("some-model-8-instrukt")
    assert told.value.suggestions == ("some-model-8-instruct",)


@pytest.mark.parametrize("wrong", ["mistral-7b", "qwen3:8", "Qwen-3:8b", "lama3.2:1b", "llama3.2:1b-instruct", "gemm"])
def test_u66_the_likest_names_are_those_of_a_comparison_with_all(wrong: str) -> None:
    """What is suggested is what a comparison with all of a thousand names finds."""
    kinds = ("mistral:7b", "qwen3:8b", "llama3.2:1b", "gemma3:4b", "phi4:mini", "user/repo:Q4_K_M")
    names = [f"{kind}-{number}" for number in range(200) for kind in kinds] + list(kinds)
    texts = {text for each in names for text in (each, each.partition(":")[0], each.rpartition("/")[2])}
    best = max(SequenceMatcher(None, text, wrong).ratio() for text in texts)
    found = KnownNames(names).closest(wrong)
    ratios = [
        SequenceMatcher(None, text, wrong.casefold()).ratio()
        for each in found
        for text in (each, each.partition(":")[0])
    ]
    assert found and max(ratios) >= best - 0.05
