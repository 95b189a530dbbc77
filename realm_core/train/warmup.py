"""Masked-LM warm-up of the encoder, for start weights without an MLM head.

The encoder must be able to use a document before joint training starts, or the retriever receives no signal and collapses
onto the null document. It therefore sees (masked sentence + its own block), the sentence taken out of the block half of the
time, mixed with the null document.
"""

from collections.abc import Sequence

import numpy as np
import torch

from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.batches import rng_for_step, rows_for_step
from realm_core.data.formats import Ids, joint_inputs, stack
from realm_core.data.masking import MaskedQuery, masked_query, pad_masks
from realm_core.index.embed import to_tensors
from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device
from realm_core.model.objectives import gold_log_probability
from realm_core.ports import MetricSink, Progress
from realm_core.train.ict import tail_means
from realm_core.train.update import Updater, seed_of

_TAKE_OUT_RATE = 0.5  # share of documents that lack the masked sentence: both copying and inferring are wanted


def warm_up(model: RealmModel, corpus: Corpus, config: Config, device: Device, sink: MetricSink) -> dict[str, float]:
    """Train the encoder in place. Returns means over the last tenth: loss and gold log-likelihood with and without document."""
    settings = config.warmup
    if settings.steps == 0:
        return {}
    updater = Updater({"encoder": model.encoder}, {"encoder": settings.lr}, settings.steps, config.optimizer)
    bar = Progress("encoder warm-up", settings.steps)
    history: list[dict[str, float]] = []
    model.encoder.train()
    for step in range(settings.steps):
        rng = rng_for_step(config.seed, step, purpose=2)
        rows = rows_for_step(len(corpus), settings.batch, step, config.seed)
        queries = _draw(corpus, rows, rng, config, model)
        if not queries:
            continue
        alone = rng.random(len(queries)) < settings.null_rate
        bodies = [[] if null else _document(corpus, query, rng) for query, null in zip(queries, alone, strict=True)]
        torch.manual_seed(seed_of(config.seed, "warmup", step))
        logp, real = _gold_log_probability(model, queries, bodies, config, device)
        loss = -logp[real].mean()
        updater.apply(loss, step)
        metrics = {"warmup/loss": float(loss.detach())}
        for name, chosen in (("document", ~alone), ("null", alone)):
            mask = real & torch.from_numpy(chosen)[:, None].to(real.device)
            if bool(mask.any()):
                metrics[f"warmup/logp_{name}"] = float(logp.detach()[mask].mean())
        history.append(metrics)
        sink.log(step, metrics)
        bar.update(step + 1, f"loss {metrics['warmup/loss']:.3f}")
    return tail_means(history)


def _draw(
    corpus: Corpus, rows: Sequence[int] | np.ndarray, rng: np.random.Generator, config: Config, model: RealmModel
) -> list[MaskedQuery]:
    queries = []
    for row in rows:
        scheme = "salient" if rng.random() < config.warmup.span_rate else "random_token"
        query, _ = masked_query(
            corpus, int(row), rng, scheme, config.lengths.query, config.pretrain.max_masks, model.tokenizer
        )
        if query is not None:
            queries.append(query)
    return queries


def _document(corpus: Corpus, query: MaskedQuery, rng: np.random.Generator) -> Ids:
    body = corpus.token_ids(query.row)
    start, stop = query.sentence
    if rng.random() < _TAKE_OUT_RATE and stop - start < len(body):
        return np.concatenate([body[:start], body[stop:]])
    return body


def _gold_log_probability(
    model: RealmModel, queries: list[MaskedQuery], bodies: Sequence[Ids], config: Config, device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = config.lengths
    inputs = [
        joint_inputs(query.token_ids, body, lengths.query, lengths.document, model.tokenizer)
        for query, body in zip(queries, bodies, strict=True)
    ]
    masks = max(len(query.targets) for query in queries)
    positions, targets, real = (torch.from_numpy(x).to(device.torch_device) for x in pad_masks(queries, masks))
    with device.autocast():
        logits = model.encoder(*to_tensors(stack(inputs, model.tokenizer.pad_id), device), positions)
    return gold_log_probability(logits, targets), real.bool()
