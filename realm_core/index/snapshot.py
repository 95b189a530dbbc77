"""An embedding snapshot on disk: one float32 matrix a corpus shard, rows in corpus order, one encoder for all of it.

Which encoder made it stands in the manifest of the folder; the stage that opens a snapshot checks that fingerprint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from realm_core.errors import ArtifactError

_ROWS = 65536  # rows looked at together, so that a report never holds a copy of the matrix


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The memory-mapped shards of one snapshot, in corpus order."""

    folder: Path
    shard_names: tuple[str, ...]
    shards: tuple[ndarray, ...]

    @classmethod
    def open(cls, folder: Path, shard_names: Sequence[str]) -> "Snapshot":
        """Map the named `.npy` files. Raises ArtifactError for a file that is missing, torn or not a float32 matrix."""
        if not shard_names:
            raise ArtifactError(f"{folder}: a snapshot of no shards; embed the corpus again")
        shards = tuple(read_matrix(folder / _plain(name, folder)) for name in shard_names)
        for name, shard in zip(shard_names, shards, strict=True):
            if shard.shape[1] != shards[0].shape[1]:
                raise ArtifactError(
                    f"{folder / name}: vectors of width {shard.shape[1]}, {shard_names[0]} has {shards[0].shape[1]}; "
                    "the shards come from different encoders, embed the corpus again"
                )
        return cls(folder=folder, shard_names=tuple(shard_names), shards=shards)

    @property
    def size(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def dimension(self) -> int:
        return int(self.shards[0].shape[1])

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of every shard in the concatenation."""
        return tuple(int(x) for x in np.cumsum([0, *(len(shard) for shard in self.shards[:-1])]))

    def shard(self, name: str) -> Float[ndarray, "_ D"]:
        if name not in self.shard_names:
            raise ArtifactError(f"{self.folder}: no shard {name!r}; it has {', '.join(self.shard_names)}")
        return self.shards[self.shard_names.index(name)]

    def rows(self, rows: Int[ndarray, "R"]) -> Float[ndarray, "R D"]:
        """The vectors of some rows of the concatenation, in the order asked for; only their pages are read."""
        chosen = np.empty((len(rows), self.dimension), dtype=np.float32)
        place = np.searchsorted(self.offsets, rows, side="right") - 1
        for number, (shard, first) in enumerate(zip(self.shards, self.offsets, strict=True)):
            here = place == number
            chosen[here] = shard[rows[here] - first]
        return chosen

    def vectors(self) -> Float[ndarray, "N D"]:
        """All vectors: the mapped file itself where there is one shard, else a copy in memory (4 N D bytes)."""
        return self.shards[0] if len(self.shards) == 1 else np.concatenate(self.shards)


def read_matrix(path: Path) -> Float[ndarray, "N D"]:
    """Map one float32 matrix; no object arrays, no other layout. Writing into it changes this process' copy alone.

    Raises ArtifactError.
    """
    try:
        matrix = _load(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; re-run the stage that writes it") from None
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError, OverflowError, TypeError) as error:
        raise ArtifactError(f"{path}: not a readable .npy matrix ({_first_line(error)}); re-run its stage") from None
    if not isinstance(matrix, ndarray) or matrix.ndim != 2 or matrix.dtype != np.float32:
        found = f"{matrix.dtype} {matrix.shape}" if isinstance(matrix, ndarray) else "an archive"
        raise ArtifactError(f"{path}: holds {found}, expected a float32 matrix; re-run the stage that writes it")
    if not matrix.flags.c_contiguous:
        raise ArtifactError(f"{path}: stored column by column; re-run the stage that writes it")
    return matrix


def write_matrix(path: Path, matrix: Float[ndarray, "N D"]) -> None:
    """Write what `read_matrix` reads."""
    with path.open("wb") as file:
        np.save(file, np.ascontiguousarray(matrix, dtype=np.float32), allow_pickle=False)


def as_tensor(matrix: Float[ndarray, "N D"] | Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """The matrix as a tensor; a float32 array that may be written is shared, anything else copied."""
    if isinstance(matrix, Tensor):
        return matrix
    return torch.from_numpy(np.require(matrix, np.float32, ["C", "W"]))


def vector_report(matrix: Float[ndarray, "N D"]) -> dict[str, int | float]:
    """Health of a set of vectors: counts of rows, of finite and of all-zero rows; smallest, mean, largest norm.

    Norms are taken over finite rows, and are 0 where there is none.
    """
    norms, zero = [np.empty(0)], 0
    for block in _blocks(matrix):
        finite = np.isfinite(block).all(axis=1)
        zero += int((~block.any(axis=1)).sum())
        norms.append(np.linalg.norm(block[finite].astype(np.float64), axis=1))
    norm = np.concatenate(norms)
    none = norm.size == 0
    return {
        "rows": len(matrix),
        "dimension": int(matrix.shape[1]),
        "finite": int(norm.size),
        "non_finite": len(matrix) - int(norm.size),
        "zero": zero,
        "norm_min": 0.0 if none else float(norm.min()),
        "norm_mean": 0.0 if none else float(norm.mean()),
        "norm_max": 0.0 if none else float(norm.max()),
    }


def _blocks(matrix: ndarray) -> Iterator[ndarray]:
    for start in range(0, len(matrix), _ROWS):
        yield np.asarray(matrix[start : start + _ROWS])


def _load(path: Path) -> ndarray:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("wrong first bytes")
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError:
        with path.open("rb") as file:  # an empty matrix cannot be mapped
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            if 0 not in read(file)[0]:
                raise
        return np.load(path, allow_pickle=False)


def _plain(name: str, folder: Path) -> str:
    if PurePath(name).name != name or name in ("", ".", ".."):
        raise ArtifactError(f"{folder}: shard name {name!r} is not a plain file name; the snapshot is refused")
    return name


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
