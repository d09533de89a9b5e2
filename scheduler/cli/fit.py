"""The command `loadmaster fit`: where a model would be placed, and why, before it is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

from rich.table import Table
from rich.text import Text

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.messages.events import Sampled
from fsm.placement.search import MEASURED_HEADROOM, PREDICTED_HEADROOM
from fsm.sizing.load_history import NOTHING
from scheduler.api.environment import Environment, device_reader, llama_engine
from scheduler.api.fit import Fit, FitDevice, fit_of
from scheduler.api.scheduler import limits_of
from scheduler.cli.output import SafeConsole, print_json
from scheduler.concurrency.clock import monotonic_clock
from scheduler.config.settings import Settings
from scheduler.config.value_parsers import memory
from scheduler.devices.device_reader import DeviceReader, of_gpu
from scheduler.engines.interface import version_of
from scheduler.engines.python import PythonEngine
from scheduler.errors.exceptions import InvalidSettings
from scheduler.errors.formatting import format_bytes
from scheduler.models.catalog import Catalog
from scheduler.models.measurement_store import MeasurementStore
from scheduler.models.measurements import identity_of
from scheduler.models.sources import default_resolvers
from scheduler.runtime.model_registry import ModelRegistry
from scheduler.runtime.request_parser import AcquireOptions, RequestParser

DOES_NOT_FIT = 1  # the exit status
_CLOSE_TIMEOUT_S = 1.0


def run_fit(chosen: argparse.Namespace) -> int:
    """Print the fit of the chosen model and return the exit status."""
    settings = Settings.from_environment()
    if chosen.memory_limit is not None:
        settings = settings.changed(memory_limit=memory("--memory-limit", chosen.memory_limit))
    devices = device_reader(settings, gpus=not chosen.gpu)
    llama = llama_engine(settings, devices.gpus)
    if llama.gpu_list is not None:
        devices.list_by(llama.gpu_list)
    samples = _samples(devices, settings, chosen.host, chosen.gpu)
    engines = (llama, PythonEngine())
    registry = ModelRegistry(*engines, partial(Environment().engine_of, settings))
    parser = RequestParser(Catalog(default_resolvers(settings.models)), registry.require, pin=lambda model: None)
    spec, question = parser.parse(chosen.model, _asking(chosen))
    identity = identity_of(spec, version_of(registry.engine_for(spec), spec))
    now = monotonic_clock()
    core = Core(limits_of(settings), settings.eviction)
    core.step(now, Sampled(samples))
    file = settings.measurement_file
    known = MeasurementStore(file).read(identity) if file and identity else NOTHING
    try:
        fit = fit_of(now, core, question, partial(registry.inspect, spec), registry.name, known)
    finally:
        for engine in registry.end():
            engine.close(_CLOSE_TIMEOUT_S)
    problems = (*devices.problems, *registry.problems)
    if chosen.json:
        print_json(fit.to_json() | {"problems": problems})
    else:
        _print(fit, problems, chosen.num_ctx)
    return 0 if fit.fits else DOES_NOT_FIT


def _asking(chosen: argparse.Namespace) -> AcquireOptions:
    """Return only the keywords that the command line names; the others may be the model's own."""
    named = {
        "num_ctx": chosen.num_ctx,
        "num_parallel": chosen.num_parallel,
        "num_batch": chosen.num_batch,
        "num_gpu": chosen.num_gpu,
        "cache_type_k": chosen.cache_type,
        "cache_type_v": chosen.cache_type,
        "flash_attention": chosen.flash_attention,
        "use_mmap": chosen.mmap,
        "require_gpu": chosen.require_gpu or None,
        "embedding": chosen.embedding or None,
        "adapters": chosen.adapter and tuple(chosen.adapter),
        "projectors": chosen.projector and tuple(chosen.projector),
    }
    return cast(AcquireOptions, {name: value for name, value in named.items() if value is not None})


def _samples(
    devices: DeviceReader, settings: Settings, host: str | None, gpus: Sequence[str]
) -> tuple[DeviceSample, ...]:
    """Return the devices, as read or as imagined."""
    samples = list(devices.sample())
    devices.close()
    if host is not None:
        size = memory("--host", host)
        samples[0] = DeviceSample(HOST, "cpu", "host", min(size, settings.memory_limit or size), size)
    for text in gpus:
        name, separator, rest = text.rpartition("=")
        if not separator or not name or name in {sample.id for sample in samples}:
            raise InvalidSettings("--gpu", text, "a name and a size, like card=24GiB, each name once")
        size = max(0, memory("--gpu", rest) - (of_gpu(settings.gpu_reserve, name) or 0))
        size = min(size, of_gpu(settings.gpu_limit or (), name) or size)
        samples.append(DeviceSample(DeviceId(name), "gpu", name, size, size))
    return tuple(samples)


def _print(fit: Fit, problems: Sequence[str], num_ctx: int | None) -> None:
    console = SafeConsole(highlight=False)
    sentence = str(fit)
    console.print(Text(f"{sentence}.", style="bold green" if fit.fits else "bold red"), soft_wrap=True)
    if fit.devices:
        console.print()
        console.print(_table(fit.devices))
        console.print(Text(_explanation(fit), style="dim"), soft_wrap=True)
    if num_ctx is not None and (fit.options.num_ctx or num_ctx) < num_ctx:
        cut = f"The model was trained with {fit.options.num_ctx} tokens: --num-ctx {num_ctx} is cut to that."
        console.print(Text(cut, style="bold"), soft_wrap=True)
    if fit.advice:
        console.print()
        better = "the whole model would go to GPUs" if fit.fits else "the model would fit"
        console.print(Text(f"What to change so that {better}, the least harm first:"), soft_wrap=True)
        for each in fit.advice:
            takes = ", ".join(f"{format_bytes(d.takes_bytes)} on {d.name}" for d in each.fit.devices if d.takes_bytes)
            console.print(Text(f"  {_flags(each.options):<44} {takes}"), soft_wrap=True)
    elif fit.verdict == "never":
        console.print()
        advice = fit.remedy or "it takes a smaller model, or more memory"
        console.print(Text(f"None of the options that were tried makes it fit: {advice}."), soft_wrap=True)
    for problem in problems:
        console.print(Text(f"({problem})", style="dim"), soft_wrap=True)


def _table(devices: Sequence[FitDevice]) -> Table:
    """Return a table with a column for each device: the model's bytes by kind, and the bytes that must be free."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for device in devices:
        layers = f"\n{device.gpu_layers} layers" if device.gpu_layers else ""
        table.add_column(Text(device.name + layers), justify="right")
    rows = {
        "weights": [device.weights_bytes for device in devices],
        "cache": [device.cache_bytes for device in devices],
        "compute buffers": [device.compute_bytes for device in devices],
        "process and the rest": [device.other_bytes for device in devices],
        "takes": [device.takes_bytes for device in devices],
        "must be free": [device.needed_bytes for device in devices],
        "is free": [max(0, device.free_bytes) for device in devices],
    }
    for name, amounts in rows.items():
        style = "bold" if name == "takes" else ""
        table.add_row(Text(name), *(Text(format_bytes(amount)) for amount in amounts), style=style)
    return table


def _explanation(fit: Fit) -> str:
    """Return a sentence on the options of the fit, and on how exact its bytes are."""
    options = fit.options
    types = " and ".join(dict.fromkeys(name for name in (options.cache_type_k, options.cache_type_v) if name))
    slots = "1 slot" if options.num_parallel == 1 else f"{options.num_parallel} slots"
    source = "What it takes was measured before" if fit.measured else "It is a prediction"
    headroom = MEASURED_HEADROOM if fit.measured else PREDICTED_HEADROOM
    return (
        f"For {slots} of {options.num_ctx} tokens, a cache of type {types}, batches of {options.num_batch}. "
        f"{source}, so {headroom * 100:.0f} % more is made free where other models can leave."
    )


def _flags(options: Mapping[str, int | str]) -> str:
    """Return options as this command takes them; it has one flag for both types of cache."""
    names = {"cache_type_k": "cache_type", "cache_type_v": "cache_type"}
    flags = {f"--{names.get(name, name)}".replace("_", "-"): value for name, value in options.items()}
    return " ".join(f"{flag} {value}" for flag, value in flags.items())
