"""Texts of published blocks: arrays of bytes are read to the last byte, and no pickle is ever run."""

import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_core.compat.block_records import read_block_records
from realm_core.errors import DataError
from tests.published import write_records, write_tf_records

HEADER = np.lib.format
RECORDS = [b"one", b"", "zw\u00f6lf".encode(), b"x" * 300, b"y" * 70_000]


def array_of(records: list[Any]) -> np.ndarray:
    array = np.empty(len(records), dtype=object)
    array[:] = records
    return array


def npy(path: Path, array: np.ndarray, content: bytes | None = None, protocol: int = 4) -> Path:
    """An npy file with the header of `array` and its pickle, or other content in place of the pickle."""
    with path.open("wb") as file:
        HEADER.write_array_header_1_0(file, HEADER.header_data_from_array_1_0(array))
        file.write(pickle.dumps(array, protocol) if content is None else content)
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_record_comes_back_in_order(tmp_path: Path, protocol: int) -> None:
    path = npy(tmp_path / "r.npy", array_of(RECORDS), protocol=protocol)
    assert list(read_block_records(path, len(RECORDS))) == RECORDS


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 1001, 2500])
def test_any_number_of_records_is_read_as_numpy_writes_them(tmp_path: Path, count: int) -> None:
    texts = [f"block {number}" for number in range(count)]
    write_records(tmp_path / "r.npy", texts)
    assert [record.decode() for record in read_block_records(tmp_path / "r.npy", count)] == texts


@settings(max_examples=50, deadline=None)
@given(records=st.lists(st.binary(max_size=600), max_size=30), protocol=st.sampled_from([3, 4, 5]))
def test_arrays_of_any_bytes_come_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], protocol: int
) -> None:
    path = npy(tmp_path_factory.mktemp("records") / "r.npy", array_of(records), protocol=protocol)
    assert list(read_block_records(path, len(records))) == records


def test_a_record_that_is_one_object_many_times_is_read_many_times(tmp_path: Path) -> None:
    same = bytes(bytearray(b"the same block"))
    records = [same, b"another", same, same]
    assert list(read_block_records(npy(tmp_path / "r.npy", array_of(records)), 4)) == records


def test_files_of_the_numpy_of_that_time_are_read(tmp_path: Path) -> None:
    old = pickle.dumps(array_of(RECORDS), 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    assert list(read_block_records(npy(tmp_path / "r.npy", array_of(RECORDS), old), len(RECORDS))) == RECORDS


class Payload:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def poisoned(canary: Path) -> dict[str, bytes]:
    """Pickles that run code in places where a careless reader would let them."""
    payload = Payload(canary)
    records = array_of([b"block"])
    call = b"cos\nmkdir\n(X" + len(str(canary)).to_bytes(4, "little") + str(canary).encode() + b"tR"
    plain = pickle.dumps(records, 3)
    return {
        "alone": pickle.dumps(payload),
        "as a record": pickle.dumps(array_of([payload])),
        "inside a record": pickle.dumps(array_of([[b"block", payload]])),
        "after the array": plain[:-1] + b"0" + call + b".",
        "behind the end": plain + pickle.dumps(payload),
        "in front": b"\x80\x03" + call + b"0" + plain[2:],
        "as an instance": b"\x80\x03(ios\nmkdir\n.",
        "as an extension": b"\x80\x03\x82\x01.",
        "as a persistent id": b"\x80\x03Pos.mkdir\n.",
        "in disguise": plain.replace(b"numpy\nndarray", b"os\nmkdir"),
    }


@pytest.mark.parametrize("place", list(poisoned(Path("x"))))
def test_a_payload_is_refused_and_never_run(tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    path = npy(tmp_path / "r.npy", array_of([b"block"]), poisoned(canary)[place])
    with pytest.raises(DataError, match="nothing in it was run"):
        list(read_block_records(path, 1))
    assert not canary.exists()


def test_the_payload_of_these_tests_would_run_if_it_were_loaded(tmp_path: Path) -> None:
    pickle.loads(poisoned(tmp_path / "canary")["as a record"])  # noqa: S301 - shows that the canary can sing
    assert (tmp_path / "canary").exists()


@settings(max_examples=120, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), protocol=st.sampled_from([3, 4]))
def test_a_changed_byte_gives_records_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, position: float, value: int, protocol: int
) -> None:
    path = npy(tmp_path_factory.mktemp("records") / "r.npy", array_of([b"one", b"two", b"three"]), protocol=protocol)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] = value
    path.write_bytes(bytes(content))
    try:
        found = list(read_block_records(path, 3))
    except DataError:
        return
    assert all(isinstance(record, bytes) for record in found)


@settings(max_examples=120, deadline=None)
@given(
    codes=st.lists(st.sampled_from([ord(op.code) for op in pickletools.opcodes]), max_size=40),
    tail=st.binary(max_size=9),
)
def test_any_instructions_are_refused_cleanly(
    tmp_path_factory: pytest.TempPathFactory, codes: list[int], tail: bytes
) -> None:
    path = npy(tmp_path_factory.mktemp("records") / "r.npy", array_of([b"one"]), bytes(codes) + tail)
    with pytest.raises(DataError):
        list(read_block_records(path, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04" + b"(" * 20_000, "more items"),
        (b"\x80\x04" + b")" + b"\x85" * 20_000 + b".", "does not end with one array"),
        (b"\x80\x04N" + b"\x94" * 20_000, "more items"),
        (b"\x80\x04\x8e" + b"\xff" * 8, "cut off or longer"),
        (b"\x80\x04X" + b"\xff" * 4, "text of 4294967295 bytes"),
        (b"\x80\x03Nr\xff\xff\xff\xff.", "out of order"),
        (b"\x80\x02N.", "protocol 2"),
        (b"\x80\x04N", "cut off"),
        (b"", "cut off"),
    ],
)
def test_sizes_that_a_file_claims_are_not_believed(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_block_records(npy(tmp_path / "r.npy", array_of([b"one"]), content), 1))


@pytest.mark.parametrize("records", [["text"], [None], [b"one", 2], [[b"one"]]])
def test_records_that_are_not_bytes_are_refused(tmp_path: Path, records: list[Any]) -> None:
    with pytest.raises(DataError, match="nothing in it was run"):
        list(read_block_records(npy(tmp_path / "r.npy", array_of(records)), len(records)))


def test_an_array_of_numbers_or_of_two_dimensions_is_refused(tmp_path: Path) -> None:
    for array in (np.arange(3), array_of([b"a", b"b"]).reshape(1, 2)):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        (tmp_path / "r.npy").write_bytes(buffer.getvalue())
        with pytest.raises(DataError, match="expected one row of objects"):
            list(read_block_records(tmp_path / "r.npy", len(array)))


def test_the_number_of_records_must_be_that_of_the_vectors(tmp_path: Path) -> None:
    path = npy(tmp_path / "r.npy", array_of([b"one", b"two"]))
    with pytest.raises(DataError, match="2 records, but there are 3 block vectors"):
        list(read_block_records(path, 3))
    two = pickle.dumps(array_of([b"one", b"two"]))
    with pytest.raises(DataError, match=r"2 records where the header says 1|more items"):
        list(read_block_records(npy(tmp_path / "r.npy", array_of([b"one"]), two), 1))


def test_records_of_tensorflow_are_read_with_their_checksums(tmp_path: Path) -> None:
    path = tmp_path / "blocks.tfr"
    write_tf_records(path, RECORDS)
    assert list(read_block_records(path, len(RECORDS))) == RECORDS
    whole = path.read_bytes()
    for count in (len(RECORDS) - 1, len(RECORDS) + 1):
        with pytest.raises(DataError, match="block vectors"):
            list(read_block_records(path, count))
    for broken in (whole[:-1], whole[:5], whole[:13] + b"!" + whole[14:], b"\xff" + whole[1:]):
        path.write_bytes(broken)
        with pytest.raises(DataError):
            list(read_block_records(path, len(RECORDS)))


def test_a_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npy: cannot be read"):
        list(read_block_records(tmp_path / "none.npy", 1))
    (tmp_path / "r.npy").touch()
    with pytest.raises(DataError, match="empty"):
        list(read_block_records(tmp_path / "r.npy", 1))
