"""Can the encoder use a document? The probe that says when joint training may start.

Using a document appears suddenly in training, and a retriever gets no signal before it (Guu et al. 2020, section 3.3). The probe
asks a fixed set of held-out masked sentences: how much likelier does the encoder find the masked words beside the rest of their
own block than beside the null document, and than beside a block drawn at random?
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.batches import rng_for_step
from realm_core.data.formats import Ids, joint_inputs, stack
from realm_core.data.masking import MaskedQuery, masked_query, pad_masks
from realm_core.index.embed import to_tensors
from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device
from realm_core.model.objectives import gold_log_probability

_PREFIX = "warmup/gain_"
_CERTAIN = 2.0  # standard errors that a gain must lie above what is asked for


@dataclass(frozen=True)
class Gain:
    """Nats a masked wordpiece. `error` is the standard error of `over_null` over sentences."""

    over_null: float
    over_random: float
    error: float

    def reaches(self, wanted: float) -> bool:
        """Whether the gain over the null document is `wanted` or more, chance excluded."""
        return self.over_null - _CERTAIN * self.error >= wanted

    def metrics(self) -> dict[str, float]:
        """Under the names that the warm-up logs and writes into its manifest."""
        return {f"{_PREFIX}{name}": value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> "Gain | None":
        """What `metrics` wrote; None where nothing was measured."""
        names = [field.name for field in fields(cls)]
        known = {name: metrics[f"{_PREFIX}{name}"] for name in names if f"{_PREFIX}{name}" in metrics}
        return cls(**known) if len(known) == len(names) else None


class Probe:
    """Held-out masked sentences, each with the rest of its block and with another block."""

    def __init__(self, corpus: Corpus, config: Config, model: RealmModel) -> None:
        self.config, self.model = config, model
        rng = rng_for_step(config.seed, 0, purpose=7)
        order = rng.permutation(len(corpus))
        # At most a tenth of a small corpus, so that something is left to learn from.
        most = max(1, min(config.warmup.probe_queries, len(corpus) // 10))
        self.queries: list[MaskedQuery] = []
        self.rows: set[int] = set()
        for row in order.tolist():
            if len(self.queries) == most:
                break
            query = draw(corpus, row, rng, config, model, span_rate=1.0)
            if query is not None and query.sentence[1] - query.sentence[0] < len(corpus.token_ids(row)):
                self.queries.append(query)
                self.rows.add(row)
        self.helpful = [without_sentence(corpus, query) for query in self.queries]
        others = [int(row) for row in rng.integers(len(corpus), size=len(self.queries))]
        self.random = [corpus.token_ids(row) for row in others]

    @torch.no_grad()
    def measure(self, device: Device) -> Gain | None:
        """Gains of the model as it is now, without dropout; None where fewer than two blocks have a sentence to ask
        about."""
        if len(self.queries) < 2:
            return None
        training = self.model.encoder.training
        self.model.encoder.eval()
        nothing: list[Ids] = [[] for _ in self.queries]
        own, null, other = (self._mean_logp(bodies, device) for bodies in (self.helpful, nothing, self.random))
        self.model.encoder.train(training)
        gains = own - null
        return Gain(
            over_null=float(gains.mean()),
            over_random=float((own - other).mean()),
            error=float(gains.std(ddof=1) / len(gains) ** 0.5),
        )

    def _mean_logp(self, bodies: Sequence[Ids], device: Device) -> np.ndarray:
        """Mean log-likelihood of the masked wordpieces of each sentence, "Q"."""
        means = []
        for start in range(0, len(self.queries), self.config.warmup.batch):
            part = slice(start, start + self.config.warmup.batch)
            logp, real = gold_logp(self.model, self.queries[part], bodies[part], self.config, device)
            means.append(((logp * real).sum(1) / real.sum(1)).float().cpu().numpy())
        return np.concatenate(means)


def draw(
    corpus: Corpus, row: int, rng: np.random.Generator, config: Config, model: RealmModel, span_rate: float
) -> MaskedQuery | None:
    """A masked sentence of a block: salient spans at this rate, else random wordpieces; None if the block has none."""
    scheme = "salient" if rng.random() < span_rate else "random_token"
    return masked_query(corpus, row, rng, scheme, config.lengths.query, config.max_masks, model.tokenizer)[0]


def without_sentence(corpus: Corpus, query: MaskedQuery) -> Ids:
    """The block of a query without the sentence that was masked; the whole block if that is all there is."""
    body = corpus.token_ids(query.row)
    start, stop = query.sentence
    return np.concatenate([body[:start], body[stop:]]) if stop - start < len(body) else body


def gold_logp(
    model: RealmModel, queries: Sequence[MaskedQuery], bodies: Sequence[Ids], config: Config, device: Device
) -> tuple[Float[Tensor, "Q M"], Bool[Tensor, "Q M"]]:
    """(log-likelihood of the masked wordpieces, which of them are real) of each sentence beside its document."""
    lengths = config.lengths
    inputs = [
        joint_inputs(query.token_ids, body, lengths.query, lengths.document, model.tokenizer)
        for query, body in zip(queries, bodies, strict=True)
    ]
    static = device.static
    masks = config.max_masks if static else max(len(query.targets) for query in queries)
    positions, targets, real = (torch.from_numpy(x).to(device.torch_device) for x in pad_masks(list(queries), masks))
    with device.autocast():
        logits = model.encoder(*to_tensors(stack(inputs, model.tokenizer.pad_id, trim=not static), device), positions)
    return gold_log_probability(logits, targets), real.bool()
