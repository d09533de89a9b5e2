"""What a runner takes, by kind and by device."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.model import HOST, Amounts, DeviceId


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one runner would take, before it is placed; bytes."""

    weights_bytes: tuple[int, ...] = ()  # of each repeating layer
    caches_bytes: tuple[int, ...] = ()  # of each repeating layer: KV cache, or state, of all slots
    output_bytes: int = 0  # moves to a GPU with the last layer
    projectors_bytes: int = 0  # go to the first GPU that has layers
    compute_bytes: int = 0  # compute buffers, once per device that computes
    input_bytes: int = 0  # weights that stay on the host whatever is offloaded
    process_bytes: int = 0  # the process itself, its tokenizer, the buffer of its results
    prompt_cache_bytes: int = 0  # on the host
    checkpoints_bytes: int = 0  # on the host: what sliding and recurrent layers held at an earlier token
    repacked_bytes: int = 0  # copies of weights, made where every layer is on the host
    output_copy_bytes: int = 0  # on a GPU beside `output_bytes`: input embeddings that are the output matrix too
    fixed: tuple[tuple[DeviceId, int], ...] = ()  # declared bytes of what has no layers; then all else is 0

    @property
    def layers_bytes(self) -> tuple[int, ...]:
        """Each repeating layer: weights and its cache."""
        return tuple(map(sum, zip(self.weights_bytes, self.caches_bytes, strict=True)))


@dataclass(frozen=True, slots=True)
class Part:
    """What a runner takes of one device, in bytes."""

    weights_bytes: int = 0
    cache_bytes: int = 0
    compute_bytes: int = 0
    other_bytes: int = 0  # the process itself, what it keeps of prompts; all of what was declared

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.weights_bytes + self.cache_bytes + self.compute_bytes + self.other_bytes


def parts(footprint: Footprint, split: Amounts) -> dict[DeviceId, Part]:
    """Return what each device takes of a model, the host always among them; `split` is layers by GPU."""
    if footprint.fixed:
        return {device: Part(other_bytes=amount) for device, amount in footprint.fixed}
    blocks = len(footprint.weights_bytes)
    offloaded = sum(layers for _, layers in split)
    found: dict[DeviceId, Part] = {}
    at = first = max(0, blocks - offloaded)
    projectors_bytes = footprint.projectors_bytes
    for gpu, layers in split:
        weights_bytes = projectors_bytes + sum(footprint.weights_bytes[at : at + layers])
        if at + layers > blocks:
            weights_bytes += footprint.output_bytes + footprint.output_copy_bytes
        found[gpu] = Part(weights_bytes, sum(footprint.caches_bytes[at : at + layers]), footprint.compute_bytes)
        at, projectors_bytes = at + layers, 0
    weights_bytes = footprint.input_bytes + projectors_bytes + sum(footprint.weights_bytes[:first])
    weights_bytes += footprint.output_bytes if offloaded <= blocks else 0
    weights_bytes += 0 if split else footprint.repacked_bytes
    computes = first > 0 or not split
    found[HOST] = Part(
        weights_bytes,
        sum(footprint.caches_bytes[:first]),
        footprint.compute_bytes if computes else 0,
        footprint.process_bytes + footprint.prompt_cache_bytes + footprint.checkpoints_bytes,
    )
    return found
