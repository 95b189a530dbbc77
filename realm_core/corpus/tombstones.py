"""Tombstones: documents that a version of a corpus no longer holds, although their blocks still stand in its shards.

Growth never rewrites a shard: that would change its digest, and everything made from it would have to be made again. A
removed document is a line in tombstones.jsonl instead, and every reader of the corpus passes over its rows.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from realm_core.errors import ArtifactError

TOMBSTONES_FILE = "tombstones.jsonl"


@dataclass(frozen=True, order=True)
class Tombstone:
    """One removed document: rows `start` to `stop` (right-exclusive) as they are counted in the shard's files."""

    shard: str
    start: int
    stop: int
    doc_id: str

    @property
    def blocks(self) -> int:
        return self.stop - self.start


def write_tombstones(folder: Path, tombstones: Iterable[Tombstone]) -> None:
    """Write what `read_tombstones` reads; equal sets give equal bytes. No file for no tombstones."""
    lines = [json.dumps(asdict(tombstone), ensure_ascii=False) + "\n" for tombstone in sorted(set(tombstones))]
    if lines:
        (folder / TOMBSTONES_FILE).write_text("".join(lines), encoding="utf-8")


def read_tombstones(folder: Path) -> list[Tombstone]:
    """All tombstones of a corpus folder, by shard and row. Raises ArtifactError for a torn file."""
    path = folder / TOMBSTONES_FILE
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); restore the folder") from None
    try:
        found = sorted(Tombstone(**json.loads(line)) for line in content.splitlines())
        sound = all(isinstance(item.start, int) and isinstance(item.stop, int) for item in found)
    except (ValueError, TypeError):
        found, sound = [], False
    overlap = any(a.shard == b.shard and b.start < a.stop for a, b in pairwise(found))
    if not sound or overlap or any(not 0 <= item.start < item.stop for item in found):
        raise ArtifactError(f"{path}: torn or no list of tombstones; restore the folder")
    return found


def by_shard(tombstones: Iterable[Tombstone]) -> Mapping[str, list[tuple[int, int]]]:
    """Shard name -> its removed ranges."""
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for tombstone in tombstones:
        ranges[tombstone.shard].append((tombstone.start, tombstone.stop))
    return ranges
