"""Bad input on the command line: one line with the place and the next move, exit code 2, and nothing half-published.

What a single reader makes of a bad record is tested beside the readers; here whole files go through `realm corpus build`.
"""

import bz2
import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import realm_core.corpus.files as files
from realm_core.artifacts.store import Store
from realm_core.corpus.shards import Corpus
from realm_core.corpus.sources import Source

TINY = ("--profile", "tiny", "--set", "model.vocabulary_size=300")
GOOD = {"id": "rome", "title": "Rome", "text": "Rome lies on the Tiber. It is old."}
HEAD = '<mediawiki version="0.11"><siteinfo><namespaces>%s</namespaces></siteinfo>'
PAGE = "<page><title>%s</title><ns>%s</ns><id>1</id><revision><text>%s</text></revision></page>"


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def dump(
    title: str = "Rome", text: str = "Rome is old.", ns: str = "0", namespaces: str = "", declared: str = ""
) -> bytes:
    declaration = f'<?xml version="1.0" encoding="{declared}"?>' if declared else ""
    return (declaration + HEAD % namespaces + PAGE % (title, ns, text) + "</mediawiki>").encode()


def built(realm: Callable, source: Path, *options: object) -> tuple[int, str, str]:
    return realm("corpus", "build", "--input", source, "--out", source.parent / "out" / "c", *TINY, *options)


def refused(outcome: tuple[int, str, str], source: Path) -> str:
    """The message: exit code 2, one line that names the place, and nothing left but the lock."""
    code, output, problem = outcome
    assert (code, output) == (2, ""), problem[-2000:]
    assert problem.startswith(f"error: {source}") and problem.endswith("\n") and problem.count("\n") == 1
    assert len(problem) < 2000 and problem.strip().isprintable()
    out = source.parent / "out"
    assert [path.name for path in out.rglob("*") if path.name != ".c.lock"] == []
    return problem


HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "an empty file": ("d.jsonl", b"", "no documents among 0 lines; expected one JSON object with title and text"),
    "white space": ("d.jsonl", b" \n\r\n\t\n", "no documents among 0 lines"),
    "title-only documents": ("d.jsonl", lines({"title": "T"}), r"d\.jsonl:1: the field 'text' is missing.*on_error=skip"),
    "empty texts": ("d.jsonl", lines({"title": "T", "text": ""}, {"title": "U", "text": " \u00a0"}), "'empty_text': 2"),
    "half a surrogate pair": ("d.jsonl", lines(GOOD, '{"title": "T", "text": "\\ud83d"}'), r":2: .*half a surrogate"),
    "… in an id": ("d.jsonl", lines('{"id": "\\ud83d", "title": "T", "text": "x"}'), r":1: .*'id' holds half a surrog"),
    "raw surrogates": ("d.jsonl", b'{"title": "T", "text": "\xed\xa0\xbd"}\n', r":1: not UTF-8 at byte 24"),
    "raw NUL bytes": ("d.jsonl", lines(GOOD) + b"\0\0\n", r":2: not JSON"),
    "malformed lines": ("d.jsonl", lines(GOOD, "{bad"), r":2: not JSON .*on_error=skip"),
    "many unknown fields": ("d.jsonl", lines({f"\x1b[31m{n}{'k' * 9999}": 1 for n in range(50)}), "and 40 more; mend it"),
    "the same id twice": ("d.jsonl", lines(GOOD, {**GOOD, "title": "X"}), r":2: .*before at .*:1: .*--on-error skip"),
    "a long id twice": ("d.jsonl", lines(*[{**GOOD, "id": "x" * 99999, "title": "\x1b" * 99999}] * 2), "more than once"),
    "UTF-16": ("d.jsonl", lines(GOOD).decode().encode("utf-16"), r":1: not UTF-8 at byte 0"),
    "mixed encodings": ("d.jsonl", lines(GOOD) + '{"title": "café", "text": "x"}'.encode("latin-1"), r":2: not UTF-8"),
    "old Macintosh line ends": ("d.jsonl", lines(GOOD, GOOD).replace(b"\n", b"\r"), r":1: not JSON \(Extra data"),
    "compressed without its ending": ("d.jsonl", gzip.compress(lines(GOOD)), r":1: not UTF-8"),
    "a cut gzip file": ("d.jsonl.gz", gzip.compress(lines(GOOD))[:-3], "damaged gzip file after line 1.*fetch the file"),
    "a cut bzip2 file": ("d.jsonl.bz2", bz2.compress(lines(GOOD))[:-3], "damaged bzip2 file after line .*fetch the f"),
    "a wrong checksum": ("d.jsonl.gz", gzip.compress(lines(GOOD))[:-8] + b"\0" * 8, "damaged gzip file .*CRC"),
    "junk after gzip": ("d.jsonl.gz", gzip.compress(lines(GOOD)) + b"junk", "damaged gzip file after line 1"),
    "no gzip file": ("d.jsonl.gz", lines(GOOD), "damaged gzip file after line 0"),
    "an XML bomb": ("d.xml", b'<!DOCTYPE l [<!ENTITY a "ha">]>' + dump(text="&a;"), "byte 12: a document type decl"),
    "an entity of a file": ("d.xml", b'<!DOCTYPE l [<!ENTITY a SYSTEM "file:///etc/hostname">]>' + dump(), "refused"),
    "an unknown entity": ("d.xml", dump(text="&nbsp;"), r"byte \d+: not well-formed XML .*--on-error skip"),
    "no XML": ("d.xml", b"\x00\x01\x02", "byte 0: not well-formed XML"),
    "another XML": ("d.xml", b"<feed><entry/></feed>", "root element is <feed>, expected <mediawiki>"),
    "a cut compressed dump": ("d.xml.bz2", bz2.compress(dump())[:-9], "no complete page before byte 0: ends early"),
    "an unknown encoding": ("d.xml", dump(declared="EBCDIC-X"), "an encoding that cannot be read .*convert the dump"),
    "an encoding that is none": ("d.xml", dump(declared="rot13"), "an encoding that cannot be read"),
    "an encoding of several bytes": ("d.xml", dump(declared="shift_jis"), "multi-byte encodings.*convert the dump"),
    "endless namespaces": (
        "d.xml", dump(namespaces="".join(f'<namespace key="6">n{n}</namespace>' for n in range(2000))),
        r"byte \d+: more than 1000 namespaces",
    ),
    "no Parquet": ("d.parquet", b"PAR1", "not a sound Parquet file .*fetch it again"),
    "a passage without columns": ("d.tsv", b"id\ttext\ttitle\n1\tx\n", r":2: 2 columns, expected 3.*on_error=skip"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_one_line_with_place_and_next_move(realm: Callable, tmp_path: Path, what: str) -> None:
    name, content, message = HOSTILE[what]
    (source := tmp_path / name).write_bytes(content)
    assert re.search(message, refused(built(realm, source), source))


def test_bad_records_are_left_out_and_counted_when_told(realm: Callable, tmp_path: Path) -> None:
    bad = [
        "{bad",
        "[1]",
        {"title": "T"},
        {**GOOD, "id": 1.5},
        '{"title": "T", "text": "\\ud83d"}',
        {**GOOD, "title": "X"},
    ]
    source = tmp_path / "d.jsonl"
    source.write_bytes(lines(GOOD, *bad, {"title": "Empty", "text": " "}) + b'{"title": "caf\xe9", "text": "x"}\n')
    code, output, problem = built(realm, source, "--on-error", "skip", "--json")
    assert code == 0, problem
    said = json.loads(output)
    counts = {"bad_json": 1, "wrong_type": 2, "missing_field": 1, "bad_text": 2, "duplicate_id": 1, "empty_text": 1}
    assert said["dropped"] == counts
    assert said["pages"] == said["articles"] + sum(counts.values())


@pytest.mark.parametrize("number", ["²", "--3", "9" * 4000, "٣"])
def test_a_namespace_that_is_no_number_tells_nothing_and_the_title_decides(
    realm: Callable, tmp_path: Path, number: str
) -> None:
    source = tmp_path / "d.xml"
    source.write_bytes(dump("Talk:Rome", ns=number))
    assert "(dropped: {'namespace': 1})" in refused(built(realm, source), source)
    source.write_bytes(dump(ns=number, namespaces=f'<namespace key="{number}">X</namespace>'))
    code, output, problem = built(realm, source, "--json")
    assert code == 0, problem
    assert json.loads(output)["articles"] == 1


SOUND = {
    "emoji": "👩‍👩‍👧‍👦 met 🇨🇭 in 1911.",
    "right to left": "‏שלום עולם‎ and مرحبا بالعالم.",
    "directions overridden": "\u202eevil\u202c and \u2066isolated\u2069 words.",
    "combining marks": "Z" + "\u0335\u0322" * 500 + " te\u0301xt.",
    "NUL": "The\0 king.",
    "line separators": "One\u2028two\u2029three.",
}


def test_odd_but_sound_text_is_kept_as_it_is(realm: Callable, tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    rows = [{"id": name, "title": name, "text": text} for name, text in SOUND.items()]
    source.write_bytes(b"\xef\xbb\xbf" + lines(*rows).replace(b"\n", b"\r\n"))
    code, output, problem = built(realm, source, "--json")
    assert code == 0, problem
    assert json.loads(output)["notes"] == {"characters_removed": 1}
    for name, text in SOUND.items():
        shown = json.loads(realm("corpus", "show", tmp_path / "out" / "c", "--title", name, "--json")[1])
        assert "".join(row["text"] for row in shown).split() == text.replace("\0", "").split()


def test_ids_and_titles_never_become_paths(realm: Callable, tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    names = ["../../escape", "/absolute", "..", ".", "a/b", "x\0y", "C:\\x", "n" * 5000]
    source.write_bytes(lines(*({"id": name, "title": name, "text": f"Number {n}."} for n, name in enumerate(names))))
    assert built(realm, source)[0] == 0
    out = tmp_path / "out"
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl", "out"}
    assert {path.name for path in out.iterdir()} == {"c", ".c.lock"}
    assert {path.name for path in (out / "c").rglob("*") if path.is_file()} == {
        "manifest.json", "report.json", "report.md", "lengths.svg", "vocab.txt", "blocks.parquet", "tokens.safetensors",
    }  # fmt: skip
    corpus = Corpus.open(out / "c")
    assert {corpus.block(row).doc_id for row in range(len(corpus))} == set(names)
    code, _, problem = realm("corpus", "show", out / "c", "--title", "../" * 999)
    assert code == 2 and "no document titled '../../" in problem and len(problem) < 400


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.bz2", "d.xml.gz", "d.xml.bz2", "d.parquet", "repeats.parquet"])
def test_decompression_bombs_are_refused_before_they_have_expanded(
    realm: Callable, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FREE_EXPANSION", 1 << 20)
    source, text = tmp_path / name, b"a" * (1 << 20)
    if source.suffix == ".parquet":
        values = pa.array([text.decode() * (1 if name == "repeats.parquet" else 8)])
        texts = pa.DictionaryArray.from_arrays([0] * 40 if name == "repeats.parquet" else [0], values)
        pq.write_table(pa.table({"title": ["T"] * len(texts), "text": texts}), source, compression="zstd")
    else:
        with (gzip if source.suffix == ".gz" else bz2).open(source, "wb") as file:
            file.write(b'{"title": "' if "jsonl" in name else HEAD.encode() + b"<page><revision><text>")
            for _ in range(8):
                file.write(text)
    for mode in ("fail", "skip"):
        assert "this is no text but a decompression bomb" in refused(built(realm, source, "--on-error", mode), source)


def test_texts_of_a_table_are_bounded_as_lines_are(
    realm: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realm_core.corpus.tables.LONGEST_LINE", 50)
    source = tmp_path / "d.parquet"
    pq.write_table(pa.table({"title": ["A", "B"], "text": ["Rome is old. " * 9, "Rome is old."]}), source)
    assert "row 0: title and text longer than 50 characters; mend it" in refused(built(realm, source), source)
    assert json.loads(built(realm, source, "--on-error", "skip", "--json")[1])["dropped"] == {"too_long": 1}


def test_a_table_of_nothing_usable_says_what_was_wrong(realm: Callable, tmp_path: Path) -> None:
    source = tmp_path / "d.parquet"
    pq.write_table(pa.table({"id": [1.5], "title": ["A"], "text": ["Rome."]}), source)
    problem = refused(built(realm, source, "--on-error", "skip"), source)
    assert "no documents in its rows, left out: {'wrong_type': 1}; expected" in problem


def test_what_can_be_read_only_once_is_refused(realm: Callable, tmp_path: Path) -> None:
    os.mkfifo(source := tmp_path / "pipe.jsonl")
    assert "neither a file nor a folder" in refused(built(realm, source), source)


def test_file_names_of_any_bytes_are_read(realm: Callable, tmp_path: Path) -> None:
    (folder := tmp_path / "docs").mkdir()
    for number, name in enumerate((b"a\xff.jsonl", b"b\xff.jsonl")):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(lines({**GOOD, "id": str(number)}))
    assert built(realm, folder)[0] == 0
    assert len(Source.find(folder).files()) == 2


REMOVALS = {
    b'{"id": "\\ud83d"}': "1: the field 'id' holds half a surrogate pair",
    b'{"id": null}': "1: the field 'id' is NoneType, expected text",
    b'{"id": ["x"]}': "1: the field 'id' is list, expected text",
    b"\xff\xfe": "1: not UTF-8 at byte 0 of the line",
    b'{"name": 1}': "1: neither id nor title",
    b'{"id": ' + b"[" * 99999: "1: not usable JSON",
    b"": "names no document",
}


@pytest.mark.parametrize("content", REMOVALS, ids=range(len(REMOVALS)))
def test_a_bad_list_of_removals_is_named_by_its_line(
    realm: Callable, tiny_home: Store, tmp_path: Path, content: bytes
) -> None:
    (source := tmp_path / "gone.txt").write_bytes(content)
    code, _, problem = realm("corpus", "remove", "--ids-from", source, "--home", tiny_home.home)
    assert code == 2 and REMOVALS[content] in problem and problem.count("\n") == 1
    assert tiny_home.names("corpus") == ["v0001"]


def test_arguments_that_are_no_text_are_documents_nobody_holds(realm: Callable, home: Store) -> None:
    for option in ("--id", "--title"):
        code, _, problem = realm("corpus", "remove", option, "x\udcff" + "y" * 9999, "--home", home.home)
        assert code == 2 and f"no document with {option[2:]} 'x\\udcffyyy" in problem and len(problem) < 500
