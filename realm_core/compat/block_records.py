"""Reads the texts behind published block vectors: `block_records.npy`, an object array of bytes, or a TFRecord file.

An object array is a pickle, which can run code when it is loaded. It is never loaded here: see `object_array`.
"""

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from realm_core.compat.crc32c import masked_crc32c
from realm_core.compat.object_array import MAX_RECORD, ObjectArray
from realm_core.errors import DataError

RECORDS, TITLES = "block_records.tfr", "block_titles.tfr"  # in folders that this project exported
NPY = b"\x93NUMPY"


def read_block_records(path: Path, expected: int) -> Iterator[bytes]:
    """The `expected` records of a file, one at a time and in order. Raises DataError at the first untrusted byte.

    What is wrong with the end of a file is said when the end is reached: use the records for good only then.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise DataError(f"{path}: empty; fetch it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if data[: len(NPY)] == NPY:
                    count, start = _header(path)
                    _require_count(count, expected)
                    yield from ObjectArray(data, start, count).records()
                else:
                    yield from _tf_records(data, expected)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, IndexError, RecursionError) as error:
        reason = "cut off" if isinstance(error, IndexError) else str(error)
        raise DataError(f"{path}: {reason}; nothing in it was run, fetch the file again") from None


def write_block_records(path: Path, records: Iterable[bytes]) -> None:
    """A TFRecord file, which `read_block_records` reads: the published form that is no pickle."""
    with path.open("wb") as file:
        for record in records:
            length = len(record).to_bytes(8, "little")
            for part in (length, record):
                file.write(part + masked_crc32c(part).to_bytes(4, "little"))


def _header(path: Path) -> tuple[int, int]:
    """(records, position of the pickle)."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"npy version {version} is unknown")
        try:
            shape, _, dtype = readers[version](file)
        except Exception as error:  # numpy reads the header as a Python literal, and lets that reader's errors through
            raise ValueError(f"a damaged header ({type(error).__name__})") from None
        if dtype != np.dtype(object) or len(shape) != 1:
            raise ValueError(f"an array of {dtype} {shape}, expected one row of objects")
        return int(shape[0]), file.tell()


def _require_count(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{found} records, but there are {expected} block vectors; they do not belong together")


def _tf_records(data: mmap.mmap, expected: int) -> Iterator[bytes]:
    """Each record is its length, a checksum of that, the bytes, and a checksum of them."""
    at = found = 0
    while at < len(data):
        if found == expected:
            raise ValueError(f"more than {expected} records, as many as there are block vectors")
        if at + 12 > len(data):
            raise ValueError("neither an npy nor a whole TFRecord file: the last record is cut off")
        head = data[at : at + 8]
        if masked_crc32c(head) != int.from_bytes(data[at + 8 : at + 12], "little"):
            raise ValueError(f"neither an npy nor a sound TFRecord file: wrong checksum at byte {at}")
        start, length = at + 12, int.from_bytes(head, "little")
        at = start + length + 4
        if at > len(data) or length > MAX_RECORD:
            raise ValueError(f"the record at byte {start} is cut off or longer than {MAX_RECORD} bytes")
        record = data[start : start + length]
        if masked_crc32c(record) != int.from_bytes(data[at - 4 : at], "little"):
            raise ValueError(f"the record at byte {start} does not match its checksum")
        found += 1
        yield record
    _require_count(found, expected)
