"""The forward pass of REALM pre-training: relevance, prediction with every candidate, marginal likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from realm_core.data.masking import MaskedQuery
from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device
from realm_core.model.embedder import relevance
from realm_core.model.objectives import (
    document_utility,
    gold_log_probability,
    marginal_mlm_loss,
    null_probability,
    retrieval_utility,
)
from realm_core.train.features import RealmBatch


class Whole(NamedTuple):
    """Sizes of a whole batch, over all its micro-batches and processes: what sums are divided by."""

    examples: int
    masks: int  # wordpieces to predict

    @classmethod
    def of(cls, queries: Sequence[MaskedQuery]) -> "Whole":
        return cls(len(queries), sum(len(query.targets) for query in queries))


@dataclass(frozen=True)
class StepResult:
    """What one micro-batch adds to the loss and to the means over the whole batch: nats for likelihoods, a share for the
    null document."""

    loss: Float[Tensor, ""]
    relevance: Float[Tensor, "B C"]
    gold_logp: Float[Tensor, "B C M"]
    metrics: dict[str, float]


def realm_step(
    model: RealmModel, batch: RealmBatch, marginal: Literal["token", "joint"], device: Device, whole: Whole
) -> StepResult:
    """Loss of one micro-batch of the `whole` batch. Candidate vectors are computed anew with current weights and gradient;
    the index only chose them (original code: language/realm)."""
    count, width = batch.present.shape
    with device.autocast():
        queries_BD = model.retriever.embed_queries(*batch.query)
        documents_BCD = model.retriever.embed_documents(*batch.documents).unflatten(0, (count, width))
        masks = batch.positions.shape[1]
        repeated = batch.positions[:, None].expand(count, width, masks).flatten(end_dim=1)
        logits = model.encoder(*batch.joint, repeated)
    relevance_BC = relevance(at_least_float32(queries_BD), at_least_float32(documents_BCD))
    relevance_BC = relevance_BC.masked_fill(~batch.present, float("-inf"))
    targets = batch.targets[:, None].expand(count, width, masks).flatten(end_dim=1)
    gold_BCM = gold_log_probability(logits, targets).unflatten(0, (count, width))
    loss = marginal_mlm_loss(
        relevance_BC, gold_BCM, batch.real, marginal, whole.masks if marginal == "token" else whole.examples
    )
    real_B = batch.real.any(dim=1)  # what fills a batch up predicts nothing
    null_B = null_probability(relevance_BC.detach()).masked_fill(~real_B, 0.0)
    metrics = {
        "loss": float(loss.detach()),
        "utility": float(retrieval_utility(relevance_BC.detach(), gold_BCM.detach(), batch.real, whole.masks)),
        "null_probability": float(null_B.sum() / whole.examples),
        "document_utility": float(_mean_document_utility(batch, gold_BCM.detach()).sum() / whole.examples),
    }
    return StepResult(loss, relevance_BC, gold_BCM, metrics)


def _mean_document_utility(batch: RealmBatch, gold_logp: Float[Tensor, "B C M"]) -> Float[Tensor, " B"]:
    """What the documents of a query add on average, each read on its own, however the retriever ranks them."""
    retrieved_BC = batch.present.clone()
    retrieved_BC[:, 0] = False  # the null document is what the others are compared with
    utility_BC = document_utility(gold_logp, batch.real).masked_fill(~retrieved_BC, 0.0)
    return utility_BC.sum(dim=1) / retrieved_BC.sum(dim=1).clamp(min=1)


def at_least_float32(vectors: Tensor) -> Tensor:
    """Vectors of a mixed-precision forward pass, ready for a softmax over their products."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))
