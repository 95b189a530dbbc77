"""A checkpoint of this project -> a folder that other libraries load; its model card says what lies where.

embedder/ (query_embedder/, question_embedder/)   sentence-transformers, and AutoModel for the backbone
encoder/                                          BertForMaskedLM
realm/{retriever,encoder,reader,…}/               the layout of transformers' Realm classes; can be imported again
passages/                                         FAISS index, and a Parquet table with a row for every vector
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from realm_core.artifacts.manifest import Manifest, Plan, open_artifact
from realm_core.artifacts.publish import building, finished
from realm_core.compat import realm_layout
from realm_core.compat.bert_layout import write_masked_lm
from realm_core.compat.importing import READER, READER_SHAPES
from realm_core.compat.importing import STAGE as IMPORT
from realm_core.compat.model_card import Contents, model_card
from realm_core.compat.sentence_layout import write_tower
from realm_core.compat.weight_files import read_json
from realm_core.corpus.layout import BLOCKS_FILE
from realm_core.corpus.shards import Corpus
from realm_core.errors import ArtifactError
from realm_core.index.backends import VECTORS, build_index
from realm_core.index.snapshot import read_matrix
from realm_core.index.version import require_parent, snapshot_of
from realm_core.model.bundle import EMBEDDER, ENCODER, encoder_shape, load_module, load_retriever
from realm_core.model.embedder import Embedder, Retriever
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.reader import Reader
from realm_core.text.tokenizer import Tokenizer

STAGE, CODE = "export", "2"
QUESTION_TOWER = "question_tower.safetensors"  # as the stage `finetune`, which lies above, names it
TUNED = "question_embedder"  # its folder
FAISS_FILES = ("index.faiss", "index.json")
_COLUMNS = ["block_id", "title", "text"]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The folders to export, and their manifests under the roles they have as parents of the export."""

    checkpoint: Path
    reader: Path | None
    index: Path | None
    corpus: Path | None
    snapshot: Path | None
    manifests: dict[str, Manifest]


def export_hf(
    *,
    checkpoint: Path,
    out: Path,
    reader: Path | None = None,
    index: Path | None = None,
    corpus: Path | None = None,
    snapshot: Path | None = None,
) -> Manifest:
    """Write all layouts. Index and corpus come together, and must be those of the checkpoint.

    With a reader as well there is a RealmForOpenQA; its vectors are those of `snapshot`, or of an index that has them.

    Raises ArtifactError for a folder that is altered, of another kind, or made from something else, and ConfigError
    if FAISS is asked for and not installed.
    """
    chosen = _opened(checkpoint, reader, index, corpus, snapshot)
    plan = Plan(stage=STAGE, code=CODE, config_digest="", parents=chosen.manifests)
    if done := finished(out, plan):
        return done
    with building(out, plan) as build:
        contents = _write_models(build.folder, chosen)
        if index is not None and corpus is not None:
            rows = _write_passages(build.folder / "passages", index, chosen.manifests["index"], corpus)
            contents = contents.with_passages(rows)
        (build.folder / "README.md").write_text(model_card(chosen.manifests, contents), encoding="utf-8")
        return build.commit(
            {"step": chosen.manifests["checkpoint"].facts.get("step"), "classes": dict(contents.classes)}
        )


def _opened(
    checkpoint: Path, reader: Path | None, index: Path | None, corpus: Path | None, snapshot: Path | None
) -> Chosen:
    if snapshot is not None and index is None:
        raise ArtifactError("a snapshot is exported with the index made from it: pass --index and --corpus too")
    if (index is None) != (corpus is None):
        raise ArtifactError("an index is exported with the texts of its rows: pass both --index and --corpus")
    manifests = {"checkpoint": _manifest(checkpoint, EMBEDDER, "a checkpoint")}
    if reader is not None:
        manifests["reader"] = _manifest(reader, READER, "a fine-tuned reader")
        require_parent(reader, manifests["reader"], "checkpoint", checkpoint)
    if index is not None and corpus is not None:
        manifests["index"] = _manifest(index, "index.json", "an index")
        manifests["corpus"] = _manifest(corpus, "vocab.txt", "a corpus")
        require_parent(index, manifests["index"], "checkpoint", checkpoint)
        require_parent(index, manifests["index"], "corpus", corpus)
        if snapshot is not None:
            manifests["snapshot"] = open_artifact(snapshot)
            require_parent(index, manifests["index"], "snapshot", snapshot)
    return Chosen(
        checkpoint=checkpoint, reader=reader, index=index, corpus=corpus, snapshot=snapshot, manifests=manifests
    )


def _manifest(folder: Path, file: str, kind: str) -> Manifest:
    manifest = open_artifact(folder)
    if file not in manifest.files:
        raise ArtifactError(f"{folder}: no {file} in it, so this is not {kind}; pass the right folder")
    return manifest


def _write_models(folder: Path, chosen: Chosen) -> Contents:
    with_encoder = ENCODER in chosen.manifests["checkpoint"].files
    retriever, tokenizer = load_retriever(chosen.checkpoint)
    contents = Contents(width=retriever.embedder.projection_size, length=retriever.embedder.shape.max_positions)
    towers = _towers(retriever, chosen)
    for name, tower in towers.items():
        write_tower(folder / name, tower.state_dict(), tower.shape, tower.projection_eps, tokenizer)
        contents.towers.append(name)
    contents.classes["retriever"] = realm_layout.write_retriever(folder / "realm" / "retriever", retriever, tokenizer)
    if with_encoder:
        encoder = KnowledgeEncoder(encoder_shape(chosen.checkpoint))
        load_module(encoder, chosen.checkpoint / ENCODER)
        write_masked_lm(folder / "encoder", encoder.state_dict(), encoder.shape, tokenizer)
        contents.classes["encoder"] = realm_layout.write_encoder(folder / "realm" / "encoder", encoder, tokenizer)
    if chosen.reader is not None:
        reader = _reader(chosen.reader)
        contents.classes["reader"] = realm_layout.write_reader(folder / "realm" / "reader", reader, tokenizer)
        if tuned := towers.get(TUNED):
            contents.classes[TUNED] = realm_layout.write_embedder(folder / "realm" / TUNED, tuned, tokenizer)
        vectors = _block_vectors(chosen)
        asking = tuned or retriever.query_tower
        if vectors is not None and asking.shape == reader.shape:
            contents.classes["open_qa"] = _write_open_qa(folder, chosen, asking, reader, vectors, tokenizer)
    return contents


def _block_vectors(chosen: Chosen) -> np.ndarray | None:
    """The vectors in the order of the corpus, unless they are only in an index that may have rounded them."""
    if chosen.index is None or chosen.corpus is None:
        return None
    if chosen.snapshot is not None:
        return snapshot_of(chosen.snapshot, Corpus.open(chosen.corpus)).vectors()
    return read_matrix(chosen.index / VECTORS) if VECTORS in chosen.manifests["index"].files else None


def _write_open_qa(
    folder: Path, chosen: Chosen, embedder: Embedder, reader: Reader, vectors: np.ndarray, tokenizer: Tokenizer
) -> str:
    """The blocks of an imported corpus go back into the order in which they were published."""
    assert chosen.corpus is not None
    blocks = pa.Table.from_batches(_kept_blocks(chosen.corpus, ["doc_id", "title", "text"]))
    rows = np.arange(len(blocks))
    if chosen.manifests["corpus"].stage == IMPORT:
        rows = np.argsort([int(doc_id) for doc_id in blocks["doc_id"].to_pylist()])
    titles, texts = (blocks[name].to_pylist() for name in ("title", "text"))
    passages = ((titles[row], texts[row]) for row in rows)
    return realm_layout.write_open_qa(
        folder / "realm" / "open_qa", embedder, reader, vectors[rows], passages, tokenizer
    )


def _towers(retriever: Retriever, chosen: Chosen) -> dict[str, Embedder]:
    """Every different tower by the folder it goes to."""
    towers = {"embedder": retriever.document_tower}
    if not retriever.share:
        towers["query_embedder"] = retriever.query_tower
    if chosen.reader is not None and QUESTION_TOWER in chosen.manifests["reader"].files:
        tuned = Embedder(
            retriever.embedder.shape, retriever.embedder.projection_size, retriever.embedder.projection_eps
        )
        load_module(tuned, chosen.reader / QUESTION_TOWER)
        towers[TUNED] = tuned
    return towers


def _reader(folder: Path) -> Reader:
    reader = Reader.from_sizes(read_json(folder / READER_SHAPES))
    load_module(reader, folder / READER)
    return reader


def _write_passages(folder: Path, index: Path, manifest: Manifest, corpus: Path) -> int:
    """The index as FAISS reads it and the texts in the order of its rows; returns their number."""
    folder.mkdir()
    if "index.faiss" in manifest.files:
        for name in FAISS_FILES:
            shutil.copyfile(index / name, folder / name)
    else:
        build_index(read_matrix(index / VECTORS), "faiss_flat").save(folder)
    schema = pa.schema([("row", pa.int64()), *((name, pa.string()) for name in _COLUMNS)])
    row = 0
    with pq.ParquetWriter(folder / "passages.parquet", schema, compression="zstd") as writer:
        for batch in _kept_blocks(corpus, _COLUMNS):
            rows = pa.array(range(row, row + len(batch)), pa.int64())
            writer.write_batch(pa.RecordBatch.from_arrays([rows, *batch.columns], schema=schema))
            row += len(batch)
    if row != manifest.facts["vectors"]:
        raise ArtifactError(
            f"{corpus}: {row} blocks for {manifest.facts['vectors']} vectors; pass the corpus of the index"
        )
    return row


def _kept_blocks(corpus: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Columns of all blocks in the order of their rows."""
    for shard in Corpus.open(corpus).shards.values():
        stored = 0
        with pq.ParquetFile(shard.folder / BLOCKS_FILE) as file:
            for whole in file.iter_batches(columns=columns):
                yield whole.take(pa.array(shard.kept_between(stored, stored + len(whole))))
                stored += len(whole)
