"""Which retrieved documents a masked query is read with: the null document first, never the query's own block."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int64, Integer
from numpy import ndarray

NULL_ROW = -1  # stands for the null document, which is in no index


Runs = frozenset[int]  # a hash of each different run of wordpieces in a text
_RUN = 8  # wordpieces: long enough that two texts do not share a run by chance
_PRIME = 0x9E3779B97F4A7C15
_FACTORS = [np.uint64(pow(_PRIME, power, 1 << 64)) for power in range(_RUN)]


def runs_of(ids: Integer[ndarray, "T"]) -> Runs:
    """What `near_duplicates` compares: about 0.05 ms for a block of 288 wordpieces."""
    count = len(ids) - _RUN + 1
    if count < 1:
        return frozenset()
    words, hashes = ids.astype(np.uint64), np.zeros(count, dtype=np.uint64)
    for place, factor in enumerate(_FACTORS):
        hashes += words[place : place + count] * factor
    return frozenset(hashes.tolist())


def near_duplicates(a: Runs, b: Runs, share: float) -> bool:
    """Whether so much of the shorter text stands in the other, measured in different runs of 8 wordpieces.

    A copy with another title, or a news item that was sent twice, has another identity than the block a query came from and
    gives the answer away all the same. The original code keeps those; news corpora are full of them.
    """
    shorter = min(len(a), len(b))
    return shorter > 0 and len(a & b) >= share * shorter


class Candidates(NamedTuple):
    """Rows in retrieval order with the null document first, and whether the origin or repetitions were met."""

    rows: Int64[ndarray, "C"]  # at most k
    origin_removed: bool
    duplicates: bool  # the original code skips such an example


def select_candidates(
    retrieved_rows: Sequence[SupportsIndex] | ndarray,
    origin_uid: str | None,
    uids: Sequence[str] | ndarray,
    k: int,
    repeats_origin: Callable[[int], bool] = lambda row: False,
) -> Candidates:
    """Drop the originating document and repetitions, put the null document first, cut to k (language/realm).

    `uids[i]` identifies the text of `retrieved_rows[i]` (document_uid or block_id, both mean equal title and text) and
    `origin_uid` the block the query came from; None when it comes from another corpus. A row that `repeats_origin` is
    dropped as well; it is asked about no more rows than are needed. Fewer than k rows come back when too few were
    retrieved: ask the index for some more than k. Raises ValueError for k < 1: the null document is always there.
    """
    if k < 1:
        raise ValueError(f"k={k}: at least the null document is a candidate")
    if len(retrieved_rows) != len(uids):
        raise ValueError(f"{len(retrieved_rows)} rows but {len(uids)} uids")
    rows, seen = [NULL_ROW], set()
    origin_removed = duplicates = False
    for row, uid in zip(retrieved_rows, uids, strict=True):
        if uid in seen:
            duplicates = True
            continue
        seen.add(uid)
        if uid == origin_uid:
            origin_removed = True
        elif len(rows) < k and not repeats_origin(int(row)):
            rows.append(int(row))
    return Candidates(np.array(rows, dtype=np.int64), origin_removed, duplicates)
