"""What stands on top of the encoder: embedder and retriever, masked-LM head, span head."""

from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from realm_core.errors import ConfigError
from realm_core.model.embedder import Embedder, Retriever, relevance
from realm_core.model.encoder import EncoderShape
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.reader import Reader, SpanScores, best_span, correct_spans, span_candidates

SHAPE = EncoderShape(vocab_size=40, hidden_size=8, layers=1, heads=2, intermediate_size=12, max_positions=16)


Module = TypeVar("Module", bound=nn.Module)


def initialised(module: Module, seed: int = 0) -> Module:
    module.initialise(torch.Generator().manual_seed(seed))  # type: ignore[operator]
    return module.double().eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, SHAPE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- embedder and retriever


def test_vectors_are_layer_normalised_and_not_of_unit_length() -> None:
    vectors = initialised(Embedder(SHAPE, projection_size=6))(tokens(5, 7))
    torch.testing.assert_close(vectors.mean(dim=1), torch.zeros(5).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(vectors.var(dim=1, correction=0), torch.ones(5).double(), atol=1e-6, rtol=0)


def test_projection_dropout_acts_in_training_only() -> None:
    embedder, pooled = initialised(Embedder(SHAPE, 64, projection_dropout=0.5)), torch.randn(1, 8).double()
    assert (embedder.project(pooled) != 0).all()
    embedder.train()
    dropped = (embedder.project(pooled) == 0).sum()
    assert 10 < dropped < 54


@pytest.mark.parametrize("change", [{"projection_size": 0}, {"projection_eps": 0.0}, {"projection_dropout": 1.0}])
def test_impossible_projections_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Embedder(SHAPE, **change)  # type: ignore[arg-type]


def test_shared_towers_are_one_embedder_with_one_set_of_keys() -> None:
    retriever = initialised(Retriever(SHAPE, 6, share=True))
    ids = tokens(2, 5)
    assert torch.equal(retriever.embed_queries(ids), retriever.embed_documents(ids))
    assert {name.split(".")[0] for name in retriever.state_dict()} == {"embedder"}


def test_separate_towers_start_equal_and_learn_apart() -> None:
    retriever = initialised(Retriever(SHAPE, 6, share=False))
    ids = tokens(2, 5)
    assert torch.equal(retriever.embed_queries(ids), retriever.embed_documents(ids))
    assert {name.split(".")[0] for name in retriever.state_dict()} == {"embedder", "query_embedder"}
    torch.autograd.backward(retriever.embed_queries(ids).square().sum() + retriever.embed_queries(ids)[0, 0])
    trained = {name for name, weight in retriever.named_parameters() if weight.grad is not None}
    assert trained
    assert all(name.startswith("query_embedder.") for name in trained)


def test_documents_keep_their_leading_dimensions() -> None:
    retriever = initialised(Retriever(SHAPE, 6))
    ids, mask = tokens(2, 3, 5), torch.ones(2, 3, 5, dtype=torch.bool)
    vectors = retriever.embed_documents(ids, torch.zeros_like(ids), mask)
    assert vectors.shape == (2, 3, 6)
    torch.testing.assert_close(vectors[1, 2], retriever.embed_documents(ids[1, 2:])[0], rtol=1e-10, atol=1e-12)


def test_relevance_is_the_unscaled_inner_product() -> None:
    queries, candidates = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 4.0], [0.0, -1.0]]])
    assert relevance(queries, candidates).tolist() == [[11.0, -2.0]]


def test_checkpointing_reaches_every_tower() -> None:
    retriever = Retriever(SHAPE, 6, share=False)
    retriever.checkpointing = True
    assert retriever.embedder.realm.checkpointing
    assert retriever.query_embedder.realm.checkpointing


# --- knowledge-augmented encoder


def test_the_decoder_is_tied_and_has_keys_of_the_published_weights() -> None:
    encoder = initialised(KnowledgeEncoder(SHAPE))
    head = {name for name in encoder.state_dict() if not name.startswith("realm.")}
    transform = [f"transform.{part}.{kind}" for part in ("dense", "LayerNorm") for kind in ("weight", "bias")]
    assert head == {f"cls.predictions.{name}" for name in ["bias", *transform]}
    ids, positions = tokens(1, 6), torch.tensor([[2]])
    before = encoder(ids, None, None, positions)
    with torch.no_grad():
        absent = next(piece for piece in range(1, SHAPE.vocab_size) if piece not in ids)
        encoder.realm.embeddings.word_embeddings.weight[absent] += 1.0
    changed = (encoder(ids, None, None, positions) != before)[0, 0].nonzero().flatten().tolist()
    assert changed == [absent]  # a wordpiece that is not in the input moves its own logit and no other


def test_logits_at_given_positions_equal_those_of_the_full_sequence() -> None:
    encoder, ids = initialised(KnowledgeEncoder(SHAPE)), tokens(2, 6)
    everywhere = encoder(ids, None, None, torch.arange(6).expand(2, -1))
    some = encoder(ids, None, None, torch.tensor([[5, 0], [1, 1]]))
    assert some.shape == (2, 2, SHAPE.vocab_size)
    torch.testing.assert_close(some[0], everywhere[0, [5, 0]], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(some[1], everywhere[1, [1, 1]], rtol=1e-10, atol=1e-12)


# --- reader


def test_spans_are_listed_by_width_then_by_start() -> None:
    starts, ends = span_candidates(4, 2)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [
        (0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (1, 2), (2, 3),
    ]  # fmt: skip


def test_a_width_beyond_the_sequence_lists_every_span_once() -> None:
    starts, ends = span_candidates(3, 10)
    assert sorted(zip(starts.tolist(), ends.tolist(), strict=True)) == [(s, e) for s in range(3) for e in range(s, 3)]


def test_the_full_size_list_has_3155_spans() -> None:
    assert len(span_candidates(320, 10)[0]) == 3155


def test_span_scores_equal_a_loop_over_all_pairs() -> None:
    reader = initialised(Reader(SHAPE, span_hidden=5, max_span_width=3))
    ids, block_mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    spans = reader(ids, None, None, block_mask)
    head, hidden = reader.qa_outputs, reader.realm(ids)
    first, second = head.dense_intermediate(hidden).split(5, dim=2)
    for index, (start, end) in enumerate(zip(*span_candidates(7, 3), strict=True)):
        normed = head.layer_normalization(torch.relu(first[:, start] + second[:, end]))
        torch.testing.assert_close(spans.score[:, index], head.dense_output(normed)[:, 0], rtol=1e-10, atol=1e-12)


def test_a_span_is_valid_only_if_both_ends_lie_in_the_block() -> None:
    reader = initialised(Reader(SHAPE, span_hidden=5, max_span_width=7))
    block_mask = torch.tensor([[0, 0, 1, 1, 0, 1]])
    valid = reader(tokens(1, 6), None, None, block_mask).valid[0]
    starts, ends = span_candidates(6, 7)
    assert {(s, e) for s, e, ok in zip(starts.tolist(), ends.tolist(), valid.tolist(), strict=True) if ok} == {
        (2, 2), (3, 3), (5, 5), (2, 3), (3, 5), (2, 5),
    }  # fmt: skip


def test_gold_spans_are_found_and_padding_or_wide_spans_match_nothing() -> None:
    starts, ends = span_candidates(6, 3)
    gold_starts, gold_ends = torch.tensor([[1, 4, -1], [0, -1, -1]]), torch.tensor([[2, 4, -1], [5, -1, -1]])
    correct = correct_spans(starts, ends, gold_starts, gold_ends)
    found = [(block, int(starts[span]), int(ends[span])) for block, span in correct.nonzero().tolist()]
    assert sorted(found) == [(0, 1, 2), (0, 4, 4)]


def test_the_best_span_adds_relevance_skips_invalid_spans_and_prefers_the_first_among_equals() -> None:
    score = torch.tensor([[9.0, 1.0, 2.0], [0.0, 2.0, 2.0]])
    valid = torch.tensor([[False, True, True], [True, True, True]])
    assert [int(x) for x in best_span(SpanScores(score, valid), torch.tensor([0.0, 0.0]))] == [0, 2, 2]
    assert [int(x) for x in best_span(SpanScores(score, valid), torch.tensor([0.0, 1.0]))] == [1, 1, 3]


@pytest.mark.parametrize("change", [{"span_hidden": 0}, {"max_span_width": 0}, {"eps": 0.0}])
def test_impossible_readers_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Reader(SHAPE, **change)  # type: ignore[arg-type]
