"""Which retrieved documents a masked query is read with: the null document first, never the query's own block."""

from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int64, Integer
from numpy import ndarray

NULL_ROW = -1  # stands for the null document, which is in no index


_SHINGLE = 8  # wordpieces: long enough that two texts do not share it by chance


def near_duplicates(a: Integer[ndarray, "A"], b: Integer[ndarray, "B"], share: float) -> bool:
    """Whether so much of the shorter text stands in the other, measured in runs of 8 wordpieces.

    A copy with another title, or a news item that was sent twice, has another identity than the block a query came from and
    gives the answer away all the same. The original code keeps those; news corpora are full of them.
    """
    shingles = [_shingles(ids) for ids in (a, b)]
    shorter, longer = sorted(shingles, key=len)
    return bool(len(shorter)) and float(np.isin(shorter, longer).mean()) >= share


def _shingles(ids: Integer[ndarray, "T"]) -> ndarray:
    """One 64-bit hash a distinct run of wordpieces."""
    if len(ids) < _SHINGLE:
        return np.empty(0, dtype=np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), _SHINGLE)
    factors = np.array([pow(_PRIME, power, 1 << 64) for power in range(_SHINGLE)], dtype=np.uint64)
    return np.unique((runs * factors).sum(axis=1, dtype=np.uint64))


_PRIME = 0x9E3779B97F4A7C15


class Candidates(NamedTuple):
    """Rows in retrieval order with the null document first, and whether the origin or repetitions were met."""

    rows: Int64[ndarray, "C"]  # at most k
    origin_removed: bool
    duplicates: bool  # the original code skips such an example


def select_candidates(
    retrieved_rows: Sequence[SupportsIndex] | ndarray, origin_uid: str | None, uids: Sequence[str] | ndarray, k: int
) -> Candidates:
    """Drop the originating document and repetitions, put the null document first, cut to k (language/realm).

    `uids[i]` identifies the text of `retrieved_rows[i]` (document_uid or block_id, both mean equal title and text) and
    `origin_uid` the block the query came from; None when it comes from another corpus. Fewer than k rows come back when
    too few were retrieved: ask the index for some more than k.
    """
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
        else:
            rows.append(int(row))
    return Candidates(np.array(rows[:k], dtype=np.int64), origin_removed, duplicates)
