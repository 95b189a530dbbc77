"""Documents from Parquet files and from Hugging Face datasets, a batch of rows at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from realm_core.corpus.documents import BadLine, Document, Tally, bad_record, document_of, names_of
from realm_core.corpus.files import LONGEST_LINE, refuse_bomb
from realm_core.errors import ConfigError, DataError

_COLUMNS = ("id", "title", "text")
_ROWS = 256  # rows of a Parquet file that are expanded together


def read_parquet(path: str | Path, on_error: str = "fail", tally: Tally | None = None) -> Iterator[Document]:
    """Documents {"id"?, "title", "text"} from the columns of a Parquet file; other columns are not read.

    Raises DataError for a damaged file, a missing column, a decompression bomb, or a file without any document. Values
    that repeat are held once, as the file holds them: a few kilobytes could stand for any number of long texts.
    """
    path, tally = Path(path), tally or Tally()
    before = tally.dropped.copy()
    row = found = given_out = 0
    try:
        size, metadata = path.stat().st_size, pq.read_metadata(path)
        columns = _wanted(path, metadata.schema.to_arrow_schema().names)
        refuse_bomb(path, size, _expanded_size(metadata))
        flat = [column.path for column in metadata.schema if column.path in columns]
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=flat) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                for record in _records(batch):
                    document = _document(record, f"{path}: row {row}", on_error, tally)
                    row += 1
                    if document:
                        found, given_out = found + 1, given_out + len(document.title) + len(document.text)
                        refuse_bomb(path, size, given_out)
                        yield document
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the second: names of columns that are no text
        raise DataError(f"{path}: not a sound Parquet file ({str(error).splitlines()[0]}); fetch it again") from None
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read ({reason}); check the file") from None
    if not found:
        raise DataError(f"{path}: no documents in its rows{_left_out(tally.dropped - before)}")


@dataclass(frozen=True)
class Dataset:
    """A dataset on the hub, or a local folder that the library `datasets` reads: NAME[:CONFIG][#SPLIT][@REVISION]."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Dataset":
        """Raises ConfigError for an empty name."""
        rest, _, revision = text.partition("@")
        rest, _, split = rest.partition("#")
        name, _, config = rest.partition(":")
        if not name:
            raise ConfigError(f"{text!r} names no dataset; write NAME[:CONFIG][#SPLIT][@REVISION]")
        return cls(name, config or None, split or "train", revision or None)

    def pinned(self) -> "Dataset":
        """The same dataset at the commit it has now, which is what a corpus is recorded to be made of."""
        if self.revision or Path(self.name).is_dir():
            return self
        _library()
        from huggingface_hub import HfApi

        try:
            sha = HfApi().dataset_info(self.name).sha
        except Exception as error:
            raise _unreachable(self, error) from None
        return Dataset(self.name, self.config, self.split, sha)

    def __str__(self) -> str:
        config, revision = f":{self.config}" if self.config else "", f"@{self.revision}" if self.revision else ""
        return f"{self.name}{config}#{self.split}{revision}"


def read_dataset(dataset: str, on_error: str = "fail", tally: Tally | None = None) -> Iterator[Document]:
    """Stream documents {"id"?, "title", "text"} from a Hugging Face dataset; nothing is stored. Code of a dataset never runs.

    Raises ConfigError without the library `datasets`, DataError if the dataset cannot be reached.
    """
    chosen, tally = Dataset.parse(dataset), tally or Tally()
    library = _library()
    number = 0
    try:
        rows = library.load_dataset(
            chosen.name, chosen.config, split=chosen.split, revision=chosen.revision, streaming=True
        )
        for record in rows:
            document = _document(dict(record), f"{chosen}: row {number}", on_error, tally)
            number += 1
            if document:
                yield document
    except DataError:
        raise
    except Exception as error:  # the library, its hub client and its file readers raise types of their own
        raise _unreachable(chosen, error) from None
    if not tally.documents:
        raise DataError(f"{chosen}: no documents in {number} rows{_left_out(tally.dropped)}")


def _left_out(dropped: Mapping[str, int]) -> str:
    why = f", left out: {dict(dropped)}" if dropped else ""
    return f"{why}; expected title and text in every row, and an id that is text or a whole number, or none"


def _document(record: dict[str, Any], place: str, on_error: str, tally: Tally) -> Document | None:
    try:
        document = document_of(record, place)
        if len(document.title) + len(document.text) > LONGEST_LINE:
            raise BadLine("too_long", f"title and text longer than {LONGEST_LINE} characters")
    except BadLine as problem:
        bad_record(place, problem, on_error, tally.dropped)
        return None
    tally.documents += 1
    return document


def _wanted(path: Path, names: list[str]) -> list[str]:
    for name in ("title", "text"):
        if name not in names:
            raise DataError(f"{path}: no column {name!r}; found {names_of(names)}")
    return [name for name in _COLUMNS if name in names]


def _expanded_size(metadata: pq.FileMetaData) -> int:
    """Bytes that all columns have once they are expanded, as the file says; a dictionary counts once.

    Not asked of the single columns: on a damaged file the library ends the process instead of raising.
    """
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows of a batch; a text that is not UTF-8 becomes bytes, which no text field accepts."""
    columns = [_values(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _values(column: pa.Array) -> Iterator[Any]:
    if not isinstance(column, pa.DictionaryArray):
        yield from map(_value, column)
        return
    for place in column.indices.to_pylist():
        if place is not None and not 0 <= place < len(column.dictionary):
            raise pa.ArrowInvalid("a value points beyond its dictionary")
        yield None if place is None else _value(column.dictionary[place])


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "--source hf needs the package datasets; install it (pip install datasets), or pass JSON lines or Parquet"
        ) from None
    return datasets


def _unreachable(dataset: Dataset, error: Exception) -> DataError:
    lines = str(error).strip().splitlines()
    reason = lines[0][:200] if lines else type(error).__name__
    return DataError(
        f"{dataset}: cannot be read from the hub ({reason}); check the name and the network, or pass a local folder or file"
    )
