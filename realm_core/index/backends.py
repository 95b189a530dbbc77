"""The choice of an index: one way to build, search, write and read each of them.

An index knows nothing of the encoder behind its vectors. Queries from another encoder of the same width give silent
nonsense, so the stage that opens an index compares the encoder fingerprint in its manifest with the query tower's.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from realm_core.errors import ArtifactError, ConfigError, DataError
from realm_core.index.exact import exact_search
from realm_core.index.snapshot import as_tensor, read_matrix, write_matrix

HEADER = "index.json"
VECTORS = "vectors.npy"
P = TypeVar("P")


@runtime_checkable
class SearchIndex(Protocol):
    """Maximum inner product search over rows in corpus order."""

    backend: ClassVar[str]

    @property
    def size(self) -> int: ...

    @property
    def dimension(self) -> int: ...

    def search(self, queries: Float[Tensor, "Q D"], k: int) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
        """The min(k, size) best rows of every query: float32 scores, int64 rows, best first, ties by ascending row.

        Every place is filled; both tensors lie on the device of `queries`.
        """
        ...

    def save(self, folder: Path) -> list[str]:
        """Write into an existing folder; returns the names of the files written."""
        ...

    @classmethod
    def load(cls, folder: Path) -> "SearchIndex":
        """Read what `save` wrote. Raises ArtifactError; verify the digests in the manifest before calling it."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExactParams:
    chunk: int = 65536  # vectors scored by one matrix product

    def __post_init__(self) -> None:
        require_range("exact", "chunk", self.chunk, 1)


class ExactIndex:
    """Exact search in torch; on disk nothing but the vectors."""

    backend: ClassVar[str] = "exact"

    def __init__(self, vectors: Float[Tensor, "N D"], params: ExactParams | None = None) -> None:
        self.vectors, self.params = vectors, params or ExactParams()
        norms = [block.float().norm(dim=1) for block in vectors.split(self.params.chunk)]
        self.max_norm = float(torch.cat(norms).max())

    @classmethod
    def build(cls, vectors: Float[Tensor, "N D"], params: Mapping[str, Any]) -> "ExactIndex":
        return cls(vectors, parse_params(cls.backend, ExactParams, params))

    @property
    def size(self) -> int:
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        return self.vectors.shape[1]

    def search(self, queries: Float[Tensor, "Q D"], k: int) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
        require_queries(self, queries, k)
        return exact_search(queries, self.vectors, k, self.params.chunk, self.max_norm)

    def to(self, device: torch.device | str) -> "ExactIndex":
        """The same index with its vectors on another device."""
        return ExactIndex(self.vectors.to(device), self.params)

    def save(self, folder: Path) -> list[str]:
        write_matrix(folder / VECTORS, self.vectors.float().cpu().numpy())
        return [VECTORS, write_header(folder, self, asdict(self.params))]

    @classmethod
    def load(cls, folder: Path) -> "ExactIndex":
        header = read_header(folder, cls.backend)
        vectors = as_tensor(read_matrix(folder / VECTORS))
        require_shape(folder / VECTORS, vectors.shape, header)
        return cls(vectors, parse_params(cls.backend, ExactParams, header["params"]))


def build_index(vectors: Float[np.ndarray, "N D"] | Float[Tensor, "N D"], backend: str, **params: Any) -> SearchIndex:
    """Build an index over `vectors`, deterministically: the same vectors and parameters give the same index.

    Raises ConfigError for an unknown backend, an unknown or impossible parameter or a missing library, and DataError
    for vectors that are not a matrix of finite numbers.
    """
    build = _backend(backend).build
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise DataError(f"index over vectors of shape {tuple(vectors.shape)}; embed at least one block")
    matrix = as_tensor(vectors)
    for start in range(0, len(matrix), 65536):
        bad = ~matrix[start : start + 65536].isfinite().all(dim=1)
        if bad.any():
            row = start + int(bad.nonzero()[0, 0])
            raise DataError(f"row {row} of the vectors is not finite; drop that block or embed it again")
    return build(matrix, params)


def load_index(folder: Path, *, size: int | None = None, dimension: int | None = None) -> SearchIndex:
    """Read an index of any backend; `size` and `dimension` are what the manifest promises.

    Verify the digests of the files first. Raises ArtifactError for anything torn or unexpected.
    """
    header = read_header(folder)
    for name, promised in (("size", size), ("dimension", dimension)):
        if promised is not None and header[name] != promised:
            raise ArtifactError(f"{folder}: index of {name} {header[name]}, expected {promised}; build the index again")
    return _backend(header["backend"]).load(folder)


def require_backend(backend: str, params: Mapping[str, Any]) -> None:
    """Raise the ConfigError that `build_index` would raise of the choice alone, while there are no vectors yet."""
    chosen = _backend(backend)
    parse_params(backend, chosen.params, params)
    chosen.require_library()


def known_backends() -> tuple[str, ...]:
    """The names `build_index` takes."""
    return ("exact", "faiss_flat", "faiss_ivf", "faiss_hnsw", "faiss_sq8", "alsh")


def parse_params(backend: str, kind: type[P], params: Mapping[str, Any]) -> P:
    """Make the frozen parameters of a backend. Raises ConfigError for names it does not know."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ConfigError(f"index {backend}: unknown parameter {unknown[0]}; it takes {', '.join(known) or 'none'}")
    return kind(**params)


def require_range(backend: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ConfigError unless `value` is a whole number in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"index {backend}: {name}={value!r}; give a whole number {limits}")


def require_queries(index: SearchIndex, queries: Tensor, k: int) -> None:
    """Raise unless `queries` fit the index: ConfigError for their shape and k, DataError for numbers not finite."""
    if queries.ndim != 2 or queries.shape[1] != index.dimension or k < 1:
        raise ConfigError(
            f"index {index.backend}: queries {tuple(queries.shape)} with k={k} against vectors of width "
            f"{index.dimension}; query with the encoder that made the vectors, and k of at least 1"
        )
    if not queries.isfinite().all():
        raise DataError(f"index {index.backend}: a query vector is not finite; check the encoder that made it")


def write_header(folder: Path, index: SearchIndex, params: Mapping[str, Any]) -> str:
    """Write the few facts a reader needs before it opens the index proper; returns the file name."""
    header = {"backend": index.backend, "size": index.size, "dimension": index.dimension, "params": dict(params)}
    (folder / HEADER).write_text(json.dumps(header, sort_keys=True) + "\n", encoding="utf-8")
    return HEADER


def read_header(folder: Path, backend: str | None = None) -> dict[str, Any]:
    """Read `index.json`. Raises ArtifactError unless it describes an index (of `backend`)."""
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        complete = isinstance(header["params"], dict) and header["backend"] in known_backends()
        complete = complete and all(isinstance(header[x], int) and header[x] > 0 for x in ("size", "dimension"))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); build the index again") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        complete = False
    if not complete:
        raise ArtifactError(f"{path}: does not describe an index this code knows; build the index again")
    if backend is not None and header["backend"] != backend:
        raise ArtifactError(f"{path}: an index of backend {header['backend']}, read as {backend}; use load_index")
    return header


def require_shape(path: Path, shape: tuple[int, ...], header: Mapping[str, Any]) -> None:
    """Raise ArtifactError unless a file holds as many vectors, of the width, that the header says."""
    if tuple(shape) != (header["size"], header["dimension"]):
        expected = (header["size"], header["dimension"])
        raise ArtifactError(f"{path}: vectors of shape {tuple(shape)}, expected {expected}; build the index again")


class _Backend(NamedTuple):
    params: type
    build: Callable[[Tensor, Mapping[str, Any]], SearchIndex]
    load: Callable[[Path], SearchIndex]
    require_library: Callable[[], object] = lambda: None


def _backend(name: str) -> _Backend:
    # The other backends import this module, and FAISS is only loaded by who asks for it.
    if name == "exact":
        return _Backend(ExactParams, ExactIndex.build, ExactIndex.load)
    if name == "alsh":
        from realm_core.index.lsh import AlshIndex, AlshParams

        return _Backend(AlshParams, AlshIndex.build, AlshIndex.load)
    if name in known_backends():
        from realm_core.index.faiss_backends import FAISS_INDEXES, require_faiss

        kind = FAISS_INDEXES[name]
        return _Backend(kind.Params, kind.build, kind.load, require_faiss)
    raise ConfigError(f"index backend {name!r} is unknown; choose one of {', '.join(known_backends())}")
