"""Inverse cloze task: a sentence is the query, the block it came from is the document to find (Lee et al. 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from numpy import ndarray

from realm_core.corpus.shards import Corpus
from realm_core.data.formats import Ids, Inputs, SpecialIds, document_inputs, prefixed, query_inputs, stack
from realm_core.data.masking import sentence_range


@runtime_checkable
class TokenBlock(Protocol):
    """The wordpieces of a block; `text.blocks.Block` has them."""

    @property
    def title_ids(self) -> Ids: ...
    @property
    def token_ids(self) -> Ids: ...
    @property
    def sentence_starts(self) -> Ids: ...


@dataclass(frozen=True)
class IctExample:
    """Wordpieces without special tokens. `removed`: the sentence was taken out of the body."""

    query_ids: ndarray
    title_ids: ndarray
    body_ids: ndarray
    removed: bool


def ict_example(block: TokenBlock, rng: np.random.Generator, mask_rate: float = 0.9) -> IctExample | None:
    """One query and its block; None when the only sentence would have to be removed.

    The sentence is drawn uniformly and removed from the body with probability `mask_rate`; otherwise it stays, which
    teaches lexical matching (original code: language/orqa, ict_dataset).
    """
    sentences = len(block.sentence_starts)
    if sentences == 0:
        return None
    chosen = int(rng.integers(sentences))
    removed = bool(rng.random() < mask_rate)
    return cut_sentence(block, chosen, removed) if leaves_text(block, removed) else None


def leaves_text(block: TokenBlock, removed: bool) -> bool:
    """Whether something of the block remains when one sentence is asked about."""
    return len(block.sentence_starts) > int(removed)


def cut_sentence(block: TokenBlock, chosen: int, removed: bool) -> IctExample:
    """The example of one sentence, with or without it in the body."""
    token_ids = np.asarray(block.token_ids)
    low, high = sentence_range(np.asarray(block.sentence_starts), len(token_ids), chosen)
    body = np.concatenate([token_ids[:low], token_ids[high:]]) if removed else token_ids
    return IctExample(token_ids[low:high], np.asarray(block.title_ids), body, removed)


_NO_IDS = np.empty(0, dtype=np.int64)
_EMPTY = IctExample(_NO_IDS, _NO_IDS, _NO_IDS, removed=False)


def ict_inputs(example: IctExample, query_len: int, block_len: int, special: SpecialIds) -> tuple[Inputs, Inputs]:
    """(query, document) sequences; the title stands on the document side only."""
    return (
        query_inputs(example.query_ids, query_len, special),
        document_inputs(example.title_ids, example.body_ids, block_len, special),
    )


def ict_batch(
    corpus: Corpus,
    rows: Sequence[SupportsIndex] | ndarray,
    rng: np.random.Generator,
    query_len: int,
    block_len: int,
    tokenizer: SpecialIds,
    mask_rate: float = 0.9,
    trim: bool = True,
) -> dict[str, ndarray]:
    """`ict_examples` as the arrays of `ict_arrays`, and rows [B] int64, which says which of `rows` are there.

    When nothing remains, B is 0.
    """
    drawn = ict_examples(corpus, rows, rng, mask_rate)
    arrays = ict_arrays([example for _, example in drawn], query_len, block_len, tokenizer, trim)
    return {**arrays, "rows": np.array([row for row, _ in drawn], dtype=np.int64)}


def ict_examples(
    corpus: Corpus, rows: Sequence[SupportsIndex] | ndarray, rng: np.random.Generator, mask_rate: float = 0.9
) -> list[tuple[int, IctExample]]:
    """(row, example) of every row that gives one (see ict_example)."""
    drawn = ((int(row), ict_example(_Row(corpus, int(row)), rng, mask_rate)) for row in rows)
    return [(row, example) for row, example in drawn if example is not None]


def ict_arrays(
    examples: Sequence[IctExample],
    query_len: int,
    block_len: int,
    tokenizer: SpecialIds,
    trim: bool = True,
    count: int | None = None,
) -> dict[str, ndarray]:
    """Arrays of a batch: query_* and doc_* {token_ids, segment_ids, mask} [B, L], removed [B] bool.

    Without `trim`, L is query_len and block_len. `count` fills up to B = count with pairs of empty sequences.
    """
    padding = [_EMPTY] * max(0, (count or 0) - len(examples))
    pairs = [ict_inputs(example, query_len, block_len, tokenizer) for example in (*examples, *padding)]
    queries = stack([query for query, _ in pairs], tokenizer.pad_id, trim) if pairs else _nothing(query_len)
    documents = stack([document for _, document in pairs], tokenizer.pad_id, trim) if pairs else _nothing(block_len)
    return {
        **prefixed(queries, "query"),
        **prefixed(documents, "doc"),
        "removed": np.array([example.removed for example in (*examples, *padding)], dtype=bool),
    }


class _Row:
    """A corpus row seen as a TokenBlock; its text is never read."""

    def __init__(self, corpus: Corpus, row: int) -> None:
        self.title_ids = corpus.title_ids(row)
        self.token_ids = corpus.token_ids(row)
        self.sentence_starts = corpus.sentence_starts(row)


def _nothing(length: int) -> Inputs:
    empty = np.zeros((0, length), dtype=np.int64)
    return Inputs(empty, empty, empty)
