"""Documents from Parquet files and from Hugging Face datasets, a batch of rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from realm_core.corpus.documents import BadLine, Document, Tally, bad_record, document_of
from realm_core.errors import ConfigError, DataError

_ROWS = 256  # rows of a Parquet file that are expanded together


def read_parquet(path: str | Path, on_error: str = "fail", tally: Tally | None = None) -> Iterator[Document]:
    """Documents {"id"?, "title", "text"} from the columns of a Parquet file; other columns are not read.

    Raises DataError for a damaged file, a missing column, or a file without any document.
    """
    path, tally = Path(path), tally or Tally()
    row = found = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = _wanted(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                for record in _records(batch):
                    document = _document(record, f"{path}: row {row}", on_error, tally)
                    row += 1
                    if document:
                        found += 1
                        yield document
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a sound Parquet file ({str(error).splitlines()[0]}); fetch it again") from None
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read ({reason}); check the file") from None
    if not found:
        raise DataError(f"{path}: no documents in its rows; expected title and text in every row")


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
        raise DataError(f"{chosen}: no documents in {number} rows; expected title and text in every row")


def _document(record: dict[str, Any], place: str, on_error: str, tally: Tally) -> Document | None:
    try:
        document = document_of(record, place)
    except BadLine as problem:
        bad_record(place, problem, on_error, tally.dropped)
        return None
    tally.documents += 1
    return document


def _wanted(path: Path, names: list[str]) -> list[str]:
    for name in ("title", "text"):
        if name not in names:
            raise DataError(f"{path}: no column {name!r}; found {', '.join(names) or 'none'}")
    return [name for name in ("id", "title", "text") if name in names]


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows of a batch; a text that is not UTF-8 becomes bytes, which no text field accepts."""
    for row in range(batch.num_rows):
        yield {name: _value(batch.column(name)[row]) for name in batch.schema.names}


def _value(scalar: Any) -> Any:
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
