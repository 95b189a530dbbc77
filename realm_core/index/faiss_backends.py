"""FAISS behind the `SearchIndex` protocol: flat, inverted file, HNSW graph and 8-bit scalar quantiser.

FAISS reads its own files with little suspicion, so a file is only opened after its head has been compared with what the
index header promises, and under FAISS' own limits on what reading may allocate.
"""

import struct
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from realm_core.errors import ArtifactError, ConfigError
from realm_core.index.backends import parse_params, read_header, require_queries, require_range, write_header
from realm_core.index.exact import merge_topk

FILE = "index.faiss"
_HEAD = struct.Struct("<4siqqqBi")  # kind, dimension, vectors, two unused, trained, metric (0: inner product)
_FAISS_SETTINGS = threading.RLock()  # thread count and reading limits are FAISS' own globals
_TRAINING_VECTORS = 100_000  # what the original code trained its tree on: language/orqa, scann_utils


@dataclass(frozen=True, kw_only=True)
class NoParams:
    pass


@dataclass(frozen=True, kw_only=True)
class IvfParams:
    nlist: int | None = None  # inverted lists; None: 4 sqrt(N), at least 39 vectors a list
    nprobe: int | None = None  # lists searched; None: a tenth, the original code's 100 of 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nlist", "nprobe"):
            if getattr(self, name) is not None:
                require_range("faiss_ivf", name, getattr(self, name), 1)
        require_range("faiss_ivf", "seed", self.seed, 0, 2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class HnswParams:
    m: int = 32  # links a node
    ef_construction: int = 200  # breadth of the search that places a node
    ef_search: int = 128  # breadth of a query's search; raised to k where k is larger

    def __post_init__(self) -> None:
        require_range("faiss_hnsw", "m", self.m, 2, 512)
        require_range("faiss_hnsw", "ef_construction", self.ef_construction, 1)
        require_range("faiss_hnsw", "ef_search", self.ef_search, 1)


class FaissIndex:
    """What the FAISS backends share: order of results, files, and the checks before a file is opened."""

    backend: ClassVar[str]
    kind: ClassVar[bytes]  # first four bytes of the file
    Params: ClassVar[type] = NoParams

    def __init__(self, index: Any, params: Any) -> None:
        self.index, self.params = index, params

    @property
    def size(self) -> int:
        return int(self.index.ntotal)

    @property
    def dimension(self) -> int:
        return int(self.index.d)

    @classmethod
    def build(cls, vectors: Float[Tensor, "N D"], params: Mapping[str, Any]) -> "FaissIndex":
        chosen: Any = parse_params(cls.backend, cls.Params, params)
        with _single_thread():
            return cls(cls._train_and_add(_contiguous(vectors), chosen), chosen)

    @staticmethod
    @abstractmethod
    def _train_and_add(matrix: np.ndarray, params: Any) -> Any: ...

    def search(self, queries: Float[Tensor, "Q D"], k: int) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
        """See `SearchIndex.search`. Scores are FAISS' own: for faiss_sq8 those of the quantised vectors."""
        require_queries(self, queries, k)
        query, k = _contiguous(queries), min(k, self.size)
        scores, rows = self._search(query, k)
        gaps = (rows < 0).any(axis=1)
        if gaps.any():
            scores[gaps], rows[gaps] = self._search_all(query[gaps], k)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.size:
            raise ArtifactError(f"index {self.backend}: FAISS returned a row it cannot hold; build the index again")
        found = merge_topk([(torch.from_numpy(scores), torch.from_numpy(rows))], k)
        return found[0].to(queries.device), found[1].to(queries.device)

    def _search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.index.search(query, k)

    def _search_all(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """For queries whose search reached fewer than k rows; a backend that compares every row has nothing to add."""
        return self.index.search(query, k)

    def save(self, folder: Path) -> list[str]:
        try:
            require_faiss().write_index(self.index, str(folder / FILE))
        except RuntimeError as error:
            raise ArtifactError(f"{folder / FILE}: FAISS cannot write it ({_reason(error)}); free some space") from None
        return [FILE, write_header(folder, self, asdict(self.params))]

    @classmethod
    def load(cls, folder: Path) -> "FaissIndex":
        header = read_header(folder, cls.backend)
        params: Any = parse_params(cls.backend, cls.Params, header["params"])
        path = folder / FILE
        _require_head(path, cls.kind, header["dimension"], header["size"])
        index = _read(path)
        found = (type(index).__name__, int(index.ntotal), int(index.d), int(index.metric_type))
        if found[1:] != (header["size"], header["dimension"], 0) or not index.is_trained:
            raise ArtifactError(f"{path}: holds {found}, not what {folder / 'index.json'} says; build the index again")
        return cls(index, params)


class FaissFlat(FaissIndex):
    """Exact search by FAISS."""

    backend: ClassVar[str] = "faiss_flat"
    kind = b"IxFI"

    @staticmethod
    def _train_and_add(matrix: np.ndarray, params: NoParams) -> Any:
        index = require_faiss().IndexFlatIP(matrix.shape[1])
        index.add(matrix)
        return index


class FaissSq8(FaissIndex):
    """Every component in 8 bits: a quarter of the memory, every row still compared."""

    backend: ClassVar[str] = "faiss_sq8"
    kind = b"IxSQ"

    @staticmethod
    def _train_and_add(matrix: np.ndarray, params: NoParams) -> Any:
        faiss = require_faiss()
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexScalarQuantizer(matrix.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        index.train(matrix)
        index.add(matrix)
        return index


class FaissIvf(FaissIndex):
    """Inverted lists around spherical k-means centres; a query reads the lists of the nearest centres."""

    backend: ClassVar[str] = "faiss_ivf"
    kind, Params = b"IwFl", IvfParams

    @staticmethod
    def _train_and_add(matrix: np.ndarray, params: IvfParams) -> Any:
        faiss = require_faiss()
        nlist = min(params.nlist or min(int(4 * len(matrix) ** 0.5), len(matrix) // 39) or 1, len(matrix))
        quantizer = faiss.IndexFlatIP(matrix.shape[1])
        index = faiss.IndexIVFFlat(quantizer, matrix.shape[1], nlist, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = params.seed
        index.cp.min_points_per_centroid = 1  # small corpora are fine, and FAISS would say otherwise on stdout
        sample = matrix
        if len(matrix) > _TRAINING_VECTORS:
            rows = np.random.default_rng(params.seed).choice(len(matrix), _TRAINING_VECTORS, replace=False)
            sample = matrix[np.sort(rows)]
        index.train(sample)
        index.add(matrix)
        index.nprobe = min(params.nprobe or -(-nlist // 10), nlist)
        return index

    def _search_all(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.index.search(query, k, params=require_faiss().SearchParametersIVF(nprobe=self.index.nlist))


class FaissHnsw(FaissIndex):
    """A navigable graph over full vectors: fast, larger in memory and slow to build."""

    backend: ClassVar[str] = "faiss_hnsw"
    kind, Params = b"IHNf", HnswParams

    @staticmethod
    def _train_and_add(matrix: np.ndarray, params: HnswParams) -> Any:
        faiss = require_faiss()
        index = faiss.IndexHNSWFlat(matrix.shape[1], params.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = params.ef_construction
        index.hnsw.efSearch = params.ef_search
        index.add(matrix)
        return index

    def _search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        breadth = max(k, self.params.ef_search)
        return self.index.search(query, k, params=require_faiss().SearchParametersHNSW(efSearch=breadth))

    def _search_all(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return require_faiss().downcast_index(self.index.storage).search(query, k)


FAISS_INDEXES: Mapping[str, type[FaissIndex]] = {
    kind.backend: kind for kind in (FaissFlat, FaissIvf, FaissHnsw, FaissSq8)
}


def require_faiss() -> Any:
    """FAISS, imported. Raises ConfigError if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise ConfigError("index: FAISS is not installed; install the extra 'faiss' or 'gpu', or use exact") from None
    return faiss


@contextmanager
def _single_thread() -> Iterator[None]:
    """Threads add to a graph in whatever order they run, so an index is built by one."""
    faiss = require_faiss()
    with _FAISS_SETTINGS:
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            yield
        finally:
            faiss.omp_set_num_threads(before)


def _contiguous(matrix: Tensor) -> np.ndarray:
    return np.ascontiguousarray(matrix.detach().float().cpu().numpy())


def _require_head(path: Path, kind: bytes, dimension: int, size: int) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); build the index again") from None
    if len(head) < _HEAD.size:
        raise ArtifactError(f"{path}: only {len(head)} bytes long; build the index again")
    found_kind, found_dimension, found_size, _, _, _, metric = _HEAD.unpack(head)
    if (found_kind, found_dimension, found_size, metric) != (kind, dimension, size, 0):
        raise ArtifactError(
            f"{path}: begins as {found_kind!r} with {found_size} vectors of width {found_dimension}, expected {kind!r} "
            f"with {size} of {dimension}; build the index again"
        )


def _read(path: Path) -> Any:
    faiss = require_faiss()
    length = path.stat().st_size
    with _FAISS_SETTINGS:
        # No honest file makes FAISS allocate one vector longer than the file, or loop more often than it has bytes.
        for setting in ("set_deserialization_vector_byte_limit", "set_deserialization_loop_limit"):
            getattr(faiss, setting, int)(length)  # younger than some builds of FAISS
        try:
            return faiss.read_index(str(path))
        except (RuntimeError, MemoryError) as error:
            raise ArtifactError(f"{path}: FAISS refuses it ({_reason(error)}); build the index again") from None


def _reason(error: Exception) -> str:
    """The last line of FAISS' message, without the place in its sources."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].rsplit("Error: ", 1)[-1][:200]
