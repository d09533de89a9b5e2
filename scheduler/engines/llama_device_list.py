"""What llama.cpp's programs print of their devices, and a question that has them print more.

`--list-devices` tells names and sizes. Which GPU of the machine a name means is told only where a model is loaded: by
the GPU's PCI id. So a server is given a file that is a model by its first field and has nothing else: it names its
devices, and refuses the file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from fsm.domain.devices import MIB
from scheduler.devices.gpus import LIBRARIES, Listed, pci_id

LIST: Final = ("--verbosity", "5", "--list-devices")  # the details tell which GPUs are integrated
_HEADER: Final = "Available devices:"
_ENTRY = re.compile(r"^ {2}(\w+): (.*) \((\d+) MiB, (\d+) MiB free\)$", re.MULTILINE)
_VULKAN = re.compile(r"ggml_vulkan: (\d+) = .*\| uma: ([01]) \|")
_USING = re.compile(r"using device (\w+) \(.*\) \(([^()]+)\) - \d+ MiB free")
_STRING: Final = 8  # the type of a value in a GGUF file


def entries_of(printed: str) -> tuple[Listed, ...] | None:
    """Return the GPUs that a list of devices names, in its order; None where there is no list."""
    if _HEADER not in printed:
        return None
    integrated = {f"Vulkan{place}": told == "1" for place, told in _VULKAN.findall(printed)}
    _, _, table = printed.rpartition(_HEADER)
    entries = (
        Listed(name, description, int(size) * MIB, int(free) * MIB, told_integrated=integrated.get(name))
        for name, description, size, free in _ENTRY.findall(table)
    )
    return tuple(entry for entry in entries if entry.library in LIBRARIES)


def with_places(entries: Iterable[Listed], places: Mapping[str, str]) -> tuple[Listed, ...]:
    """Return entries with the PCI ids that are known by name."""
    return tuple(replace(entry, pci=places.get(entry.name, "")) for entry in entries)


def places_of(log: str) -> dict[str, str]:
    """Return the PCI id of each device that the log of a load names, by the device's name, as far as it is told."""
    return {name: place for name, told in _USING.findall(log) if (place := pci_id(told))}


def question(path: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the arguments with which a server that knows these options names its devices, and ends."""
    fit = ("--fit", "off") if "--fit" in known else ()
    layers = ("--device", ",".join(names), "--gpu-layers", "1")
    return [*layers, *fit, "--verbosity", "4", "--offline", "--host", "127.0.0.1", "--port", "0", "--model", path]


def no_model() -> bytes:
    """Return a GGUF file that names its architecture and nothing else."""
    key, value = b"general.architecture", b"llama"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)  # version, tensors, fields
    return header + struct.pack("<Q", len(key)) + key + struct.pack("<IQ", _STRING, len(value)) + value
