"""Snapshots on disk, and the measures taken between two of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_core.errors import ArtifactError, ConfigError
from realm_core.index.recall import displacement, overlap, recall_against_exact
from realm_core.index.snapshot import Snapshot, as_tensor, read_matrix, vector_report, write_matrix

NAMES = ["shard-000.npy", "shard-001.npy"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_matrix(tmp_path / NAMES[0], np.arange(6, dtype=np.float32).reshape(3, 2))
    write_matrix(tmp_path / NAMES[1], np.arange(4, dtype=np.float32).reshape(2, 2) + 100)
    return tmp_path


def test_rows_stand_in_the_order_of_the_shard_names(folder: Path) -> None:
    snapshot = Snapshot.open(folder, NAMES)
    assert snapshot.vectors().tolist() == [[0, 1], [2, 3], [4, 5], [100, 101], [102, 103]]
    assert Snapshot.open(folder, NAMES[::-1]).vectors()[0].tolist() == [100, 101]
    assert (snapshot.size, snapshot.dimension, snapshot.offsets) == (5, 2, (0, 3))
    assert snapshot.shard("shard-001.npy").shape == (2, 2)


def test_a_shard_is_mapped_and_writing_into_it_does_not_reach_the_file(folder: Path) -> None:
    vectors = Snapshot.open(folder, NAMES[:1]).vectors()
    assert isinstance(vectors, np.memmap)
    as_tensor(vectors)[0, 0] = 7
    assert vectors[0, 0] == 7
    assert read_matrix(folder / NAMES[0])[0, 0] == 0


def test_a_shard_without_blocks_is_allowed(folder: Path) -> None:
    write_matrix(folder / "empty.npy", np.empty((0, 2), dtype=np.float32))
    assert Snapshot.open(folder, [*NAMES, "empty.npy"]).size == 5
    assert Snapshot.open(folder, ["empty.npy"]).vectors().shape == (0, 2)


def save(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, array, allow_pickle=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b""), "not a readable"),
        (lambda path: path.write_bytes(b"\x80\x04]."), "not a readable"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "not a readable"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "not a readable"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"(3, 2)", b"(3,-2)")), "not a readable"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"'<f4'", b"'|O8'")), "not a readable"),
        (save(np.zeros((3, 2), dtype=np.float64)), "float64"),
        (save(np.zeros(6, dtype=np.float32)), "float32 matrix"),
        (save(np.asfortranarray(np.zeros((3, 2), dtype=np.float32))), "column by column"),
        (save(np.zeros((3, 5), dtype=np.float32)), "different encoders"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder / NAMES[0])
    with pytest.raises(ArtifactError, match=message) as error:
        Snapshot.open(folder, NAMES)
    assert "shard-00" in str(error.value)


@pytest.mark.parametrize("name", ["../shard-000.npy", "/etc/hostname", "a/b.npy", "..", ""])
def test_a_shard_name_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="plain file name"):
        Snapshot.open(folder, [name])


def test_a_snapshot_of_no_shards_and_an_unknown_shard_are_errors(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="no shards"):
        Snapshot.open(folder, [])
    with pytest.raises(ArtifactError, match=r"shard-000\.npy"):
        Snapshot.open(folder, NAMES).shard("shard-002.npy")


def test_the_report_counts_rows_that_are_bad_and_measures_the_others() -> None:
    matrix = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 0], [0, 1]], dtype=np.float32)
    assert vector_report(matrix) == {
        "rows": 5, "dimension": 2, "finite": 3, "non_finite": 2, "zero": 1,
        "norm_min": 0.0, "norm_mean": 2.0, "norm_max": 5.0,
    }  # fmt: skip
    assert vector_report(np.empty((0, 2), dtype=np.float32))["norm_max"] == 0


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4, unique=True), min_size=1, max_size=6), st.randoms())
@settings(max_examples=40, deadline=None)
def test_overlap_ignores_order_and_is_symmetric(lists: list[list[int]], shuffle: object) -> None:
    rows = torch.tensor(lists)
    other = rows[torch.randperm(len(rows))]
    assert overlap(rows, rows.flip(1)) == 1.0
    assert overlap(rows, other) == overlap(other, rows)
    expected = np.mean([len(set(a) & set(b)) / 4 for a, b in zip(lists, other.tolist(), strict=True)])
    assert overlap(rows, other) == pytest.approx(expected)
    assert overlap(rows, rows + 10) == 0.0


def test_overlap_of_unlike_lists_is_an_error() -> None:
    with pytest.raises(ConfigError, match="same k"):
        overlap(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))


def test_displacement_of_a_turn_and_of_nothing() -> None:
    old = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    still = displacement(old, old)
    assert (still["cosine_mean"], still["distance_max"], still["relative_distance"]) == (1.0, 0.0, 0.0)
    moved = displacement(old, torch.tensor([[0.0, 2.0], [0.0, 2.0]]).numpy())
    assert (moved["cosine_min"], moved["cosine_mean"]) == (0.0, 0.5)
    assert moved["distance_max"] == pytest.approx(8**0.5)
    assert moved["relative_distance"] == pytest.approx(8**0.5 / 4)


class Fixed:
    """An index that returns what it is told."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = torch.tensor(rows)

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(self.rows.shape), self.rows


def test_recall_counts_equal_vectors_as_equally_good_and_repeats_once() -> None:
    vectors = torch.tensor([[1.0], [1.0], [1.0], [0.5], [0.2]])
    query = torch.ones(1, 1)
    assert recall_against_exact(Fixed([[2, 1]]), vectors, query, 2) == 1.0
    assert recall_against_exact(Fixed([[2, 2]]), vectors, query, 2) == 0.5
    assert recall_against_exact(Fixed([[3, 4]]), vectors, query, 2) == 0.0
    assert recall_against_exact(Fixed([[0, 1, 2, 4]]), vectors, query, 4) == 0.75
    assert recall_against_exact(Fixed([[0, 1, 2, 3, 4]]), vectors.numpy(), query, 50) == 1.0


def test_recall_of_an_index_over_other_vectors_is_an_error() -> None:
    with pytest.raises(ConfigError, match="built from others"):
        recall_against_exact(Fixed([[7]]), torch.ones(3, 1), torch.ones(1, 1), 1)
