"""MLflow's SQLite database of a home, made whole or not at all.

MLflow makes the tables of a new database by running its migrations on the file itself. SQLite does not undo a migration that is
cut off, and MLflow cannot go on with it: whoever is killed at that moment would leave a home that never tracks anything again.
"""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from realm_core.errors import BusyError

_SQLITE = "sqlite:///"
_PATIENCE_SECONDS = 120.0  # until another process has made the database, which takes seconds on a free machine


def ensure_database(uri: str, artifacts: str | None) -> None:
    """Make the database of `uri` if it is a SQLite file that does not exist. Files of its default experiment go to `artifacts`.

    Raises BusyError if another process is making it and does not end.
    """
    path = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=_PATIENCE_SECONDS):
            if not path.exists():
                _make(path, artifacts)
    except Timeout:
        raise BusyError(f"{path}: another process has been making it for {_PATIENCE_SECONDS:.0f} s; end it") from None


def _make(path: Path, artifacts: str | None) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = path.with_name(f".{path.name}.new")
    for left in path.parent.glob(f"{new.name}*"):  # by a process that was killed, with SQLite's journal beside it
        left.unlink()
    store = SqlAlchemyStore(f"{_SQLITE}{new}", artifacts or path.parent.as_uri())
    store.engine.dispose()
    os.replace(new, path)  # what SQLite committed is on the disk
