"""Tiny GGUF models that llama.cpp loads and serves for real: random weights, byte tokens, a few hundred kilobytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy
from numpy.typing import NDArray

HEADS = 4
HEADS_KV = 2
END = "<|end|>"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

AROUND_IMAGES = ("ĊĊ", "<fake_token_around_image>", "<global-img>")

# It describes tools, and puts a call of one between two signs that stand for nothing else.
CALL = "@"
TEMPLATE_WITH_TOOLS = """\
{%- for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}
{%- for message in messages %}{{ message.role }}
{% if message.tool_calls %}{% set call = message.tool_calls[0].function -%}
@{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}@
{%- else %}{{ message.content }}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}assistant
{% endif %}"""


def byte_tokens() -> list[str]:
    """The 256 bytes in the alphabet of GPT-2, in byte order: printable bytes stand for themselves, others move up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {byte: 256 + place for place, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


def write_tiny_model(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    seed: int = 0,
    context: int = 512,
    reranker: bool = False,
    template: str = TEMPLATE,
    biases: Mapping[str, float] | None = None,
    fills_gaps: bool = False,
    sees: bool = False,
) -> Path:
    """Write a `llama` model with 4 heads (2 for keys and values) to `path` and return `path`.

    The same arguments give the same bytes. `width` is a multiple of 8. It serves chat, completions and, with mean
    pooling, embeddings; one token is one byte of text, so a prompt of n ASCII characters is n tokens.

    A `reranker` is a `qwen3` model whose file names the pooling of one, and has its output. `biases` are added to the
    logits of tokens, about as they are named: with 40 a token is chosen wherever it may stand, with -40 nowhere.
    A model that `fills_gaps` has tokens that stand around a gap in a text, and one that `sees` those that stand around
    an image, for the projector of `written_projector`.
    """
    writer = gguf.GGUFWriter(path, "qwen3" if reranker else "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // HEADS)
    tokens = [*byte_tokens(), *(AROUND_IMAGES if sees else ()), END]
    add_tokenizer(writer, tokens, template)
    for name, token in (("fim_pre", "<"), ("fim_suf", "|"), ("fim_mid", ">")) if fills_gaps else ():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", tokens.index(token))
    shifts = {tokens.index(token): bias for token, bias in (biases or {}).items()}
    _add_tensors(writer, layers=layers, width=width, vocabulary=len(tokens), seed=seed, biases=shifts)
    if reranker:
        _add_ranking(writer, layers=layers, width=width, end=len(tokens) - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_ranking(writer: gguf.GGUFWriter, *, layers: int, width: int, end: int) -> None:
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_sep_token_id(end)
    writer.add_classifier_output_labels(["yes", "no"])
    weights = numpy.linspace(-1, 1, width, dtype=numpy.float32)
    writer.add_tensor("cls.output.weight", numpy.stack([weights, -weights]))
    for layer in range(layers):
        for name in ("attn_q_norm", "attn_k_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", numpy.ones(width // HEADS, dtype=numpy.float32))


def write_adapter(path: Path, seed: int, *, layers: int = 2, width: int = 64) -> Path:
    """Write a LoRA adapter of a tiny model with random weights, which change its answers, and return `path`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    random = numpy.random.default_rng(seed)
    for layer in range(layers):
        for name, (rows, columns) in {"attn_k": (width // 2, width), "ffn_down": (width, 2 * width)}.items():
            for part, shape in {"a": (8, columns), "b": (rows, 8)}.items():
                weights = 0.2 * random.standard_normal(shape, dtype=numpy.float32)
                writer.add_tensor(f"blk.{layer}.{name}.weight.lora_{part}", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, tokens: list[str], template: str = TEMPLATE) -> None:
    end = len(tokens) - 1
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * end + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b"])  # the tokenizer wants at least one; "ab" is no token, so it changes nothing
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)


def _add_tensors(
    writer: gguf.GGUFWriter, *, layers: int, width: int, vocabulary: int, seed: int, biases: Mapping[int, float]
) -> None:
    random = numpy.random.default_rng(seed)
    key_width = width * HEADS_KV // HEADS

    def matrix(rows: int, columns: int) -> NDArray[numpy.float32]:
        values = random.standard_normal((rows, columns), dtype=numpy.float32)
        return values / numpy.float32(columns**0.5)

    ones = numpy.ones(width, dtype=numpy.float32)
    embeddings, output = matrix(vocabulary, width), matrix(vocabulary, width)
    if biases:
        embeddings[:, 0] = 100  # far above what the layers add, so that the last norm makes it about sqrt(width)
        output[:, 0] = [biases.get(token, 0) / width**0.5 for token in range(vocabulary)]
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", output)
    for layer in range(layers):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", ones)
        writer.add_tensor(f"{block}.attn_q.weight", matrix(width, width))
        writer.add_tensor(f"{block}.attn_k.weight", matrix(key_width, width))
        writer.add_tensor(f"{block}.attn_v.weight", matrix(key_width, width))
        writer.add_tensor(f"{block}.attn_output.weight", matrix(width, width))
        writer.add_tensor(f"{block}.ffn_norm.weight", ones)
        writer.add_tensor(f"{block}.ffn_gate.weight", matrix(2 * width, width))
        writer.add_tensor(f"{block}.ffn_up.weight", matrix(2 * width, width))
        writer.add_tensor(f"{block}.ffn_down.weight", matrix(width, 2 * width))
