"""Imported checkpoints as artifacts: the project's own code opens them, and the stages go on from them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from realm_core.artifacts.manifest import Manifest, open_artifact, read_manifest
from realm_core.artifacts.store import Store
from realm_core.compat.foreign import combined
from realm_core.compat.hf import read_hf
from realm_core.compat.importing import NO_TEXTS, READER, READER_SHAPES, import_checkpoint
from realm_core.compat.tf import read_tf
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.errors import ArtifactError, DataError
from realm_core.index.backends import load_index
from realm_core.index.version import snapshot_of
from realm_core.model.bundle import RealmModel, load_retriever
from realm_core.model.weights import load_start_weights
from realm_core.params import load_config
from realm_core.ports import NullSink
from realm_core.stages import corpus, finetune, index, pretrain, qualify, questions, reembed
from tests.published import (
    SHAPE,
    SPAN_WIDTH,
    TEXTS,
    VOCABULARY,
    encoder_state,
    open_qa_state,
    port_folder,
    tf_embedder,
    tf_reader,
    write_bundle,
    write_records,
    write_tf_records,
)

SMALL = (
    "lengths.document=20",
    "lengths.query=12",
    "lengths.ict_query=12",
    "lengths.reader=32",
    "corpus.block_wordpieces=20",
    "reader.steps=2",
    "reader.searcher_beam=4",
    "index.probe_k=4",
    "pretrain.steps=2",
)
# Until `Manifest` says what an imported artifact stands for, a stage that asks for "ict" or "corpus" refuses one.
accepted = pytest.mark.skipif(not hasattr(Manifest, "stands_for"), reason="open_artifact knows no stand-ins yet")


def settings(*overrides: str) -> Config:
    return load_config(None, "tiny", [*SMALL, *overrides])


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """An imported embedder and encoder."""
    folders = [port_folder(tmp_path / name, name) for name in ("RealmEmbedder", "RealmKnowledgeAugEncoder")]
    import_checkpoint(combined([read_hf(folder) for folder in folders]), config=settings(), out=tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def open_qa(tmp_path: Path) -> Path:
    """An imported RealmForOpenQA."""
    found = read_hf(port_folder(tmp_path / "hf", "RealmForOpenQA"))
    import_checkpoint(found, config=settings("corpus.shards=3"), out=tmp_path / "qa")
    return tmp_path / "qa"


def documents(folder: Path, texts: Sequence[str] = TEXTS * 3) -> Path:
    path = folder / "documents.jsonl"
    rows = [{"id": str(number), "title": f"the {number}", "text": text} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_embedder_and_encoder_become_one_checkpoint(start: Path) -> None:
    manifest = open_artifact(start)
    assert manifest.stage == "import"
    assert manifest.facts["stands_for"] == "ict" and manifest.facts["step"] == 0 and manifest.facts["with_encoder"]
    assert manifest.facts["origin"] == "transformers RealmEmbedder + transformers RealmKnowledgeAugEncoder"
    assert {name.split("/")[0] for name in manifest.sources} == {"RealmEmbedder", "RealmKnowledgeAugEncoder"}
    model = RealmModel.load(start)
    assert model.tokenizer.vocab == VOCABULARY
    assert model.retriever.share and model.retriever.embedder.projection_eps == 1e-12
    expected = encoder_state()
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_the_stages_go_on_from_an_imported_checkpoint(start: Path, tmp_path: Path) -> None:
    config = settings(f"model.weights=folder:{start}")  # its vocabulary is that of the corpus
    corpus.run(config, source=documents(tmp_path), out=tmp_path / "corpus", sink=NullSink())
    made = {"checkpoint": start, "corpus": tmp_path / "corpus"}
    reembed.run(config, **made, out=tmp_path / "snapshot", sink=NullSink())
    index.run(config, snapshot=tmp_path / "snapshot", **made, out=tmp_path / "index", sink=NullSink())
    verdict = qualify.run(
        config, index=tmp_path / "index", snapshot=tmp_path / "snapshot", **made, out=tmp_path / "verdict"
    )
    assert verdict.facts["passed"]
    asked = tmp_path / "questions.jsonl"
    rows = [{"question": f"who is the king of {name}", "answers": ["Rome", "king"]} for name in VOCABULARY[5:45]]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions.run(config, source=asked, out=tmp_path / "questions", sink=NullSink())
    tuned = finetune.run(
        config, index=None, **made, questions=tmp_path / "questions", out=tmp_path / "r", sink=NullSink()
    )
    assert tuned.parents["checkpoint"] == read_manifest(start).digest


@accepted
def test_pretraining_starts_from_an_imported_checkpoint(start: Path, tmp_path: Path) -> None:
    lengths = ("ict_query=8", "query=10", "document=20", "reader=32")  # what 32 positions have room for
    short = ("corpus.block_wordpieces=20", *(f"lengths.{length}" for length in lengths))
    config = settings(f"model.weights=folder:{start}", *short)
    corpus.run(config, source=documents(tmp_path), out=tmp_path / "corpus", sink=NullSink())
    store = Store.create(tmp_path / "home", config, {}, "tiny")
    made = pretrain.run(
        config, store=store, training_run="r1", corpus=tmp_path / "corpus", start=start, until=0, sink=NullSink()
    )
    assert made.parents["ict"] == read_manifest(start).digest
    copied = RealmModel.load(store.path("checkpoints", "r1-s0000000")).encoder.state_dict()
    assert all(
        torch.equal(tensor, copied[name]) for name, tensor in RealmModel.load(start).encoder.state_dict().items()
    )


def test_an_encoder_alone_becomes_start_weights(tmp_path: Path) -> None:
    found = read_hf(port_folder(tmp_path / "hf", "RealmKnowledgeAugEncoder"))
    import_checkpoint(found, config=settings(), out=tmp_path / "weights")
    config = settings(f"model.weights=folder:{tmp_path / 'weights'}", "model.layers=null")
    weights = load_start_weights(config.model, len(VOCABULARY))
    assert weights.has_mlm_head and weights.shape == SHAPE
    state = encoder_state()
    for name, tensor in weights.tensors.items():
        assert torch.equal(tensor, state[name if name.startswith("cls.") else f"realm.{name}"])


def test_a_reader_alone_joins_the_checkpoint_it_is_given(start: Path, tmp_path: Path) -> None:
    found = read_hf(port_folder(tmp_path / "hf", "RealmReader"))
    with pytest.raises(DataError, match="pass --checkpoint FOLDER"):
        import_checkpoint(found, config=settings(), out=tmp_path / "reader")
    made = import_checkpoint(found, config=settings(), out=tmp_path / "reader", checkpoint=start)
    assert made[tmp_path / "reader"].parents == {"checkpoint": read_manifest(start).digest}
    assert finetune.load_reader(tmp_path / "reader").max_span_width == SPAN_WIDTH
    for other in ("RealmKnowledgeAugEncoder", "RealmEmbedder"):
        with pytest.raises(DataError, match="only for a reader alone"):
            import_checkpoint(
                read_hf(port_folder(tmp_path / other, other)), config=settings(), out=tmp_path / "x", checkpoint=start
            )


def test_the_names_of_a_readers_files_are_those_of_the_stage(open_qa: Path) -> None:
    assert (READER, READER_SHAPES) == (finetune.READER, finetune.SHAPES)
    assert set(read_manifest(open_qa / "reader").files) == {finetune.READER, finetune.SHAPES}


def test_open_qa_becomes_a_checkpoint_a_corpus_vectors_an_index_and_a_reader(open_qa: Path) -> None:
    names = {"checkpoint": "ict", "corpus": "corpus", "snapshot": "reembed", "index": "index", "reader": "finetune"}
    manifests = {name: open_artifact(open_qa / name) for name in names}
    assert {name: made.facts["stands_for"] for name, made in manifests.items()} == names
    assert set(manifests["reader"].parents) == {"checkpoint", "corpus", "index"}
    assert manifests["reader"].parents["index"] == manifests["index"].digest
    blocks = Corpus.open(open_qa / "corpus")
    assert len(blocks.shards) == 3 and sorted(blocks.texts(range(len(blocks)))) == sorted(TEXTS)
    assert all(blocks.block(row).title == "" for row in range(len(blocks)))
    vectors = snapshot_of(open_qa / "snapshot", blocks).vectors()
    published = open_qa_state()["block_emb"].numpy()
    for row in range(len(blocks)):
        np.testing.assert_array_equal(vectors[row], published[TEXTS.index(blocks.text(row))])
    found = load_index(open_qa / "index", size=len(TEXTS), dimension=published.shape[1])
    queries = torch.from_numpy(published)
    assert found.search(queries, 1)[1].flatten().tolist() == (queries @ torch.from_numpy(vectors).T).argmax(1).tolist()
    assert not manifests["checkpoint"].facts["with_encoder"]
    load_retriever(open_qa / "checkpoint")
    with pytest.raises(ArtifactError, match=r"encoder\.safetensors: cannot be read"):
        RealmModel.load(open_qa / "checkpoint")


def test_tensorflow_and_transformers_give_the_same_bytes(tmp_path: Path, open_qa: Path) -> None:
    write_bundle(
        tmp_path / "m", {**tf_embedder(depth=4), **tf_reader(), "block_emb": open_qa_state()["block_emb"].numpy()}
    )
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    write_tf_records(tmp_path / "blocks.tfr", [text.encode() for text in TEXTS])
    found = read_tf(
        tmp_path / "m", tmp_path / "vocab.txt", tmp_path / "blocks.tfr", heads=SHAPE.heads, max_span_width=SPAN_WIDTH
    )
    import_checkpoint(found, config=settings("corpus.shards=3"), out=tmp_path / "tf")
    for name in ("checkpoint", "corpus", "snapshot", "index", "reader"):
        assert read_manifest(tmp_path / "tf" / name).files == read_manifest(open_qa / name).files, name


def test_titles_go_to_their_blocks(tmp_path: Path) -> None:
    variables = {**tf_embedder(), "block_emb": open_qa_state()["block_emb"].numpy()}
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    write_tf_records(tmp_path / "blocks.tfr", [text.encode() for text in TEXTS])
    write_tf_records(tmp_path / "titles.tfr", [text[:3].encode() for text in TEXTS])
    files = [tmp_path / name for name in ("vocab.txt", "blocks.tfr", "titles.tfr")]
    found = read_tf(write_bundle(tmp_path / "m", variables), *files, heads=SHAPE.heads)
    import_checkpoint(found, config=settings(), out=tmp_path / "out")
    blocks = Corpus.open(tmp_path / "out" / "corpus")
    assert {(blocks.block(row).title, blocks.text(row)) for row in range(len(blocks))} == {
        (text[:3], text) for text in TEXTS
    }


def test_vectors_without_texts_are_left_aside_and_said_to_be(tmp_path: Path) -> None:
    folder = port_folder(tmp_path / "hf", "RealmForOpenQA")
    (folder / "block_records.npy").unlink()
    made = import_checkpoint(read_hf(folder), config=settings(), out=tmp_path / "qa")
    assert [path.name for path in made] == ["checkpoint", "reader"]
    assert NO_TEXTS in made[tmp_path / "qa" / "checkpoint"].facts["notes"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (TEXTS[:-1], "3 records, but there are 4 block vectors"),
        ([*TEXTS, "more"], "5 records, but there are 4 block vectors"),
        ([*TEXTS[:-1], " "], "1 of 4 records hold no text"),
    ],
)
def test_every_vector_needs_its_text_and_nothing_is_published_without(
    tmp_path: Path, texts: list[str], message: str
) -> None:
    folder = port_folder(tmp_path / "hf", "RealmForOpenQA")
    write_records(folder / "block_records.npy", texts)
    with pytest.raises(DataError, match=message):
        import_checkpoint(read_hf(folder), config=settings(), out=tmp_path / "qa")
    assert not (tmp_path / "qa").exists()


def test_texts_that_are_not_utf8_and_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = port_folder(tmp_path / "a", "RealmForOpenQA")
    write_tf_records(tmp_path / "blocks.tfr", [b"one", b"\xff", b"three", b"four"])
    with pytest.raises(DataError, match="record 1 is not UTF-8 at byte 0"):
        import_checkpoint(read_hf(folder, records=tmp_path / "blocks.tfr"), config=settings(), out=tmp_path / "qa")
    state = open_qa_state()
    state["block_emb"][2, 1] = torch.inf
    with pytest.raises(DataError, match="1 block vectors are not finite"):
        import_checkpoint(
            read_hf(port_folder(tmp_path / "b", "RealmForOpenQA", state)), config=settings(), out=tmp_path / "qb"
        )
    assert not (tmp_path / "qa").exists() and not (tmp_path / "qb").exists()


def test_a_text_without_a_wordpiece_publishes_nothing_either(tmp_path: Path) -> None:
    folder = port_folder(tmp_path / "hf", "RealmForOpenQA")
    write_records(folder / "block_records.npy", [*TEXTS[:-1], "\x01"])  # seen when it is cut into wordpieces only
    with pytest.raises(DataError, match="1 of 4 records hold no text"):
        import_checkpoint(read_hf(folder), config=settings(), out=tmp_path / "qa")
    assert [path.name for path in (tmp_path / "qa").iterdir() if path.name[0] != "."] == []


def test_the_vocabulary_must_fit_the_embeddings(tmp_path: Path) -> None:
    folder = port_folder(tmp_path / "hf", "RealmEmbedder")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY[:-1]) + "\n")
    size = len(VOCABULARY)
    with pytest.raises(DataError, match=f"{size - 1} wordpieces, the embeddings have {size} rows"):
        import_checkpoint(read_hf(folder), config=settings(), out=tmp_path / "out")
    (folder / "vocab.txt").unlink()
    with pytest.raises(DataError, match="pass --vocab FILE"):
        import_checkpoint(read_hf(folder), config=settings(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_import_is_recognised_and_another_is_refused(start: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("RealmEmbedder", "RealmKnowledgeAugEncoder")]
    before = read_manifest(start)
    made = import_checkpoint(combined([read_hf(folder) for folder in folders]), config=settings(), out=start)
    assert made == {start: before}
    with pytest.raises(ArtifactError, match="holds a result of other inputs"):
        import_checkpoint(read_hf(folders[0]), config=settings(), out=start)
