"""What commands print: control characters in the texts of models' files, names and paths never reach the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from scheduler.errors.formatting import shown


class SafeConsole(Console):
    """A console that escapes the control characters of what it is given to print, and no sequence of its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of what is printed."""
        for segment in super().render(renderable, options):
            safe = segment.text if segment.control else shown(segment.text)
            yield segment if safe == segment.text else Segment(safe, segment.style)


def print_json(value: object) -> None:
    """Print a value as JSON; what a terminal would act upon is escaped in its texts, and means the same to a reader."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print("".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text))
