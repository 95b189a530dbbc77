"""The order in which rows are visited, as a function of (seed, step): nothing to save, nothing to skip on resume."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

T = TypeVar("T")


def rows_for_step(n: int, batch: int, step: int, seed: int) -> Int64[ndarray, "B"]:
    """Rows of step `step` (from 0). Every stretch of n rows from a multiple of n on holds each row once.

    Epochs follow one another without a gap, so a batch may span two of them.
    """
    if n < 1 or batch < 1 or step < 0:
        raise ValueError(f"n={n}, batch={batch}, step={step}: n and batch must be positive, step not negative")
    places = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs = places // n
    rows = np.empty(batch, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        rows[here] = _permutation(n, epoch, seed)[places[here] - epoch * n]
    return rows


@lru_cache(maxsize=4)
def _permutation(n: int, epoch: int, seed: int) -> Int64[ndarray, "N"]:
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order


def rng_for_step(seed: int, step: int, purpose: int = 0) -> np.random.Generator:
    """The generator of a step's random choices; `purpose` keeps independent choices apart."""
    return np.random.default_rng([seed, step, purpose])


def split_evenly(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """`parts` contiguous runs whose lengths differ by one at most; some are empty where there are too few items."""
    ends = [len(items) * part // parts for part in range(parts + 1)]
    return [items[low:high] for low, high in pairwise(ends)]
