"""Where documents come from: the readers by name, the format a file name suggests, and folders of several files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from realm_core.corpus.documents import Document, Tally
from realm_core.corpus.mediawiki import read_mediawiki
from realm_core.corpus.readers import read_dpr, read_jsonl, read_wikiextractor
from realm_core.corpus.tables import Dataset, read_dataset, read_parquet
from realm_core.errors import DataError

Reader = Callable[..., Iterator[Document]]
READERS: dict[str, Reader] = {
    "jsonl": read_jsonl,
    "wikiextractor": read_wikiextractor,
    "mediawiki": read_mediawiki,
    "parquet": read_parquet,
    "dpr": read_dpr,
    "hf": read_dataset,
}
AUTO = "auto"
_ENDINGS = {
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "wikiextractor": (".jsonl", ".json"),
    "mediawiki": (".xml",),
    "parquet": (".parquet",),
    "dpr": (".tsv",),
}


@dataclass(frozen=True)
class Source:
    """An input: a file, a folder of files of one format, or a dataset name (kind "hf")."""

    kind: str
    where: str

    @classmethod
    def find(cls, where: str | Path, kind: str = AUTO) -> "Source":
        """Check the kind, or infer it from the file name. Raises DataError if the file is missing or its kind unclear."""
        if kind != AUTO and kind not in READERS:
            raise DataError(f"--source {kind}: unknown; choose one of {AUTO}, {', '.join(READERS)}")
        if kind == "hf":
            return cls(kind, str(Dataset.parse(str(where)).pinned()))
        path = Path(where)
        if not path.exists():
            raise DataError(
                f"{path}: no such corpus file or folder; pass JSON lines with title and text, or see --source"
            )
        if kind == AUTO:
            names = sorted(path.iterdir()) if path.is_dir() else [path]
            kind = next(filter(None, map(kind_of, names)), "jsonl")
        source = cls(kind, str(path))
        for file in source.files():
            if not file.is_file():
                raise DataError(
                    f"{file}: neither a file nor a folder, but an input is read twice; write it to a file first"
                )
        if not source.files():
            raise DataError(f"{path}: no file whose name ends in {' or '.join(_ENDINGS[kind])} (or .gz, .bz2 of it)")
        return source

    def files(self) -> list[Path]:
        """The files to read, in order of their names; none for a dataset."""
        path = Path(self.where)
        if self.kind == "hf":
            return []
        if not path.is_dir():
            return [path]
        wanted = "jsonl" if self.kind == "wikiextractor" else self.kind
        return [entry for entry in sorted(path.iterdir()) if entry.is_file() and kind_of(entry) == wanted]

    def digest(self, file_sha256: Callable[[Path], str]) -> str:
        """What the input is: the sha256 of one file, or one over those of several, or over a pinned dataset name."""
        files = self.files()
        if self.kind == "hf":
            folder = Path(Dataset.parse(self.where).name)
            if not folder.is_dir():
                return sha256(self.where.encode()).hexdigest()
            files = sorted(path for path in folder.rglob("*") if path.is_file())
        if len(files) == 1:
            return file_sha256(files[0])
        rows = "".join(f"{path.name} {file_sha256(path)}\n" for path in files)
        return sha256(rows.encode("utf-8", "surrogateescape")).hexdigest()  # a file name may be any bytes

    def read(self, on_error: str, tally: Tally) -> Iterator[Document]:
        """All documents; see the readers."""
        reader = READERS[self.kind]
        places: list[Path | str] = [*self.files()] or [self.where]
        for place in places:
            yield from reader(place, on_error, tally)


def kind_of(path: Path) -> str | None:
    """The kind that a file name suggests, if any: docs.jsonl.gz, enwiki-…-articles1.xml-p1p41242.bz2, psgs_w100.tsv."""
    name = path.name.lower()
    for ending in (".gz", ".bz2"):
        name = name.removesuffix(ending)
    if ".xml-p" in name:
        return "mediawiki"
    return next((kind for kind, endings in _ENDINGS.items() if name.endswith(endings)), None)
