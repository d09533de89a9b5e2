"""Which models names and paths have led to: a loaded model is found although its file or its link is gone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from fsm.machine.request import ModelId
from scheduler.models.model_spec import ModelSpec

MOST_REFERENCES = 4096  # that are kept, beside those to models in use

Reference = tuple[str, str]  # a name or an absolute path, and the other parts of an identity that were named


class PastReferences:
    """The model that each name and path has led to last; safe to use from any thread."""

    def __init__(self, in_use: Callable[[], frozenset[ModelId]]) -> None:
        self._in_use = in_use  # the models that are loaded, pinned or waited for
        self._led_to: dict[Reference, ModelSpec] = {}

    def note(self, reference: Reference, model: ModelSpec) -> None:
        """Keep what a reference leads to."""
        if len(self._led_to) >= MOST_REFERENCES and reference not in self._led_to:
            used = self._in_use()
            self._led_to = {each: spec for each, spec in self._led_to.copy().items() if spec.id in used}
        self._led_to[reference] = model

    def model_in_use(self, references: Iterable[Reference]) -> ModelSpec | None:
        """Return the model that the first of these references with any led to last; None where that is not in use."""
        led_to = next(filter(None, map(self._led_to.get, references)), None)
        return led_to if led_to is not None and led_to.id in self._in_use() else None


def is_there(model: ModelSpec) -> bool:
    """Return whether every file of a model is there, as far as it is named: not the further parts of a split file."""
    beside = (*model.all_adapters, *model.projectors, *([model.draft] if model.draft else []))
    return all(map(os.path.exists, (model.path, *beside)))
