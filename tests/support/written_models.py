"""GGUF models of many architectures, with random weights, large enough to tell what llama.cpp takes for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy
from gguf.quants import quantize
from numpy.typing import NDArray

from tests.support.tiny_models import add_tokenizer, byte_tokens

Shapes = dict[str, tuple[int, ...]]  # of tensors by name, rows before columns as numpy counts them


@dataclass(frozen=True, slots=True)
class Design:
    """The sizes of a model; `architecture` says which of them are used."""

    architecture: str
    layers: int = 12
    width: int = 512
    heads: int = 8
    heads_kv: int = 2
    head_size: int = 64
    feed_forward: int = 1536
    vocabulary: int = 8192
    context: int = 8192
    window: int = 512  # tokens that sliding layers see
    experts: int = 8
    experts_used: int = 2
    expert_feed_forward: int = 512
    inner: int = 1024  # sizes of recurrent layers, as are the next three
    state: int = 128
    conv: int = 4
    recurrent_heads: int = 16
    attention_every: int = 4  # one layer in so many of a hybrid attends
    quantisation: str = "Q8_0"  # of matrices, by gguf's name

    def attends(self, layer: int) -> bool:
        """Return whether a layer of a hybrid attends rather than keeps a state."""
        return layer % self.attention_every == self.attention_every - 1


def write_model(path: Path, design: Design) -> Path:
    """Write a model that llama.cpp loads and serves to `path` and return `path`; one token is one byte of text."""
    writer = gguf.GGUFWriter(path, design.architecture)
    kind = KINDS[design.architecture]
    _add_sizes(writer, design)
    kind.add_keys(writer, design)
    tokens = [*byte_tokens(), *(f"<{number}>" for number in range(256, design.vocabulary - 1)), "<|end|>"]
    add_tokenizer(writer, tokens)
    shapes: Shapes = {"token_embd.weight": (design.vocabulary, design.width), **kind.outside(design)}
    for layer in range(design.layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in kind.layer(design, layer).items()}
    for name, shape in shapes.items():
        _add_tensor(writer, name, shape, design.quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, design: Design) -> None:
    writer.add_context_length(design.context)
    writer.add_embedding_length(design.width)
    writer.add_block_count(design.layers)
    writer.add_feed_forward_length(design.feed_forward)
    writer.add_head_count(design.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(design.head_size)
    writer.add_key_length(design.head_size)
    writer.add_value_length(design.head_size)


# What llama.cpp needs as plain floats: the parameters of recurrences, and what chooses experts.
_PLAIN = ("ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm", "shortconv.conv", "ffn_gate_inp", "token_types", "time_mix_lerp")


def _add_tensor(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], quantisation: str) -> None:
    plain = len(shape) == 1 or name.endswith(".bias") or any(each in name for each in _PLAIN)
    if plain:
        sign = -1 if "ssm_a" in name else 1  # a decay
        values = numpy.full(shape, 0.0 if name.endswith(".bias") else sign, dtype=numpy.float32)
        writer.add_tensor(name, _matrix(shape, "F32") if len(shape) > 1 and "ssm_a" not in name else values)
        return
    kind = gguf.GGMLQuantizationType[quantisation]
    writer.add_tensor(name, _matrix(shape, quantisation), raw_dtype=kind)


@cache
def _matrix(shape: tuple[int, ...], quantisation: str) -> NDArray[numpy.generic]:
    """Return random weights of a shape, the same for all tensors that have it."""
    values = numpy.random.default_rng(sum(shape)).standard_normal(shape, dtype=numpy.float32)
    return quantize(values / numpy.float32(shape[-1] ** 0.5), gguf.GGMLQuantizationType[quantisation])


def _attention(design: Design) -> Shapes:
    queries, keys = design.heads * design.head_size, design.heads_kv * design.head_size
    return {
        "attn_norm.weight": (design.width,),
        "attn_q.weight": (queries, design.width),
        "attn_k.weight": (keys, design.width),
        "attn_v.weight": (keys, design.width),
        "attn_output.weight": (design.width, queries),
    }


def _feed_forward(design: Design) -> Shapes:
    return {
        "ffn_norm.weight": (design.width,),
        "ffn_gate.weight": (design.feed_forward, design.width),
        "ffn_up.weight": (design.feed_forward, design.width),
        "ffn_down.weight": (design.width, design.feed_forward),
    }


def _experts(design: Design) -> Shapes:
    wide = (design.experts, design.expert_feed_forward, design.width)
    return {
        "ffn_norm.weight": (design.width,),
        "ffn_gate_inp.weight": (design.experts, design.width),
        "ffn_gate_exps.weight": wide,
        "ffn_up_exps.weight": wide,
        "ffn_down_exps.weight": (design.experts, design.width, design.expert_feed_forward),
    }


def _norms(*names: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,) for name in names}


def _llama(design: Design, layer: int) -> Shapes:
    return _attention(design) | _feed_forward(design)


def _qwen3(design: Design, layer: int) -> Shapes:
    return _llama(design, layer) | _norms("attn_q_norm", "attn_k_norm", size=design.head_size)


def _qwen3moe(design: Design, layer: int) -> Shapes:
    return _attention(design) | _experts(design) | _norms("attn_q_norm", "attn_k_norm", size=design.head_size)


def _gemma2(design: Design, layer: int) -> Shapes:
    return _llama(design, layer) | _norms("post_attention_norm", "post_ffw_norm", size=design.width)


def _gemma3(design: Design, layer: int) -> Shapes:
    return _gemma2(design, layer) | _norms("attn_q_norm", "attn_k_norm", size=design.head_size)


def _gpt_oss(design: Design, layer: int) -> Shapes:
    shapes = _attention(design) | _experts(design) | _norms("post_attention_norm", size=design.width)
    del shapes["ffn_norm.weight"]
    biased = (
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate_inp",
        "ffn_gate_exps",
        "ffn_up_exps",
        "ffn_down_exps",
    )
    return (
        shapes
        | {f"{name}.bias": shapes[f"{name}.weight"][:-1] for name in biased}
        | {"attn_sinks.weight": (design.heads,)}
    )


def _bert(design: Design, layer: int) -> Shapes:
    shapes = _attention(replace(design, heads_kv=design.heads)) | _feed_forward(design)
    for name in ("attn_norm", "ffn_norm", "ffn_gate"):
        del shapes[f"{name}.weight"]
    biased = {f"{name[:-7]}.bias": shape[:1] for name, shape in shapes.items()}
    norms = _norms("attn_output_norm", "layer_output_norm", size=design.width)
    return shapes | biased | norms | {name.replace("weight", "bias"): shape for name, shape in norms.items()}


def _nomic_bert(design: Design, layer: int) -> Shapes:
    shapes = _feed_forward(design)
    del shapes["ffn_norm.weight"]
    norms = _norms("attn_output_norm", "layer_output_norm", size=design.width)
    return (
        shapes
        | norms
        | {name.replace("weight", "bias"): shape for name, shape in norms.items()}
        | {"attn_qkv.weight": (3 * design.width, design.width), "attn_output.weight": (design.width, design.width)}
    )


def _mamba2(design: Design, layer: int) -> Shapes:
    mixed = design.inner + 2 * design.state
    return {
        "attn_norm.weight": (design.width,),
        "ssm_in.weight": (design.inner + mixed + design.recurrent_heads, design.width),
        "ssm_conv1d.weight": (mixed, design.conv),
        "ssm_conv1d.bias": (mixed,),
        "ssm_dt.bias": (design.recurrent_heads,),
        "ssm_a": (design.recurrent_heads, 1),
        "ssm_d": (design.recurrent_heads, 1),
        "ssm_norm.weight": (1, design.inner),
        "ssm_out.weight": (design.width, design.inner),
    }


def _granite_hybrid(design: Design, layer: int) -> Shapes:
    mixer = _attention(design) if design.attends(layer) else _mamba2(design, layer)
    return mixer | _feed_forward(design)


def _lfm2(design: Design, layer: int) -> Shapes:
    if design.attends(layer):
        return _qwen3(design, layer)
    return _feed_forward(design) | {
        "attn_norm.weight": (design.width,),
        "shortconv.in_proj.weight": (3 * design.width, design.width),
        "shortconv.out_proj.weight": (design.width, design.width),
        "shortconv.conv.weight": (design.width, design.conv - 1),
    }


def _add_attention(writer: gguf.GGUFWriter, design: Design) -> None:
    writer.add_head_count_kv(design.heads_kv)


def _add_window(writer: gguf.GGUFWriter, design: Design) -> None:
    _add_attention(writer, design)
    writer.add_sliding_window(design.window)


def _add_experts(writer: gguf.GGUFWriter, design: Design) -> None:
    _add_attention(writer, design)
    writer.add_expert_count(design.experts)
    writer.add_expert_used_count(design.experts_used)
    writer.add_expert_feed_forward_length(design.expert_feed_forward)


def _add_window_and_experts(writer: gguf.GGUFWriter, design: Design) -> None:
    _add_experts(writer, design)
    writer.add_sliding_window(design.window)


def _add_encoder(writer: gguf.GGUFWriter, design: Design) -> None:
    writer.add_head_count_kv(design.heads)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(2)


def _add_recurrence(writer: gguf.GGUFWriter, design: Design) -> None:
    writer.add_ssm_conv_kernel(design.conv)
    writer.add_ssm_inner_size(design.inner)
    writer.add_ssm_state_size(design.state)
    writer.add_ssm_group_count(1)
    writer.add_ssm_time_step_rank(design.recurrent_heads)


def _add_hybrid(writer: gguf.GGUFWriter, design: Design) -> None:
    heads_kv = [design.heads_kv if design.attends(layer) else 0 for layer in range(design.layers)]
    writer.add_head_count_kv(heads_kv)
    if design.architecture == "lfm2":
        writer.add_shortconv_l_cache(design.conv - 1)
    else:
        _add_recurrence(writer, design)


def _untied(design: Design) -> Shapes:
    return _tied(design) | {"output.weight": (design.vocabulary, design.width)}


def _tied(design: Design) -> Shapes:
    return {"output_norm.weight": (design.width,)}


def _embedding_norm(design: Design) -> Shapes:
    return {"token_embd_norm.weight": (design.width,)}


def _encoder(design: Design) -> Shapes:
    shapes = _embedding_norm(design) | {
        "token_embd_norm.bias": (design.width,),
        "token_types.weight": (2, design.width),
    }
    if design.architecture == "bert":
        shapes["position_embd.weight"] = (design.context, design.width)
    return shapes


@dataclass(frozen=True, slots=True)
class Kind:
    """How models of an architecture are written."""

    layer: Callable[[Design, int], Shapes]
    add_keys: Callable[[gguf.GGUFWriter, Design], None] = _add_attention
    outside: Callable[[Design], Shapes] = _tied


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "bert": Kind(_bert, _add_encoder, _encoder),
        "gemma2": Kind(_gemma2, _add_window),
        "gemma3": Kind(_gemma3, _add_window),
        "gpt-oss": Kind(_gpt_oss, _add_window_and_experts, _untied),
        "granitehybrid": Kind(_granite_hybrid, _add_hybrid),
        "lfm2": Kind(_lfm2, _add_hybrid, _embedding_norm),
        "llama": Kind(_llama, outside=_untied),
        "mamba2": Kind(_mamba2, _add_recurrence),
        "nomic-bert": Kind(_nomic_bert, _add_encoder, _encoder),
        "qwen3": Kind(_qwen3),
        "qwen3moe": Kind(_qwen3moe, _add_experts, _untied),
    }
)
