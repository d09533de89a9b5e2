"""The measurements of runners, in one SQLite file that survives restarts; losing the file does no harm.

The file holds paths, sizes and times of model files, load-time options, bytes and seconds, and nothing of prompts or
answers. Whatever is wrong with the file, models are loaded as if it were empty.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints
from zlib import crc32

from fsm.domain.devices import HOST, Amounts, DeviceId
from fsm.domain.options import Options
from fsm.sizing.load_history import LAST_LOADS, LoadHistory, LoadTimes, MeasuredBytes, with_load
from scheduler.config.paths import NO_HOME, VERSION

log = logging.getLogger("loadmaster")
APPLICATION_ID = 0x4C4D4650  # "LMFP": tells a file of ours from any other SQLite file
MOST_ROWS = 1000  # a row takes about 600 bytes; beyond it the oldest rows are deleted
MOST_ROW_BYTES = 64 * 1024
MOST_OF_A_MODEL = 64  # rows that are read of one model
MOST_BYTES = 1 << 46  # 64 TiB: no device is larger
MOST_LAYERS = 1 << 16
MOST_OF_AN_OPTION = 1 << 63
MOST_LOAD_S = 1e6  # eleven days
READ_TIMEOUT_S, WRITE_TIMEOUT_S = 0.25, 2.0  # how long to wait for another program that holds the file

_TABLE = """CREATE TABLE footprints (
    machine TEXT NOT NULL, files TEXT NOT NULL, options TEXT NOT NULL, split TEXT NOT NULL,
    state TEXT NOT NULL, took TEXT NOT NULL, loads TEXT NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (machine, files, options, split)
)"""  # as SQLite keeps it, to the letter
_SCHEMA = {("footprints", _TABLE), ("sqlite_autoindex_footprints_1", None)}  # name and text of everything in the file
_READ = """
SELECT options, split, took, loads, checksum FROM footprints
WHERE machine = ? AND files = ? AND state = ? AND length(CAST(options || split || took || loads AS BLOB)) <= ?
"""
_READ_ALL = f"{_READ} ORDER BY rowid DESC LIMIT ?"
_READ_ONE = f"{_READ} AND options = ? AND split = ?"
_FORGET_OTHER_FILES = "DELETE FROM footprints WHERE machine = ? AND files = ? AND state != ?"
_WRITE = "INSERT OR REPLACE INTO footprints VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_FORGET_OLDEST = """
DELETE FROM footprints WHERE rowid <= (SELECT rowid FROM footprints ORDER BY rowid DESC LIMIT 1 OFFSET ?)
"""
_Row = tuple[str, str, str, str, int]
Number = TypeVar("Number", int, float)
_BROKEN = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})


@dataclass(frozen=True, slots=True)
class Identity:
    """The part of a model that a measurement holds for, beside options and split."""

    files: str  # the paths of a model's files, and their roles
    state: str  # their sizes and times, and the versions of what loads them


class MeasurementStore:
    """Reads and writes the file; each call opens it anew, blocks for at most its timeout, and never raises.

    A file that is damaged, or of another kind, is set aside as FILE.old (FILE.old2 …) with a warning; a file of a newer
    version is left as it is. A failure is warned of once, and stands in `problem`. One thread uses the store at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._problems: dict[str, str] = {}  # standing problems, by what was tried
        self._warned = False  # of damaged rows
        self._machine = platform.node()
        if path == NO_HOME:
            self._say("made", "this user has none; name a file by the setting measurement_file")

    @property
    def problem(self) -> str:
        """Why no measurements are kept, in a sentence; empty where they are kept."""
        return next(iter(self._problems.values()), "")

    def read(self, identity: Identity) -> LoadHistory:
        """Return the measurements of a model's file; empty where there are none, or the file cannot be read."""
        rows: list[_Known] = []

        def act() -> None:
            if os.path.lexists(self.path):
                with self._opened(READ_TIMEOUT_S, write=False) as file:
                    key = (self._machine, identity.files, identity.state, MOST_ROW_BYTES)
                    found = file.execute(_READ_ALL, (*key, MOST_OF_A_MODEL)).fetchall()
                rows.extend(known for row in found if (known := self._known(identity, row)) is not None)

        self._attempt("read", act)
        return _remembered(rows)

    def write(self, identity: Identity, options: Options, split: Amounts, took: Amounts, load_s: float | None) -> None:
        """Keep the measurements of a runner: `took`, in bytes, replaces what was known unless it is empty.

        `load_s`, the seconds of its load, joins the last few.
        """

        def act() -> None:
            self._prepare()
            with self._opened(WRITE_TIMEOUT_S, write=True) as file:
                self._write(file, identity, options, split, took, load_s)

        if self._attempt("written", act):
            self._attempt("written", act)

    def _write(
        self, file: sqlite3.Connection, identity: Identity, options: Options, split: Amounts, took: Amounts,
        load_s: float | None,
    ) -> None:  # fmt: skip
        place = _text_of(options), _text(split)
        key = (self._machine, identity.files, identity.state, MOST_ROW_BYTES)
        row = file.execute(_READ_ONE, (*key, *place)).fetchone()
        known = self._known(identity, row) if row is not None else None
        seconds = known.seconds if known is not None else ()
        if load_s is not None:
            seconds = with_load(seconds, load_s)
        if not took and known is not None:
            took = known.took.bytes
        self._replace(file, identity, (*place, _text(took), _text(seconds)))

    def _replace(self, file: sqlite3.Connection, identity: Identity, row: tuple[str, str, str, str]) -> None:
        """Write one row, and delete the rows of the model's earlier files and the oldest rows of all."""
        if sum(map(len, (identity.files, identity.state, *row))) > MOST_ROW_BYTES:
            return
        file.execute(_FORGET_OTHER_FILES, (self._machine, identity.files, identity.state))
        checksum = _checksum(identity, row)
        file.execute(_WRITE, (self._machine, identity.files, *row[:2], identity.state, *row[2:], checksum))
        file.execute(_FORGET_OLDEST, (MOST_ROWS,))

    def _known(self, identity: Identity, row: _Row) -> _Known | None:
        """Return the measurements in a row, or None, with a warning, where the row is damaged."""
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            if row[4] == _checksum(identity, row[:4]):
                return _known(row)
        if not self._warned:
            self._warned = True
            log.warning("%s has rows that are damaged: they are not used", self.path)
        return None

    def _attempt(self, what: str, act: Callable[[], None]) -> bool:
        """Call `act`, and go on without it where it fails; return whether the file was put aside."""
        if self.path == NO_HOME:
            return False
        try:
            act()
        except _Empty:
            pass
        except _Foreign as error:
            return self._set_aside(str(error))
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BROKEN:
                return self._set_aside(str(error))
            self._say(what, str(error))
            return False
        except Exception as error:
            # text or numbers that SQLite cannot take, for example: models are loaded all the same
            self._say(what, str(error))
            return False
        self._problems.pop(what, None)
        if what == "written":  # then it can be read too
            self._problems.clear()
        return False

    def _say(self, what: str, reason: str) -> None:
        problem = f"measurements of models are not kept: {self.path} could not be {what}: {reason}"
        if not self._problems:
            log.warning("%s", problem)
        self._problems[what] = problem

    def _set_aside(self, reason: str) -> bool:
        """Begin anew, and keep the old file beside: its path may have been given by mistake."""
        endings = (f".old{number}" if number > 1 else ".old" for number in itertools.count(1))
        names = (self.path.with_name(self.path.name + ending) for ending in endings)
        aside = next(name for name in names if not os.path.lexists(name))
        try:
            os.replace(self.path, aside)
        except FileNotFoundError:  # another program was quicker
            return True
        except OSError as error:
            self._say("put aside", f"{error} ({reason})")
            return False
        log.warning("%s cannot be used (%s): it is %s now, and its measurements are lost", self.path, reason, aside)
        return True

    def _prepare(self) -> None:
        """Make the folder and the file where they are missing, for this user alone."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    @contextmanager
    def _opened(self, timeout_s: float, *, write: bool) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction, and make its table if the file is new.

        Raises the errors that `_attempt` handles.
        """
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise OSError("it is no file")
        # the file is not made here; a read-only file is opened read-only
        uri = f"{self.path.absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, timeout=timeout_s, isolation_level=None, uri=True)) as file:
            file.text_factory = _decoded
            file.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            self._check(file, write=write)
            yield file
            file.execute("COMMIT")

    def _check(self, file: sqlite3.Connection, *, write: bool) -> None:
        """Raise unless the file is one of ours and of this version; makes the table where the file is empty."""
        (application,) = file.execute("PRAGMA application_id").fetchone()
        (version,) = file.execute("PRAGMA user_version").fetchone()
        schema = set(file.execute("SELECT name, sql FROM sqlite_master"))
        if application == APPLICATION_ID and version > VERSION:
            raise OSError("it was written by a newer version")
        if (application, version) == (APPLICATION_ID, VERSION) and schema == _SCHEMA:
            return
        if (application, version, schema) != (0, 0, set()):
            raise _Foreign("it is none of this version's")
        if not write:
            raise _Empty
        file.execute(_TABLE)
        file.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        file.execute(f"PRAGMA user_version = {VERSION}")


class _Empty(Exception):
    """Nothing was ever written to the file."""


class _Foreign(Exception):
    """The file is of another kind, or of an older version."""


@dataclass(frozen=True, slots=True)
class _Known:
    """One row."""

    took: MeasuredBytes  # its bytes are empty where only loads are known
    seconds: tuple[float, ...]


def _remembered(rows: list[_Known]) -> LoadHistory:
    """Put rows together, the newest first: loads with one split belong together, whatever their other options are."""
    loads: dict[Amounts, tuple[float, ...]] = {}
    for row in rows:
        split = row.took.split
        loads[split] = (*row.seconds, *loads.get(split, ()))[-LAST_LOADS:]
    sizes = tuple(row.took for row in rows if row.took.bytes)
    return LoadHistory(sizes, tuple(LoadTimes(split, seconds) for split, seconds in loads.items() if seconds))


def _known(row: _Row) -> _Known:
    """Return the measurements in the texts of a row; raises ValueError or TypeError for a row that is not valid."""
    options, split, took, seconds = (json.loads(text) for text in row[:4])
    layers, held = _amounts(split, MOST_LAYERS), _amounts(took, MOST_BYTES)
    gpus, devices = dict(layers).keys(), dict(held).keys()
    if HOST in gpus or (held and not {HOST} <= devices <= {HOST, *gpus}):  # an integrated GPU's bytes are the host's
        raise ValueError("no such devices")
    loads = tuple(_number(value, float, MOST_LOAD_S) for value in seconds)[-LAST_LOADS:]
    return _Known(MeasuredBytes(_options(options), layers, held), loads)


# the options' types, without None
_OPTIONS = {name: get_args(kind)[0] for name, kind in get_type_hints(Options).items()}


def _options(named: dict[str, Any]) -> Options:
    for name, value in named.items():
        if type(value) is not _OPTIONS.get(name) or (type(value) is int and abs(value) >= MOST_OF_AN_OPTION):
            raise ValueError("no such option")
    return Options(**named)


def _amounts(pairs: list[tuple[str, int]], most: int) -> Amounts:
    amounts = tuple((DeviceId(device), _number(amount, int, most)) for device, amount in pairs)
    if not all(type(device) is str for device, _ in amounts) or len(dict(amounts)) != len(amounts):
        raise ValueError("no such devices")
    return amounts


def _number(value: Number, kind: type[Number], most: float) -> Number:
    if type(value) is not kind or not 0 <= value < most:
        raise ValueError("no such number")
    return value


def _checksum(identity: Identity, row: tuple[str, ...]) -> int:
    return crc32("\0".join((identity.files, identity.state, *row)).encode())


def _text_of(options: Options) -> str:
    named = {each.name: getattr(options, each.name) for each in fields(options)}
    return _text({name: value for name, value in named.items() if value is not None})


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _decoded(text: bytes) -> str:
    """Return a text of the file; a text that is not UTF-8 differs from what was written, as its checksum shows."""
    return text.decode(errors="replace")
