"""Log lines that are safe to show: names of models and words of engines are in them, which may hold any characters."""

from __future__ import annotations

import logging

from scheduler.errors.formatting import printable, shown

NO_HANDLER = logging.NullHandler()  # of a logger whose lines go nowhere unless the program says where

_formatter = logging.Formatter()


class Escaping(logging.Filter):
    """Escapes the control characters of a record's message and traceback, and lets every record pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if (safe := printable(message)) != message:
            record.msg, record.args = safe, None
        if record.exc_info and not record.exc_text:
            trace = _formatter.formatException(record.exc_info)
            if (safe := shown(trace)) != trace:
                record.exc_text = safe
        return True


def prepare(logger: logging.Logger) -> None:
    """Have a logger print nothing by itself, and only lines that are safe to show."""
    logger.addHandler(NO_HANDLER)
    logger.addFilter(Escaping())
