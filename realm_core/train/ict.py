"""The inverse cloze task loop: the retriever's warm start (Lee et al. 2019)."""

import numpy as np
import torch

from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.batches import rng_for_step, rows_for_step
from realm_core.data.ict import ict_batch
from realm_core.errors import DataError
from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device
from realm_core.model.objectives import ict_loss, in_batch_accuracy
from realm_core.ports import MetricSink, Progress
from realm_core.train.update import Updater, seed_of


def train_ict(model: RealmModel, corpus: Corpus, config: Config, device: Device, sink: MetricSink) -> dict[str, float]:
    """Train the retriever in place. Returns means over the last tenth: loss, and in-batch accuracy of pairs whose sentence
    was taken out of the block (`masked_accuracy`)."""
    settings = config.ict
    if len(corpus) < 2:
        raise DataError(f"{corpus.folder}: {len(corpus)} block; the inverse cloze task needs two to choose from")
    updater = Updater({"retriever": model.retriever}, {"retriever": settings.lr}, settings.steps, config.optimizer)
    bar = Progress("inverse cloze task", settings.steps)
    history: list[dict[str, float]] = []
    model.retriever.train()
    for step in range(settings.steps):
        rows = np.unique(rows_for_step(len(corpus), min(settings.batch, len(corpus)), step, config.seed))
        arrays = ict_batch(
            corpus,
            rows,
            rng_for_step(config.seed, step, purpose=1),
            config.lengths.ict_query,
            config.lengths.document,
            model.tokenizer,
            settings.mask_rate,
        )
        if len(arrays["rows"]) < 2:
            continue
        torch.manual_seed(seed_of(config.seed, "ict", step))  # dropout, a function of the step
        tensors = {name: torch.from_numpy(array).to(device.torch_device) for name, array in arrays.items()}
        with device.autocast():
            queries = model.retriever.embed_queries(*(tensors[f"query_{part}"] for part in _PARTS))
            documents = model.retriever.embed_documents(*(tensors[f"doc_{part}"] for part in _PARTS))
        queries, documents = queries.float(), documents.float()
        loss = ict_loss(queries, documents)
        updater.apply(loss, step)
        hits = in_batch_accuracy(queries.detach(), documents.detach())
        removed = tensors["removed"]
        metrics = {"ict/loss": float(loss.detach()), "ict/accuracy": float(hits.float().mean())}
        if bool(removed.any()):
            metrics["ict/masked_accuracy"] = float(hits[removed].float().mean())
        history.append(metrics)
        sink.log(step, metrics)
        bar.update(step + 1, f"loss {metrics['ict/loss']:.3f}")
    return tail_means(history)


def tail_means(history: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every metric over the last tenth of the rows."""
    tail = history[-max(1, len(history) // 10) :]
    names = sorted({name for row in tail for name in row})
    return {name: float(np.mean([row[name] for row in tail if name in row])) for name in names}


_PARTS = ("token_ids", "segment_ids", "mask")
