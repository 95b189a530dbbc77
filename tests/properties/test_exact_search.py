"""Exact search against the obvious oracle, with ties in plenty, whatever the chunks and shards."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from realm_core.errors import ConfigError, DataError
from realm_core.index import exact
from realm_core.index.exact import (
    _require_shapes,
    exact_search,
    merge_topk,
    pair_scores,
    score_rows,
    sharded_search,
)

torch.set_num_threads(1)


def oracle(queries: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Score every pair, sort by descending score and then ascending row."""
    scores = pair_scores(queries, vectors.expand(len(queries), *vectors.shape))
    order = [sorted(range(len(vectors)), key=lambda row: (-line[row], row))[:k] for line in scores.tolist()]
    rows = torch.tensor(order, dtype=torch.int64).reshape(len(queries), -1)
    return scores.gather(1, rows), rows


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """Queries, vectors, k and chunk. Repeated vectors, few numbers and tiny differences make ties and near ties."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    count, width, asked = draw(st.integers(1, 90)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["normal", "whole", "repeated", "close", "zero"]))
    vectors = rng.normal(size=(count, width))
    if kind == "whole":
        vectors = rng.integers(-1, 2, size=(count, width)).astype(float)
    if kind == "repeated":
        vectors = vectors[rng.integers(0, max(1, count // 5), size=count)]
    if kind == "close":
        vectors = vectors[:1] + 1e-7 * vectors
    if kind == "zero":
        vectors = 0 * vectors
    queries = rng.normal(size=(asked, width)) if kind != "whole" else rng.integers(-1, 2, size=(asked, width))
    as_float = [torch.tensor(np.asarray(x), dtype=torch.float32) for x in (queries, vectors)]
    return as_float[0], as_float[1], draw(st.integers(1, 100)), draw(st.integers(1, 40))


def equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@given(worlds())
@settings(max_examples=120, deadline=None)
def test_the_search_equals_the_oracle_bit_for_bit(world: tuple[Tensor, Tensor, int, int]) -> None:
    queries, vectors, k, chunk = world
    assert equal(exact_search(queries, vectors, k, chunk), oracle(queries, vectors, min(k, len(vectors))))


@given(worlds(), st.lists(st.integers(0, 90), max_size=4))
@settings(max_examples=80, deadline=None)
def test_a_sharded_search_equals_the_whole_bit_for_bit(world: tuple[Tensor, Tensor, int, int], cuts: list[int]) -> None:
    queries, vectors, k, chunk = world
    edges = sorted({0, len(vectors), *(cut for cut in cuts if cut < len(vectors))})
    shards = [vectors[a:b] for a, b in itertools.pairwise(edges)] + [vectors[:0]]
    assert equal(sharded_search(queries, shards, k, chunk), exact_search(queries, vectors, k))


@given(worlds(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_query_is_answered_the_same_alone_and_in_a_batch(world: tuple[Tensor, Tensor, int, int], copies: int) -> None:
    queries, vectors, k, chunk = world
    together = exact_search(queries.repeat(copies, 1), vectors, k, chunk)
    for i in range(len(queries)):
        assert equal((together[0][i : i + 1], together[1][i : i + 1]), exact_search(queries[i : i + 1], vectors, k))


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_scores_are_the_correctly_rounded_inner_products(world: tuple[Tensor, Tensor, int, int]) -> None:
    queries, vectors, k, _ = world
    scores, rows = exact_search(queries, vectors, k)
    for query, row_scores, row in zip(queries, scores, rows, strict=True):
        true = (query.numpy().astype(np.longdouble) * vectors[row].numpy().astype(np.longdouble)).sum(axis=1)
        assert np.allclose(row_scores.numpy(), true.astype(np.float32), rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_are_searched_in_full_precision(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    queries, vectors = torch.randn(7, 32, generator=draw), torch.randn(500, 32, generator=draw).to(dtype)
    assert equal(exact_search(queries, vectors, 20, 64), exact_search(queries, vectors.float(), 20))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_faster_matrix_products_and_autocast_change_nothing(precision: str) -> None:
    draw = torch.Generator().manual_seed(0)
    queries, vectors = torch.randn(20, 64, generator=draw), torch.randn(2000, 64, generator=draw)
    expected = oracle(queries, vectors, 8)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16):
            assert equal(exact_search(queries, vectors, 8, 300), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_scoring_rows_in_many_slices_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    queries, vectors = torch.randn(9, 5, generator=draw), torch.randn(40, 5, generator=draw)
    rows = torch.randint(0, 40, (9, 7), generator=draw)
    whole = score_rows(queries, vectors, rows)
    monkeypatch.setattr(exact, "_SLICE", 70)
    assert torch.equal(score_rows(queries, vectors, rows), whole)
    assert torch.equal(exact_search(queries, torch.ones(30, 5), 4)[1][0], torch.arange(4))


def test_of_many_equal_vectors_the_lowest_rows_win_in_every_chunking() -> None:
    vectors = torch.ones(20_000, 4)
    for chunk in (3000, 65536):
        assert exact_search(torch.ones(2, 4), vectors, 5, chunk)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_late_better_row_displaces_earlier_ties() -> None:
    vectors = torch.ones(20_000, 4)
    vectors[19_999] *= 1 + 2.0**-20
    assert exact_search(torch.ones(1, 4), vectors, 3, 4096)[1].tolist() == [[19_999, 0, 1]]


def test_searching_needs_no_gradient_and_makes_none() -> None:
    queries = torch.randn(2, 4, requires_grad=True)
    assert not exact_search(queries, torch.eye(4), 2)[0].requires_grad


def test_merging_keeps_as_many_as_there_are() -> None:
    part = (torch.tensor([[2.0, 1.0]]), torch.tensor([[5, 3]]))
    scores, rows = merge_topk([part, (torch.tensor([[2.0]]), torch.tensor([[4]]))], 9)
    assert scores.tolist() == [[2.0, 2.0, 1.0]]
    assert rows.tolist() == [[4, 5, 3]]
    with pytest.raises(ConfigError):
        merge_topk([], 3)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="same encoder"):
        _require_shapes(torch.ones(1, 3), torch.ones(2, 4), 1, 1)
    with pytest.raises(ConfigError, match="k=0"):
        exact_search(torch.ones(1, 3), torch.ones(2, 3), 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_an_error_and_no_result(bad: float) -> None:
    vectors = torch.ones(50, 3)
    vectors[33, 1] = bad
    with pytest.raises(DataError, match="not finite"):
        exact_search(torch.ones(1, 3), vectors, 2)
    with pytest.raises(DataError, match="not finite"):
        exact_search(torch.full((1, 3), bad), torch.ones(50, 3), 2)
