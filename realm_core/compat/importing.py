"""Published checkpoints -> artifacts that the stages take for their own.

An imported folder says in its manifest that stage `import` wrote it, and for the output of which stage it stands.

    embedder or scorer, with or without encoder   OUT: a checkpoint, as the stage `ict` writes it
    encoder alone                                 OUT: start weights, to be named by model.weights=folder:OUT
    reader alone, onto a checkpoint               OUT: a fine-tuned reader
    embedder and reader, block vectors and texts  OUT/checkpoint OUT/reader OUT/corpus OUT/snapshot OUT/index
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from realm_core.artifacts.manifest import Manifest, Plan, read_manifest
from realm_core.artifacts.publish import Build, building, finished
from realm_core.compat.bert_layout import write_masked_lm
from realm_core.compat.foreign import EncoderPart, Foreign, ReaderPart, RetrieverPart, vocabulary_size
from realm_core.compat.passages import require_passages, write_corpus, write_index, write_snapshot
from realm_core.config import Config
from realm_core.errors import ArtifactError, DataError
from realm_core.model.bundle import EMBEDDER, ENCODER, SHAPES, VOCABULARY, encoder_shape
from realm_core.model.reader import READER_EPS
from realm_core.text.tokenizer import Tokenizer

STAGE, CODE = "import", "1"
NO_TEXTS = "block_emb was left aside, for want of the texts of its blocks"
READER, READER_SHAPES = "reader.safetensors", "reader.json"  # as the stage `finetune`, which lies above, names them

Artifacts = dict[Path, Manifest]


def import_checkpoint(found: Foreign, *, config: Config, out: Path, checkpoint: Path | None = None) -> Artifacts:
    """Write what was found; returns the manifest of every folder. What an earlier attempt finished is kept.

    `checkpoint` is the checkpoint a reader alone belongs to; `config` says how texts are cut into shards and searched.
    Raises DataError if parts do not fit each other or the vocabulary, ArtifactError if a folder holds something else.
    """
    if checkpoint is not None and (found.retriever is not None or found.reader is None):
        raise DataError(f"--checkpoint {checkpoint}: only for a reader alone, not for {' + '.join(found.origins)}")
    tokenizer, retriever = _tokenizer(found), found.retriever
    if retriever is None:
        if found.reader is not None:
            return _reader_alone(found, found.reader, checkpoint, out)
        assert found.encoder is not None, "a reader of foreign formats found nothing and said nothing"
        return {out: _write_weights(found, found.encoder, tokenizer, out)}
    with_texts = found.block_vectors is not None and found.block_records is not None
    if found.block_vectors is not None and not with_texts:
        found = replace(found, notes=(*found.notes, NO_TEXTS))
    if found.reader is None and not with_texts:
        return {out: _write_checkpoint(found, retriever, tokenizer, out)}
    made: Artifacts = {}
    if with_texts:  # texts are what can be wrong, so nothing is published before them
        require_passages(found)
        plan = _plan(found, {}, settings={"corpus": config.digest("corpus")})
        made[out / "corpus"] = write_corpus(found, config, tokenizer, plan, out / "corpus")
    made[out / "checkpoint"] = _write_checkpoint(found, retriever, tokenizer, out / "checkpoint")
    if with_texts:
        made |= _write_vectors(found, {role: made[out / role] for role in ("checkpoint", "corpus")}, config, out)
    if found.reader is not None:
        parents = {role: made[out / role] for role in ("checkpoint", "corpus", "index") if out / role in made}
        made[out / "reader"] = _write_reader(found, found.reader, parents, out / "reader")
    return made


def _tokenizer(found: Foreign) -> Tokenizer:
    size = vocabulary_size(found)
    if found.vocabulary is None:
        raise DataError(f"{' + '.join(found.origins)}: no vocab.txt beside the weights; pass --vocab FILE")
    tokenizer = Tokenizer.from_file(found.vocabulary)
    if tokenizer.vocab_size != size:
        raise DataError(
            f"{found.vocabulary}: {tokenizer.vocab_size} wordpieces, the embeddings have {size} rows; "
            "pass the vocabulary of this checkpoint"
        )
    return tokenizer


def _write_checkpoint(found: Foreign, retriever: RetrieverPart, tokenizer: Tokenizer, out: Path) -> Manifest:
    encoder = found.encoder
    shapes = {
        "embedder": asdict(retriever.shape),
        "encoder": asdict(encoder.shape if encoder else retriever.shape),
        "projection_size": retriever.projection_size,
        "projection_eps": retriever.projection_eps,
        "share_embedders": retriever.share,
    }
    plan = _plan(found, {}, settings={"checkpoint": shapes, "with_encoder": encoder is not None})
    if done := finished(out, plan):
        return done
    with building(out, plan) as build:
        save_file(retriever.tensors, build.folder / EMBEDDER)
        if encoder is not None:
            save_file(encoder.tensors, build.folder / ENCODER)
        _write_json(build.folder / SHAPES, shapes)
        tokenizer.save(build.folder / VOCABULARY)
        return _commit(build, found, "ict", with_encoder=encoder is not None, step=0)


def _write_weights(found: Foreign, encoder: EncoderPart, tokenizer: Tokenizer, out: Path) -> Manifest:
    plan = _plan(found, {}, settings={"weights": asdict(encoder.shape)})
    if done := finished(out, plan):
        return done
    with building(out, plan) as build:
        write_masked_lm(build.folder, encoder.tensors, encoder.shape, tokenizer)
        return _commit(build, found, "weights")


def _write_reader(found: Foreign, reader: ReaderPart, parents: Mapping[str, Manifest], out: Path) -> Manifest:
    shapes: dict[str, Any] = {
        "encoder": asdict(reader.shape),
        "span_hidden": reader.span_hidden,
        "max_span_width": reader.max_span_width,
    }
    if reader.span_eps != READER_EPS:
        shapes["eps"] = reader.span_eps
    plan = _plan(found, parents, settings={"reader": shapes})
    if done := finished(out, plan):
        return done
    with building(out, plan) as build:
        save_file(reader.tensors, build.folder / READER)
        _write_json(build.folder / READER_SHAPES, shapes)
        return _commit(build, found, "finetune", retrieval="dense", step=0)


def _reader_alone(found: Foreign, reader: ReaderPart, checkpoint: Path | None, out: Path) -> Artifacts:
    if found.encoder is not None:
        raise DataError(f"{' + '.join(found.origins)}: an encoder and a reader make no checkpoint; add an embedder")
    if checkpoint is None:
        raise DataError(
            f"{found.origins[0]}: a reader needs the checkpoint that retrieves for it; "
            "pass --checkpoint FOLDER, or the folder of its embedder as well"
        )
    manifest = read_manifest(checkpoint)
    if (size := encoder_shape(checkpoint).vocab_size) != reader.shape.vocab_size:
        raise ArtifactError(
            f"{checkpoint}: a vocabulary of {size} wordpieces, the reader has {reader.shape.vocab_size}; "
            "pass the checkpoint it was trained beside"
        )
    return {out: _write_reader(found, reader, {"checkpoint": manifest}, out)}


def _write_vectors(found: Foreign, parents: Mapping[str, Manifest], config: Config, out: Path) -> Artifacts:
    """Snapshot and index of published block vectors; each names the ones before it as its parents."""
    snapshot, index = out / "snapshot", out / "index"
    plan = _plan(found, parents, settings={"snapshot": ""})
    made = {snapshot: write_snapshot(found, out / "corpus", plan, snapshot)}
    parents = {"snapshot": made[snapshot], **parents}
    plan = _plan(found, parents, settings={"index": config.digest("index")})
    made[index] = write_index(snapshot, config, plan, index)
    return made


def _plan(found: Foreign, parents: Mapping[str, Manifest], settings: Mapping[str, Any]) -> Plan:
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Plan(stage=STAGE, code=CODE, config_digest=digest, parents=parents, sources=found.sources)


def _commit(build: Build, found: Foreign, stands_for: str, **facts: Any) -> Manifest:
    origin = " + ".join(found.origins)
    return build.commit(
        {
            "stands_for": stands_for,
            "origin": origin,
            "notes": list(found.notes),
            "metrics": {},
            "precision": "fp32",
            **facts,
        }
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
