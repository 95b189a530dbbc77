"""Fixtures of the tests of the operation."""

import logging
from pathlib import Path

import pytest

from orchestration.resources.mlflow_database import ensure_database
from tests.orchestration.homes import bootstrapped, empty_store, store

__all__ = ["bootstrapped", "empty_store", "store"]


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and nothing in them, to be copied; making one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    logging.getLogger("alembic").setLevel(logging.WARNING)
    ensure_database(f"sqlite:///{path}", None)
    return path
