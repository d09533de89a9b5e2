"""The page of states: Mermaid and Markdown drawn from the same tables and words that the core runs on.

`python -m fsm.verification.state_diagram > docs/states.md` draws them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fsm.machine import request, runner
from fsm.machine.request import RequestState
from fsm.machine.runner import PROCESS_TABLE, RUNNER_TABLE
from fsm.machine.transition_table import Row, State, Table

# What becomes of a request. The core writes a request's state itself, so these rows are a description, not a machine.
REQUEST_ROWS: tuple[Row[RequestState], ...] = (
    Row("grant", RequestState.queued, RequestState.granted, "its runner is loaded, or its memory is free"),
    Row("grant", RequestState.queued, RequestState.released, "a preload: it holds nothing"),
    Row(
        "reject", RequestState.queued, RequestState.rejected, "its load failed, its time limit passed, it fits nowhere"
    ),
    Row("cancel", RequestState.queued, RequestState.cancelled, "the caller left"),
    Row("release", RequestState.granted, RequestState.released, "released by the caller, or cancelled after its grant"),
    Row("revoke", RequestState.granted, RequestState.released, "its runner is gone"),
)

PREFACE = """\
# States

Drawn by `make docs` from the tables in `fsm/`; a test fails when this page differs from them.

## A runner

A runner is one life of one process: a reload is a new runner with a new id. A transition that the table does not name
is not allowed, and a row's guard must hold as well.
"""

PROCESSES = """\
## A runner's process

What a runner does while it is `expiring` follows from its leases and its process: it drains while it holds leases, and
its process is running; then its process is stopping; when its process is gone, its memory is recovered. A runner that
holds no lease is stopped in the step in which it expires.
"""

REQUESTS = """\
## A request

A request's state is a plain value that the core alone writes. A request for a loaded runner is granted in the step in
which it comes; a request that is refused at once is never queued.
"""


def mermaid(table: Table[State]) -> str:
    """Return a state diagram of a table, in Mermaid's language; triggers between the same two states share an arrow."""
    return _mermaid(table.rows, table.initial, (table.final,))


def markdown() -> str:
    """Return the page of all states in Markdown: what is true in each state, and the transitions between them."""
    queued, finals = RequestState.queued, (RequestState.released, RequestState.rejected, RequestState.cancelled)
    parts = [
        PREFACE,
        _fenced(mermaid(RUNNER_TABLE)),
        _meanings(runner.MEANING),
        _rows(RUNNER_TABLE.rows),
        PROCESSES,
        _fenced(mermaid(PROCESS_TABLE)),
        _meanings(runner.PROCESS_MEANING),
        _rows(PROCESS_TABLE.rows),
        REQUESTS,
        _fenced(_mermaid(REQUEST_ROWS, queued, finals)),
        _meanings(request.MEANING),
        _rows(REQUEST_ROWS),
    ]
    return "\n".join(parts)


def _mermaid(rows: Iterable[Row[State]], initial: State, finals: Sequence[State]) -> str:
    arrows: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        arrows.setdefault((row.source.name, row.destination.name), []).append(row.trigger)
    groups = [f"{source} --> {destination}: {', '.join(names)}" for (source, destination), names in arrows.items()]
    ends = [f"{final.name} --> [*]" for final in finals]
    return "\n    ".join(["stateDiagram-v2", f"[*] --> {initial.name}", *groups, *ends]) + "\n"


def _fenced(diagram: str) -> str:
    return f"```mermaid\n{diagram}```\n"


def _meanings(meanings: Mapping[State, str], of: str = "state") -> str:
    rows = [(f"`{state.name}`", text) for state, text in meanings.items()]
    return _table((of, "what is true while in it"), rows)


def _rows(rows: Iterable[Row[State]]) -> str:
    cells = [
        (
            f"`{row.trigger}`",
            f"`{row.source.name}`",
            f"`{row.destination.name}`",
            row.when + (f"; guard: `{row.guard}`" if row.guard else ""),
        )
        for row in rows
    ]
    return _table(("trigger", "from", "to", "when"), cells)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    groups = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in groups)


if __name__ == "__main__":
    print(markdown(), end="")
