"""A toy world in which the mechanics of REALM show within minutes: invented people, each fact in several wordings.

Documents tell two facts about a person, each twice in other words. Queries are single sentences of a second corpus in words of
their own, so that nobody finds them by copying. Everything else is the project's own: corpus, ICT, warm-up, training steps.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realm_core.artifacts.manifest import Manifest
from realm_core.config import Config, load_config
from realm_core.corpus.shards import Corpus
from realm_core.data.masking import masked_query
from realm_core.index.backends import build_index
from realm_core.index.embed import embed_blocks
from realm_core.index.version import IndexVersion
from realm_core.model.bundle import RealmModel, new_model
from realm_core.model.device import Device, resolve
from realm_core.model.weights import load_start_weights
from realm_core.ports import MemorySink, NullSink
from realm_core.stages import corpus as corpus_stage
from realm_core.text.tokenizer import Tokenizer, build_vocabulary
from realm_core.train.ict import train_ict
from realm_core.train.loop import RealmTrainer
from realm_core.train.warmup import warm_up

PEOPLE, HELD_OUT, REFRESH_EVERY = 600, 480, 50
# Of four wordings of a fact two stand in its document and another one is the query.
WORDINGS = (
    (
        "{name} lived in {value}.",
        "{value} was the home of {name}.",
        "The house of {name} stood in {value}.",
        "In {value} people knew {name}.",
    ),
    (
        "{name} was born in {value}.",
        "{value} was the year of the birth of {name}.",
        "In {value} the mother of {name} gave birth.",
        "The life of {name} began in {value}.",
    ),
    (
        "{name} was a {value}.",
        "A {value} by trade was {name}.",
        "The work of {name} was that of a {value}.",
        "People paid {name} for the work of a {value}.",
    ),
)
SETTINGS = [
    "model.layers=2",
    "model.hidden_size=128",
    "model.heads=4",
    "model.intermediate_size=512",
    "model.projection_size=64",
    "model.vocabulary_size=4000",
    "model.dropout=0.0",
    "lengths.ict_query=32",
    "lengths.query=32",
    "lengths.document=80",
    "corpus.block_wordpieces=80",
    "ict.steps=300",
    "ict.mask_rate=0.5",
    "ict.batch=32",
    "ict.lr=0.0003",
    "warmup.steps=1200",
    "warmup.batch=32",
    "warmup.lr=0.0005",
    "warmup.span_rate=1.0",
    "pretrain.steps=300",
    "pretrain.batch=16",
    "pretrain.candidates=5",
    "pretrain.lr=0.0003",
    "pretrain.embedder_lr=0.0001",
    "pretrain.guard_window=300",
    "pretrain.max_null_probability=1.0",
]


@dataclass
class World:
    """Documents to retrieve, sentences to mask, and a model that has seen ICT and the warm-up."""

    config: Config
    documents: Corpus
    queries: Corpus
    model: RealmModel
    device: Device
    warm: dict[str, float]

    def train(self, start: RealmModel, *, refresh: bool, masking: str, embedder_lr: float | None = None) -> "Outcome":
        """Joint training from `start`, with an index that follows every 50 steps or never."""
        settings = self.config.pretrain.model_copy(
            update={"masking": masking, "embedder_lr": embedder_lr or self.config.pretrain.embedder_lr}
        )
        trainer = RealmTrainer(self.config.model_copy(update={"pretrain": settings}), start, self.queries, self.device)
        titles = [self.queries.block(row).title for row in trainer.rows.tolist()]
        trainer.rows = trainer.rows[np.array([title == "train" for title in titles])]
        index = self.index(start)
        rows: list[dict[str, float]] = []
        for step in range(settings.steps):
            if refresh and step and step % REFRESH_EVERY == 0:
                index = self.index(start)
            rows.append(trainer.step(step, index))
        last = [row for row in rows[-REFRESH_EVERY:] if "loss" in row]
        return Outcome(
            **self.recall(start),
            utility=float(np.mean([row["utility"] for row in last])),
            null=float(np.mean([row["null_probability"] for row in last])),
        )

    def index(self, model: RealmModel) -> IndexVersion:
        """Every document embedded by the model as it is now; queries are embedded by a copy, as an index version does."""
        retriever = copy_of(model).retriever.eval()
        vectors = embed_blocks(
            retriever,
            self.documents,
            range(len(self.documents)),
            tokenizer=model.tokenizer,
            length=self.config.lengths.document,
            batch=64,
            device=self.device,
        )
        manifest = Manifest(
            stage="index", code="0", config_digest="", parents={}, sources={}, files={}, facts={"step": 0}
        )
        return IndexVersion(
            "toy", manifest, build_index(vectors, "exact"), retriever, model.tokenizer, self.documents, self.device
        )

    def recall(self, model: RealmModel) -> dict[str, float]:
        """Share of held-out masked sentences whose person's document is found first, and among the first five."""
        rng = np.random.default_rng(99)
        length = self.config.lengths.query
        asked, wanted = [], []
        for row in range(len(self.queries)):
            title = self.queries.block(row).title
            if not title.startswith("held") or len(asked) == HELD_OUT:
                continue
            for _ in range(20):
                query, _ = masked_query(self.queries, row, rng, "salient", length, 10, model.tokenizer)
                if query is not None and len(query.targets) == 1:  # the fact is masked, not the name that it is asked by
                    break
            else:
                continue
            if True:
                asked.append(query.token_ids)
                wanted.append(title.split()[1])
        ids = [self.documents._record(row)["doc_id"] for row in range(len(self.documents))]
        found = self.index(model).search(asked, 5, length)
        hits = np.array([[ids[row] == name for row in line] for line, name in zip(found, wanted)])
        return {"recall_at_1": float(hits[:, 0].mean()), "recall_at_5": float(hits.any(1).mean())}


@dataclass(frozen=True)
class Outcome:
    """Shares of held-out queries, nats, and the share of probability on the null document, over the last 50 steps."""

    recall_at_1: float
    recall_at_5: float
    utility: float
    null: float


def make_world(folder: Path, seed: int, **changes: str) -> World:
    """Build corpora, teach the retriever with ICT and the encoder to read."""
    overrides = [*SETTINGS, f"seed={seed}", *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]
    config = load_config(None, "tiny", overrides)
    write_sources(folder, seed)
    for name in ("documents", "queries"):
        source, words = folder / f"{name}.jsonl", folder / "vocab.txt"
        corpus_stage.run(config, source=source, out=folder / name, sink=NullSink(), vocabulary=words)
    documents, queries = Corpus.open(folder / "documents"), Corpus.open(folder / "queries")
    device = resolve(config.runtime)
    tokenizer = documents.tokenizer
    model = new_model(config.model, load_start_weights(config.model, tokenizer.vocab_size), tokenizer, seed)
    train_ict(model, documents, config, device, NullSink())
    warm = warm_up(model, documents, config, device, MemorySink())
    return World(config, documents, queries, model, device, warm)


def copy_of(model: RealmModel) -> RealmModel:
    """The same weights in other tensors."""
    import copy

    return replace(model, retriever=copy.deepcopy(model.retriever), encoder=copy.deepcopy(model.encoder))


def write_sources(folder: Path, seed: int) -> None:
    """`documents.jsonl` and `queries.jsonl`."""
    rng = np.random.default_rng([seed, 1])
    towns = _names(rng, 60, 2)
    trades = ["poet", "baker", "smith", "judge", "painter", "sailor", "farmer", "weaver", "miner", "doctor"]
    firsts, lasts = _names(rng, 80, 2), _names(rng, PEOPLE, 3)
    documents: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []
    for number, last in enumerate(lasts):
        first, town, trade = rng.choice(firsts), rng.choice(towns), rng.choice(trades)
        year = int(rng.integers(1800, 1900))
        name = f"{first} {last}"
        held = int(rng.integers(2))  # one dated or placed fact of each person may be asked in the test; the others are for training
        for fact, value in enumerate((town, year, trade)):
            told = [WORDINGS[fact][place].format(name=name, value=value) for place in rng.permutation(4)]
            documents.append({"id": f"{number}-{fact}", "title": "", "text": f"{told[0]} {told[1]}"})
            kind = f"held {number}-{fact}" if fact == held else "train"
            queries.append({"id": f"q{number}-{fact}", "title": kind, "text": told[2]})
    texts = [row["text"] for row in documents + queries]
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer(build_vocabulary(texts, 4000)).save(folder / "vocab.txt")
    for file, rows in (("documents", documents), ("queries", queries)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _names(rng: np.random.Generator, count: int, syllables: int) -> list[str]:
    names: set[str] = set()
    while len(names) < count:
        word = "".join(rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(syllables))
        names.add(word.capitalize() + rng.choice(["n", "r", "s", "l"]))
    return sorted(names)


if __name__ == "__main__":
    import sys
    import tempfile
    import time

    torch.set_num_threads(1)
    seed = int(sys.argv[1])
    changes = dict(argument.split("=") for argument in sys.argv[2:])
    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        world = make_world(Path(scratch), seed, **changes)
        print("blocks", len(world.documents), len(world.queries), world.warm, time.process_time() - began, flush=True)
        print("start", world.recall(world.model), flush=True)
        for what in ({"refresh": True, "masking": "salient"}, {"refresh": False, "masking": "salient"},
                     {"refresh": True, "masking": "random_token"}):
            began = time.process_time()
            print(what, world.train(copy_of(world.model), **what), time.process_time() - began, flush=True)
