"""The forward pass of REALM pre-training: relevance, prediction with every candidate, marginal likelihood."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device
from realm_core.model.embedder import relevance
from realm_core.model.objectives import (
    gold_log_probability,
    marginal_mlm_loss,
    null_probability,
    retrieval_utility,
)
from realm_core.train.features import RealmBatch


@dataclass(frozen=True)
class StepResult:
    """What one batch gives. `metrics` are means over the batch: nats for likelihoods, a share for the null document."""

    loss: Float[Tensor, ""]
    relevance: Float[Tensor, "B C"]
    gold_logp: Float[Tensor, "B C M"]
    metrics: dict[str, float]


def realm_step(model: RealmModel, batch: RealmBatch, marginal: Literal["token", "joint"], device: Device) -> StepResult:
    """Loss of one batch. Candidate vectors are computed anew with current weights and gradient; the index only chose them
    (original code: language/realm)."""
    count, width = batch.present.shape
    with device.autocast():
        queries_BD = model.retriever.embed_queries(*batch.query)
        documents_BCD = model.retriever.embed_documents(*batch.documents).unflatten(0, (count, width))
        masks = batch.positions.shape[1]
        repeated = batch.positions[:, None].expand(count, width, masks).flatten(end_dim=1)
        logits = model.encoder(*batch.joint, repeated)
    relevance_BC = relevance(queries_BD.float(), documents_BCD.float())
    relevance_BC = relevance_BC.masked_fill(~batch.present, float("-inf"))
    targets = batch.targets[:, None].expand(count, width, masks).flatten(end_dim=1)
    gold_BCM = gold_log_probability(logits, targets).unflatten(0, (count, width))
    loss = marginal_mlm_loss(relevance_BC, gold_BCM, batch.real, marginal)
    metrics = {
        "loss": float(loss.detach()),
        "utility": float(retrieval_utility(relevance_BC.detach(), gold_BCM.detach(), batch.real)),
        "null_probability": float(null_probability(relevance_BC.detach()).mean()),
    }
    return StepResult(loss, relevance_BC, gold_BCM, metrics)
