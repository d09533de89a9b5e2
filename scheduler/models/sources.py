"""Where other programs keep models: folders of GGUF files, Ollama's store, the Hugging Face cache."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fsm.domain.options import Options
from scheduler.errors.exceptions import InvalidModel, ModelNotFound
from scheduler.models.catalog import Resolver, confined, confined_model
from scheduler.models.file_choice import (
    best_model,
    best_projector,
    is_gguf,
    is_model,
    is_projector,
    is_quantisation,
    own_projectors,
    stem_of,
    tag_of,
)
from scheduler.models.gguf_metadata import is_projector_for
from scheduler.models.model_spec import ModelSpec
from scheduler.models.ollama_model import chat_defaults, options_of, read_json, read_parameters

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo

HUB_MISSING = "the Hugging Face cache, were huggingface_hub installed (pip install 'loadmaster[hub]')"
OLLAMA_SYSTEM_STORE = "/usr/share/ollama/.ollama/models"  # of the service that Ollama's installer for Linux sets up

_GGUF = re.compile(r"\.gguf$", re.IGNORECASE)


def default_resolvers(folders: Iterable[str | Path], environment: Mapping[str, str] = os.environ) -> Sequence[Resolver]:
    """Return the resolvers of names: these folders, then Ollama's stores, then the Hugging Face cache.

    Where `OLLAMA_MODELS` is set, it names Ollama's only store.
    """
    if named := environment.get("OLLAMA_MODELS", "").strip():
        stores = [Path(named)]
    else:
        stores = []
        with suppress(RuntimeError):  # there is no home folder in containers that run as an unknown user
            stores.append(Path("~/.ollama/models").expanduser())
        if os.access(OLLAMA_SYSTEM_STORE, os.R_OK | os.X_OK):
            stores.append(Path(OLLAMA_SYSTEM_STORE))
    return (
        *(Folder(Path(folder)) for folder in folders),
        *(OllamaStore(store) for store in stores),
        HuggingFaceCache(),
    )


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder with GGUF files, also in folders of its own; a name is the path inside it, with or without `.gguf`.

    A split model has the name that its parts share. Hidden folders, projectors (`mmproj…`) and other files that belong
    to a model have no names. A projector comes with its model: the one that lies beside the model, where it has the
    model's name, or where there is no other model beside it (other quantisations are the same model).
    """

    root: Path

    @property
    def location(self) -> str:
        """Where it looks."""
        return f"the folder {self.root}"

    def find(self, name: str) -> ModelSpec | None:
        """Return the model of that name, or None."""
        stem = _GGUF.sub("", name)
        for path in (self.root / name, self.root / f"{stem}.gguf", self.root / f"{stem}.GGUF"):
            if is_gguf(path.name) and confined_model(self.root, path):
                return ModelSpec(stem, str(path), projectors=self._projectors(path))
        for ending in ("", "-00001-of-*"):
            for file in sorted(glob.glob(f"{glob.escape(str(self.root / stem))}{ending}.[gG][gG][uU][fF]")):
                if confined_model(self.root, Path(file)):
                    return ModelSpec(stem, file, projectors=self._projectors(Path(file)))
        return None

    def _projectors(self, model: Path) -> tuple[str, ...]:
        """Return the projector that lies beside a model, or above the folder of its quantisation, if it is its own."""
        if not is_model(model.name):
            return ()
        folders = [model.parent, *([model.parent.parent] if is_quantisation(model.parent.name) else [])]
        files: list[str] = []
        for folder in folders:
            if folder == self.root or self.root in folder.parents:
                with suppress(OSError):
                    files += [
                        (folder / file).relative_to(folders[-1]).as_posix() for file in sorted(os.listdir(folder))
                    ]
        name = model.relative_to(folders[-1]).as_posix()
        chosen = best_projector(own_projectors(files, name), name)
        if chosen is None or confined(self.root, path := folders[-1] / chosen) is None:
            return ()
        return (str(path),) if is_projector_for(str(path), str(model)) else ()

    def names(self) -> Iterator[str]:
        """Yield the names, folder by folder; raises OSError at the end where a folder cannot be listed."""
        failed: list[OSError] = []
        for folder, folders, files in os.walk(self.root, onerror=failed.append):
            folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
            for file in sorted(files):
                if is_model(file):
                    yield stem_of(Path(folder, file).relative_to(self.root).as_posix())
        if failed:
            raise failed[0]


# -- Ollama ------------------------------------------------------------------------------------------------------------

_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"  # for names that leave them out
_OLLAMA_NAME = re.compile(
    r"(?:(?:(?P<host>\w[\w.:-]{0,349})/)?(?P<namespace>\w[\w-]{0,79})/)?(?P<model>\w[\w.-]{0,79})(?::(?P<tag>\w[\w.-]{0,79}))?",
    re.ASCII,
)
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.ASCII)  # nothing else becomes part of a path (CVE-2024-37032)
_LAYER = "application/vnd.ollama.image."
_KINDS = ("model", "adapter", "projector", "params", "system", "messages", "template")  # of layers
_WITHOUT_EFFECT = frozenset({"license"})  # layers that nothing is said about
_MOST_LAYERS = 16  # of one kind; real models have one or two


@dataclass(frozen=True, slots=True)
class OllamaStore:
    """Models that Ollama has pulled or made, by the names that `ollama list` shows; `:latest` may be left out.

    Adapters, projectors, parameters, and what their chats begin with come with them; what has no effect here is told.
    """

    root: Path

    @property
    def location(self) -> str:
        """Where it looks."""
        return f"Ollama's store {self.root}"

    def find(self, name: str) -> ModelSpec | None:
        """Return the model in the manifest of that name, or None.

        Raises `InvalidModel` for a manifest that is not usable.
        """
        parts = _OLLAMA_NAME.fullmatch(name)
        if parts is None:
            return None
        place = (parts["host"] or _HOST, parts["namespace"] or _NAMESPACE, parts["model"], parts["tag"] or _TAG)
        manifest = confined(self.root, self.root.joinpath("manifests", *place))
        return None if manifest is None else self._read(name, manifest)

    def names(self) -> Iterator[str]:
        """Yield the names, with their tags."""
        for path in sorted(self.root.glob("manifests/*/*/*/*")):
            host, namespace, model, tag = path.parts[-4:]
            before = "" if (host, namespace) == (_HOST, _NAMESPACE) else f"{namespace}/"
            name = f"{before if host == _HOST else f'{host}/{namespace}/'}{model}:{tag}"
            # a folder that may not be read is reported when it is read
            if _OLLAMA_NAME.fullmatch(name) and not os.path.isdir(path):
                yield name

    def _read(self, name: str, manifest: Path) -> ModelSpec:
        content = read_json(manifest)
        layers = content.get("layers") if isinstance(content, dict) else None
        if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
            raise InvalidModel(str(manifest), "it is no manifest of Ollama's: it has no list of layers")
        kinds = {kind: [layer for layer in layers if layer.get("mediaType") == _LAYER + kind] for kind in _KINDS}
        if not kinds["model"]:
            raise InvalidModel(str(manifest), "it names no GGUF file, so it is for another engine than llama.cpp")
        if len(kinds["model"]) > 1:
            raise InvalidModel(str(manifest), "it names several model files, which llama.cpp cannot put together")
        if len(kinds["projector"]) > 1:
            raise InvalidModel(str(manifest), "it names several projectors, and llama.cpp loads one")
        if any(len(layers) > _MOST_LAYERS for layers in kinds.values()):
            raise InvalidModel(str(manifest), f"it names more than {_MOST_LAYERS} files of one kind")
        files = {kind: tuple(self._blob(manifest, layer) for layer in layers) for kind, layers in kinds.items()}
        paths = {kind: [*map(Path, files[kind])] for kind in _KINDS}
        params = read_parameters(paths["params"])
        others = {str(layer.get("mediaType")).rpartition(".")[2] for layer in layers} - {*_KINDS} - _WITHOUT_EFFECT
        chat = chat_defaults(
            params,
            systems=paths["system"],
            messages=paths["messages"],
            templates=paths["template"],
            others=sorted(others),
        )
        options: dict[str, Any] = options_of(params, manifest)
        return ModelSpec(
            name, files["model"][0], files["adapter"], files["projector"], options=Options(**options), chat=chat,
            manifest=str(manifest),
        )  # fmt: skip

    def _blob(self, manifest: Path, layer: Mapping[str, object]) -> str:
        digest = layer.get("digest")
        found = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if found is None:
            raise InvalidModel(str(manifest), f"a layer has no sha256 digest, but {str(digest)[:80]!r}")
        blob = confined(self.root, self.root / "blobs" / f"sha256-{found[1]}")
        if blob is None:
            raise InvalidModel(str(manifest), f"the file of its layer sha256-{found[1]} is missing; pull it again")
        return str(blob)


# -- Hugging Face ------------------------------------------------------------------------------------------------------

_HUB_NAME = re.compile(
    r"(?:hf\.co/|huggingface\.co/)?(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>.+\.gguf)|:(?P<tag>[\w.-]+))?",
    re.ASCII | re.IGNORECASE,
)
_KNOWN_NAMES = 1024  # names kept; beyond it all are forgotten
_Stamp = tuple[tuple[int, int] | None, ...]


class _Scanned(NamedTuple):
    """A repository at the last scan, and the files and folders that show whether it has changed since."""

    repository: CachedRepoInfo
    watched: tuple[Path, ...]
    stamp: _Stamp


class _Known(NamedTuple):
    """The model that a name stood for, and the files that show whether it still does."""

    spec: ModelSpec
    watched: tuple[Path, ...]
    stamp: _Stamp


class HuggingFaceCache:
    """Models that were downloaded from the Hugging Face hub: "user/repo", "user/repo:Q8_0", "user/repo/file.gguf".

    Only downloaded files count, of the version that `main` was when they were downloaded. A projector comes with its
    model.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root  # None: huggingface_hub's own folder
        self._known: dict[str, _Known] = {}
        self._scanned: Mapping[str, _Scanned] = {}  # by id, as of the last scan; replaced, never changed

    @property
    def location(self) -> str:
        """Where it looks."""
        return f"the Hugging Face cache {self._folder()}" if hub_is_installed() else ""

    def find(self, name: str) -> ModelSpec | None:
        """Return the model, or None; raises `ModelNotFound` with other names of the repository where it has others."""
        asked = _HUB_NAME.fullmatch(name)
        if asked is None:
            return None
        if not hub_is_installed():
            raise ModelNotFound(name, (HUB_MISSING,))
        known = self._known.get(name)
        if known is not None and known.stamp == _stamp(known.watched):
            return known.spec
        self._known.pop(name, None)
        scanned = self._scanned.get(asked["repo"])
        if scanned is not None and scanned.stamp == _stamp(scanned.watched):
            with suppress(ModelNotFound):  # a missing file may have come since, into a folder of its own
                return self._choose(name, scanned.repository, asked["file"], asked["tag"])
        for repository in self._repositories():
            if repository.repo_id == asked["repo"]:
                return self._choose(name, repository, asked["file"], asked["tag"])
        return None

    def names(self) -> Iterator[str]:
        """Yield the shortest name of each model."""
        if hub_is_installed():
            for repository in sorted(self._repositories(), key=lambda one: one.repo_id):
                yield from _hub_names(repository.repo_id, _files(_revision(repository)))

    def _folder(self) -> Path:
        # imported here, since only this method needs it, and it takes 0.1 s
        from huggingface_hub.constants import HF_HUB_CACHE

        return self._root or Path(HF_HUB_CACHE)

    def _repositories(self) -> Iterable[CachedRepoInfo]:
        from huggingface_hub import CacheNotFound, scan_cache_dir

        try:
            found = scan_cache_dir(self._folder()).repos
        except (CacheNotFound, ValueError):  # there is no cache, or something else in its place
            return ()
        repositories = [each for each in found if each.repo_type == "model" and each.revisions]
        scanned = {}
        for each in repositories:
            watched = (each.repo_path / "refs" / "main", each.repo_path / "snapshots", _revision(each).snapshot_path)
            scanned[each.repo_id] = _Scanned(each, watched, _stamp(watched))
        self._scanned = scanned
        return repositories

    def _choose(self, name: str, repository: CachedRepoInfo, file: str | None, tag: str | None) -> ModelSpec:
        revision = _revision(repository)
        files = _files(revision)
        chosen = best_model([*files], tag) if file is None else file
        if chosen not in files or not confined_model(self._folder(), files[chosen]):
            raise ModelNotFound(
                name,
                (f"the Hugging Face cache {self._folder()}, where {repository.repo_id} is, but there is no such file",),
                tuple(_hub_names(repository.repo_id, files)),
            )
        path = files[chosen]
        spec = ModelSpec(name, str(path), projectors=self._projectors(files, chosen))
        watched = (repository.repo_path / "refs" / "main", revision.snapshot_path, path)
        if len(self._known) >= _KNOWN_NAMES:
            self._known.clear()
        self._known[name] = _Known(spec, watched, _stamp(watched))
        return spec

    def _projectors(self, files: Mapping[str, Path], model: str) -> tuple[str, ...]:
        there = [each for each in files if is_projector(each) and confined(self._folder(), files[each])]
        chosen = best_projector(there, model)
        return () if chosen is None else (str(files[chosen]),)


def hub_is_installed() -> bool:
    """Return whether huggingface_hub is installed, which reads the Hugging Face cache."""
    return importlib.util.find_spec("huggingface_hub") is not None


def _revision(repository: CachedRepoInfo) -> CachedRevisionInfo:
    """Return the version that `main` was when it was downloaded, else the youngest."""
    return max(repository.revisions, key=lambda each: ("main" in each.refs, each.last_modified, each.commit_hash))


def _files(revision: CachedRevisionInfo) -> dict[str, Path]:
    """Return the GGUF files of a version by their path in the repository."""
    found = {each.file_path.relative_to(revision.snapshot_path).as_posix(): each.file_path for each in revision.files}
    return {name: found[name] for name in sorted(found) if is_gguf(name)}


def _hub_names(repository: str, files: Iterable[str]) -> list[str]:
    """Return the shortest name of each model among a repository's files."""
    models = [file for file in files if is_model(file)]
    if len(models) == 1:
        return [repository]
    count = Counter(map(tag_of, models))
    return [
        f"{repository}:{tag}"
        if (tag := tag_of(file)) and count[tag] == 1 and best_model(models, tag) == file
        else f"{repository}/{file}"
        for file in models
    ]


def _stamp(paths: Iterable[Path]) -> _Stamp:
    """Return a value that changes when one of these files is written again, or deleted."""

    def one(path: Path) -> tuple[int, int] | None:
        try:
            status = path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    return tuple(map(one, paths))
