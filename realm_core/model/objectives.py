"""The training objectives, as pure functions of tensors. All are in nats and computed in at least float32.

Letters: B examples, C candidates of each (candidate 0 is the null document), M masked slots, Q questions, K blocks,
S spans of a block, D vector width, V vocabulary. Every loss depends on differences of relevance scores only.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from realm_core.errors import ConfigError

Marginal = str  # "token" or "joint"


def ict_loss(
    queries: Float[Tensor, "B D"],
    documents: Float[Tensor, "N D"],
    *,
    first: int = 0,
    real: Bool[Tensor, " N"] | None = None,
    total: int | None = None,
) -> Float[Tensor, ""]:
    """Inverse cloze task: mean cross-entropy of query i against document first + i among all N documents of the batch.

    One direction only, no temperature (Lee et al. 2019, section 4; original code: language/orqa, ICT model). Documents
    that are not `real` are padding: they are no negatives and their queries add nothing. With `total`, the sum is divided
    by it instead of by B: the losses of all parts of a batch of `total` queries then add up to that of the batch.
    """
    score_BN = _full(queries @ documents.T)
    target_B = first + torch.arange(queries.shape[0], device=queries.device)
    if real is not None:
        score_BN = score_BN.masked_fill(~real, -torch.inf)
    nll_B = F.cross_entropy(score_BN, target_B, reduction="none")
    real_B = torch.ones_like(target_B, dtype=torch.bool) if real is None else real[target_B]
    return nll_B.masked_fill(~real_B, 0.0).sum() / (real_B.sum().clamp(min=1) if total is None else total)


def in_batch_accuracy(
    queries: Float[Tensor, "B D"],
    documents: Float[Tensor, "N D"],
    *,
    first: int = 0,
    real: Bool[Tensor, " N"] | None = None,
) -> Bool[Tensor, " B"]:
    """Whether query i scores document first + i highest among the (real) documents of the batch."""
    score_BN = queries @ documents.T
    if real is not None:
        score_BN = score_BN.masked_fill(~real, -torch.inf)
    return score_BN.argmax(dim=1) == first + torch.arange(queries.shape[0], device=queries.device)


def gold_log_probability(
    logits: Float[Tensor, "*batch V"], targets: Integer[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """log p(y_j | z, x) of the target wordpieces, from vocabulary logits."""
    nll = F.cross_entropy(_full(logits).flatten(end_dim=-2), targets.flatten().long(), reduction="none")
    return -nll.view(targets.shape)


def marginal_mlm_loss(
    relevance: Float[Tensor, "B C"],
    gold_logp: Float[Tensor, "B C M"],
    real: Bool[Tensor, "B M"] | Integer[Tensor, "B M"],
    marginal: Marginal = "token",
    total: int | None = None,
) -> Float[Tensor, ""]:
    """Negative log-likelihood of the masked wordpieces, marginalised over the candidate documents.

    "token" marginalises every masked wordpiece on its own, as the original code does: the mean over all real masks of
    the batch of -log sum_z p(z|x) p(y_j|z,x); 0 when no mask is real. "joint" is the paper's equation 1, the product
    over wordpieces inside the sum: the mean over examples of -log sum_z p(z|x) prod_j p(y_j|z,x), to which an example
    without masks contributes 0. Both agree when every example has one masked wordpiece.

    With `total` (real masks for "token", examples for "joint") the sum is divided by it instead: the losses of all parts
    of a batch then add up to that of the batch.
    """
    real_BM = real.bool()
    log_prior_BC = _full(relevance).log_softmax(dim=1)
    if marginal == "token":
        marginal_BM = (log_prior_BC[:, :, None] + _full(gold_logp)).logsumexp(dim=1)
        return -_mean_where(marginal_BM, real_BM, total)
    if marginal == "joint":
        marginal_B = (log_prior_BC + _document_logp(gold_logp, real_BM)).logsumexp(dim=1)
        return -marginal_B.mean() if total is None else -marginal_B.sum() / total
    raise ConfigError(f"marginal={marginal!r}: must be 'token' or 'joint'")


def retrieval_utility(
    relevance: Float[Tensor, "B C"],
    gold_logp: Float[Tensor, "B C M"],
    real: Bool[Tensor, "B M"] | Integer[Tensor, "B M"],
    total: int | None = None,
) -> Float[Tensor, ""]:
    """What retrieval adds: mean over real masks of log p(y_j|x) - log p(y_j|null,x) (original code: language/realm).

    `total` real masks of a whole batch make it this part's share of the batch's mean.
    """
    log_prior_BC1 = _full(relevance).log_softmax(dim=1)[:, :, None]
    gold_logp = _full(gold_logp)
    return _mean_where((log_prior_BC1 + gold_logp).logsumexp(dim=1) - gold_logp[:, 0], real.bool(), total)


def document_utility(
    gold_logp: Float[Tensor, "B C M"], real: Bool[Tensor, "B M"] | Integer[Tensor, "B M"]
) -> Float[Tensor, "B C"]:
    """log p(y|z,x) - log p(y|null,x) of each candidate document (Guu et al. 2020, section 3.4, equation 2)."""
    logp_BC = _document_logp(gold_logp, real.bool())
    return logp_BC - logp_BC[:, :1]


def null_probability(relevance: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
    """p(null document | x): how much the retriever declines to retrieve."""
    return _full(relevance).softmax(dim=1)[:, 0]


def candidate_posterior(
    relevance: Float[Tensor, "B C"],
    gold_logp: Float[Tensor, "B C M"],
    real: Bool[Tensor, "B M"] | Integer[Tensor, "B M"],
    marginal: Marginal = "joint",
) -> Float[Tensor, "B C"]:
    """p(z | y, x): what each document deserved. The gradient of the log-likelihood with respect to the relevance of z
    is this minus p(z|x) (Guu et al. 2020, section 3.3, appendix A).

    "token" gives the mean over the real masks of an example of p(z | y_j, x), and the prior where there is none.
    """
    real_BM = real.bool()
    log_prior_BC = _full(relevance).log_softmax(dim=1)
    if marginal == "joint":
        return (log_prior_BC + _document_logp(gold_logp, real_BM)).softmax(dim=1)
    if marginal == "token":
        posterior_BCM = (log_prior_BC[:, :, None] + _full(gold_logp)).softmax(dim=1)
        count_B1 = real_BM.sum(dim=1, keepdim=True)
        mean_BC = posterior_BCM.masked_fill(~real_BM[:, None], 0.0).sum(dim=2) / count_B1.clamp(min=1)
        return torch.where(count_B1 > 0, mean_BC, log_prior_BC.exp())
    raise ConfigError(f"marginal={marginal!r}: must be 'token' or 'joint'")


def retriever_loss(
    relevance: Float[Tensor, "*Q K"], correct: Bool[Tensor, "*Q K"], mask_value: float | None = None
) -> Float[Tensor, ""]:
    """-log of the probability mass on blocks that hold an answer, among the retrieved blocks; mean over questions.

    A question without a correct block adds 0 and no gradient. `mask_value` None excludes the others exactly; -10000.0
    adds that number to them, as the original code (language/orqa) does.
    """
    return _marginal_loss(relevance, correct, mask_value).mean()


def marginal_log_loss(
    scores: Float[Tensor, "*Q N"], correct: Bool[Tensor, "*Q N"], mask_value: float | None = None
) -> Float[Tensor, "*Q"]:
    """-log of the softmax mass on the correct entries. Infinite, or about -mask_value, where none is correct."""
    scores = _full(scores)
    return scores.logsumexp(dim=-1) - _exclude(scores, correct, mask_value).logsumexp(dim=-1)


def reader_loss(
    span_scores: Float[Tensor, "*Q K S"],
    relevance: Float[Tensor, "*Q K"],
    correct: Bool[Tensor, "*Q K S"],
    valid: Bool[Tensor, "*Q K S"] | None = None,
    mask_value: float | None = None,
) -> Float[Tensor, ""]:
    """-log of the probability mass on gold spans, in one softmax over all (block, span) pairs; mean over questions.

    The score of a pair is the span's score plus the relevance of its block (original code: language/orqa). Spans that
    are not `valid` take no part. A question without a correct valid span adds 0 and no gradient.
    """
    scores_QKS = _full(span_scores) + _full(relevance)[..., None]
    if valid is not None:
        # A question whose spans are all invalid has no distribution; it is left unmasked here and zeroed below.
        any_valid = valid.flatten(start_dim=-2).any(dim=-1)[..., None, None]
        scores_QKS = _exclude(scores_QKS, valid | ~any_valid, mask_value)
        correct = correct & valid
    return _marginal_loss(scores_QKS.flatten(start_dim=-2), correct.flatten(start_dim=-2), mask_value).mean()


def _marginal_loss(
    scores: Float[Tensor, "*Q N"], correct: Bool[Tensor, "*Q N"], mask_value: float | None
) -> Float[Tensor, "*Q"]:
    any_correct_Q = correct.any(dim=-1)
    # Where nothing is correct everything counts as correct: both terms, and their gradients, are then the same numbers.
    return marginal_log_loss(scores, correct | ~any_correct_Q[..., None], mask_value) * any_correct_Q


def _exclude(scores: Tensor, keep: Tensor, mask_value: float | None) -> Tensor:
    if mask_value is None:
        return scores.masked_fill(~keep, -torch.inf)
    return scores + mask_value * (~keep)


def _document_logp(gold_logp: Float[Tensor, "B C M"], real: Bool[Tensor, "B M"]) -> Float[Tensor, "B C"]:
    """log prod_j p(y_j | z, x) over the real masks."""
    return _full(gold_logp).masked_fill(~real[:, None], 0.0).sum(dim=2)


def _mean_where(values: Float[Tensor, "B M"], real: Bool[Tensor, "B M"], total: int | None = None) -> Float[Tensor, ""]:
    return values.masked_fill(~real, 0.0).sum() / (real.sum().clamp(min=1) if total is None else max(total, 1))


def _full(values: Tensor) -> Tensor:
    """At least float32: log-sum-exp in half precision loses the small differences that training lives on."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
