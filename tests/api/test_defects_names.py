"""Names of models when a resolver or a folder fails: the failure is reported, and the other resolvers still work."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from rich.progress import Progress

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceSample
from fsm.messages.events import Sampled
from fsm.state.core_config import CoreConfig
from scheduler import ModelNotFound, ModelSpec, Scheduler, Settings
from scheduler.cli import models as command
from scheduler.engines.llama import LlamaEngine
from scheduler.models.catalog import Catalog
from scheduler.models.sources import Folder, HuggingFaceCache, OllamaStore, default_resolvers
from tests.support.stores import PROJECTOR, hub_repository, ollama_model
from tests.support.tiny_models import write_tiny_model

GIB = 2**30


class Broken:
    """A resolver whose disk is gone."""

    location = "the attic"

    def find(self, name: str) -> ModelSpec | None:
        """Fail."""
        raise OSError("the stairs are gone")

    def names(self) -> Iterable[str]:
        """Yield one name, and fail."""
        yield "attic-chat"
        raise RuntimeError("the light went out")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with one model."""
    (tmp_path / "models").mkdir()
    write_tiny_model(tmp_path / "models" / "chat.gguf")
    return tmp_path / "models"


@pytest.fixture
def public() -> Iterator[Path]:
    """Yield a folder that every user may look into, unlike `tmp_path`."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    subprocess.run(["chmod", "-R", "u+rwX", str(path)], check=True)
    shutil.rmtree(path)


def rows(catalog: Catalog) -> list[command.Row]:
    """Return the rows that the command would list."""
    core = Core(CoreConfig())
    core.step(0.0, Sampled((DeviceSample(HOST, "cpu", "host", 8 * GIB, 8 * GIB),)))
    return list(command.read_rows(catalog, core, LlamaEngine(), Progress(disable=True)))


def as_somebody_else(script: str, *arguments: Path) -> str:
    """Run a script's `main` as a user without rights, after its imports; return what it prints."""
    drop = "main(); print('=' * 9)\nif os.getuid() == 0: os.setuid(65534)\nmain()"
    text = f"import os, sys\n{script}\n{drop}"
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "LOADMASTER_GPUS": "off", "COLUMNS": "300"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("=" * 9)[2]


# -- a place that fails ------------------------------------------------------------------------------------------------


def test_a_resolver_that_raises_does_not_hide_what_others_know(folder: Path) -> None:
    """A resolver that raises does not keep the next resolver from being asked."""
    catalog = Catalog([Broken(), Folder(folder)])
    assert catalog.find("chat").path == str(folder / "chat.gguf")


def test_a_resolver_that_raises_is_named_where_nobody_knows_a_name(folder: Path) -> None:
    """A name that no resolver knows is refused with the failure of the one that raised, and with suggestions."""
    with pytest.raises(ModelNotFound) as caught:
        Catalog([Broken(), Folder(folder)]).find("chat2")
    failed, other = caught.value.looked_in
    assert failed.startswith("the attic") and "OSError: the stairs are gone" in failed
    assert (other, caught.value.suggestions) == (f"the folder {folder}", ("chat",))
    assert failed in str(caught.value)


def test_a_place_that_cannot_be_listed_is_a_row_of_its_own(folder: Path) -> None:
    """A resolver that fails while it lists has a row with its problem, beside the names that were listed."""
    first, chat, broken = rows(Catalog([Broken(), Folder(folder)]))
    assert (first.name, first.problem) == ("attic-chat", "OSError: the stairs are gone")
    assert (broken.name, broken.place, broken.problem) == ("", "the attic", "RuntimeError: the light went out")
    assert (chat.name, chat.problem) == ("chat", "")


def test_a_resolver_that_raises_costs_a_scheduler_nothing(folder: Path) -> None:
    """A scheduler finds a name that another resolver knows although one raises."""
    with Scheduler(Settings(gpus=False, models=folder)) as scheduler:
        scheduler.catalog.add(Broken())
        assert scheduler.fit("chat").fits
        with pytest.raises(ModelNotFound):
            scheduler.fit("unknown-name")


def test_a_folder_that_may_not_be_searched_does_not_break_ollamas_store(public: Path) -> None:
    """Models in a folder that may be listed but not entered are listed with the reason, and others are found."""
    store = public / "ollama"
    model = write_tiny_model(public / "tiny.bytes").read_bytes()
    for name in ("good:latest", "bad:latest"):
        ollama_model(store, f"registry.ollama.ai/library/{name}", model)
    subprocess.run(["chmod", "-R", "a+rX", str(public)], check=True)
    (store / "manifests/registry.ollama.ai/library/bad").chmod(0o744)
    if os.getuid() != 0:
        (store / "manifests/registry.ollama.ai/library/bad").chmod(0o644)
    told = as_somebody_else(
        "import scheduler.cli.main as cli\nfrom scheduler import Catalog, ModelNotFound\n"
        "from scheduler.models.sources import OllamaStore\nfrom pathlib import Path\n"
        "os.environ['OLLAMA_MODELS'] = sys.argv[1]\n"
        "def main():\n"
        "    assert cli.main(['models']) == 0\n"
        "    for name in ('typo', 'bad'):\n"
        "        try: Catalog([OllamaStore(Path(sys.argv[1]))]).find(name)\n"
        "        except ModelNotFound as error: print(error)\n",
        store,
    )
    lines = {line.split()[0]: line for line in told.splitlines() if line.split()}
    assert lines["good:latest"].rstrip().endswith("fits")
    assert "cannot be read: PermissionError" in lines["bad:latest"]
    typo, bad = (line for line in told.splitlines() if line.startswith("there is no model"))
    assert "PermissionError" not in typo and "PermissionError" in bad


def test_without_a_home_the_store_in_it_is_left_out(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """Without a home folder the store in it is left out, as in containers."""

    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    places = [resolver.location for resolver in default_resolvers([folder])]
    assert places[0] == f"the folder {folder}" and not any(".ollama/models" in each for each in places[:-2])
    with Scheduler(Settings(gpus=False, models=folder, lock_folder=tmp_path)) as scheduler:
        assert scheduler.fit("chat").fits


# -- the Hugging Face cache --------------------------------------------------------------------------------------------


def test_a_repository_that_cannot_be_read_is_named(public: Path) -> None:
    """A repository that cannot be read is named where it may hide a model."""
    for name in ("user/good", "user/bad"):
        hub_repository(public / "hub", name, {"m.gguf": b"GGUF"})
    subprocess.run(["chmod", "-R", "a+rX", str(public)], check=True)
    (public / "hub/models--user--bad/snapshots").chmod(0o700 if os.getuid() == 0 else 0)
    told = as_somebody_else(
        "from pathlib import Path\nfrom scheduler import Catalog, ModelNotFound\n"
        "from scheduler.models.sources import HuggingFaceCache\n"
        "def main():\n"
        "    catalog = Catalog([HuggingFaceCache(Path(sys.argv[1]))])\n"
        "    unlisted = {}\n"
        "    print(list(catalog.listing(unlisted)), unlisted)\n"
        "    try: print(catalog.find('user/good'))\n"
        "    except ModelNotFound as error: print(error)\n",
        public / "hub",
    )
    assert told.count("PermissionError") == 2 and told.count("models--user--bad") == 2


def counting(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that grows by one with each scan of the whole cache."""
    scans: list[None] = []
    scan = huggingface_hub.scan_cache_dir

    def counted(*arguments: Path) -> huggingface_hub.HFCacheInfo:
        scans.append(None)
        return scan(*arguments)

    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", counted)
    return scans


def test_the_hubs_cache_is_scanned_once_for_all_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing the cache scans it once for all of its names, and not once a name."""
    for number in range(4):
        hub_repository(tmp_path, f"user/r{number}", {"m-Q4_0.gguf": b"4", "m-Q8_0.gguf": b"8"})
    scans = counting(monkeypatch)
    cache = HuggingFaceCache(tmp_path)
    found = [cache.find(name) for name in cache.names()]
    assert len(found) == 8 and all(found)
    assert len(scans) == 1


def test_what_a_scan_did_not_see_is_found(tmp_path: Path) -> None:
    """A file, a repository and a version that came after the scan are found."""
    hub_repository(tmp_path, "user/repo", {"m-Q4_0.gguf": b"4"})
    cache = HuggingFaceCache(tmp_path)
    assert list(cache.names()) == ["user/repo"]
    hub_repository(tmp_path, "user/repo", {"m-Q8_0.gguf": b"8"})
    hub_repository(tmp_path, "user/other", {"m.gguf": b"o"})
    assert cache.find("user/repo:Q8_0") and cache.find("user/other")
    newer = hub_repository(tmp_path, "user/other", {"m.gguf": b"n"}, commit="f" * 40)
    spec = cache.find("user/other")
    assert spec is not None and spec.path == str(newer / "m.gguf")


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["MiX.GgUf", "low.gguf", "UP.GGUF", "split-00001-of-00002.GgUf", "in/ner.GGuf", "o[d]d.gGUF"]
)
def test_every_name_that_a_folder_lists_is_found_in_it(tmp_path: Path, file: str) -> None:
    """Every name that a folder lists is found in it, whatever the case of its ending."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    (name,) = Folder(tmp_path).names()
    spec = Folder(tmp_path).find(name)
    assert spec is not None and spec.path == str(tmp_path / file)


def test_ollamas_models_with_several_projectors_are_refused(tmp_path: Path) -> None:
    """An Ollama model with several projectors is refused, because the engine loads only one."""
    ollama_model(tmp_path, "registry.ollama.ai/library/a:latest", b"m", (PROJECTOR, b"1"), (PROJECTOR, b"2"))
    with pytest.raises(Exception, match="several projectors"):
        OllamaStore(tmp_path).find("a")
