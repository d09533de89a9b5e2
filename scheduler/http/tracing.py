"""Spans of OpenTelemetry for each lease, where its API is installed (extra `otel`) and the program has set it up.

`acquire` lasts from the request to the release of the lease. In it, `wait` lasts until the load of the model begins,
or until the lease is granted where no load is waited for, then come `load` and `answer`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from scheduler import __version__

try:
    from opentelemetry import propagate, trace
except ImportError:  # nothing is traced
    start = None
else:
    start = trace.get_tracer("loadmaster", __version__).start_span

_S = 1_000_000_000  # nanoseconds
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
    ended_at, epoch_ns = time.monotonic(), time.time_ns() - time.monotonic_ns()
    context = None if inside else propagate.extract(headers)

    def span(name: str, begins: float, ends: float, within: Any) -> Any:
        made = start(name, within, start_time=epoch_ns + int(begins * _S))
        made.end(epoch_ns + int(ends * _S))
        return made

    whole = start("acquire", context, start_time=epoch_ns + int(asked_at * _S))
    if whole.is_recording():
        whole.set_attributes({name: notes[note] for note, name in _NOTED.items() if note in notes})
        if (error := sys.exception()) is not None:
            whole.set_attribute("error.type", type(error).__name__)
            whole.set_status(trace.StatusCode.ERROR)
        within = trace.set_span_in_context(whole)
        if granted_at is None:
            span("wait", asked_at, ended_at, within)
        else:
            began, ended = load() or (granted_at, asked_at)
            began = max(asked_at, began) if ended > asked_at else granted_at  # a load that was over is none of its own
            span("wait", asked_at, began, within)
            if began < granted_at:
                span("load", began, granted_at, within)
            span("answer", granted_at, ended_at, within)
    whole.end(epoch_ns + int(ended_at * _S))
