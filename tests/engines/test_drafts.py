"""Tokens guessed ahead, by a small model or by the text itself: the same answers, and memory that is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fsm.domain.options import Options
from scheduler import InvalidModel, ModelSpec, Scheduler, UnsupportedOption
from scheduler.engines import llama
from scheduler.engines.llama_options import USUAL_DRAFT, resolve
from scheduler.engines.llama_sizing import estimate
from scheduler.models.gguf_metadata import read_metadata
from tests.support.leaks import no_leaks
from tests.support.models import a_model
from tests.support.real import settings
from tests.support.tiny_models import byte_tokens, write_tiny_model
from tests.tools.memory.measure import running

LETTERS_ONLY = {token: -40.0 for token in byte_tokens() if not "a" <= token <= "z"}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
A_MODEL = a_model()
STORY = "Once upon a time there was a king who had three sons. "


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    model = write_tiny_model(folder / "m.gguf", layers=4, width=256, context=2048, biases=LETTERS_ONLY)
    draft = write_tiny_model(folder / "d.gguf", width=128, context=1024, biases=LETTERS_ONLY, seed=3)
    return {"model": str(model), "draft": str(draft)}


def test_an_answer_is_the_same_with_and_without_guesses(served_by: str, files: dict[str, str]) -> None:
    """By default a draft model guesses, and another number of guesses is another load; the tokens are the model's."""
    plain = ModelSpec("m", files["model"])
    drafted = replace(plain, draft=files["draft"])
    ways: list[tuple[ModelSpec, int | None, int]] = [
        (plain, None, 0), (plain, 1, 1), (drafted, None, USUAL_DRAFT), (drafted, 2, 2), (drafted, 0, 0),
    ]  # fmt: skip
    answers, guessed = [], []
    with no_leaks(), Scheduler(settings()) as scheduler:
        for model, asked, has in ways:
            with scheduler.acquire(model, num_ctx=512, num_parallel=2, draft_num_predict=asked) as lease:
                answer = lease.complete(STORY, **GREEDY)
                (runner,) = [one for one in scheduler.status().runners if one.id == lease.runner]
                assert runner.options.draft_num_predict == has
                answers.append(str(answer))
                guessed.append(answer.raw["timings"].get("draft_n", 0) > 0)
            with scheduler.acquire(model, num_ctx=512) as lease:
                assert lease.runner == runner.id  # a request that names no number takes what there is
    assert len(answers[0]) == 24 and len({*answers}) == 1
    assert guessed == [has > 0 for _, _, has in ways]


def test_what_a_draft_model_takes_is_what_its_runner_reports(served_by: str, files: dict[str, str]) -> None:
    """Its weights, its cache and its buffers are within a tenth of what they add to a real load."""
    options, taken = Options(num_ctx=2048, num_parallel=2), []
    for draft in ("", files["draft"]):
        with running(ModelSpec("m", files["model"], draft=draft), options) as (process, _, _):
            taken.append(sum(each.bytes for each in process.buffers))
    info = replace(read_metadata(files["model"]), draft=read_metadata(files["draft"]))
    with_draft = estimate(info, resolve(info, options))
    without = estimate(info, resolve(info, replace(options, draft_num_predict=0)))
    added = with_draft.projectors_bytes - without.projectors_bytes
    assert without.projectors_bytes == 0 and abs(added - (taken[1] - taken[0])) < added / 10


def test_guesses_are_counted_among_the_results() -> None:
    """Logits are kept of each token that is guessed, whether or not there is a draft model."""
    asked = Options(num_parallel=2)
    plain, guessing = (estimate(A_MODEL, resolve(A_MODEL, replace(asked, draft_num_predict=n))) for n in (0, 8))
    assert guessing.process_bytes - plain.process_bytes == 8 * 2 * 4 * A_MODEL.vocabulary


@pytest.mark.parametrize("change", [{"embedding": True}, {"projectors_bytes": 5}])
def test_where_the_engine_cannot_guess_nothing_is_guessed(change: dict[str, Any]) -> None:
    """An embedder goes on with no text, and llama.cpp guesses none behind images: nothing is loaded for it."""
    info = replace(A_MODEL, draft=A_MODEL, **change)
    resolved = resolve(info, Options(draft_num_predict=8))
    assert resolved.draft_num_predict == 0
    assert estimate(info, resolved) == estimate(replace(info, draft=None), resolved)


def test_a_draft_model_has_the_tokens_of_its_model(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp would load it, and guess nothing with it; a number that is none is refused too."""
    monkeypatch.setattr(llama, "MOST_OTHER_TOKENS", 2)
    other = write_tiny_model(tmp_path / "sees.gguf", sees=True)  # three more
    with no_leaks(), Scheduler(settings()) as scheduler:
        with pytest.raises(InvalidModel, match="has other tokens than"):
            scheduler.acquire(ModelSpec("m", files["model"], draft=str(other)))
        for number in (-1, 65, True, "4"):
            with pytest.raises(UnsupportedOption, match="draft_num_predict"):
                scheduler.acquire(files["model"], draft_num_predict=number)  # type: ignore[arg-type]  # some are none
        model = ModelSpec("m", files["model"])
        assert len({model.id, replace(model, draft=files["draft"]).id, replace(model, draft=str(other)).id}) == 3
