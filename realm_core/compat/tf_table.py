"""Reads the sorted table that a TensorFlow checkpoint index is (the LevelDB table format), trusting nothing in it.

A file is blocks, then a footer that points to the index block, whose values point to the data blocks. A block is entries
with shared key prefixes, a list of restart points, one byte that says how it is compressed, and a masked CRC-32C.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from realm_core.compat.crc32c import masked_crc32c
from realm_core.errors import DataError

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes
MAX_FILE = 64 << 20  # bytes; the index of BERT-base takes some 20 thousand
MAX_ENTRIES = 100_000
MAX_KEY = 1024  # bytes
_TRAILER = 5  # compression type and checksum
_PLAIN, _SNAPPY = 0, 1
_MOST_EXPANSION = 64  # snappy cannot make more bytes of one


def read_table(path: Path) -> dict[bytes, bytes]:
    """All keys and values, in the order of the file. Raises DataError naming what is wrong and where."""
    content = _content(path)
    entries: dict[bytes, bytes] = {}
    try:
        index = _block(content, *_footer(content))
        for _, handle in _entries(index):
            offset, at = read_varint(handle, 0)
            size, _ = read_varint(handle, at)
            for key, value in _entries(_block(content, offset, size)):
                if entries and key <= next(reversed(entries)):
                    raise ValueError(f"keys are not in order at {key[:40]!r}")
                if len(entries) == MAX_ENTRIES:
                    raise ValueError(f"more than {MAX_ENTRIES} entries")
                entries[key] = value
    except ValueError as error:
        raise DataError(f"{path}: damaged or not a checkpoint index ({error}); fetch it again") from None
    return entries


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, next position) of a variable-length unsigned number of at most 64 bits. Raises ValueError."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at
    raise ValueError("a number of more than 64 bits")


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise DataError(f"{path}: {size} bytes, an index has at most {MAX_FILE}; this is another file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _footer(content: bytes) -> tuple[int, int]:
    """(offset, size) of the index block."""
    if len(content) < FOOTER or int.from_bytes(content[-8:], "little") != MAGIC:
        raise ValueError("the last bytes are not those of a table")
    footer = content[-FOOTER:-8]
    at = 0
    for _ in range(2):  # the first handle points to a block about blocks, which TensorFlow leaves empty
        _, at = read_varint(footer, at)
    offset, at = read_varint(footer, at)
    size, _ = read_varint(footer, at)
    return offset, size


def _block(content: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + _TRAILER > len(content) - FOOTER:
        raise ValueError(f"a block of {size} bytes at {offset} reaches past the end")
    stored = int.from_bytes(content[end + 1 : end + _TRAILER], "little")
    if masked_crc32c(content[offset : end + 1]) != stored:
        raise ValueError(f"the checksum of the block at {offset} does not match")
    kind, body = content[end], content[offset:end]
    if kind == _PLAIN:
        return body
    if kind == _SNAPPY:
        return _decompressed(body)
    raise ValueError(f"compression type {kind} is unknown")


def _decompressed(body: bytes) -> bytes:
    length, _ = read_varint(body, 0)
    if length > _MOST_EXPANSION * len(body):
        raise ValueError(f"{len(body)} compressed bytes claim to be {length}")
    try:
        return pa.decompress(body, decompressed_size=length, codec="snappy", asbytes=True)
    except (OSError, pa.ArrowException):
        raise ValueError("a compressed block does not unpack") from None


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if len(block) < 4 or end < 0:
        raise ValueError("a block is shorter than its restart points")
    key, at = b"", 0
    while at < end:
        shared, at = read_varint(block, at)
        own, at = read_varint(block, at)
        length, at = read_varint(block, at)
        if shared > len(key) or shared + own > MAX_KEY or at + own + length > end:
            raise ValueError("an entry reaches past its block")
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + length]
        at += length
