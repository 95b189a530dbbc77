"""Layout of a corpus folder, and the arrays of a shard.

    vocab.txt
    shard-000/blocks.parquet       block_id, doc_id, title, text, start, stop
    shard-000/tokens.safetensors   tokens, titles, sentences and spans: flat values and the offsets of every row

Rows of different length are stored flat with offsets, in one safetensors file that is read by memory map.
"""

import json
import shutil
from array import array
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from realm_core.errors import ArtifactError

BLOCKS_FILE, TOKENS_FILE, VOCABULARY_FILE = "blocks.parquet", "tokens.safetensors", "vocab.txt"
COLUMNS = ("block_id", "doc_id", "title", "text", "start", "stop")
ROWS_PER_GROUP = 1024  # blocks of the Parquet file that are decompressed together when one text is asked for

Array = np.ndarray
_TYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


def shard_name(number: int) -> str:
    """Folder name of a shard. Rows count through the shards in the order of these names."""
    return f"shard-{number:03d}"


class Ragged:
    """Rows of different length: flat int32 values and int64 ends, in memory."""

    def __init__(self, width: int = 1) -> None:
        self.values = array("i")
        self.ends = array("q")
        self.width = width

    def append(self, row: Sequence[int] | Sequence[tuple[int, int]]) -> None:
        """Add one row; with width 2 its values are pairs."""
        self.values.extend(chain.from_iterable(row) if self.width > 1 else row)  # type: ignore[arg-type]
        self.ends.append(len(self.values) // self.width)


class RaggedFile:
    """The same, with the values on disk: a shard may be larger than memory. Several may share one list of ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self.ends = array("q", [0])

    def extend(self, rows: Ragged) -> None:
        """Add all rows."""
        base = self.ends[-1]
        self._file.write(rows.values.tobytes())
        self.ends.extend(base + end for end in rows.ends)

    def copy_to(self, target: BinaryIO) -> None:
        """Append the values to another file."""
        self._file.seek(0)
        shutil.copyfileobj(self._file, target, 1 << 20)

    def drop(self) -> None:
        """Close and remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def write_arrays(path: Path, offsets: dict[str, RaggedFile], values: dict[str, tuple[RaggedFile, int]]) -> None:
    """Write one safetensors file: the ends as int64 offsets, then int32 values with their width.

    Equal arrays give equal bytes.
    """
    header: dict[str, Any] = {}
    position = 0
    for name, rows in sorted(offsets.items()):
        count = len(rows.ends)
        header[name] = {"dtype": "I64", "shape": [count], "data_offsets": [position, position + 8 * count]}
        position += 8 * count
    for name, (rows, width) in sorted(values.items()):
        count = rows.ends[-1]
        shape = [count] if width == 1 else [count, width]
        header[name] = {"dtype": "I32", "shape": shape, "data_offsets": [position, position + 4 * count * width]}
        position += 4 * count * width
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format wants the data to begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, rows in sorted(offsets.items()):
            file.write(rows.ends.tobytes())
        for _, (rows, _) in sorted(values.items()):
            rows.copy_to(file)


def map_arrays(path: Path) -> dict[str, Array]:
    """Read-only views into the file: nothing is read before it is used, and processes share the pages."""
    try:
        with pa.memory_map(str(path)) as file:  # the map outlives the file handle: no limit on open files is met
            view = file.read_buffer()
        header_size = int.from_bytes(view[:8].to_pybytes(), "little")
        header = json.loads(view[8 : 8 + header_size].to_pybytes())
        arrays = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype = _TYPES[entry["dtype"]]
            flat = np.frombuffer(view, dtype, (end - begin) // dtype.itemsize, 8 + header_size + begin)
            arrays[name] = flat.reshape(entry["shape"])
        return arrays
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}); re-run the corpus stage") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: torn or not a token file ({error}); re-run the corpus stage") from None
