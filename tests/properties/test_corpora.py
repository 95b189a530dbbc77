"""What must hold for any dump, any page and any question: nothing is lost uncounted, offsets are true, order is no matter."""

import bz2
import gzip
import random
import tempfile
from functools import cache
from html import escape
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_core.corpus.documents import Document, Tally
from realm_core.corpus.mediawiki import read_mediawiki
from realm_core.corpus.packing import as_plain
from realm_core.corpus.shards import Corpus, write_shards
from realm_core.corpus.sources import Source
from realm_core.data.farmhash import fingerprint64
from realm_core.errors import RealmError
from realm_core.text.blocks import pack_document
from realm_core.text.taggers import make_tagger
from realm_core.text.tokenizer import Tokenizer, build_vocabulary
from realm_core.text.wikitext import prose

PIECES = [
    "[[", "]]", "{{", "}}", "[http://a ", "]", "|", "==", "'''", "''", "<ref>", "</ref>", "<ref/>", "<!--", "-->", "{|",
    "|}", "\n", "\n* ", "\n:", "\n== ", " ==\n", "File:", "Rome", " is ", "the Tiber", ". ", "é\u0301", "\ufdd0", "\ufdd1",
    "&amp;", "&#91;", "<nowiki>", "</nowiki>", "<br>", "<div>", "(", ")", "; ", "한국", "\u200b", "1969", "#REDIRECT ",
]  # fmt: skip
pages = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
anything = st.one_of(pages, st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
TOKENIZER = Tokenizer(build_vocabulary(["".join(PIECES), "abc def"], 120))


@settings(deadline=None, max_examples=200)
@given(anything)
def test_prose_never_fails_and_its_links_are_words_in_order(wikitext: str) -> None:
    text, links = prose(wikitext)
    assert text == text.strip()
    assert "\n\n\n" not in text and "\ufdd0" not in text and "\ufdd1" not in text
    assert all(0 <= start < stop <= len(text) for start, stop in links)
    assert all(first[1] <= second[0] for first, second in pairwise(links))


@settings(deadline=None)
@given(st.text("abc deé", max_size=60))
def test_text_without_markup_stays_what_it_is(text: str) -> None:
    assert prose(text).text == " ".join(text.split())


@settings(deadline=None)
@given(pages, st.integers(16, 40))
def test_links_of_a_page_are_found_again_in_its_blocks(wikitext: str, limit: int) -> None:
    text, links = prose(wikitext)
    blocks = pack_document(Document("x", "t", text, links), TOKENIZER, limit, "simple", make_tagger("links"))
    named = {"".join(text[start:stop].split()) for start, stop in links}
    for block in blocks:
        assert 3 + len(block.title_ids) + len(block.token_ids) <= limit
        _, starts, stops = TOKENIZER.ids_with_offsets(block.text)
        for low, high in block.spans:
            words = "".join(block.text[starts[low] : stops[high - 1]].split())
            assert words == "1969" or any(words in name for name in named)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.text("ab:List of", max_size=12), pages), min_size=1, max_size=8), st.integers(0, 400))
def test_every_page_is_counted_once_and_a_cut_costs_only_what_it_cuts(content: list[tuple[str, str]], cut: int) -> None:
    body = "".join(
        f"<page><title>{escape(title)}</title><id>{number}</id><revision><text>"
        f"{escape(text.replace(chr(0xFDD0), '').replace(chr(0xFDD1), ''))}</text></revision></page>"
        for number, (title, text) in enumerate(content)
    )
    dump = f'<mediawiki version="0.3">{body}</mediawiki>'.encode()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "d.xml")
        whole, part = Tally(), Tally()
        path.write_bytes(dump)
        documents = list(read_mediawiki(path, tally=whole))
        assert whole.pages == len(content) and len(documents) == whole.documents
        path.write_bytes(dump[: len(dump) - cut])
        if b"</page>" not in dump[: len(dump) - cut]:
            return
        kept = list(read_mediawiki(path, tally=part))
        assert kept == documents[: len(kept)]
        assert part.pages == dump[: len(dump) - cut].count(b"</page>")


@settings(deadline=None, max_examples=8)
@given(st.lists(pages, min_size=1, max_size=6), st.integers(0, 2**32), st.integers(1, 4))
def test_wikitext_gives_the_same_corpus_in_any_order(texts: list[str], seed: int, shards: int) -> None:
    documents = [
        Document(str(number), f"t{number}", "Rome. " + text, hidden=("file",)) for number, text in enumerate(texts)
    ]
    shuffled = random.Random(seed).sample(documents, len(documents))
    with tempfile.TemporaryDirectory() as scratch:
        for name, order in (("a", documents), ("b", shuffled)):
            write_shards(
                order, Path(scratch, name), TOKENIZER, shards=shards, limit=32, splitter="simple", tagger="links"
            )
        first, second = (
            {str(path.relative_to(Path(scratch, name))): path.read_bytes() for path in Path(scratch, name).rglob("*.*")}
            for name in "ab"
        )
        assert first == second
        corpus = Corpus.open(Path(scratch, "a"))
        for row in range(len(corpus)):
            block = corpus.block(row)
            text = as_plain(documents[int(block.doc_id)]).text
            assert text[block.start : block.stop].replace("\0", "").split() == block.text.split()


def test_the_fingerprint_is_that_of_the_compiled_library() -> None:
    farmhash = pytest.importorskip("farmhash")
    letters = random.Random(1)
    for length in [*range(300), 511, 512, 513, 4097]:
        text = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz é한", k=length))
        assert fingerprint64(text.encode()) == farmhash.fingerprint64(text)


@cache
def sound_files() -> dict[str, bytes]:
    """A small sound file of every format, by the name it is read under."""
    page = "<page><title>A</title><ns>0</ns><id>%d</id><revision><text>Rome [[is]] {{x}}.</text></revision></page>"
    names = '<siteinfo><namespaces><namespace key="-2">M</namespace></namespaces></siteinfo>'
    dump = f'<?xml version="1.0" encoding="utf-8"?><mediawiki version="0.11">{names}{page % 1}{page % 2}</mediawiki>'
    lines = b'{"id": "a", "title": "Rome", "text": "It lies."}\n{"title": "B", "text": "\\u00e9 \\ud83d\\ude00"}\n'
    table = BytesIO()
    pq.write_table(pa.table({"id": ["a", "b"], "title": ["A", "A"], "text": ["Rome is old.", "Bee."]}), table)
    return {
        "d.xml": dump.encode(),
        "d.xml.bz2": bz2.compress(dump.encode()),
        "d.jsonl": lines,
        "d.jsonl.gz": gzip.compress(lines),
        "d.tsv": b'id\ttext\ttitle\n1\t"a ""b"""\tT\n2\tb\tU\n',
        "d.parquet": table.getvalue(),
    }


PIECES_OF_TROUBLE = [
    b"<", b">", b"&", b'"', b"\0", b"\xff", b"<!DOCTYPE x>", b"<![CDATA[", b"]]>", b"&#x110000;", b"\xc2\xb2", b"-", b"{", b"[",
    b'encoding="rot13"', b"null", b"1e999", b"\\u", b"\t", b"\n", b"\r", b"-1", b"9" * 5000,
    b"<namespace key='--1'>x</namespace>",
]  # fmt: skip
places, trouble = st.floats(0, 1), st.sampled_from(PIECES_OF_TROUBLE)
changes = st.lists(st.tuples(places, st.integers(0, 12), st.one_of(trouble, st.binary(max_size=3))), max_size=6)


@pytest.mark.slow
@settings(deadline=None, max_examples=400, derandomize=True)  # a library that ends the process would do so every time
@given(st.sampled_from(sorted(sound_files())), changes, st.sampled_from(["fail", "skip"]))
def test_whatever_stands_in_a_file_is_documents_or_one_clear_error(
    name: str, edits: list[tuple[float, int, bytes]], on_error: str
) -> None:
    content = bytearray(sound_files()[name])
    for share, cut, put in edits:
        place = int(share * len(content))
        content[place : place + cut] = put
    with tempfile.TemporaryDirectory() as scratch:
        (path := Path(scratch, name)).write_bytes(content)
        tally, message, documents = Tally(), "", list[Document]()
        try:
            documents = [as_plain(document) for document in Source.find(path).read(on_error, tally)]
        except RealmError as error:
            message = str(error)
        if message:
            assert message.startswith(str(path)) and len(message) < 1000 + len(str(path))
        else:
            assert len(documents) == tally.documents and tally.pages > 0
