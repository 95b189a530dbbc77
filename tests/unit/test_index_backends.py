"""Every index backend: what it finds, what it writes, and what it refuses to read."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from realm_core.errors import ArtifactError, ConfigError, DataError
from realm_core.index.backends import SearchIndex, build_index, known_backends, load_index
from realm_core.index.exact import exact_search
from realm_core.index.recall import recall_against_exact

torch.set_num_threads(1)
FAISS = [name for name in known_backends() if name.startswith("faiss")]


@pytest.fixture(scope="module", params=known_backends())
def backend(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("faiss"):
        pytest.importorskip("faiss")
    return request.param


@pytest.fixture(scope="module")
def clustered() -> tuple[Tensor, Tensor]:
    """2,000 vectors of uneven length around 40 centres that share a common component, and 50 queries near some."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 24, generator=draw) * 1.5 + torch.randn(1, 24, generator=draw)
    vectors = centres[torch.randint(0, 40, (2000,), generator=draw)] + 0.7 * torch.randn(2000, 24, generator=draw)
    return vectors, vectors[::40] + 0.3 * torch.randn(50, 24, generator=draw)


@pytest.fixture(scope="module")
def built(backend: str, clustered: tuple[Tensor, Tensor]) -> SearchIndex:
    return build_index(clustered[0], backend)


def test_recall_on_clustered_vectors_is_high(
    backend: str, built: SearchIndex, clustered: tuple[Tensor, Tensor]
) -> None:
    least = {"exact": 1.0, "faiss_flat": 1.0, "faiss_ivf": 0.95, "faiss_hnsw": 0.95, "faiss_sq8": 0.9, "alsh": 0.9}
    assert recall_against_exact(built, *clustered, k=8) >= least[backend]


def test_an_index_tells_its_size_and_satisfies_the_protocol(backend: str, built: SearchIndex) -> None:
    assert isinstance(built, SearchIndex)
    assert (built.backend, built.size, built.dimension) == (backend, 2000, 24)


def test_results_come_best_first_without_repeats_or_gaps(built: SearchIndex, clustered: tuple[Tensor, Tensor]) -> None:
    scores, rows = built.search(clustered[1], 300)
    assert scores.dtype == torch.float32
    assert rows.dtype == torch.int64
    assert bool((scores.diff(dim=1) <= 0).all())
    assert bool(((rows >= 0) & (rows < 2000)).all())
    assert all(len(set(line.tolist())) == 300 for line in rows)


def test_a_written_index_reads_back_and_answers_the_same(
    backend: str, built: SearchIndex, clustered: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    files = built.save(tmp_path)
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    read = load_index(tmp_path, size=2000, dimension=24)
    assert type(read).load(tmp_path).backend == backend
    for before, after in zip(built.search(clustered[1], 8), read.search(clustered[1], 8), strict=True):
        assert torch.equal(before, after)


def test_building_twice_writes_the_same_bytes(
    backend: str, built: SearchIndex, clustered: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    built.save(tmp_path / "a")
    names = build_index(clustered[0], backend).save(tmp_path / "b")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_k_beyond_a_corpus_of_one_or_a_few_blocks_is_clamped(backend: str) -> None:
    for count in (1, 3):
        scores, rows = build_index(torch.eye(3)[:count] + 0.1, backend).search(torch.ones(2, 3), 8)
        assert scores.shape == rows.shape == (2, count)
        assert sorted(rows[0].tolist()) == list(range(count))


def test_a_numpy_matrix_that_may_not_be_written_is_taken_as_it_is(backend: str) -> None:
    matrix = np.eye(4, dtype=np.float32)
    matrix.flags.writeable = False
    assert build_index(matrix, backend).search(torch.eye(4), 1)[1][:, 0].tolist() == [0, 1, 2, 3]


def test_queries_that_do_not_fit_are_refused(built: SearchIndex) -> None:
    with pytest.raises(ConfigError, match="encoder"):
        built.search(torch.zeros(1, 23), 8)
    with pytest.raises(ConfigError):
        built.search(torch.zeros(1, 24), 0)
    with pytest.raises(DataError, match="not finite"):
        built.search(torch.full((1, 24), float("nan")), 8)


def test_a_vector_that_is_not_finite_is_refused_by_row(backend: str) -> None:
    vectors = torch.ones(5, 3)
    vectors[3, 1] = float("nan")
    with pytest.raises(DataError, match="row 3"):
        build_index(vectors, backend)


def test_a_promise_the_index_does_not_keep_is_an_error(built: SearchIndex, tmp_path: Path) -> None:
    built.save(tmp_path)
    with pytest.raises(ArtifactError, match="2001"):
        load_index(tmp_path, size=2001)
    with pytest.raises(ArtifactError, match="dimension"):
        load_index(tmp_path, size=2000, dimension=128)


def test_a_header_that_lies_about_the_size_is_caught(built: SearchIndex, tmp_path: Path) -> None:
    built.save(tmp_path)
    header = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**header, "size": 1999}))
    with pytest.raises(ArtifactError):
        load_index(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"backend": "exact", "size": "2", "dimension": 2, "params": {}}', "[" * 9999]
)
def test_a_broken_header_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"index\.json"):
        load_index(tmp_path)


def test_an_unknown_backend_or_parameter_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="faiss_hnsw"):
        build_index(torch.eye(3), "scann")
    with pytest.raises(ConfigError, match="chunk"):
        build_index(torch.eye(3), "exact", nprobe=3)
    with pytest.raises(ConfigError, match="tables"):
        build_index(torch.eye(3), "alsh", tables=0)


def test_without_faiss_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="extra 'faiss'"):
        build_index(torch.eye(3), "faiss_flat")


def test_an_inverted_file_widens_its_search_until_k_places_are_filled() -> None:
    pytest.importorskip("faiss")
    vectors = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    index = build_index(vectors, "faiss_ivf", nlist=50, nprobe=1)
    assert recall_against_exact(index, vectors, vectors[:5], 150) == 1.0


def test_more_tables_find_more() -> None:
    draw = torch.Generator().manual_seed(1)
    vectors, queries = torch.randn(3000, 32, generator=draw), torch.randn(40, 32, generator=draw)
    recalls = [
        recall_against_exact(build_index(vectors, "alsh", tables=tables, bits=5, probes=1), vectors, queries, 8)
        for tables in (1, 8, 64)
    ]
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.5 < recalls[-1]


def hostile(original: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "truncated": original[: len(original) // 2],
        "another format": b"\x80\x04\x95" + original[3:],
        "garbage": b"\xff" * 400,
        "huge ntotal": original[:8] + struct.pack("<q", 2**40) + original[16:],
        "huge dimension": original[:4] + struct.pack("<i", 2**30) + original[8:],
        "negative ntotal": original[:8] + struct.pack("<q", -1) + original[16:],
        "another metric": original[:33] + struct.pack("<i", 1) + original[37:],
    }


@pytest.mark.parametrize("name", FAISS)
def test_hostile_faiss_files_are_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    build_index(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), name).save(tmp_path)
    path = tmp_path / "index.faiss"
    for data in hostile(path.read_bytes()).values():
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"index\.faiss"):
            load_index(tmp_path, size=60, dimension=8)


@pytest.mark.parametrize("name", FAISS)
def test_a_faiss_vector_longer_than_the_file_is_never_allocated(name: str, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        pytest.skip("this FAISS sets no limits")
    build_index(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), name).save(tmp_path)
    path = tmp_path / "index.faiss"
    original = path.read_bytes()
    # Wherever a length stands, put two gigabytes there: refused, or not a length and read without harm.
    refused = 0
    for at in range(37, len(original) - 8, 8 if name != "faiss_hnsw" else 64):
        path.write_bytes(original[:at] + struct.pack("<Q", 2**31) + original[at + 8 :])
        try:
            load_index(tmp_path, size=60, dimension=8)
        except ArtifactError:
            refused += 1
    assert refused > 0


def test_rows_outside_the_corpus_from_an_altered_file_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    build_index(vectors, "faiss_ivf", nlist=1).save(tmp_path)
    path = tmp_path / "index.faiss"
    identifiers = struct.pack("<60q", *range(60))
    altered = path.read_bytes().replace(identifiers, struct.pack("<60q", *range(1000, 1060)))
    path.write_bytes(altered)
    with pytest.raises(ArtifactError, match="row"):
        load_index(tmp_path).search(vectors[:2], 8)


@pytest.mark.parametrize("damage", ["truncate", "foreign rows", "unsorted"])
def test_damaged_hash_tables_are_refused(damage: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    build_index(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), "alsh").save(tmp_path)
    path = tmp_path / "tables.safetensors"
    tables = load_file(path)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:100])
    else:
        change = (
            {"rows": tables["rows"] + 7} if damage == "foreign rows" else {"codes": tables["codes"][:, ::-1].copy()}
        )
        save_file({**tables, **change}, path)
    with pytest.raises(ArtifactError, match="tables"):
        load_index(tmp_path)


def test_sq8_ranks_by_vectors_close_to_the_true_ones(clustered: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("faiss")
    vectors, queries = clustered
    found, _ = build_index(vectors, "faiss_sq8").search(queries, 1)
    assert torch.allclose(found, exact_search(queries, vectors, 1)[0], rtol=0.02)
