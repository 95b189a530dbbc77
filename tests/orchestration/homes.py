"""Fixtures that give a test a tiny home of its own; the folders `assets` and `orchestration` share them."""

import shutil
from pathlib import Path

import pytest

from realm_core.artifacts.store import Store
from tests.orchestration import worlds


@pytest.fixture(scope="session")
def bootstrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with corpus, questions, ICT checkpoint, sparse reader and the checkpoint r1-s0000000. Never change it."""
    home = tmp_path_factory.mktemp("bootstrapped") / "home"
    worlds.bootstrap(worlds.create(home))
    return home


@pytest.fixture
def store(bootstrapped: Path, tmp_path: Path) -> Store:
    """A bootstrapped home that the test may change."""
    return Store(shutil.copytree(bootstrapped, tmp_path / "home"))


@pytest.fixture
def empty_store(tmp_path: Path) -> Store:
    """A home in which nothing has been made yet."""
    return worlds.create(tmp_path / "home")
