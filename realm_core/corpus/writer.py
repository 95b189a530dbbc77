"""Writing a corpus folder: documents -> tokenised blocks in shards (see layout).

A document belongs to the shard that a digest of its id names, and a shard is ordered by document id. So the bytes of
the folder depend on nothing but the documents and the settings: not on their order, not on the number of workers; and
a changed document changes one shard only. First all documents are dealt out to scratch files, then shard after shard is
packed; a killed attempt is taken up where it stopped.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from realm_core.artifacts.manifest import file_sha256
from realm_core.corpus.documents import Document, Tally
from realm_core.corpus.layout import (
    BLOCKS_FILE,
    COLUMNS,
    ROWS_PER_GROUP,
    TOKENS_FILE,
    VOCABULARY_FILE,
    RaggedFile,
    shard_name,
    write_arrays,
)
from realm_core.corpus.packing import Columns, Pack, Packed, PackSettings, Stats, packers, tasks_of
from realm_core.corpus.spool import Spool, shard_of
from realm_core.errors import ConfigError, DataError
from realm_core.text.taggers import make_tagger
from realm_core.text.tokenizer import Tokenizer

__all__ = ["ShardWriter", "count_duplicates", "shard_name", "shard_of", "write_shards"]

SPOOL = ".spool"
_PARTS = 64  # files over which block identities are spread to be counted
_SCHEMA = pa.schema([(name, pa.int64() if name in ("start", "stop") else pa.string()) for name in COLUMNS])


def write_shards(
    documents: Iterable[Document],
    out: Path,
    tokenizer: Tokenizer,
    *,
    place: str = "the corpus",
    shards: int = 1,
    first: int = 0,
    limit: int = 288,
    splitter: str = "syntok",
    tagger: str = "rules",
    split_long: bool = True,
    workers: int = 1,
    on_error: str = "fail",
    tally: Tally | None = None,
    record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Pack, tokenise and tag the documents into `out`; returns the report.

    Report: pages, redirects, documents, articles, dropped {reason: pages}, blocks, duplicate_blocks (same title and text
    as another block; kept, as in the original code), sentences, spans, span_labels, blocks_without_span, notes
    {sentences_split, titles_cut, …}, input {what the reader noted}, block_lengths {lower end of a 32-wordpiece bin,
    specials included: blocks}, tagger {name, version}, shards {name: blocks}. `tally` is what the reader of `documents`
    fills; `record` receives seconds and rates, which differ from run to run. Shards are numbered from `first` on.

    Memory does not depend on the number of documents. An attempt that was killed leaves `out/.spool`; the same call
    takes it up, an interrupted reading from the start, finished shards not at all. Raises DataError for a repeated
    document id (on_error="fail") or when no block remains, ConfigError for impossible settings.
    """
    if shards < 1 or workers < 1:
        raise ConfigError(f"shards={shards}, workers={workers}: both must be at least 1")
    settings = PackSettings(limit=limit, splitter=splitter, tagger=tagger, split_long=split_long)
    chosen = make_tagger(tagger)  # before any work: it may be missing
    tally, record = tally or Tally(), {} if record is None else record
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / VOCABULARY_FILE)
    spool = Spool(out / SPOOL, shards)
    began = time.perf_counter()
    try:
        spool.fill(documents, tally)
        read = time.perf_counter()
        total, fresh, sizes = Stats(), Stats(), dict[str, int]()
        folders = [out / shard_name(first + number) for number in range(shards)]
        known = {number: _finished(spool, number, folder) for number, folder in enumerate(folders)}
        with packers(tokenizer, settings, chosen, workers) as pack:
            packed = _Packed(spool, [number for number, stats in known.items() if stats is None], pack, on_error)
            for number, stats in known.items():
                if stats is None:
                    stats = _write_shard(spool, number, folders[number], packed)
                    fresh.add(stats)
                total.add(stats)
                sizes[folders[number].name] = stats.blocks
        if not total.blocks:
            raise DataError(
                f"{place}: none of {tally.documents} documents gave a block "
                f"(dropped: {dict(total.dropped + tally.dropped)}); check that their text is where the format expects it"
            )
        duplicates = count_duplicates(_identities(out / name / BLOCKS_FILE for name in sizes), out / SPOOL)
    except DataError:
        shutil.rmtree(out / SPOOL, ignore_errors=True)  # a second attempt would meet the same data
        raise
    shutil.rmtree(out / SPOOL)
    record |= _rates(fresh, read - began, time.perf_counter() - read, workers)
    record["resumed_blocks"] = total.blocks - fresh.blocks
    return {
        **_report(tally, total),
        "duplicate_blocks": duplicates,
        "tagger": {"name": chosen.name, "version": chosen.version},
        "shards": dict(sorted(sizes.items())),
    }


def _finished(spool: Spool, number: int, folder: Path) -> Stats | None:
    """Counts of a shard that an earlier attempt wrote, if its files are what they were."""
    if (done := spool.finished(number)) is None:
        return None
    sound = all((folder / name).is_file() and file_sha256(folder / name) == sha for name, sha in done["files"].items())
    return Stats.from_json(done["stats"]) if sound else None


class _Packed:
    """Blocks of many shards as one stream, so that no worker waits at the end of a shard."""

    def __init__(self, spool: Spool, shards: list[int], pack: Pack, on_error: str) -> None:
        self.dropped: dict[int, Counter[str]] = {number: Counter() for number in shards}
        self._results = pack(
            task
            for number in shards
            for task in tasks_of(number, spool.documents(number, on_error, self.dropped[number]))
        )
        self._next: tuple[int, Packed] | None = None

    def of(self, shard: int) -> Iterator[Packed]:
        """Results of the shard; shards must be asked for in their order."""
        while True:
            self._next = self._next or next(self._results, None)
            if self._next is None or self._next[0] != shard:
                return
            _, packed = self._next
            self._next = None
            yield packed


def _write_shard(spool: Spool, number: int, folder: Path, packed: _Packed) -> Stats:
    total = Stats()
    writer = ShardWriter(folder)
    try:
        for columns, stats in packed.of(number):
            writer.add(columns)
            total.add(stats)
        writer.finish()
    finally:
        writer.close()
    total.dropped.update(packed.dropped[number])
    files = {name: file_sha256(folder / name) for name in (BLOCKS_FILE, TOKENS_FILE)}
    spool.finish(number, {"stats": total.to_json(), "files": files})
    return total


class ShardWriter:
    """Writes a shard as its blocks come; holds one row group and the offsets."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed attempt left
        folder.mkdir()
        self._folder = folder
        self._rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._parquet = pq.ParquetWriter(folder / BLOCKS_FILE, _SCHEMA, compression="zstd", use_dictionary=False)
        names = ("tokens", "title_tokens", "sentence_starts", "sentence_ranges", "span_bounds")
        self._flat = {name: RaggedFile(folder / f".{name}") for name in names}

    def add(self, columns: Columns) -> None:
        """Append blocks."""
        for name, values in columns.records.items():
            self._rows[name].extend(values)
        flat = (columns.tokens, columns.titles, columns.sentence_starts, columns.sentence_ranges, columns.spans)
        for file, rows in zip(self._flat.values(), flat, strict=True):
            file.extend(rows)
        while len(self._rows["block_id"]) >= ROWS_PER_GROUP:
            self._write_group(ROWS_PER_GROUP)

    def finish(self) -> None:
        """Write what is left and the token file."""
        if self._rows["block_id"]:
            self._write_group(ROWS_PER_GROUP)
        self._parquet.close()
        flat = self._flat
        offsets = {
            "token_offsets": flat["tokens"],
            "title_offsets": flat["title_tokens"],
            "sentence_offsets": flat["sentence_starts"],
            "span_offsets": flat["span_bounds"],
        }
        widths = {"sentence_ranges": 2, "span_bounds": 2}
        write_arrays(self._folder / TOKENS_FILE, offsets, {n: (file, widths.get(n, 1)) for n, file in flat.items()})

    def close(self) -> None:
        """Release the files, also after an error."""
        self._parquet.close()
        for file in self._flat.values():
            file.drop()

    def _write_group(self, rows: int) -> None:
        table = pa.Table.from_pydict({name: values[:rows] for name, values in self._rows.items()}, schema=_SCHEMA)
        self._parquet.write_table(table, row_group_size=rows)
        for values in self._rows.values():
            del values[:rows]


def count_duplicates(identities: Iterable[Sequence[str]], scratch: Path) -> int:
    """Blocks whose identity another block has already. Counted by parts, so that memory holds a fraction of them."""
    parts: list[bytearray] = [bytearray() for _ in range(_PARTS)]
    scratch.mkdir(exist_ok=True)
    files = [scratch / f"identities-{number:02d}" for number in range(_PARTS)]
    for file in files:
        file.unlink(missing_ok=True)
    for portion in identities:
        for identity in portion:
            raw = bytes.fromhex(identity)
            parts[raw[0] % _PARTS] += raw
        for file, part in zip(files, parts, strict=True):
            with file.open("ab") as target:
                target.write(part)
            part.clear()
    return sum(_repeated(file) for file in files)


def _identities(paths: Iterable[Path]) -> Iterator[list[str]]:
    for path in paths:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=["block_id"]):
                yield batch.column(0).to_pylist()


def _repeated(path: Path) -> int:
    identities = np.fromfile(path, dtype="V16")
    return len(identities) - len(set(identities.tolist()))


def _report(tally: Tally, total: Stats) -> dict[str, Any]:
    dropped = tally.dropped + total.dropped
    return {
        "pages": tally.pages,
        "redirects": tally.redirects,
        "documents": tally.documents,
        "articles": total.articles,
        "dropped": dict(sorted(dropped.items())),
        "blocks": total.blocks,
        "sentences": total.sentences,
        "spans": total.spans,
        "span_labels": dict(sorted(total.labels.items())),
        "blocks_without_span": total.blocks_without_span,
        "notes": {name: count for name, count in sorted(total.notes.items()) if count},
        "input": dict(sorted(tally.notes.items())),
        "block_lengths": dict(sorted(total.lengths.items(), key=lambda item: int(item[0]))),
    }


def _rates(total: Stats, reading: float, packing: float, workers: int) -> dict[str, Any]:
    tagging, cpu = total.tagging_seconds, total.tagging_cpu_seconds
    return {
        "workers": workers,
        "reading_seconds": round(reading, 3),
        "packing_seconds": round(packing, 3),
        "tagging_seconds": round(tagging, 3),  # of all workers together
        "sentences_per_second": round(total.sentences / max(packing, 1e-9), 1),
        "tagged_sentences_per_second": round(total.sentences / tagging, 1) if tagging else None,  # of one worker
        "tagged_sentences_per_cpu_second": round(total.sentences / cpu, 1) if cpu else None,
    }
