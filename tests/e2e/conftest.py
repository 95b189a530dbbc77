"""Homes for the end-to-end tests; one finished home serves all that only look."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.homes import Home, free_port
from tests.orchestration import worlds


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    documents, questions = worlds.sources(tmp_path)
    made = Home(tmp_path / "home", documents, questions)
    yield made
    made.end()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, dict[str, Any]]]:
    """A home in which the main job ran once, undisturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    documents, questions = worlds.sources(folder)
    made = Home(folder / "home", documents, questions)
    yield made, json.loads(made.run(*made.main_job()))
    made.end()


@pytest.fixture
def free_ports() -> tuple[int, int]:
    """Two ports of the loopback interface that nobody uses now."""
    return free_port(), free_port()
