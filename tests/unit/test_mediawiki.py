"""MediaWiki dumps: old and new, cut, damaged and hostile."""

import bz2
import gzip
import random
import string
from pathlib import Path

import pytest

import realm_core.corpus.files as files
import realm_core.corpus.mediawiki as module
from realm_core.corpus.documents import Document, Tally
from realm_core.corpus.mediawiki import read_mediawiki
from realm_core.corpus.packing import as_plain
from realm_core.errors import ConfigError, DataError

OLD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.3/" version="0.3" xml:lang="en">
<siteinfo><namespaces><namespace key="0" /><namespace key="4">Encyclo</namespace><namespace key="6">Picture</namespace>
</namespaces></siteinfo>
{pages}</mediawiki>
"""
NEW = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
<siteinfo><dbname>x</dbname></siteinfo>{pages}</mediawiki>
"""


def old(title: str, text: str, number: int = 1) -> str:
    return f"<page><title>{title}</title><id>{number}</id><revision><id>99</id><text>{text}</text></revision></page>\n"


def new(title: str, text: str, number: int = 1, ns: int = 0, extra: str = "", model: str = "wikitext") -> str:
    return (
        f"<page><title>{title}</title><ns>{ns}</ns><id>{number}</id>{extra}<revision><id>99</id><contributor><id>7</id>"
        f'</contributor><model>{model}</model><format>text/x-wiki</format><text bytes="5" xml:space="preserve">{text}'
        "</text><sha1>x</sha1></revision></page>\n"
    )


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)(raw))
    return path


def read(path: Path, on_error: str = "fail") -> tuple[list[Document], Tally]:
    tally = Tally()
    return list(read_mediawiki(path, on_error, tally)), tally


@pytest.mark.parametrize("name", ["d.xml", "d.xml.gz", "d.xml.bz2"])
def test_a_dump_without_namespace_elements_tells_them_by_the_titles(tmp_path: Path, name: str) -> None:
    pages = [
        old("Rome", "The [[Tiber]] &amp; more. [[Picture:R.png|thumb|x]]", 11),
        old("Roma", "#REDIRECT [[Rome]]", 12),
        old("Encyclo:About", "Us.", 13),
        old("Wikipedia:About", "Us.", 14),
        old("Star Trek: First Contact", "A film.", 15),
        old("List of kings", "Kings.", 16),
        old("Mercury (disambiguation)", "May be.", 17),
        old("Mercury", "May be. {{disambig}}", 18),
    ]
    documents, tally = read(write(tmp_path / name, OLD.format(pages="".join(pages))))
    assert [(document.doc_id, document.title) for document in documents] == [
        ("11", "Rome"),
        ("15", "Star Trek: First Contact"),
    ]
    assert as_plain(documents[0]).text == "The Tiber & more."
    assert [as_plain(documents[0]).text[a:b] for a, b in as_plain(documents[0]).links] == ["Tiber"]
    assert tally.redirects == 1
    assert tally.dropped == {"namespace": 2, "list_page": 1, "disambiguation": 2}
    assert tally.pages == len(pages)
    assert tally.notes == {"export": "0.3"}


def test_a_dump_of_today_has_namespaces_models_and_redirect_elements(tmp_path: Path) -> None:
    pages = [
        new("Rome", "Old.", 1).replace("</page>", "<revision><id>100</id><text>Newer.</text></revision></page>"),
        new("Talk:Rome", "x", 2, ns=1),
        new("Roma", "see Rome", 3, extra='<redirect title="Rome" />'),
        new("Data", "{}", 4, model="json"),
        new("Gone", "", 5).replace('bytes="5"', 'deleted="deleted"'),
        new("Weird: but article", "Yes.", 6),
        "<unheard-of><of/></unheard-of>",
    ]
    documents, tally = read(write(tmp_path / "d.xml", NEW.format(pages="".join(pages))))
    assert [(document.doc_id, document.text) for document in documents] == [("1", "Newer."), ("6", "Yes.")]
    assert tally.redirects == 1
    assert tally.dropped == {"namespace": 1, "not_wikitext": 1, "no_text": 1}
    assert tally.notes == {"export": "0.11"}


def test_a_version_nobody_has_seen_is_read_as_far_as_its_elements_are_known(tmp_path: Path) -> None:
    content = NEW.format(pages=new("Rome", "Yes.")).replace('version="0.11"', 'version="0.99"')
    documents, tally = read(write(tmp_path / "d.xml", content))
    assert (len(documents), tally.notes) == (1, {"export": "0.99"})


def test_a_multistream_file_is_one_dump(tmp_path: Path) -> None:
    head, tail = NEW.split("{pages}")
    parts = [head, new("A", "a", 1), new("B", "b", 2) + new("C", "c", 3), tail]
    path = tmp_path / "d-multistream.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(part.encode()) for part in parts))
    assert [document.title for document in read(path)[0]] == ["A", "B", "C"]


@pytest.mark.parametrize("name", ["d.xml", "d.xml.gz", "d.xml.bz2"])
def test_a_cut_dump_keeps_its_complete_pages_and_reports_the_cut(tmp_path: Path, name: str) -> None:
    content = OLD.format(pages=old("A", "a.", 1) + old("B", "b.", 2))
    cut = content[: content.index("b.</text>") + 1]
    documents, tally = read(write(tmp_path / name, cut))
    assert [document.title for document in documents] == ["A"]
    assert tally.notes["cut"] == f"byte {len(cut)}: ends early, inside page 'B'"


@pytest.mark.parametrize(("name", "compress"), [("d.xml.gz", gzip.compress), ("d.xml.bz2", bz2.compress)])
def test_a_cut_compressed_file_keeps_what_came_out_of_it(tmp_path: Path, name: str, compress) -> None:
    letters = random.Random(0)  # text that does not compress: bzip2 gives out nothing before a block of 900 kB is whole
    pages = (old(f"P{n}", "".join(letters.choices(string.printable[:62], k=5000)), n) for n in range(400))
    raw = compress(OLD.format(pages="".join(pages)).encode())
    (tmp_path / name).write_bytes(raw[: len(raw) * 9 // 10])
    documents, tally = read(tmp_path / name)
    assert 0 < len(documents) < 400
    assert "ends early" in tally.notes["cut"]


def test_damage_in_the_middle_is_named_with_its_byte_or_ends_the_reading(tmp_path: Path) -> None:
    content = OLD.format(pages=old("A", "a.", 1) + old("B", "b & c", 2) + old("C", "c", 3))
    path = write(tmp_path / "d.xml", content)
    place = content.index("b & c") + 3
    with pytest.raises(
        DataError, match=rf"d\.xml: byte {place}: not well-formed XML \(not well-formed \(invalid token\)\)"
    ):
        read(path)
    documents, tally = read(path, "skip")
    assert [document.title for document in documents] == ["A"]
    assert tally.notes["cut"].startswith(f"byte {place}: not well-formed")


def test_flipped_bytes_of_a_compressed_dump_are_damage(tmp_path: Path) -> None:
    for name, compress in (("d.xml.gz", gzip.compress), ("d.xml.bz2", bz2.compress)):
        raw = bytearray(compress(OLD.format(pages=old("A", "a." * 5000, 1)).encode()))
        raw[len(raw) // 2] ^= 0xFF
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=r"d\.xml\.(gz|bz2): (damaged|byte|no complete)"):
            read(tmp_path / name)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.xml", OLD.format(pages=old("A", "caf?", 1)).encode().replace(b"caf?", b"caf\xe9"))
    with pytest.raises(DataError, match=r"d\.xml: byte \d+: not well-formed"):
        read(path)


@pytest.mark.parametrize("declaration", ["<!DOCTYPE x>", '<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'])
def test_an_entity_bomb_is_refused_at_its_declaration(tmp_path: Path, declaration: str) -> None:
    with pytest.raises(DataError, match="document type declaration"):
        read(write(tmp_path / "d.xml", declaration + OLD.format(pages=old("A", "&b;"))))
    external = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
    with pytest.raises(DataError, match="document type declaration"):
        read(write(tmp_path / "d.xml", external + OLD.format(pages=old("A", "&a;"))))


@pytest.mark.parametrize("name", ["d.xml.gz", "d.xml.bz2"])
def test_a_decompression_bomb_is_refused_while_it_expands(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FREE_EXPANSION", 1 << 20)
    path = tmp_path / name
    with (gzip if name.endswith("gz") else bz2).open(path, "wb") as file:
        file.write(b"<mediawiki><page><text>")
        for _ in range(8):
            file.write(b"a" * (1 << 20))
    with pytest.raises(DataError, match=r"decompression bomb"):
        read(path)


def test_nothing_in_a_dump_may_grow_without_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_PAGE", 1000)
    documents, tally = read(write(tmp_path / "d.xml", OLD.format(pages=old("A", "a" * 2000, 1) + old("B", "b", 2))))
    assert ([document.title for document in documents], tally.dropped) == (["B"], {"too_long": 1})
    with pytest.raises(DataError, match="a tag longer than"):
        read(write(tmp_path / "d.xml", OLD.format(pages=f"<page a='{'x' * (3 << 20)}'>")))
    with pytest.raises(DataError, match="nested deeper than 32"):
        read(write(tmp_path / "d.xml", OLD.format(pages="<a>" * 50)))


@pytest.mark.parametrize("content", ["", "no xml", "<html/>", "<mediawiki></mediawiki>", "<mediawiki><page>"])
def test_what_is_no_dump_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"d\.xml"):
        read(write(tmp_path / "d.xml", content))
    with pytest.raises(DataError, match=r"absent\.xml: cannot be read"):
        read(tmp_path / "absent.xml")
    with pytest.raises(ConfigError, match="'fail' or 'skip'"):
        read(tmp_path / "d.xml", "ignore")


def test_titles_and_ids_never_become_paths(tmp_path: Path) -> None:
    page = old("../../escape", "Yes.").replace("<id>1</id>", "<id>../../../etc/x</id>")
    (document,) = read(write(tmp_path / "d.xml", OLD.format(pages=page)))[0]
    assert (document.doc_id, document.title) == ("../../../etc/x", "../../escape")


@pytest.mark.slow
def test_the_dump_of_2006_is_read_whole(shared_data: Path) -> None:
    tally = Tally()
    count = sum(1 for _ in read_mediawiki(shared_data / "enwik8.xml.gz", tally=tally))
    assert (tally.pages, tally.redirects, tally.dropped["namespace"]) == (
        12346,
        3664,
        93,
    )  # 15 redirects in namespace 4
    assert count == tally.documents
    assert tally.notes["cut"] == "byte 100000000: ends early, inside page 'Japanese language'"
