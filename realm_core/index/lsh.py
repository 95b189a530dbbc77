"""Asymmetric locality-sensitive hashing for maximum inner product search, in numpy and torch.

Shrivastava and Li 2014 (the paper REALM cites for sublinear search) turn inner products into a near-neighbour question
by mapping stored vectors and queries differently. The sign variant (Shrivastava and Li 2015) hashes with random
hyperplanes. The map used is the one-component form of Neyshabur and Srebro 2015: for vectors scaled into the unit
ball, x -> [x, sqrt(1 - |x|^2)] and q -> [q / |q|, 0] make the cosine of a pair its inner product over |q|.

Subtracting the mean vector first changes every inner product with a query by one constant, so the ranking stays, while
the angles spread out: trained embeddings share a large common component.
"""

import heapq
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from realm_core.errors import ArtifactError
from realm_core.index.backends import (
    VECTORS,
    parse_params,
    read_header,
    require_queries,
    require_range,
    require_shape,
    write_header,
)
from realm_core.index.exact import exact_search, merge_topk, score_rows
from realm_core.index.snapshot import as_tensor, read_matrix, write_matrix

TABLES = "tables.safetensors"


@dataclass(frozen=True, kw_only=True)
class AlshParams:
    tables: int = 16  # independent hash tables
    bits: int | None = None  # hyperplanes a table; None: about 16 vectors a bucket
    probes: int = 24  # buckets read a table: the query's own, then those beyond its nearest hyperplanes
    seed: int = 0

    def __post_init__(self) -> None:
        require_range("alsh", "tables", self.tables, 1, 1024)
        if self.bits is not None:
            require_range("alsh", "bits", self.bits, 1, 30)
        require_range("alsh", "probes", self.probes, 1)
        require_range("alsh", "seed", self.seed, 0)


class AlshIndex:
    """T tables of B-bit sign hashes; candidates of all buckets read are scored exactly."""

    backend: ClassVar[str] = "alsh"

    def __init__(
        self,
        vectors: Float[Tensor, "N D"],
        params: AlshParams,
        planes: Float[ndarray, "T B D+1"],
        codes: Int[ndarray, "T N"],
        rows: Int[ndarray, "T N"],
    ) -> None:
        self.vectors, self.params, self.planes = vectors, params, planes
        self.codes, self.rows = codes, rows  # codes of a table in ascending order, and the rows they belong to

    @classmethod
    def build(cls, vectors: Float[Tensor, "N D"], params: Mapping[str, Any]) -> "AlshIndex":
        chosen = parse_params(cls.backend, AlshParams, params)
        bits = chosen.bits or max(1, min(30, round(np.log2(max(2, len(vectors) / 16)))))
        shape = (chosen.tables, bits, vectors.shape[1] + 1)
        planes = np.random.default_rng(chosen.seed).standard_normal(shape, dtype=np.float32)
        held = vectors.detach().float().cpu()
        codes = _vector_codes(held, planes)
        order = np.argsort(codes, axis=1, kind="stable")
        return cls(held, chosen, planes, np.take_along_axis(codes, order, axis=1), order.astype(np.int64))

    @property
    def size(self) -> int:
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        return self.vectors.shape[1]

    def search(self, queries: Float[Tensor, "Q D"], k: int) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
        """See `SearchIndex.search`. True inner products; a query with too few candidates is searched exactly."""
        require_queries(self, queries, k)
        query, k = queries.detach().float().cpu(), min(k, self.size)
        scores, rows = torch.empty(len(query), k), torch.empty(len(query), k, dtype=torch.int64)
        margins = np.einsum("tbd,qd->qtb", self.planes[:, :, :-1], query.numpy())  # the query's last component is 0
        for i, margin in enumerate(margins):
            at = torch.from_numpy(self._candidates(margin))
            if len(at) < k:
                found = exact_search(query[i : i + 1], self.vectors, k)
            else:
                found = merge_topk([(score_rows(query[i : i + 1], self.vectors, at[None]), at[None])], k)
            scores[i], rows[i] = found[0][0], found[1][0]
        return scores.to(queries.device), rows.to(queries.device)

    def _candidates(self, margin_TB: Float[ndarray, "T B"]) -> Int[ndarray, " C"]:
        found: list[ndarray] = []
        for codes, rows, margin in zip(self.codes, self.rows, margin_TB, strict=True):
            probed = _probe_codes(margin, self.params.probes)
            low, high = np.searchsorted(codes, probed, "left"), np.searchsorted(codes, probed, "right")
            found.extend(rows[a:b] for a, b in zip(low, high, strict=True) if b > a)
        return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)

    def save(self, folder: Path) -> list[str]:
        write_matrix(folder / VECTORS, self.vectors.numpy())
        save_file({"planes": self.planes, "codes": self.codes, "rows": self.rows}, folder / TABLES)
        return [VECTORS, TABLES, write_header(folder, self, asdict(self.params))]

    @classmethod
    def load(cls, folder: Path) -> "AlshIndex":
        header = read_header(folder, cls.backend)
        params = parse_params(cls.backend, AlshParams, header["params"])
        vectors = as_tensor(read_matrix(folder / VECTORS))
        require_shape(folder / VECTORS, vectors.shape, header)
        try:
            tables = load_file(folder / TABLES)
        except (OSError, SafetensorError, ValueError) as error:
            raise ArtifactError(f"{folder / TABLES}: not readable ({error}); build the index again") from None
        _require_tables(folder / TABLES, tables, params, vectors.shape[0], vectors.shape[1])
        return cls(vectors, params, tables["planes"], tables["codes"], tables["rows"])


def augment(vectors: Float[ndarray, "N D"], mean: Float[ndarray, " D"], radius: float) -> Float[ndarray, "N D+1"]:
    """Centre, scale into the unit ball and add the component that makes every norm 1."""
    scaled = (vectors - mean) / max(radius, 1e-30)
    rest = np.sqrt(np.clip(1.0 - np.square(scaled, dtype=np.float64).sum(axis=1), 0.0, None))
    return np.concatenate([scaled, rest[:, None].astype(np.float32)], axis=1)


def _vector_codes(vectors: Tensor, planes_TBD: ndarray, rows: int = 65536) -> Int[ndarray, "T N"]:
    matrix = vectors.numpy()
    mean = matrix.mean(axis=0, dtype=np.float64).astype(np.float32)
    blocks = [matrix[start : start + rows] for start in range(0, len(matrix), rows)]
    radius = max(float(np.linalg.norm(block - mean, axis=1).max()) for block in blocks)
    weights = 1 << np.arange(planes_TBD.shape[1], dtype=np.int64)
    codes = []
    for block in blocks:
        margin_NTB = np.einsum("tbd,nd->ntb", planes_TBD, augment(block, mean, radius), optimize=True)
        codes.append(((margin_NTB > 0) @ weights).T.astype(np.int32))
    return np.ascontiguousarray(np.concatenate(codes, axis=1))


def _probe_codes(margin_B: Float[ndarray, " B"], probes: int) -> Int[ndarray, " P"]:
    """Codes of the buckets to read: by ascending sum of the distances to the hyperplanes that have to be crossed.

    Query-directed probing (Lv et al. 2007): a heap of sets of crossings, each grown by its next nearest hyperplane or
    by exchanging its farthest one.
    """
    own = int(((margin_B > 0) * (1 << np.arange(len(margin_B), dtype=np.int64))).sum())
    order = np.argsort(np.abs(margin_B), kind="stable")
    cost = np.abs(margin_B)[order].tolist()
    codes = [own]
    heap: list[tuple[float, tuple[int, ...]]] = [(cost[0], (0,))]
    while heap and len(codes) < probes:
        total, crossed = heapq.heappop(heap)
        codes.append(own ^ sum(1 << int(order[j]) for j in crossed))
        last = crossed[-1]
        if last + 1 < len(cost):
            heapq.heappush(heap, (total + cost[last + 1], (*crossed, last + 1)))
            heapq.heappush(heap, (total - cost[last] + cost[last + 1], (*crossed[:-1], last + 1)))
    return np.array(codes, dtype=np.int64)


def _require_tables(path: Path, tables: Mapping[str, ndarray], params: AlshParams, size: int, dimension: int) -> None:
    bits = tables["planes"].shape[1] if "planes" in tables and tables["planes"].ndim == 3 else 0
    expected = {
        "planes": ((params.tables, bits, dimension + 1), "float32"),
        "codes": ((params.tables, size), "int32"),
        "rows": ((params.tables, size), "int64"),
    }
    right = {name: (array.shape, array.dtype.name) for name, array in tables.items()} == expected
    right = right and 1 <= bits <= 30 and bool(np.isfinite(tables["planes"]).all())
    right = right and bool((np.sort(tables["rows"], axis=1) == np.arange(size)).all())
    if not (right and bool((tables["codes"][:, 1:] >= tables["codes"][:, :-1]).all())):
        raise ArtifactError(f"{path}: not hash tables of {size} vectors of width {dimension}; build the index again")
