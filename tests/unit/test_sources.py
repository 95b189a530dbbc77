"""Readers of tables and datasets, the kinds that file names suggest, folders of files, and bounded text files."""

import bz2
import gzip
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import realm_core.corpus.files as files
from realm_core.artifacts.manifest import file_sha256
from realm_core.corpus.documents import Document, Tally
from realm_core.corpus.readers import read_dpr, read_jsonl
from realm_core.corpus.sources import Source, kind_of
from realm_core.corpus.tables import Dataset, read_dataset, read_parquet
from realm_core.errors import ConfigError, DataError

LINE = '{"id": "%s", "title": "T", "text": "x"}\n'


def parquet(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_parquet_file_gives_its_rows(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", id=[7, 8], title=["A", "B"], text=["a", "b"], url=["u", "v"])
    assert list(read_parquet(path)) == [Document("7", "A", "a"), Document("8", "B", "b")]
    named = next(iter(read_parquet(parquet(tmp_path / "q.parquet", title=["A"], text=["a"]))))
    assert len(named.doc_id) == 32


def test_bad_rows_of_a_parquet_file_are_named_or_counted(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).buffers())
    pq.write_table(pa.table({"title": ["A", "B", None], "text": text}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet: row 1: .*'text' is bytes"):
        list(read_parquet(tmp_path / "p.parquet"))
    tally = Tally()
    assert [document.text for document in read_parquet(tmp_path / "p.parquet", "skip", tally)] == ["good"]
    assert (tally.dropped, tally.pages) == ({"wrong_type": 2}, 3)


def test_a_parquet_file_that_is_none_or_lacks_columns_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", title=["A" * 5000], body=["a"])
    with pytest.raises(DataError, match=r"no column 'text'; found body, title"):
        list(read_parquet(path))
    whole = parquet(path, title=["A"], text=["a"]).read_bytes()
    for content in (b"", b"PAR1", whole[:-10], whole[:4] + b"\xff" * 40 + whole[44:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"p\.parquet"):
            list(read_parquet(path))
    with pytest.raises(DataError, match="no documents"):
        list(read_parquet(parquet(path, title=[None], text=["a"]), "skip"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_parquet(tmp_path / "absent.parquet"))


DPR = 'id\ttext\ttitle\n1\t"Aaron ( or ; ""Ahärôn"") is a prophet."\tAaron\n2\tThe "Book" says.\t"Aaron"\n'


@pytest.mark.parametrize("name", ["psgs_w100.tsv", "psgs_w100.tsv.gz"])
def test_passages_of_dpr_are_unquoted_and_stay_apart(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(DPR.encode()) if name.endswith("gz") else DPR.encode())
    assert list(read_dpr(tmp_path / name)) == [
        Document("1", "Aaron", 'Aaron ( or ; "Ahärôn") is a prophet.'),
        Document("2", "Aaron", 'The "Book" says.'),
    ]
    headless = tmp_path / "h.tsv"
    headless.write_text(DPR.split("\n", 1)[1])
    assert list(read_dpr(headless)) == list(read_dpr(tmp_path / name))


def test_bad_passages_are_named_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_bytes(DPR.encode() + b"3\tonly two\n4\tcaf\xe9\tT\n\n5\tlast\tT\r\n")
    with pytest.raises(DataError, match=r"p\.tsv:4: 2 columns, expected 3: id, text, title"):
        list(read_dpr(path))
    tally = Tally()
    assert [document.doc_id for document in read_dpr(path, "skip", tally)] == ["1", "2", "5"]
    assert tally.dropped == {"missing_field": 1, "bad_text": 1}
    path.write_text("id\ttext\ttitle\n")
    with pytest.raises(DataError, match="no passages"):
        list(read_dpr(path))


class FakeDatasets:
    """The library `datasets`, as far as it is used."""

    def __init__(self, rows: list[dict[str, Any]] | Exception) -> None:
        self.rows = rows
        self.asked: dict[str, Any] = {}

    def load_dataset(self, name: str, config: str | None, **rest: Any) -> list[dict[str, Any]]:
        self.asked = {"name": name, "config": config, **rest}
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_a_dataset_is_streamed_at_a_fixed_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeDatasets([{"id": "1", "title": "A", "text": "a", "url": "u"}, {"id": "2", "title": "B"}])
    monkeypatch.setitem(sys.modules, "datasets", library)
    tally = Tally()
    assert list(read_dataset("org/wiki:20231101.en#dev@abc", "skip", tally)) == [Document("1", "A", "a")]
    assert library.asked == {
        "name": "org/wiki", "config": "20231101.en", "split": "dev", "revision": "abc", "streaming": True,
    }  # fmt: skip
    assert tally.dropped == {"missing_field": 1}
    with pytest.raises(DataError, match=r"org/wiki#train@abc: row 1: the field 'text' is missing"):
        list(read_dataset("org/wiki@abc"))


def test_without_network_or_library_a_dataset_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(ConnectionError("Couldn't reach the Hub\nmore")))
    with pytest.raises(DataError, match=r"org/wiki#train@1: cannot be read from the hub \(Couldn't reach the Hub\)"):
        list(read_dataset("org/wiki@1"))

    class Offline:
        def dataset_info(self, name: str) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Offline))
    with pytest.raises(DataError, match=r"no route to host.*local folder or file"):
        Source.find("org/wiki", "hf")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package datasets"):
        Source.find("org/wiki", "hf")
    with pytest.raises(ConfigError, match="names no dataset"):
        Dataset.parse(":config")


def test_a_local_dataset_is_what_its_files_hold(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINE % "a")
    source = Source.find(tmp_path, "hf")
    before = source.digest(file_sha256)
    (tmp_path / "train.jsonl").write_text(LINE % "b")
    assert source.digest(file_sha256) != before
    assert Source("hf", "org/wiki#train@1").digest(file_sha256) != Source("hf", "org/wiki#train@2").digest(file_sha256)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("docs.jsonl", "jsonl"),
        ("docs.JSON.gz", "jsonl"),
        ("enwiki-20240101-pages-articles-multistream1.xml-p1p41242.bz2", "mediawiki"),
        ("simplewiki.xml", "mediawiki"),
        ("psgs_w100.tsv.gz", "dpr"),
        ("part-0.parquet", "parquet"),
        ("README", None),
    ],
)
def test_the_kind_follows_from_the_name(name: str, kind: str | None) -> None:
    assert kind_of(Path(name)) == kind


def test_a_folder_is_read_file_by_file_in_order_of_the_names(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "b.jsonl").write_text(LINE % "b")
    (folder / "a.jsonl.bz2").write_bytes(bz2.compress((LINE % "a").encode()))
    (folder / "README").write_text("not a document")
    source = Source.find(folder)
    tally = Tally()
    assert [document.doc_id for document in source.read("fail", tally)] == ["a", "b"]
    assert (source.kind, tally.documents) == ("jsonl", 2)
    before = source.digest(file_sha256)
    (folder / "README").write_text("changed")
    assert Source.find(folder).digest(file_sha256) == before
    (folder / "c.jsonl").write_text(LINE % "c")
    assert Source.find(folder).digest(file_sha256) != before
    single = Source.find(folder / "b.jsonl")
    assert single.digest(file_sha256) == file_sha256(folder / "b.jsonl")


def test_an_input_that_is_missing_or_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such corpus file"):
        Source.find(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="--source tea: unknown; choose one of auto, jsonl"):
        Source.find(tmp_path, "tea")
    with pytest.raises(DataError, match="no file whose name ends in"):
        Source.find(tmp_path, "mediawiki")


def test_an_endless_line_is_a_bad_line_and_its_file_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 200)
    path = tmp_path / "d.jsonl"
    path.write_text(LINE % "a" + LINE % ("b" * 1000) + LINE % "c")
    with pytest.raises(DataError, match=r"d\.jsonl:2: longer than"):
        list(read_jsonl(path))
    tally = Tally()
    assert [document.doc_id for document in read_jsonl(path, "skip", tally)] == ["a", "c"]
    assert tally.dropped == {"too_long": 1}


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.jsonl.bz2"])
def test_a_bomb_of_lines_is_refused_while_it_expands(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FREE_EXPANSION", 1 << 20)
    with (gzip if name.endswith("gz") else bz2).open(tmp_path / name, "wb") as file:
        for _ in range(8):
            file.write(b" " * (1 << 20) + b"\n")
    with pytest.raises(DataError, match="decompression bomb"):
        list(read_jsonl(tmp_path / name, "skip"))
