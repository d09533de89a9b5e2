"""The footprint: the memory that a runner is predicted to take, by kind and by device."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.domain.devices import HOST, Amounts, DeviceId

OVERLAPPING_PASSES = 4  # that llama.cpp computes at once where all layers are split over several GPUs


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes that one runner would take, by kind and by layer, before it is placed."""

    weights_bytes: tuple[int, ...] = ()  # of each repeating layer
    caches_bytes: tuple[int, ...] = ()  # of each repeating layer: KV cache, or state, of all slots
    output_bytes: int = 0  # the first part to move to a GPU, before the last layer
    projectors_bytes: int = 0  # on the first GPU that has layers
    compute_bytes: int = 0  # compute buffers, once for each device that computes
    input_bytes: int = 0  # weights that stay on the host whatever is offloaded
    process_bytes: int = 0  # the process itself, its tokenizer, the buffer of its results
    prompt_cache_bytes: int = 0  # on the host
    checkpoints_bytes: int = 0  # on the host: states and windows of sliding and recurrent layers at earlier tokens
    repacked_bytes: int = 0  # copies of weights, made where every layer is on the host
    output_copy_bytes: int = 0  # on a GPU beside `output_bytes`: input embeddings that are the output matrix too
    inputs_bytes: int = 0  # input and results of a pass, on the host where all layers are on GPUs
    step_bytes: int = 0  # on the first GPU while layers are on the host: copies of the weights of one of their steps
    mapped: bool = False  # weights on the host are pages of a mapped file, where layers are on GPUs
    mapped_on_host: bool = False  # the same where no layers are
    rough: bool = False  # neither verified nor told by the engine
    fixed: tuple[tuple[DeviceId, int], ...] = ()  # declared bytes of a model without layers; all other sizes are 0

    def __post_init__(self) -> None:
        """Have a model of which nothing is predicted or declared take no bytes of the host, and have no layers."""
        layered = self.weights_bytes or self.output_bytes or self.input_bytes or self.compute_bytes
        if not (layered or self.process_bytes or self.fixed):
            object.__setattr__(self, "fixed", ((HOST, 0),))

    @property
    def layers(self) -> int:
        """Layers that can be offloaded; the output counts as one more."""
        return len(self.weights_bytes) + 1

    @property
    def layers_bytes(self) -> tuple[int, ...]:
        """The bytes of each repeating layer: its weights and its cache."""
        return tuple(map(sum, zip(self.weights_bytes, self.caches_bytes, strict=True)))

    @property
    def offloaded_bytes(self) -> tuple[int, ...]:
        """The bytes on a GPU of each layer that can be offloaded, in llama.cpp's order; the output is the last.

        The last layers go to GPUs first, so the output goes before any other layer.
        """
        return (*self.layers_bytes, self.output_bytes + self.output_copy_bytes)

    def mapped_bytes(self, split: Amounts) -> int:
        """Return the bytes of the host that are pages of a mapped file, which the system can take back."""
        if not (self.mapped if split else self.mapped_on_host):
            return 0
        offloaded = sum(layers for _, layers in split)
        return self.input_bytes + sum(self.weights_bytes[: max(0, len(self.weights_bytes) + 1 - offloaded)])

    def first_bytes(self, layers: int) -> int:
        """Return the bytes that the first GPU holds beside its layers, where `layers` are on GPUs."""
        return self.projectors_bytes + (self.step_bytes if 0 < layers <= len(self.weights_bytes) else 0)

    def copies_bytes(self, split: Amounts) -> int:
        """Return the bytes that each device of a split holds besides, so that several passes are computed at once."""
        overlap = len(split) > 1 and sum(layers for _, layers in split) > len(self.weights_bytes)
        return (OVERLAPPING_PASSES - 1) * self.inputs_bytes if overlap else 0


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """The bytes that a runner takes of one device, by kind."""

    weights_bytes: int = 0
    cache_bytes: int = 0
    compute_bytes: int = 0
    other_bytes: int = 0  # the process itself, its prompt cache and checkpoints; all declared bytes

    @property
    def total_bytes(self) -> int:
        """The bytes of all kinds."""
        return self.weights_bytes + self.cache_bytes + self.compute_bytes + self.other_bytes


def bytes_by_device(footprint: Footprint, split: Amounts) -> dict[DeviceId, DeviceBytes]:
    """Return the bytes that a model takes of each device, the host always among them; `split` is layers by GPU."""
    if footprint.fixed:
        return {device: DeviceBytes(other_bytes=amount) for device, amount in footprint.fixed}
    blocks = len(footprint.weights_bytes)
    offloaded = sum(layers for _, layers in split)
    found: dict[DeviceId, DeviceBytes] = {}
    at = first = min(blocks, blocks + 1 - offloaded)
    projectors_bytes = footprint.projectors_bytes
    step_bytes = footprint.first_bytes(offloaded) - projectors_bytes
    copies_bytes = footprint.copies_bytes(split)
    for gpu, layers in split:
        weights_bytes = projectors_bytes + sum(footprint.weights_bytes[at : at + layers])
        if at + layers > blocks:
            weights_bytes += footprint.output_bytes + footprint.output_copy_bytes
        compute_bytes = footprint.compute_bytes + copies_bytes + step_bytes
        found[gpu] = DeviceBytes(weights_bytes, sum(footprint.caches_bytes[at : at + layers]), compute_bytes)
        at, projectors_bytes, step_bytes = at + layers, 0, 0
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
