"""Vectors of an earlier snapshot of the same encoder that serve again: a block that has a vector is never embedded twice."""

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float
from numpy import ndarray

from realm_core.artifacts.manifest import file_sha256, read_manifest
from realm_core.artifacts.publish import link_or_copy
from realm_core.corpus.layout import TOKENS_FILE
from realm_core.corpus.shards import Corpus, Shard
from realm_core.index.snapshot import read_matrix


class EarlierVectors:
    """One snapshot, and the corpus it was made from."""

    def __init__(self, snapshot: Path, corpus: Path) -> None:
        self.snapshot, self.corpus = snapshot, Corpus.open(corpus)
        self.made = read_manifest(snapshot)
        self.tokens = token_digests(corpus)
        self.ends = np.cumsum([shard.blocks for shard in self.corpus.shards.values()], dtype=np.int64)
        self._matrices: dict[str, ndarray | None] = {}

    def link(self, shard: Shard, tokens: str, target: Path) -> bool:
        """Make `target` the vectors of a shard with the same tokens and the same rows, if there is one here."""
        for name in self._with_tokens(tokens):
            if _same_rows(self.corpus.shards[name], shard) and self._matrix(name) is not None:
                link_or_copy(self.snapshot / f"{name}.npy", target)
                return True
        return False

    def of_shard(self, shard: Shard, tokens: str) -> Float[ndarray, "N D"] | None:
        """Vectors of a shard with the same tokens that holds some of the rows only, if there is one here."""
        for name in self._with_tokens(tokens):
            here = self.corpus.shards[name].kept_between(0, shard.stored)
            wanted = shard.kept_between(0, shard.stored)
            matrix = self._matrix(name)
            if matrix is not None and np.isin(wanted, here).all():
                return np.array(matrix[np.searchsorted(here, wanted)])
        return None

    def fill(self, corpus: Corpus, name: str, vectors: Float[ndarray, "N D"]) -> Bool[ndarray, "N"]:
        """Write the vectors of those blocks of a shard that are here, by title and text, into `vectors`; says which."""
        rows = corpus.shard_rows(name)
        if not rows:
            return np.zeros(0, dtype=bool)
        ids = corpus.shards[name].column("block_id").combine_chunks()
        found = pc.index_in(ids, value_set=self._identities).fill_null(-1).to_numpy(zero_copy_only=False)
        filled = found >= 0
        for place in np.flatnonzero(filled).tolist():
            row = int(found[place])
            number = int(np.searchsorted(self.ends, row, "right"))
            matrix = self._matrix(list(self.corpus.shards)[number])
            if matrix is None or not self._same_wordpieces(row, corpus, rows[place]):
                filled[place] = False
            else:
                vectors[place] = matrix[row - self.ends[number]]  # counted from the shard's end
        return filled

    @cached_property
    def _identities(self) -> pa.ChunkedArray:
        columns = [shard.column("block_id") for shard in self.corpus.shards.values()]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    def _same_wordpieces(self, row: int, other: Corpus, at: int) -> bool:
        body = np.array_equal(self.corpus.token_ids(row), other.token_ids(at))
        return body and np.array_equal(self.corpus.title_ids(row), other.title_ids(at))

    def _with_tokens(self, tokens: str) -> list[str]:
        return [name for name, found in self.tokens.items() if found == tokens]

    def _matrix(self, name: str) -> ndarray | None:
        """A shard's vectors, if they are those that were published: altered ones are made anew."""
        if name not in self._matrices:
            path, known = self.snapshot / f"{name}.npy", self.made.files.get(f"{name}.npy")
            sound = path.is_file() and file_sha256(path) == known
            self._matrices[name] = read_matrix(path) if sound else None
        return self._matrices[name]


def token_digests(corpus: Path) -> dict[str, str]:
    """Shard -> sha256 of its token file, which fixes its vectors."""
    ending = f"/{TOKENS_FILE}"
    return {
        path.removesuffix(ending): sha for path, sha in read_manifest(corpus).files.items() if path.endswith(ending)
    }


def _same_rows(one: Shard, other: Shard) -> bool:
    if one.kept is None or other.kept is None:
        return one.kept is other.kept
    return np.array_equal(one.kept, other.kept)
