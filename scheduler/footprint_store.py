"""What models took, in one SQLite file that survives restarts; made to be lost without harm.

It holds paths, sizes and times of model files, load-time options, bytes and seconds: nothing of what was asked.
Whatever is wrong with the file, models are loaded as if it were empty.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import platformdirs

from fsm.model import Amounts, DeviceId, Options
from fsm.remembered import LAST_LOADS, Loads, Remembered, Took, with_load

log = logging.getLogger("loadmaster")

VERSION = 1  # of the table; part of the usual file's name, so that programs of two versions leave each other's alone
APPLICATION_ID = 0x4C4D4650  # "LMFP": how a file of ours is told from any other SQLite file
MOST_ROWS = 1000  # one is about 600 bytes; the oldest go
MOST_ROW_BYTES = 64 * 1024
MOST_OF_A_MODEL = 64  # rows that are read of one model
MOST_BYTES = 1 << 60  # no device is larger
READ_TIMEOUT_S, WRITE_TIMEOUT_S = 0.25, 2.0  # how long another program may hold the file

_TABLE = """
CREATE TABLE footprints (
    machine TEXT NOT NULL, files TEXT NOT NULL, options TEXT NOT NULL, split TEXT NOT NULL,
    state TEXT NOT NULL, took TEXT NOT NULL, loads TEXT NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (machine, files, options, split)
)
"""
_READ = """
SELECT options, split, took, loads, checksum FROM footprints WHERE machine = ? AND files = ? AND state = ?
ORDER BY rowid DESC LIMIT ?
"""
_READ_ONE = """
SELECT options, split, took, loads, checksum FROM footprints
WHERE machine = ? AND files = ? AND state = ? AND options = ? AND split = ?
"""
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
    """What must be the same for a figure to hold, beside options and split."""

    files: str  # the paths of a model's files, and what they are used as
    state: str  # their sizes and times, and the versions of what loads them


def default_footprints() -> Path:
    """Return the file that this user's programs share."""
    return Path(platformdirs.user_cache_path("loadmaster", appauthor=False)) / f"footprints-{VERSION}.sqlite3"


class FootprintStore:
    """Reads and writes the file; each call opens it anew, blocks for as long as its time-outs say, and never raises.

    A file that is damaged, or none of ours, is set aside as FILE.old with a warning; one of a newer version is left as
    it is. What cannot be used is warned of once, and stands in `problem`. One thread uses it at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._problems: dict[str, str] = {}  # that stand, by what was tried
        self._warned = False  # of damaged rows
        self._machine = platform.node()

    @property
    def problem(self) -> str:
        """Why nothing is remembered, in a sentence; empty: it is."""
        return next(iter(self._problems.values()), "")

    def read(self, identity: Identity) -> Remembered:
        """Return what is known of a model's file; nothing where there is none, or it cannot be read."""
        rows: list[_Row] = []

        def act() -> None:
            if os.path.lexists(self.path):
                with self._opened(READ_TIMEOUT_S, write=False) as file:
                    key = (self._machine, identity.files, identity.state, MOST_OF_A_MODEL)
                    rows.extend(file.execute(_READ, key))

        self._attempt("read", act)
        return _remembered([known for row in rows if (known := self._known(identity, row)) is not None])

    def write(self, identity: Identity, options: Options, split: Amounts, took: Amounts, load_s: float | None) -> None:
        """Keep what a life showed: `took` replaces what was known, unless it is empty; `load_s` joins the last few."""

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
        row = file.execute(_READ_ONE, (self._machine, identity.files, identity.state, *place)).fetchone()
        known = self._known(identity, row) if row is not None else None
        seconds = known.seconds if known is not None else ()
        if load_s is not None:
            seconds = with_load(seconds, load_s)
        if not took and known is not None:
            took = known.took.bytes
        self._replace(file, identity, (*place, _text(took), _text(seconds)))

    def _replace(self, file: sqlite3.Connection, identity: Identity, row: tuple[str, str, str, str]) -> None:
        """Write one row, forget the model's earlier files, and the oldest rows of all."""
        if sum(map(len, (identity.files, identity.state, *row))) > MOST_ROW_BYTES:
            return
        file.execute(_FORGET_OTHER_FILES, (self._machine, identity.files, identity.state))
        checksum = _checksum(identity, row)
        file.execute(_WRITE, (self._machine, identity.files, *row[:2], identity.state, *row[2:], checksum))
        file.execute(_FORGET_OLDEST, (MOST_ROWS,))

    def _known(self, identity: Identity, row: _Row) -> _Known | None:
        """Return what a row says; None, with a warning, where it is not as it was written."""
        with suppress(ValueError, TypeError, AttributeError):
            if row[4] == _checksum(identity, row[:4]):
                return _known(row)
        if not self._warned:
            self._warned = True
            log.warning("%s has rows that are damaged: they are not used", self.path)
        return None

    def _attempt(self, what: str, act: Callable[[], None]) -> bool:
        """Take whatever goes wrong as a reason to go on without; return whether the file was put out of the way."""
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
        except (OSError, ValueError, OverflowError) as error:  # the last two: what SQLite cannot take as text or number
            self._say(what, str(error))
            return False
        self._problems.pop(what, None)
        if what == "written":  # then it can be read too
            self._problems.clear()
        return False

    def _say(self, what: str, reason: str) -> None:
        problem = f"what models take is not remembered: {self.path} could not be {what}: {reason}"
        if not self._problems:
            log.warning("%s", problem)
        self._problems[what] = problem

    def _set_aside(self, reason: str) -> bool:
        """Begin anew, with the old file kept beside: it may be somebody else's, named here by mistake."""
        aside = self.path.with_name(f"{self.path.name}.old")
        try:
            os.replace(self.path, aside)
        except FileNotFoundError:  # another program was quicker
            return True
        except OSError as error:
            self._say("put aside", f"{error} ({reason})")
            return False
        log.warning("%s cannot be used (%s): it is %s now, and what it held is forgotten", self.path, reason, aside)
        return True

    def _prepare(self) -> None:
        """Make the folder and the file where they are missing, for this user alone."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    @contextmanager
    def _opened(self, timeout_s: float, *, write: bool) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction, its table made where it is new; raises as `_guarded` knows it."""
        mode = os.stat(self.path).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("it is no file")
        if write and mode & 0o077:
            self.path.chmod(0o600)
        uri = f"{self.path.absolute().as_uri()}?mode=rw"  # never made here; where it is read-only this opens it so
        with closing(sqlite3.connect(uri, timeout=timeout_s, isolation_level=None, uri=True)) as file:
            file.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            self._check(file, write=write)
            yield file
            file.execute("COMMIT")

    def _check(self, file: sqlite3.Connection, *, write: bool) -> None:
        """See to it that the file is one of ours and of this version."""
        (application,) = file.execute("PRAGMA application_id").fetchone()
        (version,) = file.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if application == APPLICATION_ID and version > VERSION:
            raise OSError("it was written by a newer version")
        if (application, version) == (APPLICATION_ID, VERSION) and tables == {"footprints"}:
            return
        if (application, version, tables) != (0, 0, set()):
            raise _Foreign("it is none of this version's")
        if not write:
            raise _Empty
        file.execute(_TABLE)
        file.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        file.execute(f"PRAGMA user_version = {VERSION}")


class _Empty(Exception):
    """Nothing was ever written to the file."""


class _Foreign(Exception):
    """The file is none of ours, or of an older version."""


@dataclass(frozen=True, slots=True)
class _Known:
    """One row."""

    took: Took  # its bytes are empty where only loads are known
    seconds: tuple[float, ...]


def _remembered(rows: list[_Known]) -> Remembered:
    """Put rows together, the newest first: loads with one split belong together, whatever else was asked for."""
    loads: dict[Amounts, tuple[float, ...]] = {}
    for row in rows:
        split = row.took.split
        loads[split] = (*row.seconds, *loads.get(split, ()))[-LAST_LOADS:]
    sizes = tuple(row.took for row in rows if row.took.bytes)
    return Remembered(sizes, tuple(Loads(split, seconds) for split, seconds in loads.items() if seconds))


def _known(row: _Row) -> _Known:
    """Return what the texts of a row say; raises ValueError or TypeError for anything that is not what is written."""
    options, split, took, seconds = (json.loads(text) for text in row[:4])
    loads = tuple(_number(value, float, math.inf) for value in seconds)
    return _Known(Took(Options(**options), _amounts(split), _amounts(took)), loads)


def _amounts(pairs: list[tuple[str, int]]) -> Amounts:
    return tuple((DeviceId(device), _number(amount, int, MOST_BYTES)) for device, amount in pairs)


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
