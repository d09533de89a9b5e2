"""The command `loadmaster models`: the models that have a name, and whether they would fit now."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from fsm.core import Core
from fsm.machine.request import Purpose, RequestSpec
from fsm.messages.events import Sampled
from fsm.messages.refusals import DoesNotFitRefusal
from fsm.preview import preview
from fsm.sizing.model_profile import ModelProfile
from scheduler.api.environment import device_reader, llama_engine
from scheduler.api.scheduler import limits_of
from scheduler.cli.output import SafeConsole, print_json
from scheduler.concurrency.clock import monotonic_clock
from scheduler.config.settings import Settings
from scheduler.engines.llama import LlamaEngine
from scheduler.errors.exceptions import InvalidModel, InvalidSettings
from scheduler.errors.formatting import format_bytes, printable, shown
from scheduler.models.catalog import Catalog, found_by, in_words, location_of
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.model_spec import ModelSpec
from scheduler.models.sources import HUB_MISSING, Folder, default_resolvers, hub_is_installed

PATIENCE_S = 1.0  # a list that takes longer shows its progress


_HEADINGS = ("name", "size", "architecture", "quantisation", "context", "needs", "fits now?")
_NUMBERS = frozenset({"size", "context", "needs"})  # to the right
FITS, IN_PART, ON_HOST, TOO_LARGE = "fits", "fits in part on the GPU", "fits on the host only", "too large"


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the list; numbers are 0 and texts empty where `problem` says why it cannot be read."""

    name: str  # to acquire the model by; empty where the place itself cannot be listed
    place: str  # where the model was found
    path: str = ""
    size_bytes: int = 0  # of its files, adapters and projectors among them
    architecture: str = ""
    quantisation: str = ""  # empty too where the file names none
    context_trained: int = 0  # tokens
    needed_bytes: int = 0  # that must be free on all devices together to load it with automatic options
    fits: str = ""  # whether it would be loaded now if no other model were: one of the texts below
    problem: str = ""


def run_models(settings: Settings, folders: Sequence[Path], *, as_json: bool) -> int:
    """Print the list, of these folders alone if there are any; return the exit status, 0 for an empty list too."""
    for folder in folders:
        if not folder.is_dir():
            raise InvalidSettings("FOLDER", str(folder), "a folder; `loadmaster fit` takes a file or a name")
    catalog = Catalog([Folder(folder.absolute()) for folder in folders] or default_resolvers(settings.models))
    engine = llama_engine(settings)
    try:
        core = _core_of(settings, engine)
        with progress_on(SafeConsole(stderr=True)) as progress:
            rows = list(read_rows(catalog, core, engine, progress))
    finally:
        engine.close()
    if as_json:
        print_json([asdict(row) for row in rows])
    elif rows:
        _print_tables(rows)
    else:
        print(shown(_nothing(catalog.places, named=bool(folders))))
    return 0


def read_rows(catalog: Catalog, core: Core, engine: LlamaEngine, progress: Progress) -> Iterator[Row]:
    """Yield a row for each model that has a name, in the order in which names are looked up.

    `core`, which knows the devices, says whether a model fits, and is not changed; `engine` says what it takes.
    """
    task = progress.add_task("Looking for models", total=None)
    unlisted: dict[str, str] = {}
    listed = list(catalog.listing(unlisted))
    progress.remove_task(task)
    for name, resolver in progress.track(listed, description="Reading models"):
        row = Row(name, location_of(resolver))
        try:
            if (spec := found_by(resolver, name)) is None:
                continue  # the model went away meanwhile
            row = replace(row, path=spec.path)
            yield _read(row, spec, core, engine)
        except Exception as error:  # a resolver may be the user's own
            yield replace(row, problem=error.reason if isinstance(error, InvalidModel) else in_words(error))
    yield from (Row("", place, problem=why) for place, why in unlisted.items())


def _core_of(settings: Settings, engine: LlamaEngine) -> Core:
    """Return a core that has the devices as they are, and no runners."""
    devices = device_reader(settings)
    if engine.gpu_list is not None:
        devices.list_by(engine.gpu_list)
    core = Core(limits_of(settings), settings.eviction)
    core.step(monotonic_clock(), Sampled(devices.sample()))
    devices.close()
    return core


def _read(row: Row, spec: ModelSpec, core: Core, engine: LlamaEngine) -> Row:
    spec = spec.resolved()
    info = read_metadata(spec.path, adapters=spec.all_adapters, projectors=spec.projectors, embedding=spec.embedding)
    fits, needed_bytes = _fit(spec, engine.profile(info, [spec.options]), core)
    return replace(
        row,
        size_bytes=info.file_bytes + info.adapters_bytes + info.projectors_bytes,
        architecture=info.architecture,
        quantisation=info.quantisation,
        context_trained=info.context_trained,
        fits=fits,
        needed_bytes=needed_bytes,
    )


def _fit(spec: ModelSpec, profile: ModelProfile, core: Core) -> tuple[str, int]:
    found = preview(monotonic_clock(), core, RequestSpec(spec.id, spec.options, Purpose.lease, 0), profile)
    if isinstance(found.refusal, DoesNotFitRefusal):
        return TOO_LARGE, sum(amount for _, amount in found.refusal.needed)
    needed_bytes = sum(share.needed_bytes for share in found.shares)
    if found.in_part:
        return IN_PART if found.gpu_layers else ON_HOST, needed_bytes
    return FITS, needed_bytes


def _print_tables(rows: Sequence[Row]) -> None:
    console = SafeConsole(highlight=False)
    for place, group in groupby(rows, key=lambda row: row.place):
        console.print(Text(place, style="bold"), soft_wrap=True)
        for line in table_of(group):
            console.print(Text(line), soft_wrap=True)
        console.print()


def table_of(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the models of one place as lines: one for each model, whole, however narrow the terminal is."""
    lines = [_HEADINGS, *(tuple(map(printable, _cells(row))) for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = [
            " " * (width - cell_len(text)) + text if heading in _NUMBERS else text + " " * (width - cell_len(text))
            for text, width, heading in zip(line, widths, _HEADINGS, strict=True)
        ]
        yield "  ".join(padded).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    if row.problem:
        return (row.name or "(the rest)", "", "", "", "", "", f"cannot be read: {row.problem}")
    context, size, needed = str(row.context_trained), format_bytes(row.size_bytes), format_bytes(row.needed_bytes)
    return (row.name, size, row.architecture, row.quantisation, context, needed, row.fits)


def _nothing(places: Sequence[str], *, named: bool) -> str:
    looked = "\n".join(f"  {place}" for place in (*places, *(() if named or hub_is_installed() else (HUB_MISSING,))))
    return (
        f"No model has a name. Looked in\n{looked}\n"
        "Name folders of GGUF files with LOADMASTER_MODELS, several separated as in PATH; a file is also taken by its "
        "path."
    )


@contextmanager
def progress_on(console: Console) -> Iterator[Progress]:
    """Yield a display that appears on a terminal once the work takes long, and that leaves nothing behind."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, console=console, transient=True)
    patience = threading.Timer(PATIENCE_S, progress.start)
    if console.is_terminal:
        patience.start()
    try:
        yield progress
    finally:
        patience.cancel()
        if console.is_terminal:
            patience.join()
            progress.stop()
