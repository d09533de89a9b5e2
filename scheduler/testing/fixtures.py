"""A fixture of pytest; a `conftest.py` that imports it has it. Nothing else here needs pytest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scheduler.testing.fake_machine import FakeMachine


@pytest.fixture
def fake_machine() -> Iterator[FakeMachine]:
    """Yield a machine with 8 GiB of memory and no models; its scheduler is closed after the test."""
    with FakeMachine() as machine:
        yield machine
