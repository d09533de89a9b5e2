"""A projector for images, with random weights, that llama.cpp loads beside a written model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy

IMAGE, PATCH, WIDTH, LAYERS, HEADS, MERGED = 224, 16, 256, 4, 4, 4


def write_projector(path: Path, model_width: int, image: int = IMAGE) -> Path:
    """Write an `idefics3` projector that ends in `model_width`, and return `path`.

    It loads with any `image`, the pixels of an image's side; it takes images where that is 256, since then the patches
    can be merged evenly.
    """
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("idefics3")
    writer.add_vision_image_size(image)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_embedding_length(WIDTH)
    writer.add_vision_feed_forward_length(2 * WIDTH)
    writer.add_vision_projection_dim(model_width)
    writer.add_vision_block_count(LAYERS)
    writer.add_vision_head_count(HEADS)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_projector_scale_factor(MERGED)
    writer.add_vision_use_gelu(True)
    random = numpy.random.default_rng(0)
    for name, shape in _shapes(model_width, image).items():
        writer.add_tensor(name, random.standard_normal(shape, dtype=numpy.float32) / numpy.float32(WIDTH))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(model_width: int, image: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (WIDTH, 3, PATCH, PATCH),
        "v.patch_embd.bias": (WIDTH,),
        "v.position_embd.weight": ((image // PATCH) ** 2, WIDTH),
        "v.post_ln.weight": (WIDTH,),
        "v.post_ln.bias": (WIDTH,),
        "mm.model.fc.weight": (model_width, WIDTH * MERGED**2),
    }
    for layer in range(LAYERS):
        block = f"v.blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= {f"{block}.{name}.weight": (WIDTH, WIDTH), f"{block}.{name}.bias": (WIDTH,)}
        for name in ("ln1", "ln2"):
            shapes |= {f"{block}.{name}.weight": (WIDTH,), f"{block}.{name}.bias": (WIDTH,)}
        shapes |= {f"{block}.ffn_up.weight": (2 * WIDTH, WIDTH), f"{block}.ffn_up.bias": (2 * WIDTH,)}
        shapes |= {f"{block}.ffn_down.weight": (WIDTH, 2 * WIDTH), f"{block}.ffn_down.bias": (WIDTH,)}
    return shapes
