"""Stage `reembed`: one checkpoint and a corpus -> one vector a block, shard by shard.

A killed pass keeps its finished shards: the scratch folder is handed to the next attempt, which checks what it finds there.
Where an earlier snapshot of the same encoder is given, only blocks without a vector in it are embedded: that is what makes
growth cheap. Vectors of shards with the same tokens are what this pass would make, bit for bit; those of single blocks, after
a compaction or a replacement, were made in other batches and may differ from them in the last bits.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from realm_core.artifacts.manifest import Manifest, Plan, file_sha256, open_artifact, read_manifest, verify_files
from realm_core.artifacts.publish import building, finished, write_durably
from realm_core.artifacts.store import PRUNED
from realm_core.config import Config
from realm_core.corpus.shards import Corpus, Shard
from realm_core.errors import ArtifactError
from realm_core.index.embed import embed_blocks
from realm_core.index.reuse import EarlierVectors, token_digests
from realm_core.index.snapshot import read_matrix, vector_report, write_matrix
from realm_core.model.bundle import EMBEDDER, load_retriever
from realm_core.model.device import Device, resolve
from realm_core.ports import MetricSink, Progress
from realm_core.stages import CODE

SECTIONS = ("runtime", "lengths", "reembed")
_DONE = ".done.json"  # in the scratch folder: shard -> sha256, written after each shard


def plan(config: Config, *, checkpoint: Path, corpus: Path) -> Plan:
    """What `run` would make."""
    parents = {"checkpoint": read_manifest(checkpoint), "corpus": read_manifest(corpus)}
    return Plan(stage="reembed", code=CODE["reembed"], config_digest=config.digest(*SECTIONS), parents=parents)


def run(
    config: Config,
    *,
    checkpoint: Path,
    corpus: Path,
    out: Path,
    sink: MetricSink,
    earlier: Sequence[tuple[Path, Path]] = (),
) -> Manifest:
    """Embed every block. Raises ArtifactError if a vector is not finite, or vocabularies differ.

    `earlier` are (snapshot, corpus) pairs; the first that comes from the same encoder, settings and code lends its vectors.
    """
    doing = plan(config, checkpoint=checkpoint, corpus=corpus)
    if done := finished(out, doing):
        return done
    if (checkpoint / PRUNED).exists():
        raise ArtifactError(f"{checkpoint}: its weights were dropped by retention; embed a newer checkpoint")
    verify_files(checkpoint, doing.parents["checkpoint"], only=EMBEDDER)
    open_artifact(corpus, "corpus")
    blocks = Corpus.open(corpus)
    device = resolve(config.runtime, shared=True)
    with building(out, doing, resume=True) as build:
        pass_ = _Pass(config, checkpoint, blocks, build.folder, device, _lender(doing, device, earlier))
        pass_.drop_foreign_files()
        digests = {name: pass_.shard(name) for name in blocks.shards}
        report = pass_.report(digests)
        (build.folder / _DONE).unlink(missing_ok=True)
        sink.log(0, {"reembed/blocks": len(blocks), "reembed/bad_vectors": report["bad_vectors"]})
        return build.commit(
            {
                "step": doing.parents["checkpoint"].facts["step"],
                "encoder": doing.parents["checkpoint"].files[EMBEDDER],
                "vectors": len(blocks),
                "precision": device.precision,
                **report,
                "shards": {name: digests[name] for name in blocks.shards},
            },
            record={
                "resumed_shards": pass_.resumed,
                "linked_shards": pass_.linked,
                "embedded_blocks": pass_.embedded,
                "reused_blocks": pass_.reused,
                "borrowed_blocks": pass_.borrowed,  # one by one, by identity: made in other batches
                "reused_from": pass_.lender.snapshot.name if pass_.lender else None,
            },
            known={f"{name}.npy": digest for name, digest in digests.items()},
        )


class _Pass:
    """One pass over the shards; remembers on disk which ones are done."""

    def __init__(
        self,
        config: Config,
        checkpoint: Path,
        corpus: Corpus,
        folder: Path,
        device: Device,
        lender: EarlierVectors | None,
    ) -> None:
        self.config, self.checkpoint, self.corpus, self.folder = config, checkpoint, corpus, folder
        self.device, self.lender = device, lender
        self.tokens = token_digests(corpus.folder)
        self.retriever, self.tokenizer = load_retriever(checkpoint)
        if self.tokenizer.digest != corpus.tokenizer.digest:
            raise ArtifactError(f"{checkpoint}: other vocabulary than {corpus.folder}; build the corpus with it")
        self.retriever.to(device.torch_device)
        # The scratch folder may stem from another plan for the same name: a finished shard counts only for this encoder.
        self.mark = {"encoder": file_sha256(checkpoint / EMBEDDER), "corpus": read_manifest(corpus.folder).digest}
        self.done = self._read_done()
        self.resumed = self.linked = self.reused = self.borrowed = self.embedded = self.passed = 0
        self.bar = Progress(f"embed {folder.name}", len(corpus), unit="blocks")

    def drop_foreign_files(self) -> None:
        """Remove what an attempt with another corpus left: it would be published with the rest."""
        expected = {_DONE, *(f"{name}.npy" for name in self.corpus.shards)}
        for entry in self.folder.iterdir():
            if entry.name not in expected:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def shard(self, name: str) -> str:
        """sha256 of the shard's vectors, embedding it unless a finished, unaltered file is there."""
        path = self.folder / f"{name}.npy"
        if name in self.done and path.exists() and file_sha256(path) == self.done[name]:
            self.resumed += 1
            self._advance(self.corpus.shards[name].blocks)
            return self.done[name]
        path.unlink(missing_ok=True)  # it may share its bytes with a published file
        shard = self.corpus.shards[name]
        if self.lender and self.lender.link(shard, self.tokens[name], path):
            self.linked += 1
            self._reuse(shard.blocks)
        else:
            write_matrix(path, self._vectors(name))
        self.done[name] = file_sha256(path)
        write_durably(self.folder / _DONE, json.dumps({**self.mark, "shards": self.done}) + "\n")
        return self.done[name]

    def _vectors(self, name: str) -> Float[ndarray, "N D"]:
        """Vectors of a shard: those that exist, and those of its new blocks."""
        shard, rows = self.corpus.shards[name], self.corpus.shard_rows(name)
        if self.lender is None:
            return self._whole_shard(shard)
        found = self.lender.of_shard(shard, self.tokens[name])
        if found is not None:
            self._reuse(shard.blocks)
            return found
        vectors = np.empty((shard.blocks, self.retriever.embedder.projection_size), dtype=np.float32)
        known = self.lender.fill(self.corpus, name, vectors)
        if not known.any():
            return self._whole_shard(shard)
        self.borrowed += int(known.sum())
        self._reuse(int(known.sum()))
        if not known.all():
            vectors[~known] = self._embed(self.corpus, [rows[place] for place in np.flatnonzero(~known).tolist()])
        return vectors

    def _whole_shard(self, shard: Shard) -> Float[ndarray, "N D"]:
        """Removed blocks are embedded with the rest and left out then: the last bits of a vector follow from the batch it
        was in, and this pass shall give the bytes of one that borrows."""
        whole = Corpus(self.corpus.folder, {shard.name: Shard(shard.folder)})
        return self._embed(whole, range(shard.stored))[shard.kept_between(0, shard.stored)]

    def _embed(self, corpus: Corpus, rows: Sequence[int]) -> Float[ndarray, "N D"]:
        self.embedded += len(rows)
        return embed_blocks(
            self.retriever,
            corpus,
            rows,
            tokenizer=self.tokenizer,
            length=self.config.lengths.document,
            batch=self.config.reembed.batch,
            device=self.device,
            progress=self._advance,
        )

    def _reuse(self, blocks: int) -> None:
        self.reused += blocks
        self._advance(blocks)

    def report(self, digests: dict[str, str]) -> dict[str, int | float]:
        """Health of all vectors. Raises ArtifactError if one is not finite."""
        reports = [vector_report(read_matrix(self.folder / f"{name}.npy")) for name in digests]
        rows = sum(report["rows"] for report in reports)
        bad = rows - sum(report["finite"] for report in reports)
        if bad:
            shutil.rmtree(self.folder)  # a second attempt has no use for it, and retention may then drop the checkpoint
            raise ArtifactError(
                f"{self.checkpoint}: {bad:.0f} of {rows:.0f} vectors are not finite; it is broken, "
                "resume training from an earlier one"
            )
        return {
            "bad_vectors": bad,
            "zero_vectors": sum(report["zero"] for report in reports),
            "norm_min": min(report["norm_min"] for report in reports if report["rows"]),
            "norm_max": max(report["norm_max"] for report in reports),
        }

    def _advance(self, blocks: int) -> None:
        self.passed += blocks
        self.bar.update(self.passed)

    def _read_done(self) -> dict[str, str]:
        with suppress(OSError, ValueError, KeyError):
            values = json.loads((self.folder / _DONE).read_text(encoding="utf-8"))
            if {key: values[key] for key in self.mark} == self.mark:
                return dict(values["shards"])
        return {}


def _lender(doing: Plan, device: Device, earlier: Sequence[tuple[Path, Path]]) -> EarlierVectors | None:
    """The first earlier snapshot whose vectors are those that this pass would make."""
    for snapshot, corpus in earlier:
        made = read_manifest(snapshot)
        same = (made.stage, made.code, made.config_digest) == (doing.stage, doing.code, doing.config_digest)
        encoder = doing.parents["checkpoint"].files[EMBEDDER]
        if same and (made.facts["encoder"], made.facts["precision"]) == (encoder, device.precision):
            return EarlierVectors(snapshot, corpus)
    return None
