"""Readers, blocks and corpus folders: hostile files, exact offsets, one result whatever the order of the input."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from realm_core.corpus.documents import Document, Tally
from realm_core.corpus.readers import read_jsonl, read_wikiextractor
from realm_core.corpus.shards import Corpus, write_shards
from realm_core.corpus.writer import shard_of
from realm_core.errors import ArtifactError, ConfigError, DataError
from realm_core.text.blocks import pack_document
from realm_core.text.tokenizer import SPECIAL_TOKENS, Tokenizer, build_vocabulary

TEXT = (
    "Mount Elbert is in Colorado. It rises 4,401 metres above the sea. Nobody lives there.\n\n"
    "It was climbed in 1874 by Henry Stuckle. The river below it is the Arkansas River."
)
DOCUMENTS = [
    Document("elbert", "Mount Elbert", TEXT),
    Document("blank", "Nothing", " \n\t "),
    Document("marks", "Marks", "\u200b\u200b \x01"),
    Document("twin-1", "Twin", "The same words. In the same order."),
    Document("twin-2", "Twin", "The same words. In the same order."),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_vocabulary([document.text for document in DOCUMENTS], 300))


@pytest.fixture
def corpus(tmp_path: Path, tokenizer: Tokenizer) -> Corpus:
    write_shards(DOCUMENTS, tmp_path / "corpus", tokenizer, shards=3, limit=40)
    return Corpus.open(tmp_path / "corpus")


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


GOOD = {"id": "a", "title": "A", "text": "One."}


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        ("{not json", "bad_json", "not JSON"),
        ('{"title": "x", "text": ' + "9" * 5000 + "}", "bad_json", "too many digits"),
        ("[" * 100_000, "bad_json", "nested too deeply"),
        ("[1, 2]", "wrong_type", "list, expected an object"),
        ('{"id": "b", "title": "B"}', "missing_field", "'text' is missing; found id, title"),
        ('{"id": "b", "title": null, "text": "x"}', "wrong_type", "'title' is NoneType"),
        ('{"id": ["b"], "title": "B", "text": "x"}', "wrong_type", "'id' is list"),
        ('{"id": "", "title": "B", "text": "x"}', "wrong_type", "'id' is empty"),
        ('{"id": "b", "title": "B", "text": "\\ud83d"}', "bad_text", "half a surrogate"),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, line: str, kind: str, reason: str) -> None:
    path = lines(tmp_path / "c.jsonl", GOOD, {"title": "N", "text": "no id"}, "", line, {**GOOD, "id": "z"})
    with pytest.raises(DataError, match=rf"c\.jsonl:4: .*{reason}"):
        list(read_jsonl(path))
    tally = Tally()
    first, _, last = read_jsonl(path, "skip", tally)
    assert (first.doc_id, last.doc_id, last.place) == ("a", "z", f"{path}:5")
    assert tally.dropped == {kind: 1}
    assert (tally.documents, tally.pages) == (3, 4)


def test_bytes_that_are_not_utf8_are_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"title": "caf\xe9", "text": "x"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8"):
        list(read_jsonl(path))


def test_byte_order_mark_windows_line_ends_and_odd_separators_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"id": 7, "title": "T", "text": "a\xe2\x80\xa8b"}\r\n\r\n{"title": "T", "text": "c"}'
    )
    first, second = read_jsonl(path)
    assert first == Document("7", "T", "a\u2028b")
    assert second.doc_id == next(iter(read_jsonl(lines(tmp_path / "x.jsonl", {"title": "T", "text": "c"})))).doc_id
    assert len(second.doc_id) == 32


def test_a_compressed_file_is_read_and_a_torn_one_is_refused(tmp_path: Path) -> None:
    raw = gzip.compress(("\n".join(json.dumps({**GOOD, "id": str(n)}) for n in range(5000)) + "\n").encode())
    (tmp_path / "c.jsonl.gz").write_bytes(raw)
    assert len(list(read_jsonl(tmp_path / "c.jsonl.gz"))) == 5000
    for torn in (raw[:-200], b"not gzip at all", raw[:50] + b"\xff" * 40 + raw[90:]):
        (tmp_path / "torn.jsonl.gz").write_bytes(torn)
        with pytest.raises(DataError, match="damaged gzip file"):
            list(read_jsonl(tmp_path / "torn.jsonl.gz", "skip"))


def test_an_empty_or_absent_corpus_is_an_error(tmp_path: Path) -> None:
    for content in ("", "\n \n"):
        (tmp_path / "e.jsonl").write_text(content)
        with pytest.raises(DataError, match="no documents"):
            list(read_jsonl(tmp_path / "e.jsonl"))
    with pytest.raises(DataError, match=r"e\.jsonl: no documents"):
        list(read_jsonl(lines(tmp_path / "e.jsonl", "x"), "skip"))
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    with pytest.raises(ConfigError, match="'fail' or 'skip'"):
        list(read_jsonl(tmp_path / "e.jsonl", "ignore"))


def test_wikiextractor_lines_lose_list_pages_and_entities(tmp_path: Path) -> None:
    titles = ["List of kings", "Rome (disambiguation)", "Rome"]
    path = lines(tmp_path / "w.jsonl", *({"id": t, "title": t, "text": "a &lt;b&gt; &amp; c"} for t in titles))
    tally = Tally()
    assert list(read_wikiextractor(path, tally=tally)) == [Document("Rome", "Rome", "a <b> & c")]
    assert tally.dropped == {"list_page": 1, "disambiguation": 1}
    assert tally.pages == 3


def test_blocks_know_their_place_in_the_document_and_their_spans(tokenizer: Tokenizer) -> None:
    blocks = pack_document(DOCUMENTS[0], tokenizer, limit=40)
    assert len(blocks) > 1
    assert [TEXT[block.start : block.stop].split() for block in blocks] == [block.text.split() for block in blocks]
    found = []
    for block in blocks:
        _, starts, stops = tokenizer.ids_with_offsets(block.text)
        assert len(starts) == len(block.token_ids)
        found += [block.text[starts[low] : stops[high - 1]] for low, high in block.spans]
        assert " ".join(block.text[low:high] for low, high in block.sentences) == block.text
    assert found == ["Mount Elbert", "Colorado", "4,401 metres", "1874", "Henry Stuckle", "Arkansas River"]


def test_text_without_wordpieces_makes_no_block_and_joins_its_neighbour(tokenizer: Tokenizer) -> None:
    assert pack_document(DOCUMENTS[1], tokenizer) == []
    assert pack_document(DOCUMENTS[2], tokenizer) == []
    text = "\u200b\n\nThe river.\n\n\u200b\n\n\u200b\n\nNobody."
    (block,) = pack_document(Document("x", "t", text), tokenizer)
    assert list(block.sentence_starts) == [0, len(tokenizer.ids("The river."))]
    assert (block.start, block.stop) == (0, len(text))


def test_nul_characters_are_removed_and_offsets_stay_true(tokenizer: Tokenizer) -> None:
    text = "\0The ri\0ver is the\0 river. " * 12
    blocks = pack_document(Document("x", "t\0", text), tokenizer, limit=20)
    assert {block.title for block in blocks} == {"t"}
    for block in blocks:
        assert "\0" not in block.text
        assert text[block.start : block.stop].replace("\0", "").split() == block.text.split()


def test_a_long_title_is_cut_for_the_models_but_kept_for_people(tokenizer: Tokenizer) -> None:
    counts: Counter[str] = Counter()
    title = "river " * 100
    (block,) = pack_document(Document("x", title, "The river."), tokenizer, limit=40, counts=counts)
    assert len(block.title_ids) == 20
    assert block.title == title.strip()
    assert counts["titles_cut"] == 1


def test_an_over_long_sentence_is_split_only_when_asked(tokenizer: Tokenizer) -> None:
    document = Document("x", "river", "the river is the " * 40)
    assert len(pack_document(document, tokenizer, limit=30, split_long=False)) == 1
    blocks = pack_document(document, tokenizer, limit=30)
    assert max(4 + len(block.token_ids) for block in blocks) == 30
    assert " ".join(block.text for block in blocks).split() == document.text.split()


def test_a_part_that_needs_more_wordpieces_on_its_own_is_cut_shorter() -> None:
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "un", "##bev", "b", "##e", "##v"])
    word = "un" + "bev" * 30
    assert len(tokenizer.ids(word)) == 31
    blocks = pack_document(Document("x", "", word), tokenizer, limit=16)
    assert max(3 + len(block.token_ids) for block in blocks) == 16
    assert "".join(block.text for block in blocks) == word


def test_a_block_limit_without_room_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="limit 15"):
        pack_document(DOCUMENTS[0], tokenizer, limit=15)


def test_a_corpus_gives_back_what_packing_made(corpus: Corpus, tokenizer: Tokenizer) -> None:
    expected = {}
    for document in DOCUMENTS:
        for block in pack_document(document, tokenizer, limit=40):
            expected[(block.doc_id, block.start)] = block
    assert len(corpus) == len(expected)
    assert sum(shard.blocks for shard in corpus.shards.values()) == len(corpus)
    for row in range(len(corpus)):
        block = corpus.block(row)
        assert block == expected[(block.doc_id, block.start)]
        assert corpus.token_ids(row).tolist() == block.token_ids
        assert corpus.spans(row).tolist() == [list(span) for span in block.spans]
        assert corpus.block_ids[row] == block.block_id
        assert corpus.text(np.int64(row)) == block.text
    order = [len(corpus) - 1, 0]
    assert corpus.texts(order) == [corpus.text(row) for row in order]
    assert [row for name in corpus.shards for row in corpus.shard_rows(name)] == list(range(len(corpus)))
    assert corpus.tokenizer.digest == tokenizer.digest


def test_texts_are_found_across_row_groups(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realm_core.corpus.writer.ROWS_PER_GROUP", 2)
    monkeypatch.setattr("realm_core.corpus.shards.ROWS_PER_GROUP", 2)
    documents = [Document(f"{number:02d}", "t", f"Number {number}.") for number in range(41)]
    write_shards(documents, tmp_path / "c", tokenizer)
    rows = [*range(40, -1, -1), *range(41)]
    assert Corpus.open(tmp_path / "c").texts(rows) == [f"Number {row}." for row in rows]


def test_documents_spread_over_the_shards_and_stay_there() -> None:
    assert {shard_of(str(number), 4) for number in range(100)} == {0, 1, 2, 3}
    assert [shard_of(name, 64) for name in ("elbert", "", "Émile")] == [55, 20, 33]


def test_a_block_is_found_by_identity_the_first_of_equals(corpus: Corpus) -> None:
    for row, identity in enumerate(corpus.block_ids):
        found = corpus.row_of(identity)
        assert found <= row
        assert corpus.block_ids[found] == identity
    with pytest.raises(DataError, match="no block 'feed'"):
        corpus.row_of("feed")
    with pytest.raises(IndexError, match="row -1"):
        corpus.token_ids(-1)


def test_the_report_counts_everything(tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = write_shards(DOCUMENTS, tmp_path / "c", tokenizer, shards=2, limit=40)
    corpus = Corpus.open(tmp_path / "c")
    assert report["documents"] == 5
    assert report["dropped"] == {"empty_text": 1, "no_wordpieces": 1}
    assert report["blocks"] == len(corpus) == sum(report["block_lengths"].values()) == sum(report["shards"].values())
    assert report["duplicate_blocks"] == 1
    assert report["spans"] == sum(len(corpus.spans(row)) for row in range(len(corpus)))
    assert report["tagger"]["name"] == "rules"
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["shard-000", "shard-001", "vocab.txt"]
    json.dumps(report)


def digest_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_order_workers_and_an_earlier_attempt_change_no_byte(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(DOCUMENTS, tmp_path / "a", tokenizer, shards=2, limit=40)
    (tmp_path / "b" / ".spool").mkdir(parents=True)
    (tmp_path / "b" / ".spool" / "shard-000").write_text("left by a killed attempt")
    (tmp_path / "b" / "shard-000").mkdir()
    write_shards(reversed(DOCUMENTS), tmp_path / "b", tokenizer, shards=2, limit=40, workers=2)
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b")


def test_a_changed_document_changes_its_shard_only(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(DOCUMENTS, tmp_path / "a", tokenizer, shards=4, limit=40)
    changed = [Document("elbert", "Mount Elbert", "Gone."), *DOCUMENTS[1:]]
    write_shards(changed, tmp_path / "b", tokenizer, shards=4, limit=40)
    first, second = digest_of(tmp_path / "a"), digest_of(tmp_path / "b")
    touched = {name.split("/")[0] for name in first if first[name] != second[name]}
    assert touched == {f"shard-{shard_of('elbert', 4):03d}"}


def test_repeated_ids_and_corpora_without_text_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="'elbert' occurs more than once"):
        write_shards([*DOCUMENTS, DOCUMENTS[0]], tmp_path / "a", tokenizer, shards=2)
    with pytest.raises(DataError, match="none of 1 documents gave a block"):
        write_shards(DOCUMENTS[1:2], tmp_path / "b", tokenizer)
    with pytest.raises(ConfigError, match="shards=0"):
        write_shards(DOCUMENTS, tmp_path / "c", tokenizer, shards=0)


def test_a_damaged_corpus_is_reported_with_the_file(corpus: Corpus) -> None:
    folder = corpus.folder
    with pytest.raises(ArtifactError, match="not a corpus"):
        Corpus.open(folder / "shard-000")
    name = next(name for name, shard in corpus.shards.items() if shard.blocks)
    tokens = folder / name / "tokens.safetensors"
    raw = tokens.read_bytes()
    for torn in (b"", raw[:5], raw[:40], raw[:-8], b"\xff" * 64):
        tokens.write_bytes(torn)
        with pytest.raises(ArtifactError, match=r"tokens\.safetensors"):
            Corpus.open(folder)
    tokens.write_bytes(raw)
    (folder / name / "blocks.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match=r"blocks\.parquet"):
        Corpus.open(folder).text(Corpus.open(folder).shard_rows(name)[0])
    with pytest.raises(ArtifactError, match=r"blocks\.parquet"):
        _ = Corpus.open(folder).block_ids
