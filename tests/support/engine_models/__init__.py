"""Sparse GGUF files of any architecture that the installed llama.cpp knows, made from what llama.cpp asks for.

llama.cpp says which keys it misses, of which type, and which tensors it looks for; the files have all of these, and a
hole in place of the weights, so that a file takes some kilobytes whatever the size of its model.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy

from tests.support.tiny_models import add_tokenizer, byte_tokens

Keys = dict[str, Any]  # without the architecture in front, but for those of the tokenizer

PROGRAM = Path(__file__).with_name("tensors.py")
VOCABULARY = 8192
SMALL: Mapping[str, int] = {"layers": 4, "width": 512, "feed_forward": 1536, "heads": 8, "heads_kv": 2, "head": 64}
LARGE: Mapping[str, int] = {"layers": 6, "width": 2048, "feed_forward": 8192, "heads": 16, "heads_kv": 4, "head": 128}
MOST_KEYS = 60  # that are added to a model's, one after the other
MOST_TENSORS = 60  # kinds of optional ones that turn out to be needed

NO_LANGUAGE_MODELS = {
    "clip",
    "gptj",
    "wavtokenizer-dec",
    "pockettts",
    "qwen3tts",
    "eagle3",
    "dflash",
    "gemma4-assistant",
}
# Values of keys that llama.cpp misses, where 2 would not do; sizes of a model's own are in `_sizes`.
MISSED: Mapping[str, Any] = {
    "rope.dimension_sections": [8, 12, 12, 0],
    "use_parallel_residual": True,
    "attention.sliding_window": 256,
    "expert_gating_func": 2,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 64,
    "ssm.group_count": 1,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.group_norm_epsilon": 1e-5,
    "attention.relative_buckets_count": 32,
    "attention.q_lora_rank": 256,
    "attention.kv_lora_rank": 256,
    "attention.kv_lora_rank_swa": 256,
    "attention.key_length_mla": 96,
    "attention.value_length_mla": 64,
    "attention.key_length_mla_swa": 96,
    "attention.value_length_mla_swa": 64,
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 64,
    "attention.indexer.block_size": 64,
    "attention.indexer.kpool": 4,
    "attention.decay_lora_rank": 64,
    "attention.iclr_lora_rank": 64,
    "attention.value_residual_mix_lora_rank": 32,
    "attention.gate_lora_rank": 128,
    "expert_shared_count": 1,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 1,
    "kda.head_dim": 64,
    "time_mix_extra_dim": 32,
    "time_decay_extra_dim": 64,
    "wkv.head_size": 64,
    "shortconv.l_cache": 3,
    "hyper_connection.count": 4,
}
MLA = ("attention.key_length_mla", "attention.value_length_mla")
# Keys of architectures that llama.cpp ends at once without, or that contradict the usual ones.
EQUAL_HEADS = "equal heads"  # stands for as many heads of keys and values as of queries
LATENT: Keys = {
    "attention.head_count_kv": 1,
    "attention.key_length": 288,
    "attention.value_length": 256,
    "attention.key_length_mla": 96,
    "attention.value_length_mla": 64,
    "attention.kv_lora_rank": 256,
    "attention.q_lora_rank": 256,
    "rope.dimension_count": 32,
}
HALF_ROTATED: Keys = {"attention.key_length": 96, "rope.dimension_count": 32, EQUAL_HEADS: True}
MIXED = "mixed layers"  # stands for heads of keys and values in every other layer; the others keep a state
ONE_EACH = "one each"  # stands for layers that keep a state, attend, and feed forward, in turns
WITHOUT_ATTENTION: Keys = {"attention.head_count": 0, "attention.head_count_kv": 0}
OF_ARCHITECTURE: Mapping[str, Keys] = {
    "apertus": {f"xielu.{name}": 1.0 for name in ("alpha_n", "alpha_p", "beta", "eps")},
    "afmoe": {"expert_gating_func": 2},
    "arwkv7": {**WITHOUT_ATTENTION, "token_shift_count": 1},
    "bailingmoe3": {**LATENT, "kda.gate_lower_bound": -1.0, MIXED: True},
    **{name: {EQUAL_HEADS: True} for name in ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v3")},
    "deepseek2": LATENT,
    "deepseek2-ocr": {EQUAL_HEADS: True},
    "deepseek32": LATENT,
    "deepseek4": {
        "attention.head_count_kv": 1,
        "attention.key_length": 512,
        "attention.value_length": 512,
        "attention.indexer.head_count": 8,
        "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 512,
        "attention.output_group_count": 8,
        "attention.output_lora_rank": 256,
        "attention.sliding_window": 128,
        "expert_gating_func": 4,
    },
    "dots1": {"expert_gating_func": 2, EQUAL_HEADS: True},
    "gemma4": {"attention.key_length_swa": 64, "attention.value_length_swa": 64, "rope.dimension_count_swa": 64},
    "glm-dsa": LATENT,
    "glm5-next": {**LATENT, "rope.dimension_count": 0},
    "hy_v4": {**LATENT, "expert_gating_func": 2},
    "kimi-k3": {**LATENT, MIXED: True},
    "kimi-linear": {**LATENT, MIXED: True},
    "minicpm3": HALF_ROTATED,
    "minimax-m2": {"expert_gating_func": 2},
    "minimax-m3": {"attention.indexer.head_count": 2, "attention.head_count_kv": 2},
    "mistral4": LATENT,
    "olmoe": {EQUAL_HEADS: True},
    "paddleocr": {"rope.dimension_sections": [16, 24, 24, 0]},
    "plm": HALF_ROTATED,
    **{
        name: {MIXED: True}
        for name in (
            "granitehybrid",
            "jamba",
            "lfm2",
            "lfm2moe",
        )
    },
    "nemotron_h": {ONE_EACH: True},
    "nemotron_h_moe": {ONE_EACH: True},
    "plamo2": {MIXED: True, "ssm.group_count": 0},
    "rwkv6": WITHOUT_ATTENTION,
    "rwkv6qwen2": {**WITHOUT_ATTENTION, "token_shift_count": 1},
    "rwkv7": {**WITHOUT_ATTENTION, "attention.gate_lora_rank": 128},
    "smallthinker": {"expert_gating_func": 2},
    "t5": {EQUAL_HEADS: True},
    "t5encoder": {EQUAL_HEADS: True},
}
MISSING_KEY = re.compile(r"key not found in model: (\S+)")
MISSING_TENSOR = re.compile(r"tensor '(\S+)' not found")
BLOCK = re.compile(r"blk\.\d+\.")
WRONG_TYPE = re.compile(r"key (\S+) has wrong type \w+ but expected type (\w+)")
OPTIONAL = re.compile(r"(\.bias|\.scale|\.input_scale|_scale)$|^cls|^rope_f|\.cls|rope_factors|rope_freqs")
PRECISE = re.compile(
    r"norm|ssm_|time_mix_|ffn_gate_inp|shortconv\.conv|sinks|_ape|hc_|altup_|rel_b|position_embd|token_types"
)


class Unwritable(Exception):
    """llama.cpp asks for something that is not known here."""


@cache
def architectures() -> tuple[str, ...]:
    """Return the architectures of language models that the installed llama.cpp knows."""
    return tuple(name for name in _run()["architectures"] if name not in NO_LANGUAGE_MODELS)


def write(folder: Path, architecture: str, sizes: Mapping[str, int] = SMALL, vocabulary: int = VOCABULARY) -> Path:
    """Write a model of an architecture, and return its path; raises `Unwritable`."""
    path = folder / f"{architecture}-{sizes['width']}-{vocabulary}.gguf"
    keys, shapes = _asked_for(path, architecture, sizes, vocabulary)
    left_out = {_kind(name) for name in shapes if OPTIONAL.search(name)}
    for _ in range(MOST_TENSORS):
        kept = {name: shape for name, shape in shapes.items() if _kind(name) not in left_out}
        _write(path, architecture, keys, vocabulary, kept)
        told = _run("load", str(path))
        if "loaded" in told:
            return path
        if not told["error"] and left_out:  # it reached for a tensor that is not there
            left_out.clear()
            continue
        missing = MISSING_TENSOR.search(told["error"])
        if missing is None or _kind(missing[1]) not in left_out:
            raise Unwritable(f"{architecture}: {told['error']}")
        left_out.remove(_kind(missing[1]))
    raise Unwritable(f"{architecture}: more than {MOST_TENSORS} kinds of tensors")


def _kind(name: str) -> str:
    return BLOCK.sub("", name)


def _asked_for(
    path: Path, architecture: str, sizes: Mapping[str, int], vocabulary: int
) -> tuple[Keys, dict[str, list[int]]]:
    """Return the keys that llama.cpp wants, and the shape of each tensor that it looks for, by name."""
    keys = _sizes(sizes) | OF_ARCHITECTURE.get(architecture, {})
    if keys.pop(EQUAL_HEADS, False):
        keys["attention.head_count_kv"] = sizes["heads"]
    layers, heads_kv = range(sizes["layers"]), keys["attention.head_count_kv"]
    if keys.pop(MIXED, False):
        keys["attention.head_count_kv"] = [heads_kv * (layer % 2) for layer in layers]
    if keys.pop(ONE_EACH, False):
        keys["attention.head_count_kv"] = [heads_kv * (layer % 3 == 1) for layer in layers]
        keys["feed_forward_length"] = [sizes["feed_forward"] * (layer % 3 == 2) for layer in layers]
    for _ in range(MOST_KEYS):
        _write(path, architecture, keys, vocabulary, {})
        told = _run("tensors", str(path))
        if "tensors" in told:
            return keys, {name: shape for name, shape in told["tensors"] if 0 not in shape}
        _add(keys, architecture, told["error"], sizes)
    raise Unwritable(f"{architecture}: more than {MOST_KEYS} keys")


def _sizes(sizes: Mapping[str, int]) -> Keys:
    return {
        "block_count": sizes["layers"],
        "context_length": 32768,
        "embedding_length": sizes["width"],
        "feed_forward_length": sizes["feed_forward"],
        "attention.head_count": sizes["heads"],
        "attention.head_count_kv": sizes["heads_kv"],
        "attention.key_length": sizes["head"],
        "attention.value_length": sizes["head"],
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": sizes["head"],
        "rope.freq_base": 1e4,
    }


def _experts(sizes: Mapping[str, int]) -> Keys:
    return {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": sizes["feed_forward"] // 4}


def _add(keys: Keys, architecture: str, error: str, sizes: Mapping[str, int]) -> None:
    """Add the key that an error of llama.cpp's is about, or give it the type that llama.cpp expects."""
    if missing := MISSING_KEY.search(error):
        key = missing[1].removeprefix(f"{architecture}.")
        if key in keys:
            raise Unwritable(f"{architecture}: {error}")
        keys[key] = _missed(key, sizes)
    elif wrong := WRONG_TYPE.search(error):
        key = wrong[1].removeprefix(f"{architecture}.")
        kinds = {"f32": float, "bool": bool, "i32": _signed, "u32": int, "str": str}
        keys[key] = [keys[key]] * sizes["layers"] if wrong[2] == "arr" else kinds[wrong[2]](keys[key])
    elif "token type count" in error and "tokenizer.ggml.token_type_count" not in keys:
        keys["tokenizer.ggml.token_type_count"] = 2
    elif "MLA" in error and MLA[0] not in keys:
        keys |= {key: MISSED[key] for key in MLA}
    elif "expert_count" not in keys:  # llama.cpp says so, or ends at once
        keys |= _experts(sizes)
    else:
        raise Unwritable(f"{architecture}: {error}")


def _missed(key: str, sizes: Mapping[str, int]) -> Any:
    if key in (experts := _experts(sizes)):
        return experts[key]
    layers = sizes["layers"]
    if key == "attention.sliding_window_pattern":
        return [layer % 2 == 0 for layer in range(layers)]
    if key == "attention.compress_ratios":
        return [(0, 4, 128)[layer % 3] for layer in range(layers)]
    if key == "ssm.inner_size":
        return 2 * sizes["width"]
    if key == "ssm.time_step_rank":
        return 2 * sizes["width"] // 64
    return MISSED.get(key, 2)


class _signed(int):
    """A number that is written with a sign."""


def _run(*arguments: str) -> dict[str, Any]:
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    told: dict[str, Any] = json.loads(last) if last.startswith("{") else {"error": done.stderr[-600:]}
    return told


def _write(path: Path, architecture: str, keys: Keys, vocabulary: int, tensors: Mapping[str, list[int]]) -> None:
    """Write a file with these keys, with the bytes and others as tokens, and a hole in place of the weights."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in keys.items():
        _add_key(writer, key if key.startswith(("tokenizer.", "xielu.")) else f"{architecture}.{key}", value)
    tokens = [*byte_tokens(), *(f"<{number}>" for number in range(256, vocabulary - 1)), "<|end|>"]
    add_tokenizer(writer, tokens)
    writer.add_sep_token_id(vocabulary - 1)
    total = 0
    for name, shape in tensors.items():
        whole = "tid2eid" in name  # numbers of experts
        exact = (
            whole or len(shape) == 1 or name.endswith(".bias") or PRECISE.search(name) is not None or shape[0] % 32 != 0
        )
        kind = gguf.GGMLQuantizationType.F32 if exact else gguf.GGMLQuantizationType.Q8_0
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = int(numpy.prod(shape, dtype=numpy.int64)) // block * block_bytes
        rows = [*reversed(shape)]
        if exact:
            writer.add_tensor_info(name, rows, numpy.dtype("int32" if whole else "float32"), size)
        else:
            rows[-1] = rows[-1] // block * block_bytes
            writer.add_tensor_info(name, rows, numpy.dtype("uint8"), size, raw_dtype=kind)
        total += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if tensors:
        writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + total)


def _add_key(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case _signed():
            writer.add_int32(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case list():
            writer.add_array(name, value)
