"""Documents dealt out to one file a shard, and read back in order of their ids without holding a shard in memory."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from realm_core.corpus.documents import Document, Tally
from realm_core.errors import DataError, quoted

_READ = "read.json"  # written once every document is on disk
_BUFFERED = 32 << 20  # bytes of all shards together that wait to be written


def shard_of(doc_id: str, shards: int) -> int:
    """Shard of a document: a digest of its id, so it stays where it is when the corpus grows."""
    return int.from_bytes(sha256(doc_id.encode("utf-8", "replace")).digest()[:8], "big") % shards


class Spool:
    """A scratch folder with the raw documents of every shard, and what is known of the shards that are finished."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder, self.shards = folder, shards

    def fill(self, documents: Iterable[Document], tally: Tally) -> None:
        """Deal the documents out, unless an earlier attempt has done so; the tally is that of the reading."""
        known = _read(self.folder / _READ)
        if known is not None and known["sizes"] == self._sizes():
            tally.restore(known["tally"])
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed attempt left
        self.folder.mkdir(parents=True)
        waiting = [bytearray() for _ in range(self.shards)]
        size = given = 0
        for document in documents:
            line = _line(document)
            waiting[shard_of(document.doc_id, self.shards)] += line
            size, given = size + len(line), given + 1
            if size > _BUFFERED:
                self._write(waiting)
                size = 0
        self._write(waiting)
        tally.documents = tally.documents or given  # documents that come from no reader
        _write(self.folder / _READ, {"tally": tally.to_json(), "sizes": self._sizes()})

    def documents(self, shard: int, on_error: str, dropped: Counter[str]) -> Iterator[Document]:
        """The shard's documents by id. Of several with one id the first is kept, and counted, or DataError is raised."""
        path = self._path(shard)
        if not path.exists():
            return
        places = _places(path)
        with path.open("rb") as file:
            previous: Document | None = None
            for _, offset in places:
                file.seek(offset)
                document = _document(file.readline())
                if previous and previous.doc_id == document.doc_id:
                    if on_error == "fail":
                        raise _repeated(previous, document)
                    dropped["duplicate_id"] += 1
                    continue
                previous = document
                yield document

    def finish(self, shard: int, facts: dict[str, Any]) -> None:
        """The shard is written: remember what is known of it."""
        _write(self.folder / f"{shard}.done.json", facts)

    def finished(self, shard: int) -> dict[str, Any] | None:
        """What is known of a shard that an earlier attempt has finished."""
        return _read(self.folder / f"{shard}.done.json")

    def _sizes(self) -> list[int]:
        """Bytes of every shard's file: a power cut may have kept the mark and lost the documents."""
        paths = map(self._path, range(self.shards))
        return [path.stat().st_size if path.exists() else 0 for path in paths]

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard}.documents"

    def _write(self, waiting: list[bytearray]) -> None:
        # Opened anew each time: a corpus may have more shards than a process may have files.
        for shard, lines in enumerate(waiting):
            if lines:
                with self._path(shard).open("ab") as file:
                    file.write(lines)
                lines.clear()


def _write(path: Path, facts: dict[str, Any]) -> None:
    # Whole or not at all for whoever comes after a kill. Not forced to the disk: what a power cut takes is noticed by
    # the sizes and digests in here.
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _line(document: Document) -> bytes:
    rest = [document.title, document.text, document.links, document.place, document.hidden]
    return f"{json.dumps(document.doc_id)}\t{json.dumps(rest)}\n".encode("ascii")


def _document(line: bytes) -> Document:
    doc_id, _, rest = line.partition(b"\t")
    title, text, links, place, hidden = json.loads(rest)
    ranges = tuple((start, stop) for start, stop in links)
    return Document(json.loads(doc_id), title, text, ranges, place, None if hidden is None else tuple(hidden))


def _places(path: Path) -> list[tuple[str, int]]:
    """Id and offset of every document, in order of the ids and, among equals, of the input."""
    places, offset = [], 0
    with path.open("rb") as file:
        for line in file:
            places.append((json.loads(line[: line.index(b"\t")]), offset))
            offset += len(line)
    return sorted(places)


def _repeated(first: Document, second: Document) -> DataError:
    where = f"{second.place}: " if second.place else ""
    before = f" at {first.place}" if first.place else ""
    same = (
        "the same title and text occur" if (first.title, first.text) == (second.title, second.text) else "the id occurs"
    )
    return DataError(
        f"{where}document id {quoted(second.doc_id)} occurs more than once, before{before}: {same} again "
        f"(titles {quoted(first.title)} and {quoted(second.title)}); ids must be unique, or keep the first with "
        "--on-error skip"
    )
