"""Stage `finetune`: a checkpoint and its frozen index -> question tower and reader for open-domain QA.

Without an index the reader is trained on BM25's passages: the sparse baseline.
"""

import json
from pathlib import Path

import torch

from realm_core.artifacts.manifest import Manifest, Plan, open_artifact, read_manifest
from realm_core.artifacts.publish import building, finished
from realm_core.baselines.bm25 import Bm25
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.index.version import open_version, require_parent, snapshot_of
from realm_core.model.bundle import RealmModel, load_module, save_module
from realm_core.model.device import resolve
from realm_core.model.embedder import Retriever
from realm_core.model.reader import Reader
from realm_core.ports import MetricSink
from realm_core.stages import CODE
from realm_core.stages.questions import load as load_questions
from realm_core.train.interim import Interim
from realm_core.train.parts import require_positions
from realm_core.train.reader import DenseRetrieval, FixedRetrieval, train_reader
from realm_core.train.update import seed_of

SECTIONS = ("runtime", "lengths", "optimizer", "reader")
READER, QUESTION_TOWER, SHAPES = "reader.safetensors", "question_tower.safetensors", "reader.json"


def plan(config: Config, *, index: Path | None, checkpoint: Path, corpus: Path, questions: Path) -> Plan:
    """What `run` would make; `index` None means BM25."""
    parents = {
        "checkpoint": read_manifest(checkpoint),
        "corpus": read_manifest(corpus),
        "questions": read_manifest(questions),
    }
    if index is not None:
        parents["index"] = read_manifest(index)
    return Plan(stage="finetune", code=CODE["finetune"], config_digest=config.digest(*SECTIONS), parents=parents)


def run(
    config: Config,
    *,
    index: Path | None,
    snapshot: Path | None = None,
    checkpoint: Path,
    corpus: Path,
    questions: Path,
    out: Path,
    sink: MetricSink,
) -> Manifest:
    """Fine-tune on the train questions. The document vectors stay as they are; the question side moves away from them.

    Saves interim states on the way, from which a killed attempt is taken up.
    """
    doing = plan(config, index=index, checkpoint=checkpoint, corpus=corpus, questions=questions)
    if done := finished(out, doing):
        return done
    open_artifact(checkpoint)
    open_artifact(questions, "questions")
    blocks = Corpus.open(corpus)
    config.require_fits(len(blocks), "reader.searcher_beam")
    device = resolve(config.runtime)
    model = RealmModel.load(checkpoint).to(device.torch_device)
    require_positions(model.encoder.shape, reader=config.lengths.reader)
    reader = Reader(model.encoder.shape, config.reader.span_hidden, config.reader.max_span_width)
    reader.initialise(torch.Generator().manual_seed(seed_of(config.seed, "reader head")))
    reader.realm.load_state_dict(model.encoder.realm.state_dict())
    reader.to(device.torch_device)
    asked = load_questions(questions, "train")
    retrieval: DenseRetrieval | FixedRetrieval
    if index is None:
        found = Bm25.over(blocks).search([question.question for question in asked], config.reader.searcher_beam)
        retrieval = FixedRetrieval(found[1])
    else:
        assert snapshot is not None, "an index comes with its snapshot"
        require_parent(index, read_manifest(index), "snapshot", snapshot)
        opened = open_version(index, checkpoint=checkpoint, corpus=corpus, device=device)
        retrieval = DenseRetrieval(model.retriever, opened, snapshot_of(snapshot, blocks).vectors(), config)
    with building(out, doing, interim=True) as build:
        interim = Interim(out, doing, device.precision)
        with interim.named_if_diverged("reader.lr"):
            metrics = train_reader(reader, retrieval, blocks, asked, config, device, sink, interim)
        save_module(reader, build.folder / READER)
        if index is not None:
            save_module(model.retriever.query_tower, build.folder / QUESTION_TOWER)
        (build.folder / SHAPES).write_text(json.dumps(reader.sizes()) + "\n", encoding="utf-8")
        facts = {"retrieval": "bm25" if index is None else "dense", "metrics": metrics}
        if index is not None:
            facts["step"] = read_manifest(index).facts["step"]
        return build.commit(facts, record={"resumed": interim.resumed})


def load_reader(folder: Path) -> Reader:
    """The reader of a finished fine-tuning. It needs no checkpoint: retention may drop the one it started from."""
    reader = Reader.from_sizes(json.loads((folder / SHAPES).read_text(encoding="utf-8")))
    load_module(reader, folder / READER)
    return reader.eval()


def with_question_tower(retriever: Retriever, folder: Path) -> Retriever:
    """The retriever with the fine-tuned question side. Its document side must not be used afterwards."""
    load_module(retriever.query_tower, folder / QUESTION_TOWER)
    return retriever.eval()
