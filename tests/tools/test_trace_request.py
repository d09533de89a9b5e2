"""`make trace-request`: the files and functions of the project that one request passes."""

from __future__ import annotations

from pathlib import Path

from tests.support.leaks import no_leaks
from tests.tools.trace_request import KINDS, table, trace_all


def test_a_warm_request_passes_less_than_a_cold_one_and_that_less_than_one_that_evicts(tmp_path: Path) -> None:
    """A warm request passes fewer functions than a cold one, and that one fewer than a request that evicts."""
    root = Path(__file__).parents[2]
    with no_leaks():
        found = trace_all(root, tmp_path, llama=False)
    assert tuple(found) == KINDS
    warm, cold, evicting = found.values()
    assert 0 < len(warm) < len(cold) < len(evicting)
    for functions in (warm, cold, evicting):
        assert functions[0].name == "Scheduler.acquire"
        assert {Path(function.file).parts[0] for function in functions} == {"fsm", "scheduler"}
    assert len(table(found).splitlines()) == 1 + len(KINDS)
