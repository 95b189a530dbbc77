"""Masked queries for REALM pre-training: one sentence of a block with the wordpieces to predict replaced by [MASK].

Guu et al. 2020, section 3.4 (salient spans) and its ablation (random tokens, random spans). Works on the stored token
arrays; nothing is tokenised again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from realm_core.config import RANDOM_MASK_RATE
from realm_core.corpus.shards import Corpus
from realm_core.errors import ConfigError

NO_SPAN = "no_valid_spans"
TRUNCATED = "masks_truncated"
NO_TOKENS = "no_tokens_masked"
SPAN_CONTINUES = 0.8  # SpanBERT: geometric span lengths with p = 0.2 …
LONGEST_RANDOM_SPAN = 10  # … clipped here


@runtime_checkable
class MaskId(Protocol):
    """A Tokenizer has it."""

    mask_id: int


@dataclass(frozen=True)
class MaskedQuery:
    """`token_ids`: the sentence without special tokens. `positions` count [CLS], so they index the formatted query.

    `sentence` is the sentence's token range in its block; (0, 0) where a caller masks tokens of no block.

    All chosen wordpieces are masked; at most `max_masks` of them are to be predicted.
    """

    row: int
    token_ids: Int64[ndarray, "L"]
    positions: Int64[ndarray, "M"]
    targets: Int64[ndarray, "M"]
    sentence: tuple[int, int] = (0, 0)


def masked_query(
    corpus: Corpus,
    row: SupportsIndex,
    rng: np.random.Generator,
    scheme: str,
    query_len: int,
    max_masks: int,
    tokenizer: MaskId,
) -> tuple[MaskedQuery | None, str]:
    """(query, "") or (None, reason); reasons are no_valid_spans, masks_truncated and no_tokens_masked.

    scheme "salient": one stored span, drawn uniformly over the block; "random_token": 15 % of the wordpieces of one
    sentence; "random_span": the same share in spans of geometric length. The random schemes choose a sentence uniformly
    and mask at most `max_masks` wordpieces, among those that fit the query.
    """
    row = int(row)
    token_ids, starts = corpus.token_ids(row), corpus.sentence_starts(row)
    if scheme == "salient":
        spans = corpus.spans(row)
        if len(spans) == 0:
            return None, NO_SPAN
        first, last = (int(value) for value in spans[rng.integers(len(spans))])
        sentence = int(np.searchsorted(starts, first, side="right")) - 1
        low, high = sentence_range(starts, len(token_ids), sentence)
        chosen = np.arange(first - low, last - low)
    elif scheme in ("random_token", "random_span"):
        if len(starts) == 0:
            return None, NO_TOKENS
        low, high = sentence_range(starts, len(token_ids), int(rng.integers(len(starts))))
        fitting = min(high - low, query_len - 2)
        budget = min(max(1, round(RANDOM_MASK_RATE * fitting)), max_masks)
        pick = random_tokens if scheme == "random_token" else random_spans
        chosen = pick(fitting, budget, rng)
    else:
        raise ConfigError(f"masking scheme {scheme!r} is unknown; choose salient, random_token or random_span")
    query, reason = mask_tokens(token_ids[low:high], chosen, row, query_len, max_masks, tokenizer.mask_id)
    return (replace(query, sentence=(low, high)) if query else None), reason


def mask_tokens(
    token_ids: Sequence[int] | ndarray,
    chosen: Sequence[int] | ndarray,
    row: int,
    query_len: int,
    max_masks: int,
    mask_id: int,
) -> tuple[MaskedQuery | None, str]:
    """Replace the chosen wordpieces of a sentence by [MASK]; always, without BERT's 80/10/10 rule.

    A query whose last mask would be cut off is refused (original code: language/realm, featurization).
    Raises ValueError unless `max_masks` allows one.
    """
    if max_masks < 1:
        raise ValueError(f"max_masks={max_masks}: a query without a wordpiece to predict teaches nothing")
    chosen = np.asarray(chosen, dtype=np.int64)
    if len(chosen) == 0:
        return None, NO_TOKENS
    if int(chosen[-1]) >= query_len - 2:
        return None, TRUNCATED
    original = np.asarray(token_ids, dtype=np.int64)
    masked = original.copy()
    masked[chosen] = mask_id
    predicted = chosen[:max_masks]
    return MaskedQuery(row, masked, predicted + 1, original[predicted]), ""


def empty_query() -> MaskedQuery:
    """A query without wordpieces and without anything to predict: it fills a batch up and adds nothing to a loss."""
    nothing = np.empty(0, dtype=np.int64)
    return MaskedQuery(-1, nothing, nothing, nothing)


def pad_masks(
    queries: Sequence[MaskedQuery], max_masks: int
) -> tuple[Int64[ndarray, "B M"], Int64[ndarray, "B M"], Int64[ndarray, "B M"]]:
    """(positions, targets, mask), each max_masks wide; padding points at position 0 and has mask 0."""
    positions, targets, mask = (np.zeros((len(queries), max_masks), dtype=np.int64) for _ in range(3))
    for number, query in enumerate(queries):
        count = len(query.targets)
        positions[number, :count] = query.positions
        targets[number, :count] = query.targets
        mask[number, :count] = 1
    return positions, targets, mask


def sentence_range(starts: Sequence[int] | ndarray, length: int, sentence: int) -> tuple[int, int]:
    """Token range of a sentence of a block with `length` tokens."""
    return int(starts[sentence]), int(starts[sentence + 1]) if sentence + 1 < len(starts) else length


def random_tokens(length: int, budget: int, rng: np.random.Generator) -> Int64[ndarray, "K"]:
    """`budget` different positions below `length`, sorted."""
    return np.sort(rng.choice(length, size=min(budget, length), replace=False))


def random_spans(length: int, budget: int, rng: np.random.Generator) -> Int64[ndarray, "K"]:
    """Positions of random spans, sorted, `budget` in all (Joshi et al. 2020, without whole-word alignment)."""
    taken: set[int] = set()
    budget = min(budget, length)
    while len(taken) < budget:
        width = min(int(rng.geometric(1 - SPAN_CONTINUES)), LONGEST_RANDOM_SPAN, budget - len(taken))
        start = int(rng.integers(length))
        taken.update(range(start, min(start + width, length)))
    return np.array(sorted(taken), dtype=np.int64)
