"""What the files of a model tell of it: sizes, quantisation, template, capabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scheduler import InvalidModel, ModelNotFound, ModelSpec
from scheduler.models.gguf_header import LONGEST_TEXT_BYTES, read_text
from scheduler.models.model_card import TEMPLATE, ModelCard, read_card, shown_count
from tests.support.gguf_bytes import a_file, a_model, array, number, tensor, words
from tests.support.tiny_models import TEMPLATE_WITH_TOOLS, write_tiny_model
from tests.support.written_projector import write_projector


def card_of(path: Path, content: bytes, **parts: Any) -> ModelCard:
    path.write_bytes(content)
    return read_card(ModelSpec("m", str(path), **parts))


def test_a_card_tells_size_template_and_metadata(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", template=TEMPLATE_WITH_TOOLS, fills_gaps=True)
    card = read_card(ModelSpec("m", str(path)))
    assert (card.architecture, card.quantisation, card.template) == ("llama", "F32", TEMPLATE_WITH_TOOLS)
    assert card.file_bytes == path.stat().st_size
    assert 4 * card.parameters < card.file_bytes < 4 * card.parameters + 20_000  # all tensors are 32-bit floats
    assert card.values["llama.embedding_length"] == 64 and card.values[TEMPLATE] is None
    assert card.capabilities == ("completion", "tools", "insert")


@pytest.mark.parametrize(
    ("template", "capabilities"),
    [
        ("{{ messages }}", ("completion",)),
        ("{% if tools %}{{ tools }}{% endif %}", ("completion", "tools")),
        ("{{ toolset }}", ("completion",)),
        ("{% if enable_thinking %}{% endif %}", ("completion", "thinking")),
        ("{{ reasoning_effort }}{{ tools }}", ("completion", "tools", "thinking")),
    ],
)
def test_a_template_tells_what_chats_may_have(tmp_path: Path, template: str, capabilities: tuple[str, ...]) -> None:
    """What the template never mentions cannot reach the model."""
    assert card_of(tmp_path / "m.gguf", a_model(words(TEMPLATE, template))).capabilities == capabilities


@pytest.mark.parametrize(("pooling", "able"), [(1, "embedding"), (3, "embedding"), (4, "rerank")])
def test_a_model_that_pools_is_for_vectors_or_scores(tmp_path: Path, pooling: int, able: str) -> None:
    content = a_model(number("llama.pooling_type", pooling), words(TEMPLATE, "{{ tools }}"))
    assert card_of(tmp_path / "m.gguf", content).capabilities == (able,)


def test_a_projector_tells_what_else_is_taken(tmp_path: Path) -> None:
    projector = write_projector(tmp_path / "mmproj.gguf", 64)
    model = write_tiny_model(tmp_path / "m.gguf")
    card = read_card(ModelSpec("m", str(model), projectors=(str(projector),)))
    assert card.capabilities == ("completion", "vision")
    assert card.file_bytes == model.stat().st_size + projector.stat().st_size


@pytest.mark.parametrize(("kind", "name"), [(15, "Q4_K_M"), (0, "F32"), (1, "F16"), (1024, "F32"), (9999, "F32")])
def test_the_quantisation_is_the_one_that_the_file_names(tmp_path: Path, kind: int, name: str) -> None:
    """A type that is guessed or not known says nothing: then the type of most bytes counts."""
    content = a_model(number("general.file_type", kind), blocks=1, tensors=[tensor("blk.0.w", sizes=(8, 1))])
    assert card_of(tmp_path / "m.gguf", content).quantisation == name


def test_the_parts_of_a_split_model_count_together(tmp_path: Path) -> None:
    split = number("split.count", 2), number("split.tensors.count", 2)
    tensors = [tensor("blk.0.w", sizes=(8,))]
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(a_model(*split, number("split.no", 0), blocks=2, tensors=tensors))
    second = a_file([*split, number("split.no", 1)], [tensor("blk.1.w", sizes=(16,))])
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(second)
    card = read_card(ModelSpec("m", str(tmp_path / "m-00001-of-00002.gguf")))
    assert card.parameters == 24
    assert card.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 5, 256, 257, 70_000, LONGEST_TEXT_BYTES])
def test_a_text_of_any_usual_length_is_read(tmp_path: Path, size: int) -> None:
    text = "é" * (size // 2) + "a" * (size % 2)
    (tmp_path / "m.gguf").write_bytes(a_model(words("before", "x"), words("a.text", text), words("behind", "y")))
    assert read_text(str(tmp_path / "m.gguf"), "a.text") == text


def test_what_is_no_text_is_none(tmp_path: Path) -> None:
    """A number, an array, a key that is not there, and a text that is far too long."""
    path = tmp_path / "m.gguf"
    long = words("long", "a" * (LONGEST_TEXT_BYTES + 1))
    path.write_bytes(a_model(number("number", 5), array("array", 8, 0), long))
    assert [read_text(str(path), key) for key in ("number", "array", "nothing", "long")] == [""] * 4


def test_a_file_that_is_gone_or_changed_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut short between the look at its header and the look at its text."""
    path = tmp_path / "m.gguf"
    path.write_bytes(a_model(words("a.text", "a" * 1000)))
    from scheduler.models import gguf_header

    header = gguf_header.read_header(str(path))
    monkeypatch.setattr(gguf_header, "read_header", lambda _: header)
    path.write_bytes(b"GGUF")
    with pytest.raises(InvalidModel):
        read_text(str(path), "a.text")
    path.unlink()
    with pytest.raises(InvalidModel):
        read_text(str(path), "a.text")
    monkeypatch.undo()
    with pytest.raises(ModelNotFound):
        read_text(str(path), "a.text")


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"), (999, "999"), (1000, "1K"), (107_456, "107K"), (1_000_000, "1M"), (494_032_768, "494.03M"),
        (7_615_616_512, "7.6B"), (70_000_000_000, "70B"),
    ],
)  # fmt: skip
def test_numbers_of_parameters_are_shown_as_ollama_shows_them(count: int, shown: str) -> None:
    assert shown_count(count) == shown
