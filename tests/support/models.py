"""Metadata of models without files, as an inspection would find them."""

from __future__ import annotations

from scheduler.models.model_info import ModelInfo

MIB = 2**20


def a_model(
    layers_bytes: tuple[int, ...] = (2 * MIB,) * 4,
    *,
    architecture: str = "llama",
    context_trained: int = 8192,
    embedding: bool = False,
    vision: bool = False,
    head_length: int = 16,
) -> ModelInfo:
    """Return the metadata of a small model of the llama family; heads of 32 may have quantised caches."""
    return ModelInfo(
        architecture=architecture,
        context_trained=context_trained,
        embedding_length=64,
        feed_forward_length=128,
        vocabulary=256,
        heads=4,
        heads_kv=(2,) * len(layers_bytes),
        key_length=head_length,
        value_length=head_length,
        sliding_window=0,
        layers_bytes=layers_bytes,
        input_bytes=MIB,
        output_bytes=MIB,
        file_bytes=sum(layers_bytes) + 2 * MIB,
        embedding=embedding,
        vision=vision,
    )
