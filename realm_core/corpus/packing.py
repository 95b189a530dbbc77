"""Documents to blocks on one process or several; what comes back is compact, and the same whatever the number."""

import multiprocessing
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from realm_core.corpus.documents import Document
from realm_core.corpus.layout import COLUMNS, Ragged
from realm_core.errors import ArtifactError
from realm_core.text.blocks import SPECIALS_PER_BLOCK, Block, pack_document
from realm_core.text.spans import LabelledSpan, Tagger
from realm_core.text.taggers import make_tagger
from realm_core.text.tokenizer import Tokenizer
from realm_core.text.wikitext import prose

HISTOGRAM_STEP = 32  # wordpieces
_TASK_DOCUMENTS = 32
_TASK_CHARACTERS = 1 << 19
_TASKS_WAITING = 3  # a worker; more would only fill memory


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How a document is cut into blocks; lengths in wordpieces."""

    limit: int = 288
    splitter: str = "syntok"
    tagger: str = "rules"
    split_long: bool = True


@dataclass
class Stats:
    """What packing counts. Adds up over tasks and shards."""

    articles: int = 0  # documents that gave a block
    blocks: int = 0
    sentences: int = 0
    spans: int = 0
    blocks_without_span: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    lengths: Counter[str] = field(default_factory=Counter)  # lower end of a bin, specials included
    tagging_seconds: float = 0.0
    tagging_cpu_seconds: float = 0.0  # of all threads; what else the machine does leaves it as it is

    def add(self, other: "Stats") -> None:
        """Add another's counts to these."""
        for item in fields(self):
            value = getattr(self, item.name) + getattr(other, item.name)
            setattr(self, item.name, value)

    def to_json(self) -> dict[str, Any]:
        """Plain values; see from_json."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Stats":
        """What `to_json` gave."""
        made = cls()
        for name, value in values.items():
            setattr(made, name, Counter(value) if isinstance(value, dict) else value)
        return made


class Columns:
    """Blocks as columns: lists for Parquet, flat numbers for the token file."""

    def __init__(self) -> None:
        self.records: dict[str, list[Any]] = {name: [] for name in COLUMNS}
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


Task = tuple[int, list[Document]]  # a shard, and documents of it that are packed together
Packed = tuple[Columns, Stats]
Pack = Callable[[Iterable[Task]], Iterator[tuple[int, Packed]]]


@contextmanager
def packers(tokenizer: Tokenizer, settings: PackSettings, tagger: Tagger, workers: int) -> Iterator[Pack]:
    """A function tasks -> (shard, columns and counts), in the order of the tasks."""
    if workers == 1:
        packer = _Packer(tokenizer, settings, tagger)
        yield lambda tasks: ((shard, packer.pack(documents)) for shard, documents in tasks)
        return
    executor = ProcessPoolExecutor(
        workers,
        # spawn, not fork: the caller may run threads (torch, the tokenizer), which a fork would copy half-alive
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.vocab, tokenizer.lowercase, settings),
    )
    try:
        yield lambda tasks: _in_order(executor, tasks, workers * _TASKS_WAITING)
    except BrokenProcessPool:
        raise ArtifactError(
            "a worker process died, most likely for want of memory; run again with fewer --workers: "
            "finished shards are kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _in_order(executor: ProcessPoolExecutor, tasks: Iterable[Task], most: int) -> Iterator[tuple[int, Packed]]:
    waiting: deque[tuple[int, Future[Packed]]] = deque()
    for shard, documents in tasks:
        waiting.append((shard, executor.submit(_pack_in_worker, documents)))
        if len(waiting) >= most:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def tasks_of(shard: int, documents: Iterable[Document]) -> Iterator[Task]:
    """The documents of a shard in portions that are worth sending to a worker."""
    task: list[Document] = []
    characters = 0
    for document in documents:
        task.append(document)
        characters += len(document.text)
        if len(task) == _TASK_DOCUMENTS or characters > _TASK_CHARACTERS:
            yield shard, task
            task, characters = [], 0
    if task:
        yield shard, task


_worker: dict[str, "_Packer"] = {}


def _start_worker(vocab: list[str], lowercase: bool, settings: PackSettings) -> None:
    _worker["packer"] = _Packer(Tokenizer(vocab, lowercase), settings, make_tagger(settings.tagger))
    if "torch" in sys.modules:  # a tagger that computes with it: the workers share the processors already
        sys.modules["torch"].set_num_threads(1)


def _pack_in_worker(documents: Sequence[Document]) -> Packed:
    return _worker["packer"].pack(documents)


class _Packer:
    """Packs documents in this process."""

    def __init__(self, tokenizer: Tokenizer, settings: PackSettings, tagger: Tagger) -> None:
        self.tokenizer, self.settings, self.tagger = tokenizer, settings, _TimedTagger(tagger)

    def pack(self, documents: Sequence[Document]) -> Packed:
        columns, stats = Columns(), Stats()
        self.tagger.seconds = self.tagger.cpu_seconds = 0.0
        for document in documents:
            blocks = self._blocks(as_plain(document), stats)
            stats.articles += bool(blocks)
            for block in blocks:
                columns.add(block)
                self._count(block, stats)
        stats.tagging_seconds, stats.tagging_cpu_seconds = self.tagger.seconds, self.tagger.cpu_seconds
        return columns, stats

    def _blocks(self, document: Document, stats: Stats) -> list[Block]:
        settings = self.settings
        blocks = pack_document(
            document,
            self.tokenizer,
            settings.limit,
            settings.splitter,
            self.tagger,
            settings.split_long,
            stats.notes,
            stats.labels,
        )
        if not blocks:
            stats.dropped["no_wordpieces" if document.text.strip() else "empty_text"] += 1
        return blocks

    def _count(self, block: Block, stats: Stats) -> None:
        stats.blocks += 1
        stats.sentences += len(block.sentences)
        stats.spans += len(block.spans)
        stats.blocks_without_span += not block.spans
        length = SPECIALS_PER_BLOCK + len(block.title_ids) + len(block.token_ids)
        stats.lengths[str(length // HISTOGRAM_STEP * HISTOGRAM_STEP)] += 1


def as_plain(document: Document) -> Document:
    """The document with its wikitext, if it is some, turned to prose and links."""
    if document.hidden is None:
        return document
    text, links = prose(document.text, frozenset(document.hidden))
    return replace(document, text=text, links=links, hidden=None)


class _TimedTagger:
    """A tagger, and the time spent in it."""

    def __init__(self, tagger: Tagger) -> None:
        self._tagger = tagger
        self.name, self.version = tagger.name, tagger.version
        self.seconds = self.cpu_seconds = 0.0

    def spans(self, text: str, links: Sequence[LabelledSpan] = ()) -> list[LabelledSpan]:
        began, began_cpu = time.perf_counter(), time.process_time()
        found = self._tagger.spans(text, links)
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - began_cpu
        return found
