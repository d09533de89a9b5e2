"""Spans of OpenTelemetry for each lease, where its API is installed (extra `otel`) and the program has set it up.

`acquire` lasts from the request to the release of the lease. In it, `wait` lasts until the load of the model begins,
or until the lease is granted where no load is waited for, then come `load` and `answer`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from scheduler import __version__

try:
    from opentelemetry import propagate, trace
except ImportError:  # nothing is traced
    start = None
else:
    start = trace.get_tracer("loadmaster", __version__).start_span

_NOTED = {"model": "gen_ai.request.model", "tokens_in": "gen_ai.usage.input_tokens"}
_NOTED |= {"tokens_out": "gen_ai.usage.output_tokens"}


def write_spans(
    notes: Mapping[str, Any],
    headers: Mapping[str, str],
    asked_at: float,
    granted_at: float | None,
    load: Callable[[], tuple[float, float] | None],
) -> None:
    """Write the spans of a lease that ends now, with the exception that is handled now, if any, as its error.

    Times are of the monotonic clock; `granted_at` is None where the lease was not granted. The spans belong to the
    current span, or else to the one that the headers of the request name. `load` returns when the load of the runner
    began and ended; it is called only where spans are recorded.
    """
    if start is None:
        return
    inside = trace.get_current_span().get_span_context().is_valid
    epoch_s, ended_at = time.time() - time.monotonic(), time.monotonic()
    context = None if inside else propagate.extract(headers)
    whole = start("acquire", context, start_time=_ns(epoch_s + asked_at))
    if whole.is_recording():
        whole.set_attributes({name: notes[note] for note, name in _NOTED.items() if note in notes})
        if (error := sys.exception()) is not None:
            whole.set_attribute("error.type", type(error).__name__)
            whole.set_status(trace.StatusCode.ERROR)
        within, last = trace.set_span_in_context(whole), asked_at
        for name, until in _parts(asked_at, granted_at, ended_at, load):
            part = start(name, within, start_time=_ns(epoch_s + last))
            part.end(_ns(epoch_s + until))
            last = until
    whole.end(_ns(epoch_s + ended_at))


def _parts(
    asked_at: float, granted_at: float | None, ended_at: float, load: Callable[[], tuple[float, float] | None]
) -> Iterator[tuple[str, float]]:
    """Yield the parts of a lease in order, each with its end."""
    if granted_at is None:
        yield "wait", ended_at
        return
    began, ended = load() or (granted_at, asked_at)
    if ended > asked_at:  # else the load was over before
        began = max(asked_at, began)
        yield "wait", began
        yield "load", granted_at
    else:
        yield "wait", granted_at
    yield "answer", ended_at


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
