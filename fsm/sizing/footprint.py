"""What a runner takes, by kind and by device."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.domain.devices import HOST, Amounts, DeviceId

OVERLAPPING_PASSES = 4  # that llama.cpp works on at once where all layers are dealt to several GPUs


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one runner would take, before it is placed; bytes."""

    weights_bytes: tuple[int, ...] = ()  # of each repeating layer
    caches_bytes: tuple[int, ...] = ()  # of each repeating layer: KV cache, or state, of all slots
    output_bytes: int = 0  # the first to move to a GPU, before the last layer
    projectors_bytes: int = 0  # go to the first GPU that has layers
    compute_bytes: int = 0  # compute buffers, once per device that computes
    input_bytes: int = 0  # weights that stay on the host whatever is offloaded
    process_bytes: int = 0  # the process itself, its tokenizer, the buffer of its results
    prompt_cache_bytes: int = 0  # on the host
    checkpoints_bytes: int = 0  # on the host: what sliding and recurrent layers held at an earlier token
    repacked_bytes: int = 0  # copies of weights, made where every layer is on the host
    output_copy_bytes: int = 0  # on a GPU beside `output_bytes`: input embeddings that are the output matrix too
    inputs_bytes: int = 0  # what a pass begins with and hands on, on the host where all layers are on GPUs
    fixed: tuple[tuple[DeviceId, int], ...] = ()  # declared bytes of what has no layers; then all else is 0

    @property
    def layers_bytes(self) -> tuple[int, ...]:
        """Each repeating layer: weights and its cache."""
        return tuple(map(sum, zip(self.weights_bytes, self.caches_bytes, strict=True)))

    @property
    def offloaded_bytes(self) -> tuple[int, ...]:
        """What GPUs take of each layer that can be offloaded, in llama.cpp's order, in which the output is the last.

        The last ones go to GPUs first, so the output does before any other.
        """
        return (*self.layers_bytes, self.output_bytes + self.output_copy_bytes)

    def copies_bytes(self, split: Amounts) -> int:
        """What each device of a split holds besides, so that several passes are worked on at once."""
        overlap = len(split) > 1 and sum(layers for _, layers in split) > len(self.weights_bytes)
        return (OVERLAPPING_PASSES - 1) * self.inputs_bytes if overlap else 0


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """What a runner takes of one device, in bytes."""

    weights_bytes: int = 0
    cache_bytes: int = 0
    compute_bytes: int = 0
    other_bytes: int = 0  # the process itself, what it keeps of prompts; all of what was declared

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.weights_bytes + self.cache_bytes + self.compute_bytes + self.other_bytes


def bytes_by_device(footprint: Footprint, split: Amounts) -> dict[DeviceId, DeviceBytes]:
    """Return what each device takes of a model, the host always among them; `split` is layers by GPU."""
    if footprint.fixed:
        return {device: DeviceBytes(other_bytes=amount) for device, amount in footprint.fixed}
    blocks = len(footprint.weights_bytes)
    offloaded = sum(layers for _, layers in split)
    found: dict[DeviceId, DeviceBytes] = {}
    at = first = min(blocks, blocks + 1 - offloaded)
    projectors_bytes = footprint.projectors_bytes
    copies_bytes = footprint.copies_bytes(split)
    for gpu, layers in split:
        weights_bytes = projectors_bytes + sum(footprint.weights_bytes[at : at + layers])
        if at + layers > blocks:
            weights_bytes += footprint.output_bytes + footprint.output_copy_bytes
        compute_bytes = footprint.compute_bytes + copies_bytes
        found[gpu] = DeviceBytes(weights_bytes, sum(footprint.caches_bytes[at : at + layers]), compute_bytes)
        at, projectors_bytes = at + layers, 0
    weights_bytes = footprint.input_bytes + projectors_bytes + sum(footprint.weights_bytes[:first])
    weights_bytes += 0 if split else footprint.output_bytes + footprint.repacked_bytes
    computes = first > 0 or not split
    found[HOST] = DeviceBytes(
        weights_bytes,
        sum(footprint.caches_bytes[:first]),
        footprint.compute_bytes if computes else footprint.inputs_bytes + copies_bytes,
        footprint.process_bytes + footprint.prompt_cache_bytes + footprint.checkpoints_bytes,
    )
    return found
