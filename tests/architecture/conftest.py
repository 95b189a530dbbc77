"""Fixtures of the tests that look at the repository itself."""

from pathlib import Path

import pytest

PACKAGES = ("realm_core", "assets", "orchestration")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Top folder of the working tree."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sources(repository: Path) -> list[Path]:
    """Every Python file that ships."""
    return sorted(path for package in PACKAGES for path in (repository / package).rglob("*.py"))
