"""Stores of models on disk, laid out as their programs lay them out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

MODEL, ADAPTER, PROJECTOR, PARAMS, TEMPLATE, LICENSE = (
    f"application/vnd.ollama.image.{kind}"
    for kind in ("model", "adapter", "projector", "params", "template", "license")
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_blob(store: Path, content: bytes) -> str:
    """Put a file into an Ollama store; return its digest."""
    digest = hashlib.sha256(content).hexdigest()
    blobs = store / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / f"sha256-{digest}").write_bytes(content)
    return f"sha256:{digest}"


def write_manifest(store: Path, name: str, content: object) -> Path:
    """Write the manifest of a full name (host/namespace/model:tag) in an Ollama store; return the file."""
    path = store / "manifests" / Path(*name.replace(":", "/").split("/"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def ollama_model(store: Path, name: str, model: bytes, *others: tuple[str, bytes]) -> Path:
    """Put a model with layers of other kinds into an Ollama store; return its manifest."""
    layers = [(MODEL, model), (TEMPLATE, b"{{ .Prompt }}"), *others, (LICENSE, b"MIT")]
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": write_blob(store, b'{"model_format":"gguf"}'),
            "size": 23,
        },
        "layers": [
            {"mediaType": kind, "digest": write_blob(store, content), "size": len(content)} for kind, content in layers
        ],
    }
    return write_manifest(store, name, manifest)


def blob_of(store: Path, content: bytes) -> str:
    """Return where an Ollama store keeps a file with this content."""
    return str(store / "blobs" / f"sha256-{hashlib.sha256(content).hexdigest()}")


def hub_repository(
    cache: Path, name: str, files: Mapping[str, bytes], *, commit: str = COMMIT, ref: str | None = "main"
) -> Path:
    """Put files of a repository into a Hugging Face cache, as the hub's client downloads them; return the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return snapshot
