"""Writing a corpus folder: documents -> tokenised blocks in shards (see layout).

A document belongs to the shard that a digest of its id names, and a shard is ordered by document id. So the bytes of
the folder depend on nothing but the documents and the settings: not on their order, not on the number of workers; and
a changed document changes one shard only.
"""

import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from realm_core.corpus.layout import BLOCKS_FILE, ROWS_PER_GROUP, TOKENS_FILE, VOCABULARY_FILE, Ragged, write_arrays
from realm_core.corpus.readers import Document
from realm_core.errors import ConfigError, DataError
from realm_core.text.blocks import SPECIALS_PER_BLOCK, Block, pack_document
from realm_core.text.spans import Tagger, make_tagger
from realm_core.text.tokenizer import Tokenizer

HISTOGRAM_STEP = 32  # wordpieces
_DOCUMENTS_PER_TASK = 32
_SCHEMA = pa.schema(
    [
        ("block_id", pa.string()),
        ("doc_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How a document is cut into blocks; lengths in wordpieces."""

    limit: int = 288
    splitter: str = "syntok"
    tagger: str = "rules"
    split_long: bool = True


def shard_name(number: int) -> str:
    """Folder name of a shard. Rows count through the shards in the order of these names."""
    return f"shard-{number:03d}"


def shard_of(doc_id: str, shards: int) -> int:
    """Shard of a document: a digest of its id, so it stays where it is when the corpus grows."""
    return int.from_bytes(sha256(doc_id.encode("utf-8", "replace")).digest()[:8], "big") % shards


def write_shards(
    documents: Iterable[Document],
    out: Path,
    tokenizer: Tokenizer,
    *,
    shards: int = 1,
    limit: int = 288,
    splitter: str = "syntok",
    tagger: str = "rules",
    split_long: bool = True,
    workers: int = 1,
) -> dict[str, Any]:
    """Pack, tokenise and tag the documents into `out`; returns the report.

    Report: documents, blocks, duplicate_blocks (same title and text as an earlier row; kept, as in the original code),
    spans, blocks_without_span, dropped {reason: documents}, notes {sentences_split, titles_cut, …},
    block_lengths {lower end of a 32-wordpiece bin, specials included: blocks}, tagger {name, version}, shards
    {name: blocks}. Memory holds one shard at a time. Raises DataError for a repeated document id or when no block
    remains, ConfigError for impossible settings.
    """
    if shards < 1 or workers < 1:
        raise ConfigError(f"shards={shards}, workers={workers}: both must be at least 1")
    settings = PackSettings(limit=limit, splitter=splitter, tagger=tagger, split_long=split_long)
    chosen = make_tagger(tagger)  # before any work: it may be missing
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / VOCABULARY_FILE)
    spool = out / ".spool"
    shutil.rmtree(spool, ignore_errors=True)  # what a killed attempt left
    spool.mkdir()
    totals = _Totals()
    sizes: dict[str, int] = {}
    try:
        totals.documents = _spool(documents, spool, shards)
        with _packers(tokenizer, settings, chosen, workers) as pack:
            for number in range(shards):
                columns = _Columns()
                for block in pack(_spooled(spool / shard_name(number)), totals):
                    columns.add(block)
                    totals.add(block)
                columns.write(out / shard_name(number))
                sizes[shard_name(number)] = len(columns.records["block_id"])
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    if not totals.blocks:
        raise DataError(f"none of {totals.documents} documents gave a block; they are empty: {dict(totals.dropped)}")
    return {
        **totals.report(),
        "tagger": {"name": chosen.name, "version": chosen.version},
        "shards": dict(sorted(sizes.items())),
    }


class _Totals:
    """What the report counts."""

    def __init__(self) -> None:
        self.documents = self.blocks = self.duplicates = self.spans = self.without_span = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.seen: set[bytes] = set()

    def add(self, block: Block) -> None:
        """Count a block of any shard."""
        identity = bytes.fromhex(block.block_id)
        self.blocks += 1
        self.duplicates += identity in self.seen
        self.seen.add(identity)
        self.spans += len(block.spans)
        self.without_span += not block.spans
        length = SPECIALS_PER_BLOCK + len(block.title_ids) + len(block.token_ids)
        self.lengths[length // HISTOGRAM_STEP * HISTOGRAM_STEP] += 1

    def report(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "blocks": self.blocks,
            "duplicate_blocks": self.duplicates,
            "spans": self.spans,
            "blocks_without_span": self.without_span,
            "dropped": dict(sorted(self.dropped.items())),
            "notes": {name: count for name, count in sorted(self.notes.items()) if count},
            "block_lengths": {str(low): count for low, count in sorted(self.lengths.items())},
        }


def _spool(documents: Iterable[Document], spool: Path, shards: int) -> int:
    """Deal the documents out to one file a shard; returns how many there were."""
    count = 0
    with ExitStack() as stack:
        paths = [spool / shard_name(number) for number in range(shards)]
        files = [stack.enter_context(path.open("w", encoding="ascii")) for path in paths]
        for document in documents:
            record = [document.doc_id, document.title, document.text]
            files[shard_of(document.doc_id, shards)].write(json.dumps(record) + "\n")
            count += 1
    return count


def _spooled(path: Path) -> list[Document]:
    with path.open(encoding="ascii") as file:
        documents = sorted((Document(*json.loads(line)) for line in file), key=lambda document: document.doc_id)
    for first, second in pairwise(documents):
        if first.doc_id == second.doc_id:
            raise DataError(
                f"document id {first.doc_id!r} occurs more than once in the corpus "
                f"(titles {first.title!r} and {second.title!r}); ids must be unique"
            )
    return documents


@contextmanager
def _packers(tokenizer: Tokenizer, settings: PackSettings, tagger: Tagger, workers: int) -> Iterator[Any]:
    """A function (documents, totals) -> blocks in the order of the documents, on one process or several."""
    with ExitStack() as stack:
        executor: Executor | None = None
        if workers > 1:
            # spawn, not fork: the caller may run threads (torch, the tokenizer), which a fork would copy half-alive
            executor = stack.enter_context(
                ProcessPoolExecutor(
                    workers,
                    mp_context=multiprocessing.get_context("spawn"),
                    initializer=_start_worker,
                    initargs=(tokenizer.vocab, tokenizer.lowercase, settings),
                )
            )

        def pack(documents: Sequence[Document], totals: _Totals) -> Iterator[Block]:
            tasks = [
                documents[low : low + _DOCUMENTS_PER_TASK] for low in range(0, len(documents), _DOCUMENTS_PER_TASK)
            ]
            results = (
                executor.map(_pack_in_worker, tasks)
                if executor
                else (_pack_all(task, tokenizer, settings, tagger) for task in tasks)
            )
            for blocks, dropped, notes in results:
                totals.dropped.update(dropped)
                totals.notes.update(notes)
                yield from blocks

        yield pack


Packed = tuple[list[Block], Counter[str], Counter[str]]
_worker: dict[str, Any] = {}


def _start_worker(vocab: list[str], lowercase: bool, settings: PackSettings) -> None:
    _worker.update(tokenizer=Tokenizer(vocab, lowercase), settings=settings, tagger=make_tagger(settings.tagger))


def _pack_in_worker(documents: Sequence[Document]) -> Packed:
    return _pack_all(documents, _worker["tokenizer"], _worker["settings"], _worker["tagger"])


def _pack_all(documents: Sequence[Document], tokenizer: Tokenizer, settings: PackSettings, tagger: Tagger) -> Packed:
    blocks: list[Block] = []
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for document in documents:
        made = pack_document(document, tokenizer, settings.limit, settings.splitter, tagger, settings.split_long, notes)
        if not made:
            dropped["no_wordpieces" if document.text.strip() else "empty_text"] += 1
        blocks.extend(made)
    return blocks, dropped, notes


class _Columns:
    """The blocks of one shard, in compact form, until they are written."""

    def __init__(self) -> None:
        self.records: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        self.tokens, self.titles, self.sentence_starts = Ragged(), Ragged(), Ragged()
        self.sentence_ranges, self.spans = Ragged(2), Ragged(2)

    def add(self, block: Block) -> None:
        for name, values in self.records.items():
            values.append(getattr(block, name))
        self.tokens.append(block.token_ids)
        self.titles.append(block.title_ids)
        self.sentence_starts.append(block.sentence_starts)
        self.sentence_ranges.append(block.sentences)
        self.spans.append(block.spans)

    def write(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed attempt left
        folder.mkdir()
        table = pa.Table.from_pydict(self.records, schema=_SCHEMA)
        path = folder / BLOCKS_FILE
        pq.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="zstd", use_dictionary=False)
        arrays = {
            "tokens": self.tokens.values,
            "token_offsets": self.tokens.offsets,
            "title_tokens": self.titles.values,
            "title_offsets": self.titles.offsets,
            "sentence_starts": self.sentence_starts.values,
            "sentence_ranges": self.sentence_ranges.values,
            "sentence_offsets": self.sentence_starts.offsets,
            "span_bounds": self.spans.values,
            "span_offsets": self.spans.offsets,
        }
        write_arrays(folder / TOKENS_FILE, arrays)
