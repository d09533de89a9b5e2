"""`scheduler.__version__`."""

from __future__ import annotations

import importlib.metadata
from unittest.mock import patch

import pytest

import scheduler


def test_the_version_is_that_of_the_installed_distribution() -> None:
    """The version is that of the installed distribution, as `pip show loadmaster` prints it."""
    try:
        installed = importlib.metadata.version("loadmaster")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("loadmaster runs here without being installed")
    assert scheduler.__version__ == installed


def test_the_version_is_unknown_where_nothing_is_installed() -> None:
    """The version is "unknown" where the package is imported from its source without being installed."""
    with patch.object(importlib.metadata, "version", side_effect=importlib.metadata.PackageNotFoundError):
        assert scheduler._version() == "0+unknown"
