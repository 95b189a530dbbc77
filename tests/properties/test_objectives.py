"""Identities of the training objectives that hold for any scores."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from realm_core.errors import ConfigError
from realm_core.model.objectives import (
    candidate_posterior,
    document_utility,
    gold_log_probability,
    ict_loss,
    in_batch_accuracy,
    marginal_log_loss,
    marginal_mlm_loss,
    null_probability,
    reader_loss,
    retrieval_utility,
    retriever_loss,
)

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 4)
examples = settings(max_examples=20, deadline=None)


def normal(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def masked_lm(seed: int, batch: int, candidates: int, masks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance, gold log-probabilities, and a mask with at least one real slot in every example."""
    relevance = normal(seed, batch, candidates).requires_grad_()
    gold_logp = -normal(seed + 1, batch, candidates, masks).abs()
    real = normal(seed + 2, batch, masks) > 0
    real[:, 0] = True
    return relevance, gold_logp, real


def gradient(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


# --- masked LM


@examples
@given(SEEDS, SIZES, SIZES, SIZES)
def test_the_joint_gradient_is_posterior_minus_prior(seed: int, batch: int, candidates: int, masks: int) -> None:
    relevance, gold_logp, real = masked_lm(seed, batch, candidates, masks)
    (found,) = gradient(-batch * marginal_mlm_loss(relevance, gold_logp, real, "joint"), relevance)
    expected = candidate_posterior(relevance, gold_logp, real, "joint") - relevance.softmax(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@examples
@given(SEEDS, SIZES, SIZES, SIZES)
def test_the_token_gradient_is_the_mean_posterior_minus_prior_over_real_masks(
    seed: int, batch: int, candidates: int, masks: int
) -> None:
    relevance, gold_logp, real = masked_lm(seed, batch, candidates, masks)
    (found,) = gradient(-marginal_mlm_loss(relevance, gold_logp, real, "token"), relevance)
    share = real.double().sum(dim=1, keepdim=True) / real.sum()  # every mask of the batch weighs the same
    expected = share * (candidate_posterior(relevance, gold_logp, real, "token") - relevance.softmax(dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@examples
@given(SEEDS, SIZES, SIZES)
def test_both_marginals_agree_when_one_wordpiece_is_masked(seed: int, batch: int, candidates: int) -> None:
    relevance, gold_logp, _ = masked_lm(seed, batch, candidates, 3)
    one = torch.zeros(batch, 3, dtype=torch.bool)
    one[torch.arange(batch), torch.arange(batch) % 3] = True
    token, joint = (marginal_mlm_loss(relevance, gold_logp, one, kind) for kind in ("token", "joint"))
    torch.testing.assert_close(token, joint, rtol=1e-12, atol=1e-12)
    posteriors = [candidate_posterior(relevance, gold_logp, one, kind) for kind in ("token", "joint")]
    torch.testing.assert_close(*posteriors, rtol=1e-12, atol=1e-12)


@examples
@given(SEEDS, SIZES, SIZES, SIZES)
def test_masked_lm_losses_equal_sums_written_out(seed: int, batch: int, candidates: int, masks: int) -> None:
    relevance, gold_logp, real = masked_lm(seed, batch, candidates, masks)
    token, joint = [], []
    for b in range(batch):
        weights = [math.exp(score) for score in relevance[b].tolist()]
        prior = [weight / sum(weights) for weight in weights]
        slots = [m for m in range(masks) if real[b, m]]
        p = gold_logp[b].exp().tolist()
        token += [-math.log(sum(prior[c] * p[c][m] for c in range(candidates))) for m in slots]
        whole = sum(prior[c] * math.prod(p[c][m] for m in slots) for c in range(candidates))
        joint.append(-math.log(whole))
    assert marginal_mlm_loss(relevance, gold_logp, real, "token").item() == pytest.approx(sum(token) / len(token))
    assert marginal_mlm_loss(relevance, gold_logp, real, "joint").item() == pytest.approx(sum(joint) / batch)


@examples
@given(SEEDS, st.floats(-50, 50))
def test_a_constant_added_to_all_relevance_changes_no_loss(seed: int, constant: float) -> None:
    relevance, gold_logp, real = masked_lm(seed, 3, 4, 2)
    shift = constant * torch.arange(1, 4, dtype=torch.float64)[:, None]  # another constant for every example
    for kind in ("token", "joint"):
        before, after = (marginal_mlm_loss(scores, gold_logp, real, kind) for scores in (relevance, relevance + shift))
        torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)
    correct, valid = gold_logp > -1.0, gold_logp > -3.0
    for before, after in (
        (retriever_loss(relevance, correct[..., 0]), retriever_loss(relevance + shift, correct[..., 0])),
        (
            reader_loss(gold_logp, relevance, correct, valid),
            reader_loss(gold_logp, relevance + shift, correct, valid),
        ),
        (retrieval_utility(relevance, gold_logp, real), retrieval_utility(relevance + shift, gold_logp, real)),
    ):
        torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


@examples
@given(SEEDS)
def test_slots_without_a_mask_never_matter(seed: int) -> None:
    relevance, gold_logp, real = masked_lm(seed, 3, 4, 3)
    other = torch.where(real[:, None], gold_logp, -normal(seed + 9, 3, 4, 3).abs() - 40.0)
    for measure in (marginal_mlm_loss, retrieval_utility, candidate_posterior):
        torch.testing.assert_close(measure(relevance, gold_logp, real), measure(relevance, other, real))
    torch.testing.assert_close(document_utility(gold_logp, real), document_utility(other, real))


@examples
@given(SEEDS)
def test_a_candidate_of_relevance_minus_infinity_is_as_if_absent(seed: int) -> None:
    relevance, gold_logp, real = masked_lm(seed, 3, 4, 2)
    absent = relevance.detach().clone()
    absent[:, 2] = -math.inf
    absent.requires_grad_()
    present = [0, 1, 3]
    for kind in ("token", "joint"):
        loss = marginal_mlm_loss(absent, gold_logp, real, kind)
        expected = marginal_mlm_loss(relevance[:, present], gold_logp[:, present], real, kind)
        torch.testing.assert_close(loss, expected)
        (found,) = gradient(loss, absent)
        torch.testing.assert_close(found[:, present], gradient(expected, relevance)[0][:, present])
        assert (found[:, 2] == 0).all()
        assert (candidate_posterior(absent, gold_logp, real, kind)[:, 2] == 0).all()
    torch.testing.assert_close(
        retrieval_utility(absent, gold_logp, real),
        retrieval_utility(relevance[:, present], gold_logp[:, present], real),
    )


def test_a_batch_without_masks_has_zero_loss_and_zero_gradient() -> None:
    relevance, gold_logp, real = masked_lm(1, 2, 3, 2)
    for kind in ("token", "joint"):
        loss = marginal_mlm_loss(relevance, gold_logp, torch.zeros_like(real), kind)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-15)
        assert gradient(loss, relevance)[0].abs().max() < 1e-15
        prior = relevance.softmax(dim=1)
        torch.testing.assert_close(candidate_posterior(relevance, gold_logp, torch.zeros_like(real), kind), prior)


def test_an_unknown_marginal_is_refused() -> None:
    relevance, gold_logp, real = masked_lm(1, 2, 3, 2)
    for measure in (marginal_mlm_loss, candidate_posterior):
        with pytest.raises(ConfigError, match="marginal='sum'"):
            measure(relevance, gold_logp, real, "sum")


def test_utilities_measure_what_documents_add_to_the_null_document() -> None:
    gold_logp = torch.tensor([[[-3.0, -1.0], [-1.0, -1.5]]])
    real = torch.tensor([[True, True]])
    assert document_utility(gold_logp, real).tolist() == [[0.0, 1.5]]
    certain_null = torch.tensor([[0.0, -1e4]])
    assert retrieval_utility(certain_null, gold_logp, real).item() == pytest.approx(0.0)
    certain_document = torch.tensor([[-1e4, 0.0]])
    assert retrieval_utility(certain_document, gold_logp, real).item() == pytest.approx((2.0 - 0.5) / 2)
    assert null_probability(torch.tensor([[0.0, 0.0, math.log(2.0)]])).tolist() == pytest.approx([0.25])


# --- inverse cloze task


@examples
@given(SEEDS, SIZES, SIZES)
def test_the_cloze_loss_equals_the_sum_written_out_with_extra_documents_as_negatives(
    seed: int, batch: int, extra: int
) -> None:
    queries, documents = normal(seed, batch, 3, scale=1.0), normal(seed + 1, batch + extra, 3, scale=1.0)
    scores = (queries @ documents.T).tolist()
    expected = [math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(scores)]
    assert ict_loss(queries, documents).item() == pytest.approx(sum(expected) / batch)
    right = [max(row) == row[i] for i, row in enumerate(scores)]
    assert in_batch_accuracy(queries, documents).tolist() == right


@examples
@given(SEEDS, SIZES, SIZES, st.floats(-50, 50))
def test_a_constant_added_to_all_scores_of_a_query_changes_no_cloze_loss(
    seed: int, batch: int, extra: int, constant: float
) -> None:
    queries, documents = normal(seed, batch, 3, scale=1.0), normal(seed + 1, batch + extra, 3, scale=1.0)
    shift = constant * torch.arange(1, batch + 1, dtype=torch.float64)[:, None]  # another constant for every query
    shifted = torch.cat([queries, shift], dim=1), torch.nn.functional.pad(documents, (0, 1), value=1.0)
    torch.testing.assert_close(shifted[0] @ shifted[1].T, queries @ documents.T + shift)
    torch.testing.assert_close(ict_loss(*shifted), ict_loss(queries, documents), rtol=1e-9, atol=1e-9)


def test_gold_log_probability_reads_the_target_column() -> None:
    logits = normal(4, 2, 3, 5)
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    found = gold_log_probability(logits, targets)
    for b, m in product(range(2), range(3)):
        assert found[b, m].item() == pytest.approx(logits[b, m].log_softmax(dim=0)[targets[b, m]].item())


def test_half_precision_scores_are_summed_in_float32() -> None:
    relevance, gold_logp, real = (tensor.detach() for tensor in masked_lm(3, 2, 3, 2))
    loss = marginal_mlm_loss(relevance.bfloat16(), gold_logp.bfloat16(), real)
    assert loss.dtype == torch.float32
    assert gold_log_probability(torch.zeros(1, 7).bfloat16(), torch.tensor([3])).dtype == torch.float32


# --- retriever and reader


@examples
@given(SEEDS, SIZES, st.sampled_from([None, -10000.0]))
def test_the_retriever_gradient_is_prior_minus_mass_on_correct_blocks(
    seed: int, blocks: int, mask_value: float | None
) -> None:
    relevance = normal(seed, blocks).requires_grad_()
    correct = normal(seed + 1, blocks) > 0
    correct[0] = True
    loss = retriever_loss(relevance, correct, mask_value)
    prior = relevance.softmax(dim=0)
    assert loss.item() == pytest.approx(-math.log(prior[correct].sum().item()), abs=1e-12)
    on_correct = torch.where(correct, prior, 0.0)
    (found,) = gradient(loss, relevance)
    torch.testing.assert_close(found, prior - on_correct / on_correct.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mask_value", [None, -10000.0])
def test_nothing_correct_means_exactly_zero_loss_and_gradient(mask_value: float | None) -> None:
    relevance, scores = normal(1, 4).requires_grad_(), normal(2, 4, 6).requires_grad_()
    nothing = torch.zeros(4, 6, dtype=torch.bool)
    valid = normal(3, 4, 6) > 0
    loss = retriever_loss(relevance, nothing[:, 0], mask_value)
    loss = loss + reader_loss(scores, relevance, nothing, valid, mask_value)
    assert loss.item() == 0.0
    for found in gradient(loss, relevance, scores):
        assert torch.equal(found, torch.zeros_like(found))


def test_spans_that_are_all_invalid_give_zero_and_never_nan() -> None:
    relevance, scores = normal(1, 2).requires_grad_(), normal(2, 2, 3).requires_grad_()
    everything = torch.ones(2, 3, dtype=torch.bool)
    loss = reader_loss(scores, relevance, everything, ~everything)
    assert loss.item() == 0.0
    for found in gradient(loss, relevance, scores):
        assert torch.equal(found, torch.zeros_like(found))


@examples
@given(SEEDS)
def test_the_reader_loss_is_one_softmax_over_all_valid_block_and_span_pairs(seed: int) -> None:
    relevance, scores = normal(seed, 3), normal(seed + 1, 3, 4).requires_grad_()
    valid, correct = normal(seed + 2, 3, 4) > -1, normal(seed + 3, 3, 4) > 1
    valid[0, 0] = correct[0, 0] = True
    correct[1, 1], valid[1, 1] = True, False  # a gold span that is not valid cannot be predicted and does not count
    weights = {
        (k, s): math.exp(scores[k, s].item() + relevance[k].item())
        for k, s in product(range(3), range(4))
        if valid[k, s]
    }
    gold = sum(weight for place, weight in weights.items() if correct[place])
    loss = reader_loss(scores, relevance, correct, valid)
    assert loss.item() == pytest.approx(-math.log(gold / sum(weights.values())), abs=1e-12)
    assert (gradient(loss, scores)[0][~valid] == 0).all()


@examples
@given(SEEDS)
def test_a_batch_of_questions_is_the_mean_of_its_questions(seed: int) -> None:
    relevance, scores = normal(seed, 3, 2), normal(seed + 1, 3, 2, 4)
    correct, valid = normal(seed + 2, 3, 2, 4) > 0.5, normal(seed + 3, 3, 2, 4) > -1
    correct[1] = False
    together = reader_loss(scores, relevance, correct, valid)
    alone = [reader_loss(scores[q], relevance[q], correct[q], valid[q]) for q in range(3)]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    blocks = correct.any(dim=2)
    alone = [retriever_loss(relevance[q], blocks[q]) for q in range(3)]
    torch.testing.assert_close(retriever_loss(relevance, blocks), torch.stack(alone).mean())


def test_the_raw_marginal_loss_is_unbounded_where_nothing_is_correct() -> None:
    scores, nothing = normal(1, 3), torch.zeros(3, dtype=torch.bool)
    assert marginal_log_loss(scores, nothing).item() == math.inf
    assert marginal_log_loss(scores, nothing, -10000.0).item() == pytest.approx(10000.0)
