"""A toy world in which the mechanics of REALM show within minutes: invented people, and every fact in several wordings.

A person's document tells two facts, each in two wordings. A query is one sentence in a third wording, with the fact masked. The
model is small and starts from nothing; corpus, inverse cloze task, warm-up and training steps are the project's own.
"""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from realm_core.artifacts.manifest import Manifest
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.masking import masked_query
from realm_core.index.backends import build_index
from realm_core.index.embed import embed_blocks
from realm_core.index.version import IndexVersion
from realm_core.model.bundle import RealmModel, new_model
from realm_core.model.device import Device, resolve
from realm_core.model.weights import load_start_weights
from realm_core.params import load_config
from realm_core.ports import MetricSink, NullSink
from realm_core.stages import corpus as corpus_stage
from realm_core.train.ict import train_ict
from realm_core.train.loop import RealmTrainer
from realm_core.train.warmup import warm_up

OTHERS = 8  # other people for each one that documents are kept of
SETTINGS = (
    "model.layers=2",
    "model.hidden_size=128",
    "model.heads=4",
    "model.intermediate_size=512",
    "model.projection_size=64",
    "model.vocabulary_size=3000",
    "model.dropout=0.0",
    "lengths.ict_query=24",
    "lengths.query=24",
    "lengths.document=64",
    "corpus.block_wordpieces=64",
    "ict.steps=30",
    "ict.warmup_steps=3",
    "ict.batch=32",
    "ict.lr=3e-4",
    "ict.mask_rate=0.5",
    "warmup.steps=1200",
    "warmup.warmup_steps=120",
    "warmup.batch=32",
    "warmup.lr=5e-4",
    "warmup.span_rate=1.0",
    "warmup.probe_every=100",
    "warmup.ready_gain=2.0",
    "pretrain.batch=16",
    "pretrain.steps=250",
    "pretrain.warmup_steps=100",
    "pretrain.candidates=5",
    "pretrain.lr=3e-4",
    "pretrain.embedder_lr=1e-4",
)
# Names stand in lower case and every sentence opens with a function word: the tagger finds the facts alone.
WORDINGS = (
    (
        "The home of {name} is a house in {town}.",
        "Since then has {name} lived in {town}.",
        "In the streets of {town} one meets {name}.",
    ),
    (
        "It was {year} when {name} was born.",
        "The birth of {name} fell into {year}.",
        "In {year} a child was named {name}.",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """Shares of the held-out queries whose person is found first, and among five; retrieval utility in nats and p(null),
    means over the last fifty steps."""

    recall_at_1: float
    recall_at_5: float
    utility: float = 0.0
    null: float = 0.0


@dataclass(frozen=True)
class World:
    """Documents, queries to train on and to hold out, and a model after inverse cloze task and warm-up. The warm-up reads
    about other people: who knows the facts by heart needs no document."""

    config: Config
    documents: Corpus
    queries: Corpus
    held_out: Corpus
    model: RealmModel
    device: Device
    warm: dict[str, float]

    @classmethod
    def make(cls, folder: Path, seed: int, people: int, sink: MetricSink | None = None, *changes: str) -> "World":
        """The world of a seed and its warmed-up model."""
        config = load_config(None, "tiny", [*SETTINGS, *changes, f"seed={seed}"])
        write_sources(folder, seed, people)
        for name in ("others", "documents", "queries", "held_out"):
            vocabulary = None if name == "others" else folder / "others"
            source = folder / f"{name}.jsonl"
            corpus_stage.run(config, source=source, out=folder / name, sink=NullSink(), vocabulary=vocabulary)
        others, documents, queries, held_out = (
            Corpus.open(folder / name) for name in ("others", "documents", "queries", "held_out")
        )
        tokenizer, device = documents.tokenizer, resolve(config.runtime)
        model = new_model(config.model, load_start_weights(config.model, tokenizer.vocab_size), tokenizer, seed)
        train_ict(model, documents, config, device, sink or NullSink())
        warm = warm_up(model, others, config, device, sink or NullSink())
        return cls(config, documents, queries, held_out, model, device, warm)

    def train(self, *changes: str, refresh_every: int | None, sink: MetricSink | None = None) -> Outcome:
        """Joint training of a copy of the model, with an index that is made anew every so many steps, or never."""
        model = replace(
            self.model, retriever=copy.deepcopy(self.model.retriever), encoder=copy.deepcopy(self.model.encoder)
        )
        config = self.config.model_validate(_changed(self.config, changes))
        trainer = RealmTrainer(config, model, self.queries, self.device)
        index, rows = self.index(model), []
        for step in range(config.pretrain.steps):
            if refresh_every and step and step % refresh_every == 0:
                index = self.index(model)
            rows.append(trainer.step(step, index))
            if sink:
                sink.log(step, rows[-1])
        last = [row for row in rows[-50:] if "utility" in row]
        return replace(
            self.recall(model),
            utility=float(np.mean([row["utility"] for row in last])),
            null=float(np.mean([row["null_probability"] for row in last])),
        )

    def index(self, model: RealmModel) -> IndexVersion:
        """All documents as the model embeds them now. Queries are embedded by a copy, as an index version does."""
        retriever, length = copy.deepcopy(model.retriever).eval(), self.config.lengths.document
        rows = range(len(self.documents))
        vectors = embed_blocks(
            retriever, self.documents, rows, tokenizer=model.tokenizer, length=length, batch=64, device=self.device
        )
        manifest = Manifest(
            stage="index", code="0", config_digest="", parents={}, sources={}, files={}, facts={"step": 0}
        )
        return IndexVersion(
            "toy", manifest, build_index(vectors, "exact"), retriever, model.tokenizer, self.documents, self.device
        )

    def recall(self, model: RealmModel) -> Outcome:
        """How many held-out queries find their person."""
        rng, length = np.random.default_rng(0), self.config.lengths.query
        asked, wanted = [], []
        for row in range(len(self.held_out)):
            query, _ = masked_query(self.held_out, row, rng, "salient", length, 10, model.tokenizer)
            if query is not None:
                asked.append(query.token_ids)
                wanted.append(self.held_out.block(row).title)
        titles = [self.documents.block(row).title for row in range(len(self.documents))]
        found = self.index(model).search(asked, 5, length)
        hits = np.array([[titles[row] == title for row in line] for line, title in zip(found, wanted, strict=True)])
        return Outcome(float(hits[:, 0].mean()), float(hits.any(axis=1).mean()))


def write_sources(folder: Path, seed: int, people: int) -> None:
    """`documents.jsonl`; a query about one fact of each person in `queries.jsonl`, about the other in `held_out.jsonl`; and
    documents about other people, from the same names, in `others.jsonl`."""
    rng = np.random.default_rng([seed, 1])
    towns, firsts, lasts = (_words(rng, count, 2) for count in (60, 60, people // 2))
    rows: dict[str, list[dict[str, str]]] = {"documents": [], "queries": [], "held_out": [], "others": []}
    names = [f"{first} {last}" for first in firsts for last in lasts]
    for number, name in enumerate(rng.permutation(names)[: (1 + OTHERS) * people].tolist()):
        town, year = str(rng.choice(towns)).capitalize(), str(rng.integers(1700, 1900))
        facts = [rng.permutation([w.format(name=name, town=town, year=year) for w in each]) for each in WORDINGS]
        document = " ".join(rng.permutation([*facts[0][:2], *facts[1][:2]]))
        asked = [facts[side][2] for side in rng.permutation(2)]
        told = {"documents": document, "queries": asked[0], "held_out": asked[1]}
        for kind, text in told.items() if number < people else [("others", document)]:
            rows[kind].append({"id": str(number), "title": name, "text": text})
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def _words(rng: np.random.Generator, count: int, syllables: int) -> list[str]:
    words: set[str] = set()
    while len(words) < count:
        made = "".join(rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(syllables))
        words.add(made + rng.choice(list("nrsl")))
    return sorted(words)


def _changed(config: Config, changes: tuple[str, ...]) -> dict:
    values = config.model_dump()
    for change in changes:
        key, _, value = change.partition("=")
        section, name = key.split(".")
        values[section][name] = value
    return values
