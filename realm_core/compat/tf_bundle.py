"""Reads a TensorFlow checkpoint ("tensor bundle": PREFIX.index and PREFIX.data-xxxxx-of-xxxxx) without TensorFlow.

The index is a sorted table from variable names to descriptions in protocol-buffer form; the data files hold raw tensors,
each with a CRC-32C. Tensors are memory-mapped: nothing is ever allocated on the word of a file.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from realm_core.compat.crc32c import masked_crc32c
from realm_core.compat.tf_table import read_table, read_varint
from realm_core.errors import DataError

_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # numbers of tensorflow/core/framework/types.proto
_LITTLE_ENDIAN = 0
_MAX_SHARDS = 99_999
_MAX_DIMENSIONS = 8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies and what it is."""

    dtype: int  # TensorFlow's number
    shape: tuple[int, ...]
    shard: int
    offset: int  # bytes
    size: int  # bytes
    crc: int  # masked CRC-32C of the bytes
    sliced: bool  # stored in several parts


class Bundle:
    """One checkpoint. `entries` maps every variable name to its description."""

    def __init__(self, prefix: Path, shards: int, entries: dict[str, Entry]) -> None:
        self.prefix, self.shards, self.entries = prefix, shards, entries

    @classmethod
    def open(cls, prefix: Path) -> "Bundle":
        """Read the index `PREFIX.index`. Raises DataError if it is missing, damaged or of an unknown kind."""
        path = index_of(prefix)
        table = read_table(path)
        try:
            header = _fields(table.pop(b"")) if b"" in table else None
            entries = {name.decode("utf-8"): _entry(value) for name, value in table.items()}
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); fetch it again") from None
        if header is None:
            raise DataError(f"{path}: a table, but not a checkpoint index: it has no header; name another prefix")
        shards, order = _number(header, 1), _number(header, 2)
        if not 1 <= shards <= _MAX_SHARDS or order != _LITTLE_ENDIAN:
            raise DataError(f"{path}: {shards} data files, byte order {order}; only little-endian files are read")
        return cls(prefix, shards, entries)

    def data_file(self, shard: int) -> Path:
        """Path of one data file."""
        return self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self.shards:05d}")

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only map of the file, after its checksum. Raises DataError."""
        if name not in self.entries:
            raise DataError(f"{self.prefix}: no variable {name!r}; it has {len(self.entries)} others")
        entry = self.entries[name]
        where = f"{self.prefix}: variable {name}"
        if entry.dtype not in _TYPES or entry.sliced:
            kind = "stored in slices" if entry.sliced else f"of TensorFlow type {entry.dtype}"
            raise DataError(f"{where} is {kind}, which is not read; export the checkpoint with plain float variables")
        dtype = np.dtype(_TYPES[entry.dtype])
        expected = math.prod(entry.shape) * dtype.itemsize
        if entry.size != expected:
            raise DataError(f"{where} has {entry.size} bytes, its shape {entry.shape} asks for {expected}")
        raw = self._bytes(entry, where)
        if masked_crc32c(raw) != entry.crc:
            raise DataError(f"{where}: the checksum does not match; fetch {self.data_file(entry.shard).name} again")
        return raw.view(dtype).reshape(entry.shape)

    def _bytes(self, entry: Entry, where: str) -> np.ndarray:
        path = self.data_file(entry.shard)
        try:
            available = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); fetch all files of the checkpoint") from None
        if entry.offset + entry.size > available:
            raise DataError(f"{where} ends at byte {entry.offset + entry.size} of {path.name}, which has {available}")
        if entry.size == 0:
            return np.empty(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r", offset=entry.offset, shape=(entry.size,))


def index_of(prefix: Path) -> Path:
    """Path of the index of a checkpoint."""
    return prefix.with_name(f"{prefix.name}.index")


def _entry(value: bytes) -> Entry:
    fields = _fields(value)
    shape = fields.get(2, [b""])[-1]
    if not isinstance(shape, bytes):
        raise ValueError("a shape is not a message")
    return Entry(
        dtype=_number(fields, 1),
        shape=_shape(shape),
        shard=_number(fields, 3),
        offset=_number(fields, 4),
        size=_number(fields, 5),
        crc=_number(fields, 6),
        sliced=7 in fields,
    )


def _shape(message: bytes) -> tuple[int, ...]:
    fields = _fields(message)
    if 3 in fields or len(fields.get(2, [])) > _MAX_DIMENSIONS:
        raise ValueError("a variable without a fixed shape")
    sizes = []
    for dimension in fields.get(2, []):
        if not isinstance(dimension, bytes):
            raise ValueError("a dimension is not a message")
        sizes.append(_number(_fields(dimension), 1))
    return tuple(sizes)


def _number(fields: dict[int, list[int | bytes]], tag: int) -> int:
    """A field that holds a number; 0 if it is absent, as protocol buffers have it. Negative numbers have no place here."""
    value = fields.get(tag, [0])[-1]
    if not isinstance(value, int) or value >= 1 << 63:
        raise ValueError(f"field {tag} is not a number of at least 0")
    return value


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """Field number -> values of a protocol-buffer message, one level deep. Raises ValueError."""
    fields: dict[int, list[int | bytes]] = {}
    for tag, value in _wire(message):
        fields.setdefault(tag, []).append(value)
    return fields


def _wire(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        key, at = read_varint(message, at)
        tag, kind = key >> 3, key & 7
        if kind == _VARINT:
            number, at = read_varint(message, at)
            yield tag, number
            continue
        if kind == _BYTES:
            length, at = read_varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} is unknown")
        if at + length > len(message):
            raise ValueError("a message is cut off")
        piece = message[at : at + length]
        at += length
        yield tag, piece if kind == _BYTES else int.from_bytes(piece, "little")
