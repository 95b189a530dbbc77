"""Raw files as bounded streams: .gz and .bz2 are expanded on the fly, and never without limit."""

import bz2
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from realm_core.errors import DataError

LONGEST_LINE = 64 << 20  # bytes; a longer line is no record
MOST_EXPANSION = 300  # bytes out of a byte in; text reaches 100 in the best case, bombs a thousand and more
_FREE_EXPANSION = 64 << 20  # bytes that may come out before the ratio counts
_CHUNK = 1 << 16

DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)  # and an OSError without a number, from bz2


class Stream:
    """Expanded bytes of one file. Raises DataError for a file that expands beyond reason."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self._path, self._raw = path, raw
        self._file: BinaryIO = raw
        if path.suffix == ".gz":
            self._file = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
        elif path.suffix == ".bz2":
            self._file = bz2.BZ2File(raw)  # type: ignore[assignment]
        self.position = 0  # bytes given out

    def read(self) -> bytes:
        """The next piece, empty at the end."""
        return self._counted(self._file.read(_CHUNK))

    def line(self) -> bytes:
        """The next line with its end, or the first LONGEST_LINE + 1 bytes of one that is longer."""
        return self._counted(self._file.readline(LONGEST_LINE + 1))

    def _counted(self, piece: bytes) -> bytes:
        self.position += len(piece)
        if self.position > _FREE_EXPANSION and self._file is not self._raw:
            refuse_bomb(self._path, self._raw.tell(), self.position)
        return piece


def refuse_bomb(path: Path, packed: int, expanded: int) -> None:
    """Raise DataError if so many bytes of a compressed file cannot have made so many bytes of text."""
    if expanded > max(_FREE_EXPANSION, MOST_EXPANSION * packed):
        raise DataError(
            f"{path}: {packed} bytes of it expand to {expanded}, more than {MOST_EXPANSION}-fold; this is no text but a "
            "decompression bomb, fetch the file again"
        )


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """Open a plain, .gz or .bz2 file. Errors of reading it surface as they are; see `damage`."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    with raw:
        yield Stream(path, raw)


def damage(error: BaseException, path: Path, where: str) -> DataError:
    """What to tell the operator about an error met while reading."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, gzip.BadGzipFile):
        return DataError(f"{path}: cannot be read ({error.strerror}); check the path")
    kind = "bzip2" if path.suffix == ".bz2" else "gzip"
    return DataError(f"{path}: damaged {kind} file {where} ({error}); fetch the file again")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines that are not blank, without byte order mark and line end; None for a line beyond LONGEST_LINE."""
    number = 0
    with open_stream(path) as stream:
        try:
            while line := stream.line():
                number += 1
                if len(line) > LONGEST_LINE:
                    while line and not line.endswith(b"\n"):
                        line = stream.line()
                    yield number, None
                    continue
                line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
                if line:
                    yield number, line
        except (*DAMAGED, OSError) as error:
            raise damage(error, path, f"after line {number}") from None
