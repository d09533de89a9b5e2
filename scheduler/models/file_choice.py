"""Which file of a repository or folder a name stands for, by the files' names, as llama.cpp chooses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from scheduler.models.model_spec import FIRST_PART

DEFAULT_QUANTISATIONS = ("Q4_K_M", "Q8_0")  # of a repository that has several; else its first model counts

# Parts of the names of files that belong to a model and are none: importance matrices, and models for drafts.
_BESIDE = ("imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_LATER_PART = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_GGUF = re.compile(r"\.gguf$", re.IGNORECASE)
_PROJECTOR = re.compile(r"mmproj[^/]*\.gguf$", re.IGNORECASE)
_QUANTISATION = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|[A-Z]*FP(?:4|8|16)\w*|BF16|F16|F32))$", re.IGNORECASE
)
_BITS = re.compile(r"\d+")


def is_gguf(file: str) -> bool:
    """Return whether a file's name ends as that of a GGUF file."""
    return bool(_GGUF.search(file))


def is_model(file: str) -> bool:
    """Return whether a file is a model by its name, or the first part of one."""
    name = file.rpartition("/")[2]
    return is_gguf(name) and not _LATER_PART.search(name) and not is_projector(name) and not _is_beside(name)


def is_projector(file: str) -> bool:
    """Return whether a file is a projector by its name."""
    return bool(_PROJECTOR.search(file))


def stem_of(file: str) -> str:
    """Return a file's name without its ending, and without that of a part."""
    return FIRST_PART.sub("", file) if FIRST_PART.search(file) else _GGUF.sub("", file)


def tag_of(file: str) -> str:
    """Return the quantisation that a file's name ends in, or its folder's; empty if neither does."""
    stem = stem_of(file)
    found = _QUANTISATION.search(stem) or _QUANTISATION.search(stem.rpartition("/")[0])
    return found[1].upper() if found else ""


def base_of(file: str) -> str:
    """Return the name that the quantisations of a model share, in small letters."""
    return _QUANTISATION.sub("", stem_of(file.rpartition("/")[2])).casefold()


def best_model(files: Sequence[str], tag: str | None = None) -> str | None:
    """Return the model to load of a repository's files; None if no file fits.

    1. The first file with the quantisation `tag` in its name, before a `.` or `-`: `Q4_K_XL` finds `UD-Q4_K_XL` too.
    2. The first file in a folder of that name.
    3. Where no `tag` is named, the first with one of the usual quantisations, else the first model.
    """
    models = [file for file in files if is_model(file)]
    for each in DEFAULT_QUANTISATIONS if tag is None else (tag,):
        pattern = re.compile(rf"{re.escape(each)}[.-]", re.IGNORECASE)
        if found := [file for file in models if pattern.search(file)]:  # 1
            return found[0]
        if found := [file for file in models if tag_of(file) == each.upper()]:  # 2
            return found[0]
    return models[0] if models and tag is None else None  # 3


def best_projector(files: Iterable[str], model: str) -> str | None:
    """Return the projector to load with a model; None if none of these files fits.

    It lies in the model's folder or in one that holds it. The closest one counts, then the one with the bits that are
    closest to the model's, then one in F16, then the first.
    """
    folder, bits = model.split("/")[:-1], _bits_of(model)
    above = [file for file in files if is_projector(file) and file.split("/")[:-1] == folder[: file.count("/")]]
    key = {file: (-file.count("/"), abs(_bits_of(file) - bits), tag_of(file) != "F16", file) for file in above}
    return min(above, key=lambda file: key[file], default=None)


def own_projectors(files: Sequence[str], model: str) -> list[str]:
    """Return the projectors among a folder's files that are a model's own.

    These are the projectors with the model's name in theirs, without its quantisation, unless another model's longer
    name is in it too. If there are none, all projectors without any model's name are, unless the folder has other
    models.
    """
    bases = {base_of(file) for file in (model, *files) if is_model(file)}
    named = {file: _longest_in(bases, file) for file in files if is_projector(file)}
    own = [file for file, base in named.items() if base == base_of(model)]
    return own if own or len(bases) > 1 else [*named]


def _longest_in(bases: Iterable[str], projector: str) -> str:
    """Return the longest of some names that is in a projector's, as a whole; empty where none is."""
    stem = stem_of(projector.rpartition("/")[2]).casefold().replace("mmproj", "")
    found = [base for base in bases if re.search(rf"(?:^|[-._]){re.escape(base)}(?:[-._]|$)", stem)]
    return max(found, key=len, default="")


def is_quantisation(folder: str) -> bool:
    """Return whether a folder has the name of a quantisation, as folders of large models' parts have."""
    return bool(tag_of(f"{folder}/"))


def _bits_of(file: str) -> int:
    found = _BITS.search(tag_of(file))
    return int(found[0]) if found else 0


def _is_beside(name: str) -> bool:
    return any(part in name for part in _BESIDE)
