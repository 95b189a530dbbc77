"""How stale an index is: what the retriever would return now against what the index returns, and how old it is."""

from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from realm_core.errors import ConfigError
from realm_core.index.recall import displacement, overlap


def index_drift(
    *,
    old_rows: Int[Tensor, "Q k"] | Int[ndarray, "Q k"] | None = None,
    new_rows: Int[Tensor, "Q k"] | Int[ndarray, "Q k"] | None = None,
    old_vectors: Float[Tensor, "N D"] | Float[ndarray, "N D"] | None = None,
    new_vectors: Float[Tensor, "N D"] | Float[ndarray, "N D"] | None = None,
    index_step: int | None = None,
    trainer_step: int | None = None,
    built_at: float | None = None,
    now: float | None = None,
) -> dict[str, int | float]:
    """Every measure whose two sides are given.

    `top_k_overlap` of two searches for the same queries, the measures of `displacement` for the same blocks (old: the
    encoder behind the index, new: the encoder now), `age_steps` in optimiser steps and `age_seconds`. A clock that went
    back counts as age 0.
    """
    drift: dict[str, int | float] = {}
    if old_rows is not None and new_rows is not None:
        drift["top_k_overlap"] = overlap(old_rows, new_rows)
    if old_vectors is not None and new_vectors is not None:
        drift.update(displacement(old_vectors, new_vectors))
    if index_step is not None and trainer_step is not None:
        if trainer_step < index_step:
            raise ConfigError(f"index of step {index_step} under a trainer at step {trainer_step}; it is another run's")
        drift["age_steps"] = trainer_step - index_step
    if built_at is not None and now is not None:
        drift["age_seconds"] = max(0.0, now - built_at)
    return drift
