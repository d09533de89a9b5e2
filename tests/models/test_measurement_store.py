"""The file that keeps measurements: what it returns, and what may be wrong with it."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest

from fsm.domain.devices import HOST, DeviceId
from fsm.domain.options import Options
from fsm.sizing.load_history import LAST_LOADS, NOTHING, LoadHistory, LoadTimes, MeasuredBytes
from scheduler.config.paths import NO_HOME, VERSION, default_measurement_file
from scheduler.models.measurement_store import (
    _TABLE,
    APPLICATION_ID,
    MOST_BYTES,
    MOST_OF_A_MODEL,
    MOST_ROW_BYTES,
    MOST_ROWS,
    Identity,
    MeasurementStore,
    _checksum,
)
from scheduler.models.measurements import Measurements, identity_of
from scheduler.models.model_spec import ModelSpec
from tests.support.waiting import LIMIT_S

FILE = Identity('["/models/a.gguf"]', "[[1,2]]")
OPTIONS = Options(num_ctx=4096, use_mmap=False, cache_type_k="f16")
TOOK = ((HOST, 7), (DeviceId("GPU-1"), 5))
SPLIT = ((DeviceId("GPU-1"), 3),)
ON_HOST = ((HOST, 7),)
FORMER_FILE = Path(__file__).with_name("measurement_file_of_version_1.sql")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "footprints.sqlite3"


def test_a_file_of_the_former_setting_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file from when the setting was called `footprints` is read and written to."""
    monkeypatch.setattr("platform.node", lambda: "a-machine")
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as file:
        file.executescript(FORMER_FILE.read_text())
    store = MeasurementStore(path)
    every = Options(
        num_ctx=4096, num_batch=512, num_gpu=3, main_gpu=0, num_parallel=2, use_mmap=False, flash_attention=True,
        cache_type_k="f16", cache_type_v="q8_0",
    )  # fmt: skip
    assert store.read(FILE) == LoadHistory(
        (MeasuredBytes(every, SPLIT, TOOK), MeasuredBytes(Options(), (), ON_HOST)),
        (LoadTimes(SPLIT, (1.5, 2.5)), LoadTimes((), (0.5,))),
    )
    store.write(FILE, every, SPLIT, (), 3.5)
    assert store.read(FILE).loads[0] == LoadTimes(SPLIT, (1.5, 2.5, 3.5))
    assert store.problem == "" and [each.name for each in path.parent.iterdir()] == [path.name]


def written(path: Path, *, load_s: float = 1.5) -> MeasurementStore:
    """Return a store that has written one row."""
    store = MeasurementStore(path)
    store.write(FILE, OPTIONS, SPLIT, TOOK, load_s)
    return store


def known(load_s: float = 1.5) -> LoadHistory:
    """Return what that row holds."""
    return LoadHistory((MeasuredBytes(OPTIONS, SPLIT, TOOK),), (LoadTimes(SPLIT, (load_s,)),))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def is_a_store(path: Path) -> bool:
    with sqlite3.connect(path) as file:
        (application,) = file.execute("PRAGMA application_id").fetchone()
    file.close()
    return bool(application == APPLICATION_ID)


# -- what it gives back -----------------------------------------------------------------------------------------------


def test_what_was_written_is_read_by_another_store(path: Path) -> None:
    """Options, split, bytes and seconds are read by another store exactly as they were written."""
    written(path)
    assert MeasurementStore(path).read(FILE) == known()


def test_nothing_is_made_by_reading(path: Path) -> None:
    """Reading makes no file."""
    store = MeasurementStore(path)
    assert (store.read(FILE), store.problem, path.parent.exists()) == (NOTHING, "", False)


def test_the_file_and_its_folder_are_the_users_alone(path: Path) -> None:
    """The file and its folder are the user's alone, and a file that is shared stays shared."""
    store = written(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o664)
    store.write(FILE, OPTIONS, SPLIT, TOOK, 1.0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664


def test_another_state_of_the_files_is_another_model(path: Path) -> None:
    """Measurements of a file that was replaced, touched or loaded by another engine version are not used or kept."""
    store = written(path)
    replaced = Identity(FILE.files, "[[1,3]]")
    assert store.read(replaced) == NOTHING
    store.write(replaced, OPTIONS, (), ((HOST, 9),), None)
    assert store.read(FILE) == NOTHING
    assert store.read(replaced).sizes == (MeasuredBytes(OPTIONS, (), ((HOST, 9),)),)


def test_other_options_and_splits_are_told_apart(path: Path) -> None:
    """Each set of options has a row of its own, and loads are joined by split."""
    store = written(path)
    other = Options(num_ctx=512)
    store.write(FILE, other, SPLIT, ((HOST, 1),), 2.5)
    store.write(FILE, OPTIONS, (), ((HOST, 2),), 3.5)
    found = store.read(FILE)
    assert set(found.sizes) == {
        MeasuredBytes(OPTIONS, SPLIT, TOOK), MeasuredBytes(other, SPLIT, ((HOST, 1),)), MeasuredBytes(OPTIONS, (),
        ((HOST, 2),)),
    }  # fmt: skip
    assert {each.split: each.seconds for each in found.loads} == {SPLIT: (1.5, 2.5), (): (3.5,)}


def test_another_machine_that_shares_the_folder_has_figures_of_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine with the same home folder has figures of its own."""
    written(path)
    monkeypatch.setattr("platform.node", lambda: "another")
    assert MeasurementStore(path).read(FILE) == NOTHING


def test_a_load_alone_leaves_the_bytes_as_they_were(path: Path) -> None:
    """A run that measured only its load leaves the bytes of earlier runs."""
    store = written(path)
    store.write(FILE, OPTIONS, SPLIT, (), 2.5)
    store.write(FILE, OPTIONS, SPLIT, ((HOST, 8),), None)
    assert store.read(FILE) == LoadHistory(
        (MeasuredBytes(OPTIONS, SPLIT, ((HOST, 8),)),), (LoadTimes(SPLIT, (1.5, 2.5)),)
    )


def test_only_the_last_loads_are_kept(path: Path) -> None:
    """Only the last few load times are kept, so that a faster disk shows soon."""
    store = MeasurementStore(path)
    for number in range(LAST_LOADS + 3):
        store.write(FILE, OPTIONS, (), (), float(number))
    (loads,) = store.read(FILE).loads
    assert loads.seconds == tuple(map(float, range(3, LAST_LOADS + 3)))


def test_the_oldest_rows_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file keeps a bounded number of rows, those used last."""
    monkeypatch.setattr("scheduler.models.measurement_store.MOST_ROWS", 5)
    store = MeasurementStore(path)
    files = [Identity(f'["/models/{number}.gguf"]', "[]") for number in range(8)]
    for file in files[:5]:
        store.write(file, OPTIONS, (), ON_HOST, None)
    store.write(files[0], OPTIONS, (), (), 1.0)  # this row is used again
    for file in files[5:]:
        store.write(file, OPTIONS, (), ON_HOST, None)
    left = [number for number, file in enumerate(files) if store.read(file) != NOTHING]
    assert left == [0, 4, 5, 6, 7]


def test_a_full_file_is_small(path: Path) -> None:
    """A full file is small, and a bounded number of rows is read for one model."""
    store = MeasurementStore(path)
    store.write(FILE, OPTIONS, (), ON_HOST, 1.0)
    with sqlite3.connect(path) as file:  # the rows that so many writes would make
        row = list(file.execute("SELECT * FROM footprints").fetchone())
        many = ([*row[:2], f"{row[2]}{number}", *row[3:]] for number in range(MOST_ROWS + 100))
        file.executemany("INSERT INTO footprints VALUES (?, ?, ?, ?, ?, ?, ?, ?)", many)
    file.close()
    store.write(FILE, OPTIONS, SPLIT, TOOK, 1.0)
    with sqlite3.connect(path) as file:
        assert file.execute("SELECT count(*) FROM footprints").fetchone() == (MOST_ROWS,)
    file.close()
    assert path.stat().st_size < 2 * 2**20
    assert len(store.read(FILE).sizes) <= MOST_OF_A_MODEL


def test_what_is_too_long_is_not_kept(path: Path) -> None:
    """A row that is too long is not kept."""
    store = MeasurementStore(path)
    long = Identity("x" * 100_000, "[]")
    store.write(long, OPTIONS, (), ON_HOST, 1.0)
    assert (store.read(long), store.problem) == (NOTHING, "")


# -- what may be wrong with the file ----------------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database " * 1000)


def cut_short(path: Path) -> None:
    """Write a store of some pages whose last ones are lost."""
    store = written(path)
    for number in range(40):
        store.write(FILE, Options(num_ctx=number + 1), (), ON_HOST, 1.0)
    os.truncate(path, 4096)


def of_another_program(path: Path) -> None:
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE users (name TEXT)")
    file.close()


def of_ours(path: Path, schema: str, version: int = VERSION) -> None:
    """Write a file that claims to be a store of some schema."""
    with sqlite3.connect(path) as file:
        file.executescript(schema)
        file.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        file.execute(f"PRAGMA user_version = {version}")
    file.close()


def of_an_older_version(path: Path) -> None:
    of_ours(path, "CREATE TABLE footprints (model TEXT)", VERSION - 1)


def of_other_columns(path: Path) -> None:
    of_ours(path, "CREATE TABLE footprints (machine TEXT, files TEXT, options TEXT)")


def of_a_view(path: Path) -> None:
    of_ours(path, "CREATE VIEW footprints AS SELECT 1 AS machine")


def with_a_trigger(path: Path) -> None:
    """Write a store with a trigger that would run for ever."""
    of_ours(
        path,
        f"""{_TABLE}; CREATE TRIGGER endless AFTER INSERT ON footprints BEGIN
        DELETE FROM footprints WHERE machine =
            (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n); END;""",
    )


FOREIGN = [
    garbage, cut_short, of_another_program, of_an_older_version, of_other_columns, of_a_view, with_a_trigger,
]  # fmt: skip


@pytest.mark.parametrize("damage", FOREIGN)
def test_what_cannot_be_used_is_put_aside_and_begun_anew(
    damage: Callable[[Path], None], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that cannot be used is put aside with one warning that names both files, and a new file is begun."""
    path.parent.mkdir()
    damage(path)
    before = path.read_bytes()
    store = MeasurementStore(path)
    assert store.read(FILE) == NOTHING
    store.write(FILE, OPTIONS, SPLIT, TOOK, 1.5)
    assert (store.read(FILE), store.problem) == (known(), "")
    (warning,) = warnings(caplog)
    aside = path.with_name(f"{path.name}.old")
    assert str(path) in warning and str(aside) in warning
    assert aside.read_bytes() == before


def test_nothing_is_lost_of_what_was_put_aside_before(path: Path) -> None:
    """A file is put aside under a free name."""
    path.parent.mkdir()
    first, second = (path.with_name(f"{path.name}.{ending}") for ending in ("old", "old2"))
    first.write_text("my only backup")
    for number in range(2):
        path.write_text(f"no database {number}")
        written(path)
    assert (first.read_text(), second.read_text()) == ("my only backup", "no database 0")
    assert path.with_name(f"{path.name}.old3").read_text() == "no database 1"


@pytest.mark.parametrize("damage", [garbage, of_another_program, with_a_trigger])
def test_a_write_begins_anew_too(damage: Callable[[Path], None], path: Path) -> None:
    """A write that finds an unusable file begins a new one and writes its row."""
    path.parent.mkdir()
    damage(path)
    assert written(path).read(FILE) == known()


def test_an_empty_file_is_a_new_one(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An empty file is a new store, without a warning."""
    path.parent.mkdir()
    path.touch()
    store = MeasurementStore(path)
    assert store.read(FILE) == NOTHING
    store.write(FILE, OPTIONS, SPLIT, TOOK, 1.5)
    assert store.read(FILE) == known() and not warnings(caplog)


def test_a_file_of_a_newer_version_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of a newer version is left alone, so that two versions used in turns do not lose each other's rows."""
    written(path)
    with sqlite3.connect(path) as file:
        file.execute(f"PRAGMA user_version = {VERSION + 1}")
    file.close()
    before = path.read_bytes()
    store = written(path)
    assert (store.read(FILE), path.read_bytes()) == (NOTHING, before)
    assert "newer version" in store.problem and len(warnings(caplog)) == 1


def test_a_folder_in_its_place_is_said_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder in place of the file is reported once, and nothing is kept."""
    path.mkdir(parents=True)
    store = MeasurementStore(path)
    for _ in range(3):
        store.write(FILE, OPTIONS, (), ON_HOST, 1.0)
        assert store.read(FILE) == NOTHING
    assert path.is_dir() and str(path) in store.problem and len(warnings(caplog)) == 1


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be made is reported once."""
    (tmp_path / "home").touch()
    store = MeasurementStore(tmp_path / "home" / "cache" / "footprints.sqlite3")
    for _ in range(3):
        store.write(FILE, OPTIONS, (), ON_HOST, 1.0)
        assert store.read(FILE) == NOTHING
    assert store.problem and len(warnings(caplog)) == 1


READ_ONLY = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
import tests.models.test_measurement_store as those
path = Path(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
store = those.MeasurementStore(path)
store.write(those.FILE, those.OPTIONS, those.SPLIT, (), 9.0)
print(bool(store.problem), store.read(those.FILE) == those.known())
"""


def test_a_store_that_cannot_be_written_is_still_read() -> None:
    """A store that cannot be written is read, and reports the problem, as on a read-only image."""
    with tempfile.TemporaryDirectory() as folder:  # a folder that another user may enter, should this user be root
        path = Path(folder) / "footprints.sqlite3"
        written(path)
        path.chmod(0o444)
        path.parent.chmod(0o555)
        try:
            program = [sys.executable, "-c", READ_ONLY, str(path)]
            done = subprocess.run(program, capture_output=True, text=True, check=True)
        finally:
            path.parent.chmod(0o700)
    assert done.stdout.split() == ["True", "True"], done.stderr


FULL_DISK = """
import os, resource, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
import tests.models.test_measurement_store as those
path = Path(sys.argv[1])
store = those.MeasurementStore(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, resource.RLIM_INFINITY))
for number in range(60):
    store.write(those.FILE, those.Options(num_ctx=number + 1), (), those.ON_HOST, 1.0)
print(bool(store.problem), those.MeasuredBytes(those.OPTIONS, those.SPLIT, those.TOOK) in store.read(those.FILE).sizes)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.write(those.FILE, those.Options(num_ctx=1000), (), those.ON_HOST, 1.0)
later = those.MeasuredBytes(those.Options(num_ctx=1000), (), those.ON_HOST)
print(store.problem == "", later in store.read(those.FILE).sizes)
"""


def test_a_full_disk_costs_what_was_to_be_written_and_no_more(path: Path) -> None:
    """A full disk loses what was to be written, keeps the rows, is reported, and is over when there is room."""
    written(path)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4, done.stderr
    assert done.stderr.count("are not kept") <= 2  # once each for reading and for writing


def change(path: Path, column: str, value: object) -> None:
    with sqlite3.connect(path) as file:
        file.execute(f"UPDATE footprints SET {column} = ?", (value,))
    file.close()


def believe(path: Path, options: str, split: str, took: str, loads: str) -> None:
    """Insert a row with the right checksum."""
    for column, value in (("options", options), ("split", split), ("took", took), ("loads", loads)):
        change(path, column, value)
    change(path, "checksum", _checksum(FILE, (options, split, took, loads)))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("took", '[["cpu",1]]'), ("took", "[]"), ("took", "nonsense"), ("took", b"\xff"), ("loads", "[0.001]"),
        ("options", '{"num_ctx":1}'), ("split", "[]"), ("checksum", 0), ("checksum", "text"),
    ],
)  # fmt: skip
def test_a_row_that_was_changed_is_not_used(
    column: str, value: object, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that was changed is not used, and the next run writes it again."""
    store = written(path)
    change(path, column, value)
    assert (store.read(FILE), store.read(FILE)) == (NOTHING, NOTHING)
    assert len(warnings(caplog)) == 1
    store.write(FILE, OPTIONS, SPLIT, TOOK, 1.5)
    assert MeasuredBytes(OPTIONS, SPLIT, TOOK) in store.read(FILE).sizes


@pytest.mark.parametrize(
    ("options", "took", "loads"),
    [
        ('{"num_ctx":"x"}', "[]", "[]"), ('{"num_ctx":[1]}', "[]", "[]"), ('{"num_ctx":true}', "[]", "[]"),
        ('{"use_mmap":1}', "[]", "[]"), ('{"cache_type_k":1}', "[]", "[]"), ('{"num_ctx":null}', "[]", "[]"),
        (f'{{"num_ctx":{2**63}}}', "[]", "[]"), ("{}", '[["cuda9",1]]', "[]"), ("{}", '[["GPU-1",1]]', "[]"),
        ("{}", '[["cpu",1],["cuda9",1]]', "[]"), ("{}", '[["cpu",1],["cpu",2]]', "[]"), ("{}", '[[5,1]]', "[]"),
        ("{}", '[[["cpu"],1]]', "[]"), ("{}", f'[["cpu",{MOST_BYTES}]]', "[]"), ("{}", "[]", "[1e308]"),
        ("{}", "[" * (MOST_ROW_BYTES // 2), "[]"), ("[" * 30_000 + "]" * 30_000, "[]", "[]"), ("{}", "null", "[]"),
        ('{"dreams":1}', "[]", "[]"), ("[]", "[]", "[]"), ("{}", '[["cpu",-1]]', "[]"), ("{}", '[["cpu",1.5]]', "[]"),
        ("{}", '[["cpu",true]]', "[]"), ("{}", f'[["cpu",{10**30}]]', "[]"), ("{}", '["cpu"]', "[]"), ("{}", "7", "[]"),
        ("{}", "[]", "[NaN]"), ("{}", "[]", "[Infinity]"), ("{}", "[]", "[-1.0]"), ("{}", "[]", '["1"]'),
    ],
)  # fmt: skip
def test_a_row_that_makes_no_sense_is_not_used(options: str, took: str, loads: str, path: Path) -> None:
    """A row without a meaning is not used, even with the right checksum."""
    store = written(path)
    believe(path, options, json.dumps(SPLIT, separators=(",", ":")), took, loads)
    assert store.read(FILE) == NOTHING


@pytest.mark.parametrize("split", ["[[5,1]]", '[[["a"],1]]', '[["cpu",1]]', '[["a",1],["a",1]]', f'[["a",{2**40}]]'])
def test_a_split_that_makes_no_sense_is_not_used(split: str, path: Path) -> None:
    """A split that names the host, a GPU twice or too many layers is not used."""
    store = written(path)
    believe(path, "{}", split, "[]", "[1.0]")
    assert store.read(FILE) == NOTHING


def test_a_row_that_is_too_long_is_not_even_read(path: Path) -> None:
    """A row that is too long is not read, so that a model's rows take bounded memory."""
    store = written(path)
    believe(path, "{}", "[]", "[]", f"[{','.join(['0.1'] * MOST_ROW_BYTES)}]")
    assert store.read(FILE) == NOTHING


def test_text_that_is_none_is_a_row_that_is_damaged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A row with text that cannot be decoded is not used, and the other rows are."""
    store = written(path)
    store.write(FILE, Options(num_ctx=1), SPLIT, TOOK, None)
    path.write_bytes(path.read_bytes().replace(b'"num_ctx":4096', b'"\xeeum_ctx":4096'))
    assert store.read(FILE).sizes == (MeasuredBytes(Options(num_ctx=1), SPLIT, TOOK),)
    store.write(FILE, OPTIONS, SPLIT, TOOK, 1.5)
    assert MeasuredBytes(OPTIONS, SPLIT, TOOK) in store.read(FILE).sizes
    assert (store.problem, len(warnings(caplog))) == ("", 1)


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without a home folder there is no usual file, which is reported once with what to do."""

    def no_home(*_: object, **__: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("platformdirs.user_cache_path", no_home)
    path = default_measurement_file()
    store = written(path)
    assert (path, store.read(FILE)) == (NO_HOME, NOTHING)
    assert "the setting measurement_file" in store.problem and len(warnings(caplog)) == 1


# -- several programs -------------------------------------------------------------------------------------------------

WRITER = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
import scheduler.models.measurement_store as patience
import tests.models.test_measurement_store as those
patience.READ_TIMEOUT_S = patience.WRITE_TIMEOUT_S = 20.0  # a busy disk is no reason to lose anything here
store = those.MeasurementStore(Path(sys.argv[1]))
for number in range(20):
    store.write(those.FILE, those.Options(num_ctx=int(sys.argv[2]) + number), (), those.ON_HOST, 1.0)
    store.read(those.FILE)
print(store.problem or "all written")
"""


def test_programs_that_write_at_once_lose_nothing(path: Path) -> None:
    """Programs that write at once lose no row, from the one that makes the file on."""
    programs = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first)], stdout=subprocess.PIPE, text=True)
        for first in (1000, 2000)
    ]
    said = [program.communicate(timeout=LIMIT_S)[0].strip() for program in programs]
    assert said == ["all written"] * 2
    found = {took.options.num_ctx for took in MeasurementStore(path).read(FILE).sizes}
    assert found == {first + number for first in (1000, 2000) for number in range(20)}


def test_a_program_that_holds_the_file_is_not_waited_for_long(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that another program holds is waited for briefly: the model is predicted, and the write is lost."""
    store = written(path)
    with sqlite3.connect(path, isolation_level=None) as file:
        file.execute("BEGIN EXCLUSIVE")
        assert store.read(FILE) == NOTHING
        assert "locked" in store.problem
        file.execute("ROLLBACK")
    file.close()
    assert (store.read(FILE), store.problem) == (known(), "")
    assert len(warnings(caplog)) == 1


# -- the thread -------------------------------------------------------------------------------------------------------


class Stalled(MeasurementStore):
    """A store whose disk does not answer until it is released."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go = threading.Event()

    def read(self, identity: Identity) -> LoadHistory:
        self.go.wait(LIMIT_S)
        return super().read(identity)


def test_a_disk_that_does_not_answer_is_waited_for_once(path: Path) -> None:
    """A disk that does not answer is waited for once, and is used again when it answers."""
    written(path)
    footprints = Measurements(path)
    stalled = footprints._store = Stalled(path)
    assert footprints.recall(FILE, 0.01) == NOTHING
    assert footprints.recall(FILE, LIMIT_S) == NOTHING  # returns at once
    stalled.go.set()
    while footprints._late is not None and not footprints._late.is_set():
        assert footprints.recall(FILE, LIMIT_S) in (NOTHING, known())
    assert footprints.recall(FILE, LIMIT_S) == known()
    assert footprints.close(LIMIT_S) == []


def test_no_more_is_queued_than_a_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of jobs that wait for the disk is bounded."""
    monkeypatch.setattr("scheduler.models.measurements.MOST_JOBS", 3)
    footprints = Measurements(path)
    stalled = footprints._store = Stalled(path)
    accepted = [footprints._put(lambda: stalled.go.wait(LIMIT_S)) for _ in range(5)]
    assert accepted == [True] * 3 + [False] * 2
    stalled.go.set()
    assert footprints.close(LIMIT_S) == []


def test_a_job_that_could_not_be_queued_is_not_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that could not be queued, for Ctrl-C, does not count as one that the disk does not answer."""
    written(path)
    footprints = Measurements(path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(footprints._workers, "put", Mock(side_effect=KeyboardInterrupt))
        footprints.recall(FILE)
    assert (len(footprints._jobs), footprints.recall(FILE, LIMIT_S)) == (0, known())
    assert footprints.close(LIMIT_S) == []


# -- identities -------------------------------------------------------------------------------------------------------


def a_file(path: Path, content: bytes = b"model") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    return path


def test_a_model_is_told_by_its_files_and_what_is_done_with_them(tmp_path: Path) -> None:
    """A model's identity has path, size and time of each of its files, links resolved, and its use for embedding."""
    model, beside = a_file(tmp_path / "a.gguf"), str(a_file(tmp_path / "b.gguf"))
    (tmp_path / "link.gguf").symlink_to(model)
    specs = [
        ModelSpec("a", str(model)), ModelSpec("a", beside), ModelSpec("a", str(model), adapters=(beside,)),
        ModelSpec("a", str(model), projectors=(beside,)), ModelSpec("a", str(model), embedding=True),
    ]  # fmt: skip
    identities = [identity_of(spec.resolved()) for spec in specs]
    assert None not in identities and len(set(identities)) == len(specs)
    assert identity_of(ModelSpec("other name", str(tmp_path / "link.gguf")).resolved()) == identities[0]


@pytest.mark.parametrize("how", ["size", "time", "adapter", "engine"])
def test_a_file_that_was_replaced_is_another(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced file of a model, or another version of the engine, is another identity."""
    model, adapter = a_file(tmp_path / "a.gguf"), a_file(tmp_path / "b.gguf")
    spec = ModelSpec("a", str(model), adapters=(str(adapter),))
    before = identity_of(spec)
    match how:
        case "size":
            a_file(model, b"longer")
        case "time":
            os.utime(model, ns=(1, 2))
        case "adapter":
            os.utime(adapter, ns=(1, 2))
        case _:
            monkeypatch.setattr("scheduler.models.measurements.installed_version", lambda name: "99")
    after = identity_of(spec)
    assert before is not None and after is not None
    assert (after.files, after.state == before.state) == (before.files, False)


def test_all_parts_of_a_model_that_was_split_count(tmp_path: Path) -> None:
    """Each part of a split model is in its identity, and with a missing part there is none."""
    for number in (1, 2, 3):
        a_file(tmp_path / f"a-{number:05}-of-00003.gguf")
    spec = ModelSpec("a", str(tmp_path / "a-00001-of-00003.gguf"))
    before = identity_of(spec)
    os.utime(tmp_path / "a-00003-of-00003.gguf", ns=(1, 2))
    assert identity_of(spec) not in (before, None)
    (tmp_path / "a-00002-of-00003.gguf").unlink()
    assert identity_of(spec) is None


def test_an_object_has_no_file(tmp_path: Path) -> None:
    """An object has no identity for measurements, because it declares its memory."""
    assert identity_of(object()) is None
    assert identity_of(ModelSpec("a", str(tmp_path / "nowhere.gguf"))) is None
