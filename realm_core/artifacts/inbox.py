"""HOME/inbox: files that change the corpus when the loop finds them.

NAME.jsonl (or .parquet, .xml …)    documents to add
NAME.replace.jsonl                  the same; texts with a known id take the place of the old ones
NAME.remove                         documents to remove: an id a line, or {"id": …} or {"title": …}

What was taken in moves to inbox/done, what cannot be to inbox/refused, beside a file that says why. Write a file under
another name (.part, or a leading dot) and rename it when it is complete.
"""

import os
from hashlib import sha256
from pathlib import Path

from realm_core.artifacts.publish import operator_error, write_durably

DONE, REFUSED, REASON = "done", "refused", ".reason"
_QUIET_SECONDS = 2.0  # a file that changed later than this may still be written
_UNFINISHED = (".part", ".tmp", ".crdownload", "~")


def pending(home: Path, now: float) -> list[Path]:
    """Complete files that wait, in order of their names. `now` is in seconds since the epoch."""
    folder = home / "inbox"
    if not folder.is_dir():
        return []
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."]
    return [path for path in found if not path.name.endswith(_UNFINISHED) and _age(path, now) > _QUIET_SECONDS]


def signature(paths: list[Path]) -> str:
    """Changes when a file is added, replaced or touched."""
    facts = [(path.name, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [path.stat()]]
    return sha256(repr(facts).encode()).hexdigest()[:16]


def refused(home: Path) -> list[str]:
    """Names of the files that could not be taken in."""
    folder = home / "inbox" / REFUSED
    return sorted(path.name for path in folder.iterdir() if path.suffix != REASON) if folder.is_dir() else []


def move(path: Path, to: str, reason: str | None = None) -> Path:
    """Put a file into a folder beside the others, with the reason in a file of its own; never over an older one."""
    folder = path.parent / to
    try:
        folder.mkdir(exist_ok=True)
        target, number = folder / path.name, 1
        while target.exists():
            number += 1
            target = folder / f"{number}.{path.name}"
        os.replace(path, target)
    except OSError as error:
        raise operator_error(error, folder) from None
    if reason is not None:
        write_durably(target.with_name(target.name + REASON), reason + "\n")
    return target


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:  # somebody took it away meanwhile
        return 0.0
