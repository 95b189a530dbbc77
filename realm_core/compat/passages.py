"""Published block vectors and texts -> a corpus, a snapshot and an index of the project's own.

The rows of a corpus follow its shards, so the vectors are put into that order here. Which block is which is never
a matter of its position afterwards.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from realm_core.artifacts.manifest import Manifest, Plan, file_sha256
from realm_core.artifacts.publish import building, finished
from realm_core.compat.block_records import read_block_records
from realm_core.compat.foreign import Foreign
from realm_core.config import Config
from realm_core.corpus.layout import BLOCKS_FILE, TOKENS_FILE
from realm_core.corpus.readers import Document
from realm_core.corpus.shards import Corpus
from realm_core.corpus.writer import write_shards
from realm_core.errors import DataError
from realm_core.index.backends import build_index
from realm_core.index.snapshot import Snapshot, vector_report, write_matrix
from realm_core.model.bundle import EMBEDDER
from realm_core.text.tokenizer import Tokenizer

_ROWS_AT_ONCE = 1 << 16
_WHOLE = 1 << 30  # wordpieces; a published block is never cut again


def require_passages(found: Foreign) -> None:
    """Raise DataError unless every vector is finite and has exactly one text. Writes nothing; reads all records once."""
    assert found.block_vectors is not None and found.block_records is not None
    rows = len(found.block_vectors)
    parts = (found.block_vectors[start : start + _ROWS_AT_ONCE] for start in range(0, rows, _ROWS_AT_ONCE))
    if bad := sum(int((~np.isfinite(part)).any(axis=1).sum()) for part in parts):
        raise DataError(f"{found.origins[0]}: {bad} block vectors are not finite; the checkpoint is damaged")
    empty = sum(not document.text.strip() for document in _documents(found.block_records, found.block_titles, rows))
    if empty:
        raise DataError(
            f"{found.block_records}: {empty} of {rows} records hold no text; every block vector needs its text"
        )


def write_corpus(found: Foreign, config: Config, tokenizer: Tokenizer, plan: Plan, out: Path) -> Manifest:
    """One block a record, as it was published. Raises DataError unless every vector has exactly one text."""
    assert found.block_vectors is not None and found.block_records is not None
    if done := finished(out, plan):
        return done
    rows = len(found.block_vectors)
    with building(out, plan) as build:
        report = write_shards(
            _documents(found.block_records, found.block_titles, rows),
            build.folder,
            tokenizer,
            shards=config.corpus.shards,
            limit=_WHOLE,
            splitter=config.corpus.splitter,
            tagger=config.corpus.tagger,
            split_long=False,
        )
        if report["blocks"] != rows:
            raise DataError(
                f"{found.block_records}: {rows - report['blocks']} of {rows} records hold no text "
                f"({report['dropped']}); every block vector needs its text"
            )
        sizes = report.pop("shards")
        digests = {name: file_sha256(build.folder / name / TOKENS_FILE) for name in sizes}
        return build.commit({"stands_for": "corpus", **report, "shard_blocks": sizes, "shards": digests})


def write_snapshot(found: Foreign, corpus: Path, plan: Plan, out: Path) -> Manifest:
    """The vectors, shard by shard in the order of the corpus. Raises DataError if one is not finite."""
    assert found.block_vectors is not None
    if done := finished(out, plan):
        return done
    reports: list[dict[str, int | float]] = []
    with building(out, plan) as build:
        for name, shard in Corpus.open(corpus).shards.items():
            vectors = np.ascontiguousarray(found.block_vectors[_published_rows(shard.folder)])
            reports.append(vector_report(vectors))
            write_matrix(build.folder / f"{name}.npy", vectors)
        digests = {path.stem: file_sha256(path) for path in sorted(build.folder.glob("*.npy"))}
        facts: dict[str, Any] = {
            "stands_for": "reembed",
            "step": 0,
            "encoder": plan.parents["checkpoint"].files[EMBEDDER],
            "vectors": len(found.block_vectors),
            "precision": "fp32",
            "bad_vectors": 0,
            "zero_vectors": sum(report["zero"] for report in reports),
            "norm_min": min(report["norm_min"] for report in reports),
            "norm_max": max(report["norm_max"] for report in reports),
            "shards": digests,
        }
        return build.commit(facts, known={f"{name}.npy": digest for name, digest in digests.items()})


def write_index(snapshot: Path, config: Config, plan: Plan, out: Path) -> Manifest:
    """The search structure that the settings choose, over a snapshot that was just written."""
    if done := finished(out, plan):
        return done
    facts = plan.parents["snapshot"].facts
    vectors = Snapshot.open(snapshot, [f"{name}.npy" for name in facts["shards"]]).vectors()
    with building(out, plan) as build:
        index = build_index(vectors, config.index.backend, **config.index.params)
        index.save(build.folder)
        return build.commit(
            {
                "stands_for": "index",
                "backend": config.index.backend,
                "vectors": index.size,
                "dimension": index.dimension,
                **{key: facts[key] for key in ("step", "encoder", "shards")},
            }
        )


def _documents(records: Path, titles: Path | None, rows: int) -> Iterator[Document]:
    """A document for every record; its id is the published row, so that the vector can be found again."""
    names = read_block_records(titles, rows) if titles is not None else iter([b""] * rows)
    for row, (title, text) in enumerate(zip(names, read_block_records(records, rows), strict=True)):
        yield Document(f"{row:010d}", _decoded(title, titles or records, row), _decoded(text, records, row))


def _decoded(record: bytes, path: Path, row: int) -> str:
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: record {row} is not UTF-8 at byte {error.start}; fetch the file again") from None


def _published_rows(shard: Path) -> np.ndarray:
    """Published row of every block of a shard."""
    column = pq.read_table(shard / BLOCKS_FILE, columns=["doc_id"]).column(0)
    return np.array([int(doc_id) for doc_id in column.to_pylist()], dtype=np.int64)
