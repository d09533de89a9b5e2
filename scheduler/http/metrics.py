"""Figures of the server for Prometheus: read from the scheduler as they are asked for, or counted as requests end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from fsm.machine.request import ModelId
from fsm.machine.runner import LOADING, RunnerState
from scheduler.api.scheduler import Scheduler
from scheduler.api.status import RunnerStatus, Status
from scheduler.errors.kinds import WAIT_KINDS, kind_of
from scheduler.http.observer import LOADED, Event, Observer
from scheduler.runtime.event_stream import Decision, Gap, Transition

_SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OUTCOME = ("model", "outcome")
_RUNNER_LABELS = ("runner", "model", "device")
_DEVICE = (
    ("capacity_bytes", "memory of the device that may be used"),
    ("free_bytes", "memory of the device that can still be reserved"),
    ("held_bytes", "memory of the device that counts as taken by runners and reservations"),
    ("missing_bytes", "memory of the device that other programs hold"),
)
_RUNNER = (
    ("held_bytes", "memory that counts as taken by the runner"),
    ("resident_bytes", "memory of the runner as last measured"),
)


class Metrics(Collector):
    """Counts what happens, and reads the rest from the scheduler when it is asked.

    The label of a model is the first name under which it was used, since a model has many names, and clients choose
    among them: there are as many labels as models.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._names: dict[ModelId, str] = {}
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"loadmaster_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"loadmaster_{name}_seconds", text, ("model",), registry=registry, buckets=_SECONDS)

        self._requests = counter("requests", "requests; the outcome is ok, left or an error's code", *_OUTCOME)
        self._tokens_in = counter("tokens_in", "tokens of prompts, where the answer tells them", "model")
        self._tokens_out = counter("tokens_out", "tokens of answers, where the answer tells them", "model")
        self._evictions = counter("evictions", "runners that were told to leave, by cause", "model", "cause")
        self._crashes = counter("crashes", "runners that failed, by cause", "model", "cause")
        self._missed = counter("events_missed", "events of the scheduler that came too fast to be counted")
        self._waits = histogram("wait", "how long requests waited for the lease that they got")
        self._answers = histogram("answer", "how long requests held their lease")
        self._loads = histogram("load", "how long loads took")
        self.observer = Observer(scheduler, self._hear)
        registry.register(self)

    def text(self) -> bytes:
        """Return all figures in the text format of Prometheus."""
        self.observer.catch_up()
        return generate_latest(self._registry)

    def count(self, notes: Mapping[str, object]) -> None:
        """Count a request by what was noted of it; of those that need no model, the refused ones are counted."""
        model, error = notes.get("model_id"), notes.get("error")
        if model is None and error is None:
            return
        name = "" if model is None else self._label(ModelId(str(model)), str(notes["model"]))
        outcome = "left" if notes.get("left") else str(error or "ok")
        self._requests.labels(name, outcome).inc()
        for note, histogram in (("wait_s", self._waits), ("answer_s", self._answers)):
            if isinstance(seconds := notes.get(note), float):
                histogram.labels(name).observe(seconds)
        for note, counter in (("tokens_in", self._tokens_in), ("tokens_out", self._tokens_out)):
            if isinstance(tokens := notes.get(note), int):
                counter.labels(name).inc(tokens)

    def collect(self) -> Iterator[Metric]:
        """Yield what the scheduler's status tells."""
        status = self._scheduler.status()
        for field, text in _DEVICE:
            metric = GaugeMetricFamily(f"loadmaster_device_{field}", text, labels=("device", "kind"))
            for device in status.devices:
                metric.add_metric((device.id, device.kind), getattr(device, field))
            yield metric
        yield from self._runners(status)
        waits = GaugeMetricFamily(
            "loadmaster_queue", "requests that wait, by what they wait for", labels=("waits_for",)
        )
        for kind in WAIT_KINDS:
            waits.add_metric((kind,), sum(wait.waits_for_kind == kind for wait in status.queue))
        yield waits
        yield GaugeMetricFamily("loadmaster_problems", "what went wrong and still does", value=len(status.problems))

    def _runners(self, status: Status) -> Iterator[Metric]:
        states = GaugeMetricFamily("loadmaster_runners", "runners by state", labels=("state",))
        for state in RunnerState:
            if state is not RunnerState.unloaded:
                states.add_metric((state.value,), sum(runner.state == state.value for runner in status.runners))
        yield states
        leases = GaugeMetricFamily("loadmaster_runner_leases", "leases on the runner", labels=_RUNNER_LABELS[:2])
        for runner in status.runners:
            leases.add_metric((str(runner.id), self._label_of(runner)), runner.leases)
        yield leases
        for field, text in _RUNNER:
            metric = GaugeMetricFamily(f"loadmaster_runner_{field}", text, labels=_RUNNER_LABELS)
            for runner in status.runners:
                for device, amount in getattr(runner, field).items():
                    metric.add_metric((str(runner.id), self._label_of(runner), device), amount)
            yield metric

    def _label(self, model: ModelId, name: str) -> str:
        return self._names.setdefault(model, name)

    def _label_of(self, runner: RunnerStatus) -> str:
        life = self.observer.lives.get(runner.id)
        return runner.model if life is None else self._label(life.model, runner.model)

    def _hear(self, event: Event) -> None:
        match event:
            case Transition():
                name = self._label(event.model, self._scheduler.name(event.model))
                if event.source is LOADING and event.destination in LOADED:
                    if (load := self.observer.lives[event.runner].load) is not None:
                        self._loads.labels(name).observe(load[1] - load[0])
                elif event.trigger == "expire":
                    self._evictions.labels(name, kind_of(event.why)).inc()
                elif event.trigger == "crash":
                    self._crashes.labels(name, kind_of(event.why)).inc()
            case Gap(missed):
                self._missed.inc(missed)
            case Decision():
                pass


class Counted:
    """An ASGI application around another, whose requests it counts."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self._metrics.count(scope.get("loadmaster", {}))
                self._metrics.observer.keep_up()
