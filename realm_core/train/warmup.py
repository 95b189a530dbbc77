"""Masked-LM warm-up of the encoder, for start weights without an MLM head.

The encoder must be able to use a document before joint training starts, or the retriever receives no signal and collapses
onto the null document. It therefore sees (masked sentence + its own block), the sentence taken out of the block half of the
time, mixed with the null document. A probe of held-out sentences says when it can, and may end the warm-up early.
"""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.batches import rng_for_step, rows_for_step, split_evenly
from realm_core.data.formats import Ids
from realm_core.data.masking import MaskedQuery, empty_query
from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device
from realm_core.model.world import World
from realm_core.ports import MetricSink, Progress
from realm_core.train.interim import History, Interim, Saved
from realm_core.train.parts import parts_of, require_positions, sum_metrics
from realm_core.train.probe import Gain, Probe, draw, gold_logp, without_sentence
from realm_core.train.update import Updater, seed_dropout

_TAKE_OUT_RATE = 0.5  # share of documents that lack the masked sentence: both copying and inferring are wanted
_ALONE = World()
Example = tuple[MaskedQuery, Ids]  # and the body it is read beside; empty for the null document


def warm_up(
    model: RealmModel,
    corpus: Corpus,
    config: Config,
    device: Device,
    sink: MetricSink,
    world: World = _ALONE,
    interim: Interim | None = None,
) -> dict[str, float]:
    """Train the encoder in place, until the probe is content or the steps are used up. Goes on from the state in `interim`,
    if it holds one. Collective; the first process logs.

    Returns means over the last tenth of the steps (loss, gold log-likelihood with and without document), the steps taken, and
    what the probe found at the end: nats a masked wordpiece gained from the right document, over none and over a random one.
    """
    settings = config.warmup
    if settings.steps == 0:
        return {}
    require_positions(model.encoder.shape, joint=config.lengths.joint)
    parts = parts_of(settings, "warmup", world)
    probe = Probe(corpus, config, model)
    rows = np.array([row for row in range(len(corpus)) if row not in probe.rows])
    modules, rates = {"encoder": model.encoder}, {"encoder": settings.lr}
    updater = Updater(modules, rates, settings.steps, config.optimizer, world=world, warmup=settings.warmup_steps)
    bar = Progress("encoder warm-up", settings.steps)
    history = History(settings.steps)
    saved = Saved(interim, "warmup", settings.checkpoint_every, updater, history)
    gain: Gain | None = None
    model.encoder.train()
    for step in range(saved.first, settings.steps):
        metrics = _step(model, corpus, rows, config, device, updater, step, parts)
        done = step + 1
        last = done == settings.steps
        if last or (settings.probe_every and done % settings.probe_every == 0):
            gain = probe.measure(device)
            metrics |= gain.metrics() if gain else {}
        history.add(metrics)
        if world.leads:
            sink.log(step, metrics)
            bar.update(done, f"loss {metrics.get('warmup/loss', float('nan')):.3f}")
        ready = gain is not None and settings.ready_gain is not None and gain.reaches(settings.ready_gain)
        if world.exchange(ready)[0]:  # not every device rounds alike
            break
        saved.after(done)  # never at the end: what the probe found there is not in it
    if world.leads:
        _warn_unless_ready(gain, settings.ready_gain)
    return history.means() | {"warmup/steps": float(history.count)} | (gain.metrics() if gain else {})


def _step(
    model: RealmModel,
    corpus: Corpus,
    rows: np.ndarray,
    config: Config,
    device: Device,
    updater: Updater,
    step: int,
    parts: int,
) -> dict[str, float]:
    """One update, collective; its metrics, or nothing if no sentence could be drawn."""
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
    masks = _count_masks(queries, alone)
    examples = list(zip(queries, bodies, strict=True))
    updater.begin(step)
    found = []
    for number, part in updater.world.share(list(enumerate(split_evenly(examples, parts)))):
        filled = _filled(part, settings.batch // parts, device)
        if filled:
            seed_dropout(config.seed, "warmup", step, number)
            logp, real = gold_logp(model, [query for query, _ in filled], [body for _, body in filled], config, device)
            loss = -logp.masked_fill(~real, 0.0).sum() / sum(masks.values())
            updater.add(loss)
            found.append(_metrics(loss, logp, real, filled, masks))
    updater.finish(step)
    device.end_step()
    return sum_metrics(updater.world, found)


def _count_masks(queries: Sequence[MaskedQuery], alone: Bool[np.ndarray, " B"]) -> dict[str, int]:
    """Wordpieces to predict in the whole batch, beside a document and beside the null document."""
    sizes = np.array([len(query.targets) for query in queries])
    return {"document": int(sizes[~alone].sum()), "null": int(sizes[alone].sum())}


def _filled(part: Sequence[Example], count: int, device: Device) -> list[Example]:
    """The examples of a micro-batch, on a device with static shapes as many as it can have."""
    missing = count - len(part) if device.static else 0
    return [*part, *((empty_query(), ()) for _ in range(missing))]


def _metrics(
    loss: Float[Tensor, ""],
    logp: Float[Tensor, "B M"],
    real: Bool[Tensor, "B M"],
    examples: Sequence[Example],
    masks: Mapping[str, int],
) -> dict[str, float]:
    """What a micro-batch adds to the means over the whole batch."""
    total_B = logp.detach().masked_fill(~real, 0.0).sum(dim=1).cpu().numpy()
    alone_B = np.array([len(body) == 0 for _, body in examples])
    metrics = {"warmup/loss": float(loss.detach())}
    for name, chosen in (("document", ~alone_B), ("null", alone_B)):
        if masks[name]:
            metrics[f"warmup/logp_{name}"] = float(total_B[chosen].sum()) / masks[name]
    return metrics


def _document(corpus: Corpus, query: MaskedQuery, rng: np.random.Generator) -> Ids:
    return without_sentence(corpus, query) if rng.random() < _TAKE_OUT_RATE else corpus.token_ids(query.row)


def _warn_unless_ready(gain: Gain | None, wanted: float | None) -> None:
    """Joint training from an encoder that ignores documents destroys the retriever: say so while it can still be mended."""
    if gain is not None and not gain.reaches(wanted or 0.0):
        print(
            f"warning: after the warm-up the right document adds {gain.over_null:.2f} +- {gain.error:.2f} nats a masked "
            f"wordpiece, wanted {wanted or 0.0:.2f}: the retriever will learn little; raise warmup.steps",
            file=sys.stderr,
            flush=True,
        )
