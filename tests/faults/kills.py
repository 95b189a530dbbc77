"""Sudden ends, for code that runs in a process of its own: no handler runs, nothing is flushed or cleaned up."""

import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_publishing(name: str, moment: str, writer: ModuleType) -> None:
    """From now on this process ends as soon as it publishes the artifact `name`: when a file of it that `writer` saves is
    "half written", or just "before the rename" or "after the rename" that makes it visible. At any other moment it lives."""
    save, rename = writer.save_file, os.rename

    def torn_save(values: Any, path: Path) -> None:
        save(values, path)
        if moment == "half written" and path.parent.name == f".{name}.partial":
            path.write_bytes(path.read_bytes()[:1000])
            die()

    def sudden_rename(source: Path, target: Path) -> None:
        here = Path(target).name == name
        if moment == "before the rename" and here:
            die()
        rename(source, target)
        if moment == "after the rename" and here:
            die()

    writer.save_file, os.rename = torn_save, sudden_rename
