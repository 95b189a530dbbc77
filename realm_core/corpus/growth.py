"""Growth of a corpus: which documents it holds, a version beside it that shares its shards, and one that is written anew."""

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from realm_core.artifacts.publish import link_or_copy
from realm_core.corpus.documents import BadLine, checked_text, identifier, string_field
from realm_core.corpus.files import numbered_lines
from realm_core.corpus.layout import BLOCKS_FILE, TOKENS_FILE, shard_name
from realm_core.corpus.packing import HISTOGRAM_STEP, Columns
from realm_core.corpus.readers import json_object
from realm_core.corpus.shards import Corpus, Shard
from realm_core.corpus.spool import shard_of
from realm_core.corpus.tombstones import Tombstone
from realm_core.corpus.writer import ShardWriter, count_duplicates
from realm_core.errors import DataError
from realm_core.text.blocks import SPECIALS_PER_BLOCK
from realm_core.text.tokenizer import encodable

_ADDED_UP = 512  # blocks handed to a shard's writer together


@dataclass(frozen=True)
class Held:
    """A document that a corpus holds, and the tombstone that would remove it."""

    title: str
    tombstone: Tombstone

    @property
    def doc_id(self) -> str:
        return self.tombstone.doc_id


def documents_of(shard: Shard) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """(ids, first rows, rows after the last) of the documents of a shard; the rows of one lie together."""
    column = shard.column("doc_id").combine_chunks()
    if len(column) == 0:
        return pa.array([], pa.string()), np.empty(0, np.int64), np.empty(0, np.int64)
    runs = pc.run_end_encode(column, run_end_type=pa.int64())
    stops = runs.run_ends.to_numpy()
    return runs.values, np.concatenate([[0], stops[:-1]]), stops


def find_documents(corpus: Corpus, ids: Collection[str], titles: Collection[str] = ()) -> Iterator[Held]:
    """The documents with one of these ids, or with one of these titles, letter by letter."""
    known, named = _storable(ids), _storable(titles)
    for name, shard in corpus.shards.items():
        found, starts, stops = documents_of(shard)
        chosen = pc.is_in(found, known).to_numpy(zero_copy_only=False)
        if titles:
            first = shard.column("title").take(pa.array(starts))
            chosen = chosen | pc.is_in(first, named).to_numpy(zero_copy_only=False)
        for number in np.flatnonzero(chosen).tolist():
            start, stop = int(starts[number]), int(stops[number])
            tombstone = Tombstone(name, shard.place(start), shard.place(stop - 1) + 1, found[number].as_py())
            yield Held(shard.record(start)["title"], tombstone)


def _storable(names: Collection[str]) -> pa.Array:
    """Those of the names that a corpus can hold: a command line may hand over halves of surrogate pairs."""
    return pa.array(sorted(name for name in names if encodable(name) == name), pa.string())


def read_removals(path: Path) -> tuple[list[str], list[str]]:
    """(ids, titles) that a file asks to remove: {"id": …} or {"title": …} a line, or an id as it is.

    Raises DataError naming the line.
    """
    ids: list[str] = []
    titles: list[str] = []
    for number, line in numbered_lines(path):
        try:
            if line is None or not line.startswith(b"{"):
                ids.append(checked_text(None if line is None else line.decode("utf-8"), "id"))
                continue
            record = json_object(line)
            if not record.keys() & {"id", "title"}:
                raise BadLine("missing_field", "neither id nor title")
            ids += [identifier(record["id"])] if "id" in record else []
            titles += [string_field(record, "title")] if "id" not in record else []
        except (BadLine, UnicodeDecodeError) as problem:
            reason = problem if isinstance(problem, BadLine) else f"not UTF-8 at byte {problem.start} of the line"
            raise DataError(
                f"{path}:{number}: {reason}; write one id a line, or a JSON object with id or title"
            ) from None
    if not ids and not titles:
        raise DataError(f"{path}: names no document; write one id a line, or a JSON object with id or title")
    return ids, titles


def link_shards(base: Corpus, out: Path) -> list[str]:
    """Give `out` the shards of `base` without copying their bytes; returns the paths inside the folder."""
    paths = [f"{name}/{file}" for name in base.shards for file in (BLOCKS_FILE, TOKENS_FILE)]
    for path in paths:
        (out / path).parent.mkdir(exist_ok=True)
        link_or_copy(base.folder / path, out / path)
    return paths


def write_compacted(corpus: Corpus, out: Path, shards: int) -> None:
    """Write the documents of `corpus` into `shards` shards: those that a build from the same documents would write."""
    names = list(corpus.shards)
    places = [documents_of(shard) for shard in corpus.shards.values()]
    targets = [np.array([shard_of(doc_id, shards) for doc_id in ids.to_pylist()], np.int32) for ids, _, _ in places]
    for number in range(shards):
        rows: list[tuple[str, int, int]] = []
        for name, (ids, starts, stops), target in zip(names, places, targets, strict=True):
            chosen, first = np.flatnonzero(target == number), corpus.shard_rows(name).start
            of_shard = ids.take(pa.array(chosen)).to_pylist()
            rows += zip(of_shard, (starts[chosen] + first).tolist(), (stops[chosen] + first).tolist(), strict=True)
        with closing(ShardWriter(out / shard_name(number))) as writer:
            columns = Columns()
            for _, start, stop in sorted(rows):
                for row in range(start, stop):
                    columns.add(corpus.block(row))
                if len(columns.records["block_id"]) >= _ADDED_UP:
                    writer.add(columns)
                    columns = Columns()
            writer.add(columns)
            writer.finish()


def census(corpus: Corpus, scratch: Path) -> dict[str, Any]:
    """What the report of a version says about its blocks, counted from the shards; `scratch` is a folder for that."""
    lengths = SPECIALS_PER_BLOCK + corpus.lengths("title_tokens") + corpus.lengths("tokens")
    bins, counts = np.unique(lengths // HISTOGRAM_STEP * HISTOGRAM_STEP, return_counts=True)
    spans = corpus.lengths("span_bounds")
    identities = (shard.column("block_id").to_pylist() for shard in corpus.shards.values())
    return {
        "articles": sum(len(documents_of(shard)[0]) for shard in corpus.shards.values()),
        "blocks": len(corpus),
        "sentences": int(corpus.lengths("sentence_starts").sum()),
        "spans": int(spans.sum()),
        "blocks_without_span": int((spans == 0).sum()),
        "duplicate_blocks": count_duplicates(identities, scratch),
        "block_lengths": {str(low): int(count) for low, count in zip(bins.tolist(), counts.tolist(), strict=True)},
        "shards": {name: shard.blocks for name, shard in corpus.shards.items()},
    }
