"""A context that gives up its older half when it is full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fsm.domain.options import Options
from scheduler import Scheduler
from scheduler.engines.llama_options import resolve
from tests.support.leaks import no_leaks
from tests.support.models import a_model
from tests.support.real import settings
from tests.support.tiny_models import END, write_tiny_model

INFO = a_model()


def test_an_answer_goes_on_past_its_context(served_by: str, tmp_path: Path) -> None:
    """Where that is named; it ends with its context else, and after ten contexts where nothing else ends it."""
    model = write_tiny_model(tmp_path / "m.gguf", context=1024, biases={END: -40})
    with no_leaks(), Scheduler(settings()) as scheduler:
        lengths, runners = [], []
        for shifts, most in ((None, None), (True, None), (None, 300), (False, 300)):
            with scheduler.acquire(model, num_ctx=256, context_shift=shifts, keep_alive="1h") as lease:
                answer = lease.complete("Once upon a time", temperature=0, max_tokens=most)
                assert answer.finish_reason == "length"
                lengths.append(answer.usage["completion_tokens"])
                runners.append(lease.runner)
    assert lengths == [240, 2560, 300, 240]
    assert runners[1] == runners[2] and len({*runners}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"embedding": True}, {"vision": True}, {"projectors_bytes": 1}, {"architecture": "deepseek2"},
        {"architecture": "qwen2vl"}, {"sliding_layers": (False, True)}, {"recurrent_layers": (True,)},
        {"draft": replace(INFO, recurrent_layers=(True,))},
    ],
)  # fmt: skip
def test_where_the_engine_cannot_shift_nothing_is_shifted(change: dict[str, Any]) -> None:
    """llama.cpp would switch it off, or abort: what a runner has is what its options say."""
    assert resolve(INFO, Options(context_shift=True)).context_shift is True
    assert resolve(replace(INFO, **change), Options(context_shift=True)).context_shift is False
    assert resolve(INFO, Options()).context_shift is False
