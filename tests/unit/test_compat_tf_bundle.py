"""Checkpoints of TensorFlow read without it: sound files give their numbers, every other file a message."""

import contextlib
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_core.compat import tf_table
from realm_core.compat.crc32c import crc32c, masked_crc32c
from realm_core.compat.tf_bundle import Bundle
from realm_core.compat.tf_table import read_table
from realm_core.errors import DataError
from tests.published import write_bundle, write_table

VARIABLES = {
    "bert/dense/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "bert/dense/bias": np.arange(4, dtype=np.float32) / 3,
    "double": np.array([[1.5], [2.5]], dtype=np.float64),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "global_step": np.array(7, dtype=np.int64),
}


def bitwise_crc32c(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_the_checksum_is_that_of_the_standard(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@settings(max_examples=30, deadline=None)
@given(size=st.integers(8000, 12000), seed=st.integers(0, 99))
def test_long_runs_are_summed_in_lanes_to_the_same_checksum(size: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(size)
    assert crc32c(data) == bitwise_crc32c(data)


def test_checksums_of_several_chunks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realm_core.compat.crc32c._CHUNK", 1000)
    monkeypatch.setattr("realm_core.compat.crc32c._FEW", 0)
    data = np.random.default_rng(0).bytes(4321)
    assert crc32c(data) == bitwise_crc32c(data)


@pytest.mark.parametrize("snappy", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_variable_comes_back(tmp_path: Path, shards: int, snappy: bool) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "model.ckpt-1", VARIABLES, shards=shards, snappy=snappy))
    assert set(bundle.entries) == set(VARIABLES)
    for name, array in VARIABLES.items():
        found = bundle.read(name)
        assert found.dtype == array.dtype and found.shape == array.shape
        np.testing.assert_array_equal(found, array)


@settings(max_examples=40, deadline=None)
@given(
    keys=st.sets(st.binary(min_size=1, max_size=20), min_size=1, max_size=40),
    per_block=st.integers(1, 9),
    snappy=st.booleans(),
)
def test_a_table_gives_back_any_keys(
    tmp_path_factory: pytest.TempPathFactory, keys: set[bytes], per_block: int, snappy: bool
) -> None:
    path = tmp_path_factory.mktemp("table") / "t.index"
    rows = [(key, str(zlib.crc32(key)).encode()) for key in sorted(keys)]
    write_table(path, rows, per_block=per_block, snappy=snappy)
    assert list(read_table(path).items()) == rows


@settings(max_examples=80, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_index_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: float, change: int, cut: bool
) -> None:
    prefix = write_bundle(tmp_path_factory.mktemp("bundle") / "m", VARIABLES)
    path = prefix.with_name("m.index")
    content = bytearray(path.read_bytes())
    at = int(position * len(content))
    if cut:
        del content[at:]
    else:
        content[at] ^= change
    path.write_bytes(bytes(content))
    try:
        bundle = Bundle.open(prefix)
    except DataError:
        return
    # What lies between the blocks and in the padding of the footer has no checksum and no meaning.
    for name, array in VARIABLES.items():
        np.testing.assert_array_equal(bundle.read(name), array)


@settings(max_examples=80, deadline=None)
@given(content=st.binary(max_size=200))
def test_an_index_whose_checksums_are_right_but_whose_content_is_not_is_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    prefix = tmp_path_factory.mktemp("bundle") / "m"
    write_table(prefix.with_name("m.index"), [(b"", b"\x08\x01"), (b"bert/x", content)])
    with contextlib.suppress(
        DataError
    ):  # hardly any bytes describe a tensor; whatever they are, nothing else may be raised
        Bundle.open(prefix).read("bert/x")


def test_a_changed_byte_of_a_tensor_is_found(tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "m", VARIABLES)
    data = Bundle.open(prefix).data_file(0)
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"checksum does not match; fetch m\.data-00000-of-00001 again"):
        Bundle.open(prefix).read(min(VARIABLES))  # the first one of the file


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"f5": 1 << 60}, "asks for 48"),
        ({"f4": 1 << 62}, "ends at byte"),
        ({"f4": 1 << 63}, "not a number"),
        ({"f3": 5}, "cannot be read"),
        ({"f1": 7}, "TensorFlow type 7"),
        ({"f6": 1}, "checksum does not match"),
    ],
)
def test_an_entry_that_lies_is_refused_before_anything_is_allocated(
    tmp_path: Path, entry: dict[str, int], message: str
) -> None:
    prefix = write_bundle(tmp_path / "m", {"kernel": VARIABLES["bert/dense/kernel"]}, **entry)
    with pytest.raises(DataError, match=message):
        Bundle.open(prefix).read("kernel")


def test_a_shape_of_any_size_allocates_nothing(tmp_path: Path) -> None:
    huge = b"".join(b"\x12" + bytes([len(size) + 1]) + b"\x08" + size for size in [b"\xff" * 8 + b"\x7f"] * 3)
    write_table(tmp_path / "m.index", [(b"", b"\x08\x01"), (b"x", b"\x08\x01\x12" + bytes([len(huge)]) + huge)])
    with pytest.raises(DataError, match="its shape"):
        Bundle.open(tmp_path / "m").read("x")


def test_a_variable_stored_in_slices_is_named(tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "m", {"kernel": VARIABLES["bert/dense/kernel"]}, f7=0)
    with pytest.raises(DataError, match="variable kernel is stored in slices"):
        Bundle.open(prefix).read("kernel")


def test_a_compressed_block_may_not_claim_more_than_it_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "m.index"
    write_table(path, [(b"", b"\x08\x01")])
    content = path.read_bytes()
    bomb = b"\xff\xff\xff\xff\x0f\x00" + b"\1"  # snappy: 4 GiB to come
    crc = masked_crc32c(bomb).to_bytes(4, "little")
    footer = bytes([0, 0, 0, len(bomb) - 1]).ljust(40, b"\0") + content[-8:]
    path.write_bytes(bomb + crc + footer)
    with pytest.raises(DataError, match="claim to be 4294967295"):
        read_table(path)


def test_keys_are_bounded_in_length_number_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.index"
    write_table(path, [(b"k" * 2000, b"")])
    with pytest.raises(DataError, match="reaches past its block"):
        read_table(path)
    write_table(path, [(b"b", b""), (b"a", b"")])
    with pytest.raises(DataError, match="not in order"):
        read_table(path)
    monkeypatch.setattr(tf_table, "MAX_ENTRIES", 2)
    write_table(path, [(b"a", b""), (b"b", b""), (b"c", b"")])
    with pytest.raises(DataError, match="more than 2 entries"):
        read_table(path)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "text.index").write_text("not a table at all, but long enough to have a footer of 48 bytes")
    with pytest.raises(DataError, match="last bytes are not those of a table"):
        Bundle.open(tmp_path / "text")
    write_table(tmp_path / "bare.index", [(b"a", b"")])
    with pytest.raises(DataError, match="no header"):
        Bundle.open(tmp_path / "bare")
    write_table(tmp_path / "big.index", [(b"", b"\x08\x01\x10\x01")])
    with pytest.raises(DataError, match="byte order 1"):
        Bundle.open(tmp_path / "big")
