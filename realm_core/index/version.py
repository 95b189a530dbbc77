"""An index version opened for use: the searchable vectors together with the query tower and the corpus they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int

from realm_core.artifacts.manifest import Manifest, open_artifact, read_manifest, verify_files
from realm_core.corpus.shards import Corpus
from realm_core.data.formats import Ids
from realm_core.errors import ArtifactError
from realm_core.index.backends import ExactIndex, SearchIndex, load_index
from realm_core.index.embed import embed_queries
from realm_core.index.sharded import ShardedIndex, shardable
from realm_core.index.snapshot import Snapshot
from realm_core.model.bundle import EMBEDDER, load_retriever
from realm_core.model.device import Device
from realm_core.model.embedder import Retriever
from realm_core.model.world import World
from realm_core.text.tokenizer import Tokenizer

_ALONE = World()


@dataclass(frozen=True)
class IndexVersion:
    """Queries are embedded by the very checkpoint whose document vectors are searched, as in the original code."""

    name: str
    manifest: Manifest
    search_index: SearchIndex | ShardedIndex
    retriever: Retriever
    tokenizer: Tokenizer
    corpus: Corpus
    device: Device

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def step(self) -> int:
        return int(self.manifest.facts["step"])

    def search(self, queries: Sequence[Ids], k: int, length: int | None) -> Int[np.ndarray, "Q k"]:
        """Rows of the k best blocks of each query (wordpiece ids), best first; fewer columns in a smaller corpus."""
        return self.search_vectors(self.embed(queries, length), k)[1]

    def embed(self, queries: Sequence[Ids], length: int | None) -> Float[np.ndarray, "Q D"]:
        return embed_queries(self.retriever, queries, tokenizer=self.tokenizer, length=length, device=self.device)

    def search_vectors(
        self, vectors: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """(scores, rows) of the k best blocks of each query vector. Collective where the index is shared out."""
        scores, rows = self.search_index.search(torch.from_numpy(vectors), k)
        return scores.numpy(), rows.numpy()


def open_version(index: Path, *, checkpoint: Path, corpus: Path, device: Device, world: World = _ALONE) -> IndexVersion:
    """Verify digests, then open. Raises ArtifactError if a byte changed, or if checkpoint or corpus is not the one
    the index was built from: a query embedded by another encoder would find plausible nonsense.

    The processes of a `world` each hold a share of the rows of an exact index, and a whole index of any other kind.
    """
    manifest = open_artifact(index, "index")
    require_parent(index, manifest, "checkpoint", checkpoint)
    require_parent(index, manifest, "corpus", corpus)
    verify_files(checkpoint, read_manifest(checkpoint), only=EMBEDDER)
    retriever, tokenizer = load_retriever(checkpoint)
    retriever.to(device.torch_device).eval()
    whole = load_index(index, size=manifest.facts["vectors"], dimension=manifest.facts["dimension"])
    search_index: SearchIndex | ShardedIndex = whole
    if isinstance(whole, ExactIndex) and shardable(whole, world):
        search_index = ShardedIndex(whole, world, device.torch_device)
    return IndexVersion(index.name, manifest, search_index, retriever, tokenizer, Corpus.open(corpus), device)


def require_parent(child: Path, manifest: Manifest, role: str, parent: Path) -> None:
    """Raise ArtifactError unless `parent` is what `child` was made from."""
    found = read_manifest(parent).digest
    if manifest.parents.get(role) != found:
        raise ArtifactError(
            f"{child}: made from {role} {str(manifest.parents.get(role))[:12]}, not from {parent} ({found[:12]}); "
            f"pass the {role} of this version"
        )


def snapshot_of(snapshot: Path, corpus: Corpus) -> Snapshot:
    """The vectors of a snapshot in corpus order. Raises ArtifactError unless there is one for every block."""
    opened = Snapshot.open(snapshot, [f"{name}.npy" for name in corpus.shards])
    for name, shard in corpus.shards.items():
        if (found := len(opened.shard(f"{name}.npy"))) != shard.blocks:
            raise ArtifactError(f"{snapshot}/{name}.npy: {found} vectors for {shard.blocks} blocks; embed it again")
    return opened
