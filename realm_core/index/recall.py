"""How close an index comes to exact search, and how far two index versions lie apart."""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from realm_core.errors import ConfigError
from realm_core.index.exact import exact_search, score_rows
from realm_core.index.snapshot import as_tensor

_ROWS = 65536


@runtime_checkable
class Searchable(Protocol):
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]: ...


def recall_against_exact(
    index: Searchable,
    vectors: Float[Tensor, "N D"] | Float[np.ndarray, "N D"],
    queries: Float[Tensor, "Q D"] | Float[np.ndarray, "Q D"],
    k: int,
) -> float:
    """Share of the k best places that `index` fills correctly, averaged over queries.

    A returned row counts if its true inner product reaches that of the k-th best row: of several equal vectors any will
    do. Repeated rows count once. 1.0 for no queries. `queries` must come from the encoder that made `vectors`.
    """
    if len(queries) == 0:
        return 1.0
    vectors, queries = as_tensor(vectors), as_tensor(queries)
    score_Qk, _ = exact_search(queries, vectors, k)
    row_QC = index.search(queries, k)[1].to(vectors.device)
    if bool((row_QC < 0).any()) or bool((row_QC >= len(vectors)).any()):
        raise ConfigError(f"the index returns rows outside the {len(vectors)} vectors; it was built from others")
    found_QC = score_rows(queries.to(vectors.device), vectors, row_QC) >= score_Qk[:, -1:].to(vectors.device)
    hits = (found_QC & ~_repeated(row_QC)).sum(dim=1).clamp(max=score_Qk.shape[1])
    return float(hits.double().mean()) / score_Qk.shape[1]


def overlap(
    rows_a: Int[Tensor, "Q _"] | Int[np.ndarray, "Q _"], rows_b: Int[Tensor, "Q _"] | Int[np.ndarray, "Q _"]
) -> float:
    """Share of rows that two result lists have in common, regardless of order, averaged over queries (1.0 for none)."""
    rows_a, rows_b = torch.as_tensor(rows_a), torch.as_tensor(rows_b)
    if rows_a.shape != rows_b.shape:
        raise ConfigError(f"overlap of {tuple(rows_a.shape)} with {tuple(rows_b.shape)}; search both with the same k")
    if rows_a.numel() == 0:
        return 1.0
    return sum(float(torch.isin(a, b).double().mean()) for a, b in zip(rows_a, rows_b, strict=True)) / len(rows_a)


def displacement(
    old: Float[Tensor, "N D"] | Float[np.ndarray, "N D"], new: Float[Tensor, "N D"] | Float[np.ndarray, "N D"]
) -> dict[str, float]:
    """How far the vectors of the same rows moved between two snapshots.

    `cosine_mean` and `cosine_min` compare directions; `distance_mean` and `distance_max` are Euclidean;
    `relative_distance` is the mean distance divided by the mean norm of the old vectors.
    """
    if old.shape != new.shape:
        raise ConfigError(f"displacement of {tuple(old.shape)} to {tuple(new.shape)}; the snapshots cover other blocks")
    if len(old) == 0:
        raise ConfigError("displacement of no vectors; embed at least one block")
    old, new = as_tensor(old), as_tensor(new)
    cosines, distances, norms = [], [], []
    for start in range(0, len(old), _ROWS):
        a, b = old[start : start + _ROWS].double(), new[start : start + _ROWS].double()
        cosines.append(torch.cosine_similarity(a, b, dim=1))
        distances.append((a - b).norm(dim=1))
        norms.append(a.norm(dim=1))
    cosine, distance, norm = torch.cat(cosines), torch.cat(distances), torch.cat(norms)
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "distance_mean": float(distance.mean()),
        "distance_max": float(distance.max()),
        "relative_distance": float(distance.mean() / norm.mean().clamp(min=1e-30)),
    }


def _repeated(row_QC: Tensor) -> Tensor:
    """True where a row already stands further left in the same list."""
    order = row_QC.argsort(dim=1, stable=True)
    row_sorted = row_QC.gather(1, order)
    again = torch.zeros_like(row_QC, dtype=torch.bool)
    again[:, 1:] = row_sorted[:, 1:] == row_sorted[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)
