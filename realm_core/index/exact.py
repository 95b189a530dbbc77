"""Exact maximum inner product search in plain torch: the oracle every other index is measured against.

The score of a pair is a pure function of its two vectors: products in float64, added in a fixed tree, rounded once to
float32. A matrix product only proposes candidates. Its rounding depends on the shape of the matrices, so ranking by it
would let the chunk size, the sharding or the device decide between near ties. Equal scores go to the lowest row.

Queries must come from the encoder that made the vectors. Nothing here can tell; whoever opens an index compares the
encoder fingerprints of index and query tower.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from realm_core.errors import ConfigError, DataError

_SPARE = 8  # proposals beyond k; enough that one matrix product settles almost every query
_SLICE = 1 << 23  # float64 numbers held at once while pairs are scored (64 MiB)
_SETTLE_ROWS = 8192  # vectors looked at together in the second pass
_UNIT = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}  # what torch's settings add to the error


@torch.no_grad()
def exact_search(
    queries: Float[Tensor, "Q D"],
    vectors: Float[Tensor, "N D"],
    k: int,
    chunk: int = 65536,
    max_norm: float | None = None,
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """The min(k, N) largest inner products of every query, best first, equal scores by ascending row.

    Scores are float32 (also for bfloat16 and float16 vectors), rows int64, both on the device of `queries`. `max_norm`
    is the largest vector norm where the caller knows it; it saves one pass over the vectors and must not be too small.
    Raises ConfigError for impossible shapes and DataError for numbers that are not finite.
    """
    _require_shapes(queries, vectors, k, chunk)
    query_QD = queries.detach().to(vectors.device, torch.float32)
    k = min(k, len(vectors))
    if k == 0 or len(queries) == 0:
        return queries.new_empty((len(queries), k), dtype=torch.float32), _no_rows(queries, k)
    coarse_QC, row_QC, norm = _propose(query_QD, vectors, min(k + _SPARE, len(vectors)), chunk, max_norm)
    score_Qk, row_Qk = merge_topk([(score_rows(query_QD, vectors, row_QC), row_QC)], k)
    if row_QC.shape[1] < len(vectors):
        # Whatever was not proposed has a coarse score of at most the last proposal's.
        slack_Q = _coarse_error(query_QD) * query_QD.norm(dim=1) * norm
        open_Q = ~(score_Qk[:, -1] > coarse_QC[:, -1] + slack_Q)
        if open_Q.any():
            score_Qk[open_Q], row_Qk[open_Q] = _settle(query_QD[open_Q], vectors, score_Qk[open_Q], chunk, norm)
    return score_Qk.to(queries.device), row_Qk.to(queries.device)


def sharded_search(
    queries: Float[Tensor, "Q D"], shards: Sequence[Float[Tensor, "_ D"]], k: int, chunk: int = 65536
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """`exact_search` over the concatenation of `shards`, one shard in use at a time; equal to it bit for bit.

    Shards may live on different devices. Rows count through the shards in the order given.
    """
    parts, offset = [], 0
    for shard in shards:
        scores, rows = exact_search(queries, shard, k, chunk)
        parts.append((scores, rows + offset))
        offset += len(shard)
    return merge_topk(parts, k)


def merge_topk(
    parts: Sequence[tuple[Float[Tensor, "Q _"], Int[Tensor, "Q _"]]], k: int
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """The k best of several result lists (as many as there are), best first, equal scores by ascending row."""
    if not parts:
        raise ConfigError("merge_topk: no result lists; search at least one shard")
    score_QC = torch.cat([scores for scores, _ in parts], dim=1)
    row_QC = torch.cat([rows for _, rows in parts], dim=1)
    by_row_QC = row_QC.argsort(dim=1, stable=True)
    by_score_QC = score_QC.gather(1, by_row_QC).argsort(dim=1, stable=True, descending=True)
    best_Qk = by_row_QC.gather(1, by_score_QC)[:, :k]
    return score_QC.gather(1, best_Qk), row_QC.gather(1, best_Qk)


def score_rows(
    queries: Float[Tensor, "Q D"], vectors: Float[Tensor, "N D"], rows: Int[Tensor, "Q C"]
) -> Float[Tensor, "Q C"]:
    """`pair_scores` of every query with rows of `vectors`, gathered a few queries at a time."""
    step = max(1, _SLICE // max(1, rows.shape[1] * vectors.shape[1]))
    parts = zip(queries.split(step), rows.split(step), strict=True)
    return torch.cat([pair_scores(query, vectors[row]) for query, row in parts])


def pair_scores(queries: Float[Tensor, "Q D"], candidates: Float[Tensor, "Q C D"]) -> Float[Tensor, "Q C"]:
    """Inner product of every query with its own candidates, in float32.

    The same two vectors give the same bits whatever stands around them.
    """
    return _tree_sum(queries[:, None, :].double() * candidates.double()).float()


def _tree_sum(terms: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
    """Sum over the last axis in an order fixed by its length alone, which no library reduction promises."""
    width = terms.shape[-1]
    terms = torch.nn.functional.pad(terms, (0, (1 << max(0, width - 1).bit_length()) - width))
    while terms.shape[-1] > 1:
        left, right = terms.chunk(2, dim=-1)
        terms = left + right
    return terms[..., 0]


def _propose(
    query_QD: Tensor, vectors: Tensor, count: int, chunk: int, max_norm: float | None
) -> tuple[Tensor, Tensor, float]:
    """The `count` best rows by matrix product, their coarse scores in descending order, and the largest vector norm."""
    norm = max_norm or 0.0
    best_QC, row_QC = query_QD.new_empty((len(query_QD), 0)), _no_rows(query_QD, 0)
    for start in range(0, len(vectors), chunk):
        block_BD = vectors[start : start + chunk].float()
        if max_norm is None:
            norm = max(norm, float(block_BD.norm(dim=1).max()))
        with torch.autocast(vectors.device.type, enabled=False):
            score_QB = query_QD @ block_BD.T
        top = score_QB.topk(min(count, len(block_BD)), dim=1)
        best_QC = torch.cat([best_QC, top.values], dim=1)
        row_QC = torch.cat([row_QC, top.indices + start], dim=1)
        if best_QC.shape[1] > count:
            best_QC, keep_QC = best_QC.topk(count, dim=1)
            row_QC = row_QC.gather(1, keep_QC)
    if not best_QC.isfinite().all() or not math.isfinite(norm):  # topk ranks NaN first, so none hides
        raise DataError("exact search met a number that is not finite; check the query batch and the vector report")
    if best_QC.shape[1] == len(vectors):
        return best_QC, row_QC, norm
    best_QC, order_QC = best_QC.sort(dim=1, descending=True)
    return best_QC, row_QC.gather(1, order_QC), norm


def _settle(query_QD: Tensor, vectors: Tensor, found_Qk: Tensor, chunk: int, norm: float) -> tuple[Tensor, Tensor]:
    """Second pass for queries whose k-th place is too close to call: every row that could reach it is scored.

    `found_Qk` holds true scores of k rows, so its last column bounds the k-th best score from below.
    """
    k, query64_QD = found_Qk.shape[1], query_QD.double()
    slack_Q = query64_QD.norm(dim=1) * norm * (query_QD.shape[1] + 4) * 2.0**-52 + 2.0**-149
    best = [(found_Qk.new_empty((1, 0)), _no_rows(found_Qk[:1], 0)) for _ in range(len(found_Qk))]
    reach_Q = _halfway(found_Qk[:, -1], -torch.inf) - slack_Q
    for start in range(0, len(vectors), step := min(chunk, _SETTLE_ROWS)):
        block_BD = vectors[start : start + step].double()
        with torch.autocast(vectors.device.type, enabled=False):
            may_QB = query64_QD @ block_BD.T >= reach_Q[:, None]
        for i in may_QB.any(dim=1).nonzero()[:, 0].tolist():
            at_C = may_QB[i].nonzero()[:, 0]
            best[i] = merge_topk([best[i], (_scores_of(query_QD[i], block_BD, at_C)[None], at_C[None] + start)], k)
            if best[i][0].shape[1] == k:  # later rows lose every tie, so they must do better than the k-th
                reach_Q[i] = _halfway(best[i][0][0, -1], torch.inf) - slack_Q[i]
    return torch.cat([scores for scores, _ in best]), torch.cat([rows for _, rows in best])


def _halfway(score: Float[Tensor, "*B"], towards: float) -> Float[Tensor, "*B"]:
    """The float64 number halfway to the neighbouring float32: what rounds to `score` or beyond lies on the far side."""
    return (score.double() + torch.nextafter(score, torch.full_like(score, towards)).double()) / 2


def _scores_of(query_D: Tensor, block_BD: Tensor, at_C: Tensor) -> Tensor:
    parts = at_C.split(max(1, _SLICE // len(query_D)))
    return torch.cat([pair_scores(query_D[None], block_BD[part][None])[0] for part in parts])


def _coarse_error(query_QD: Tensor) -> float:
    """Bound on |matrix product - true inner product| / (|q| |v|) for the precision torch is set to."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set per backend, which torch will not sum up in one word
        precision = "medium"
    return (query_QD.shape[1] + 4) * 2.0**-23 + _UNIT.get(precision, _UNIT["medium"])


def _no_rows(like: Tensor, width: int) -> Tensor:
    return torch.empty((len(like), width), dtype=torch.int64, device=like.device)


def _require_shapes(queries: Tensor, vectors: Tensor, k: int, chunk: int) -> None:
    if queries.ndim != 2 or vectors.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ConfigError(
            f"exact search: queries {tuple(queries.shape)} against vectors {tuple(vectors.shape)}; "
            "both must be matrices of one width, made by the same encoder"
        )
    if k < 1 or chunk < 1:
        raise ConfigError(f"exact search: k={k}, chunk={chunk}; both must be at least 1")
