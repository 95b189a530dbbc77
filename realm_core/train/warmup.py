"""Masked-LM warm-up of the encoder, for start weights without an MLM head.

The encoder must be able to use a document before joint training starts, or the retriever receives no signal and collapses
onto the null document. It therefore sees (masked sentence + its own block), the sentence taken out of the block half of the
time, mixed with the null document. A probe of held-out sentences says when it can, and may end the warm-up early.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch

from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.batches import rng_for_step, rows_for_step
from realm_core.data.formats import Ids
from realm_core.data.masking import MaskedQuery
from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device
from realm_core.ports import MetricSink, Progress
from realm_core.train.ict import tail_means
from realm_core.train.probe import Gain, Probe, draw, gold_logp, without_sentence
from realm_core.train.update import Updater, seed_of

_TAKE_OUT_RATE = 0.5  # share of documents that lack the masked sentence: both copying and inferring are wanted


def warm_up(model: RealmModel, corpus: Corpus, config: Config, device: Device, sink: MetricSink) -> dict[str, float]:
    """Train the encoder in place, until the probe is content or the steps are used up.

    Returns means over the last tenth of the steps (loss, gold log-likelihood with and without document), the steps taken, and
    what the probe found at the end: nats a masked wordpiece gained from the right document, over none and over a random one.
    """
    settings = config.warmup
    if settings.steps == 0:
        return {}
    probe = Probe(corpus, config, model)
    rows = np.array([row for row in range(len(corpus)) if row not in probe.rows])
    updater = Updater({"encoder": model.encoder}, {"encoder": settings.lr}, settings.steps, config.optimizer)
    bar = Progress("encoder warm-up", settings.steps)
    history: list[dict[str, float]] = []
    gain: Gain | None = None
    model.encoder.train()
    for step in range(settings.steps):
        metrics = _step(model, corpus, rows, config, device, updater, step)
        done = step + 1
        last = done == settings.steps
        if last or (settings.probe_every and done % settings.probe_every == 0):
            gain = probe.measure(device)
            metrics |= _as_metrics(gain)
        history.append(metrics)
        sink.log(step, metrics)
        bar.update(done, f"loss {metrics.get('warmup/loss', float('nan')):.3f}")
        if gain is not None and settings.ready_gain is not None and gain.reaches(settings.ready_gain):
            break
    _warn_unless_ready(gain, settings.ready_gain)
    return tail_means(history) | {"warmup/steps": float(len(history))} | _as_metrics(gain)


def _step(
    model: RealmModel,
    corpus: Corpus,
    rows: np.ndarray,
    config: Config,
    device: Device,
    updater: Updater,
    step: int,
) -> dict[str, float]:
    """One update; its metrics, or nothing if no sentence could be drawn."""
    settings = config.warmup
    rng = rng_for_step(config.seed, step, purpose=2)
    places = rows_for_step(len(rows), settings.batch, step, config.seed)
    drawn = (draw(corpus, int(row), rng, config, model, settings.span_rate) for row in rows[places])
    queries = [query for query in drawn if query is not None]
    if not queries:
        return {}
    alone = rng.random(len(queries)) < settings.null_rate
    bodies: Sequence[Ids] = [
        [] if null else _document(corpus, query, rng) for query, null in zip(queries, alone, strict=True)
    ]
    torch.manual_seed(seed_of(config.seed, "warmup", step))
    logp, real = gold_logp(model, queries, bodies, config, device)
    loss = -logp[real].mean()
    updater.apply(loss, step)
    metrics = {"warmup/loss": float(loss.detach())}
    for name, chosen in (("document", ~alone), ("null", alone)):
        mask = real & torch.from_numpy(chosen)[:, None].to(real.device)
        if bool(mask.any()):
            metrics[f"warmup/logp_{name}"] = float(logp.detach()[mask].mean())
    return metrics


def _document(corpus: Corpus, query: MaskedQuery, rng: np.random.Generator) -> Ids:
    return without_sentence(corpus, query) if rng.random() < _TAKE_OUT_RATE else corpus.token_ids(query.row)


def _as_metrics(gain: Gain | None) -> dict[str, float]:
    if gain is None:
        return {}
    return {
        "warmup/gain_over_null": gain.over_null,
        "warmup/gain_over_random": gain.over_random,
        "warmup/gain_error": gain.error,
    }


def _warn_unless_ready(gain: Gain | None, wanted: float | None) -> None:
    """Joint training from an encoder that ignores documents destroys the retriever: say so while it can still be mended."""
    if gain is not None and not gain.reaches(wanted or 0.0):
        print(
            f"warning: after the warm-up the right document adds {gain.over_null:.2f} +- {gain.error:.2f} nats a masked "
            f"wordpiece, wanted {wanted or 0.0:.2f}: the retriever will learn little; raise warmup.steps",
            file=sys.stderr,
            flush=True,
        )
