"""Fixtures shared by all tests. Large reference data is optional: tests that need it are skipped where it is absent."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def _optional_folder(variable: str, beside: str) -> Path:
    folder = Path(os.environ.get(variable, REPOSITORY.parent / "shared" / beside))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set {variable} to run this test")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference vectors made with the two earlier implementations."""
    return _optional_folder("REALM_GOLDEN", "golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real corpora and question sets."""
    return _optional_folder("REALM_DATA", "data")
