"""Layout of a corpus folder, and the arrays of a shard.

    vocab.txt
    shard-000/blocks.parquet       block_id, doc_id, title, text, start, stop
    shard-000/tokens.safetensors   tokens, titles, sentences and spans: flat values and the offsets of every row

Rows of different length are stored flat with offsets, in one safetensors file that is read by memory map.
"""

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from realm_core.errors import ArtifactError

BLOCKS_FILE, TOKENS_FILE, VOCABULARY_FILE = "blocks.parquet", "tokens.safetensors", "vocab.txt"
ROWS_PER_GROUP = 1024  # blocks of the Parquet file that are decompressed together when one text is asked for

Array = np.ndarray
_TYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


class Ragged:
    """Collects rows of different length: flat int32 values and int64 offsets, four bytes a value."""

    def __init__(self, width: int = 1) -> None:
        self._values = array("i")
        self._ends = array("q", [0])
        self._width = width

    def append(self, row: Sequence[int] | Sequence[tuple[int, int]]) -> None:
        """Add one row; with width 2 its values are pairs."""
        for value in row:
            self._values.extend(value if isinstance(value, tuple) else (value,))
        self._ends.append(len(self._values) // self._width)

    @property
    def values(self) -> Array:
        """Flat [m], or [m, 2] with width 2."""
        flat = np.frombuffer(self._values, dtype=np.int32) if self._values else np.zeros(0, dtype=np.int32)
        return flat if self._width == 1 else flat.reshape(-1, self._width)

    @property
    def offsets(self) -> Array:
        """[rows + 1]; row i is values[offsets[i]:offsets[i + 1]]."""
        return np.frombuffer(self._ends, dtype=np.int64)


def write_arrays(path: Path, arrays: dict[str, Array]) -> None:
    """Write the arrays; equal arrays give equal bytes."""
    save_file({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}, path)


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
