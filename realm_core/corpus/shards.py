"""Reading a corpus folder: tokens by memory map, texts on demand, rows across all shards."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64, Shaped
from numpy import ndarray

from realm_core.corpus.layout import BLOCKS_FILE, ROWS_PER_GROUP, TOKENS_FILE, VOCABULARY_FILE, Array, map_arrays
from realm_core.corpus.tombstones import TOMBSTONES_FILE, by_shard, read_tombstones
from realm_core.corpus.writer import write_shards
from realm_core.errors import ArtifactError, DataError
from realm_core.text.blocks import Block
from realm_core.text.tokenizer import Tokenizer

__all__ = ["Corpus", "Shard", "write_shards"]

_OFFSETS = {
    "tokens": "token_offsets",
    "title_tokens": "title_offsets",
    "sentence_starts": "sentence_offsets",
    "sentence_ranges": "sentence_offsets",
    "span_bounds": "span_offsets",
}
_GROUPS_KEPT = 8  # decompressed row groups a shard keeps in memory


class Shard:
    """One shard; rows count from 0 within it, and pass over what `removed` (ranges of the rows in its files) names."""

    def __init__(self, folder: Path, removed: Sequence[tuple[int, int]] = ()) -> None:
        self.folder = folder
        self.name = folder.name
        self.arrays: Mapping[str, Array] = map_arrays(folder / TOKENS_FILE)
        missing = {*_OFFSETS, *_OFFSETS.values()} - set(self.arrays)
        if missing:
            raise ArtifactError(f"{folder / TOKENS_FILE}: no array {min(missing)}; re-run the corpus stage")
        self.stored = len(self.arrays["token_offsets"]) - 1  # rows in the files
        self.kept = _kept(folder, self.stored, removed)  # their numbers there; None: all of them
        self.blocks = self.stored if self.kept is None else len(self.kept)
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def values(self, name: str, row: int) -> Array:
        """The row's part of a flat array, as a read-only view."""
        offsets, row = self.arrays[_OFFSETS[name]], self.place(row)
        return self.arrays[name][offsets[row] : offsets[row + 1]]

    def lengths(self, name: str) -> Int64[ndarray, "N"]:
        """How many values of a flat array every row has."""
        lengths = np.diff(self.arrays[_OFFSETS[name]])
        return lengths if self.kept is None else lengths[self.kept]

    def place(self, row: int) -> int:
        """Where the row stands in the files."""
        return row if self.kept is None else int(self.kept[row])

    def kept_between(self, start: int, stop: int) -> Int64[ndarray, "_"]:
        """Rows of the files from `start` to `stop` that are not removed, counted from `start`."""
        if self.kept is None:
            return np.arange(stop - start)
        low, high = np.searchsorted(self.kept, (start, stop))
        return self.kept[low:high] - start

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the block table in row order."""
        column = self._read(lambda file: file.read(columns=[name])).column(0)
        return column if self.kept is None else column.take(pa.array(self.kept))

    @cached_property
    def block_ids(self) -> Shaped[ndarray, "N"]:
        """Identities in row order."""
        return np.array(self.column("block_id").to_pylist(), dtype="U32")

    def titles(self) -> list[str]:
        """Titles in row order."""
        return self.column("title").to_pylist()

    def record(self, row: int) -> dict[str, Any]:
        """block_id, doc_id, title, text, start, stop of a row."""
        row = self.place(row)
        group = row // ROWS_PER_GROUP
        if group not in self._groups:
            self._groups[group] = self._read(lambda file: file.read_row_group(group))
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group].slice(row % ROWS_PER_GROUP, 1).to_pylist()[0]

    def _read(self, part: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
        path = self.folder / BLOCKS_FILE
        try:
            with pq.ParquetFile(path) as file:  # not kept open: a large corpus has thousands of shards
                found = file.metadata.num_rows
                if found == self.stored:
                    return part(file)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{path}: cannot be read ({reason}); re-run the corpus stage") from None
        raise ArtifactError(f"{path}: {found} rows, {TOKENS_FILE} has {self.stored}; re-run the corpus stage")


class Corpus:
    """All blocks of a corpus folder. A global row counts through the shards in order of their names.

    Rows mean something only together with the digest of this very corpus: use `block_ids` to name a block elsewhere.
    """

    def __init__(self, folder: Path, shards: Mapping[str, Shard]) -> None:
        self.folder = folder
        self.shards = shards
        self._order = list(shards.values())
        self._ends = list(np.cumsum([shard.blocks for shard in self._order], dtype=np.int64).tolist())

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Map the token arrays of every shard; texts are read when asked for. Raises ArtifactError."""
        folder = Path(folder)
        names = sorted(path.name for path in folder.glob("shard-*") if path.is_dir())
        if not names or not (folder / VOCABULARY_FILE).is_file():
            raise ArtifactError(f"{folder}: not a corpus (no shard-* or no {VOCABULARY_FILE}); run the corpus stage")
        removed = by_shard(read_tombstones(folder))
        if unknown := sorted(removed.keys() - set(names)):
            raise ArtifactError(
                f"{folder / TOMBSTONES_FILE}: names {unknown[0]}, which is not there; restore the folder"
            )
        return cls(folder, {name: Shard(folder / name, removed.get(name, ())) for name in names})

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the ids belong to."""
        return Tokenizer.from_file(self.folder / VOCABULARY_FILE)

    def shard_rows(self, name: str) -> range:
        """Global rows of a shard."""
        position = list(self.shards).index(name)
        return range(self._ends[position] - self._order[position].blocks, self._ends[position])

    @cached_property
    def block_ids(self) -> Shaped[ndarray, "N"]:
        """Identities (32 hexadecimal digits) in row order. Equal title and text give an equal identity."""
        return np.concatenate([shard.block_ids for shard in self._order])

    def row_of(self, block_id: str) -> int:
        """Global row of a block, the lowest if its title and text occur several times. Raises DataError."""
        order, ordered = self._by_id
        place = int(np.searchsorted(ordered, block_id))
        if place == len(ordered) or ordered[place] != block_id:
            raise DataError(f"{self.folder}: no block {block_id!r}; it belongs to another version of the corpus")
        return int(order[place])

    def rows_titled(self, title: str) -> list[int]:
        """Global rows of all blocks with that title, letter by letter."""
        return [
            self.shard_rows(name)[row]
            for name, shard in self.shards.items()
            for row, found in enumerate(shard.titles())
            if found == title
        ]

    def token_ids(self, row: SupportsIndex) -> Int32[ndarray, "L"]:
        """Wordpieces of the body, without special tokens."""
        return self._values("tokens", row)

    def title_ids(self, row: SupportsIndex) -> Int32[ndarray, "L"]:
        """Wordpieces of the title, cut to half the block limit."""
        return self._values("title_tokens", row)

    def sentence_starts(self, row: SupportsIndex) -> Int32[ndarray, "S"]:
        """Offsets into `token_ids` at which a sentence begins; the first is 0."""
        return self._values("sentence_starts", row)

    def spans(self, row: SupportsIndex) -> Int32[ndarray, "M 2"]:
        """Salient spans as right-exclusive ranges of `token_ids`."""
        return self._values("span_bounds", row)

    def text(self, row: SupportsIndex) -> str:
        """Text of the block, original case."""
        return self._record(row)["text"]

    def texts(self, rows: Sequence[SupportsIndex] | ndarray) -> list[str]:
        """Texts of several blocks, in the order asked for."""
        return [self._record(row)["text"] for row in rows]

    def block(self, row: SupportsIndex) -> Block:
        """Everything about one block."""
        return Block(
            **self._record(row),
            title_ids=self.title_ids(row).tolist(),
            token_ids=self.token_ids(row).tolist(),
            sentence_starts=self.sentence_starts(row).tolist(),
            sentences=[(low, high) for low, high in self._values("sentence_ranges", row).tolist()],
            spans=[(low, high) for low, high in self.spans(row).tolist()],
        )

    @cached_property
    def _by_id(self) -> tuple[Array, Array]:
        order = np.argsort(self.block_ids, kind="stable")
        return order, self.block_ids[order]

    def lengths(self, name: str) -> Int64[ndarray, "N"]:
        """How many values of a flat array of the shards every row has."""
        return np.concatenate([shard.lengths(name) for shard in self._order])

    def _values(self, name: str, row: SupportsIndex) -> Array:
        shard, local = self._locate(row)
        return shard.values(name, local)

    def _record(self, row: SupportsIndex) -> dict[str, Any]:
        shard, local = self._locate(row)
        return shard.record(local)

    def _locate(self, row: SupportsIndex) -> tuple[Shard, int]:
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus with {len(self)} blocks")
        position = bisect_right(self._ends, row)
        shard = self._order[position]
        return shard, row - (self._ends[position] - shard.blocks)


def _kept(folder: Path, stored: int, removed: Sequence[tuple[int, int]]) -> Int64[ndarray, "N"] | None:
    if not removed:
        return None
    if max(stop for _, stop in removed) > stored:
        raise ArtifactError(f"{folder}: tombstones beyond its {stored} blocks; restore the folder")
    alive = np.ones(stored, dtype=bool)
    for start, stop in removed:
        alive[start:stop] = False
    return np.flatnonzero(alive).astype(np.int64)
