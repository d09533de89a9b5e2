"""Profiles of Hypothesis: HYPOTHESIS_PROFILE is dev (the default), ci (always the same examples), fast or nightly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from scheduler.engines.llama_spare import Spares
from tests.support.own_server import CHOSEN, KINDS, SERVER, the_server

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background, where Ctrl-C is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def footprints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give each test a file of its own for measurements, and its child processes none; yield the files' folder."""
    folder = tmp_path_factory.mktemp("footprints")

    def of_this_test() -> Path:
        name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]  # without its phase
        return folder / f"{sha256(name.encode()).hexdigest()[:16]}.sqlite3"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scheduler.config.settings.default_measurement_file", of_this_test)
        patch.setenv("LOADMASTER_MEASUREMENT_FILE", "none")
        yield folder


@pytest.fixture(autouse=True, scope="session")
def lock_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep schedulers under test and in their child processes from waiting for other programs' loads."""
    folder = tmp_path_factory.mktemp("locks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scheduler.config.settings.shared_lock_folder", lambda: folder)
        patch.setenv("LOADMASTER_LOCK_FOLDER", str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="session")
def no_child_kept_ready() -> Iterator[None]:
    """Keep no child ready for the next load: few tests have one, and they would take it for a leak."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scheduler.engines.llama.Spares", lambda launcher, enabled: Spares(launcher, enabled=False))
        patch.setenv("LOADMASTER_PRESTART", "false")
        yield


@pytest.fixture(params=KINDS, scope="module")
def served_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Have each test that uses this serve its models by the wheel, and once more by a `llama-server`."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == SERVER:
            patch.setenv(CHOSEN, str(the_server()))
        yield request.param


settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("fast", deadline=None, derandomize=True, max_examples=20)
settings.register_profile(
    "nightly", deadline=None, max_examples=5000, stateful_step_count=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
