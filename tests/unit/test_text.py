"""Tokenizer, sentences and salient spans on small, visible texts."""

import hashlib
from pathlib import Path

import pytest

from realm_core.errors import ConfigError, DataError
from realm_core.text.sentences import split_sentences
from realm_core.text.spans import RuleTagger, merge_spans, tokens_within
from realm_core.text.taggers import make_tagger
from realm_core.text.tokenizer import SPECIAL_TOKENS, Tokenizer, build_vocabulary

WORDS = ["the", "cafe", "un", "##believ", "##able", "river", "中", "国", ",", ".", "[", "]", "mask", "sep"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer([*SPECIAL_TOKENS, *WORDS])


def test_pieces_follow_case_folding_accents_and_word_parts(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces(tokenizer.ids("The CAFÉ, unbelievable 中国 zzz.")) == [
        "the", "cafe", ",", "un", "##believ", "##able", "中", "国", "[UNK]", ".",
    ]  # fmt: skip


def test_offsets_point_into_the_text_as_given(tokenizer: Tokenizer) -> None:
    text = "  The Café\x00, unbelievable"
    _, starts, stops = tokenizer.ids_with_offsets(text)
    assert [text[start:stop] for start, stop in zip(starts, stops, strict=True)] == [
        "The", "Café", ",", "un", "believ", "able",
    ]  # fmt: skip


def test_text_cannot_inject_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces(tokenizer.ids("[MASK][SEP]")) == ["[", "mask", "]", "[", "sep", "]"]


def test_half_a_surrogate_pair_is_no_crash(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces(tokenizer.ids("the \ud83d river")) == ["the", "river"]


def test_a_vocabulary_file_comes_back_byte_for_byte(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "windows.txt").write_bytes("\r\n".join(tokenizer.vocab).encode())
    read = Tokenizer.from_file(tmp_path / "windows.txt")
    read.save(tmp_path / "copy.txt")
    assert read.vocab == tokenizer.vocab
    assert read.digest == hashlib.sha256((tmp_path / "windows.txt").read_bytes()).hexdigest()
    assert (tmp_path / "copy.txt").read_bytes() == (tmp_path / "windows.txt").read_bytes()


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_a_missing_special_token_is_named(tmp_path: Path, special: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([token for token in SPECIAL_TOKENS if token != special]) + "\n")
    with pytest.raises(DataError, match=rf"vocab\.txt.*\{special}"):
        Tokenizer.from_file(path)


def test_a_repeated_piece_is_refused() -> None:
    with pytest.raises(DataError, match="'the' occurs 2 times"):
        Tokenizer([*SPECIAL_TOKENS, "the", "the"])


def test_an_absent_or_binary_vocabulary_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt"):
        Tokenizer.from_file(tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        Tokenizer.from_file(tmp_path / "binary")


def test_a_built_vocabulary_is_small_deterministic_and_sufficient() -> None:
    texts = ["the river runs", "the river Sleeps", "the cat"]
    vocabulary = build_vocabulary(texts, 60)
    assert vocabulary == build_vocabulary(reversed(texts), 60)
    assert vocabulary[:5] == list(SPECIAL_TOKENS)
    assert len(build_vocabulary(texts, 40)) <= 40
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.pieces(tokenizer.ids("river")) == ["river"]
    assert tokenizer.unk_id not in tokenizer.ids("cattle that sleep")


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no room"):
        build_vocabulary(["a"], 6)


SENTENCES = ["Dr. Smith went to Washington.", "He arrived at 5 p.m. on Monday!", '"Really?" she asked.']


@pytest.mark.parametrize("splitter", ["syntok", "simple"])
def test_sentences_end_at_full_stops_but_not_after_abbreviations(splitter: str) -> None:
    text = "  " + " \n".join(SENTENCES[:2]) + "\n\nA heading\n\n" + SENTENCES[2]
    found = [text[start:stop] for start, stop in split_sentences(text, splitter)]
    assert found == [*SENTENCES[:2], "A heading", SENTENCES[2]]


@pytest.mark.parametrize("splitter", ["syntok", "simple"])
@pytest.mark.parametrize(
    "text", ["", " \n\t ", "\x00", "...", "a" * 50_000, "." * 50_000, "\n" * 50_000, "x. " * 9_000]
)
def test_odd_texts_are_split_without_losing_a_character(splitter: str, text: str) -> None:
    ranges = split_sentences(text, splitter)
    assert "".join("".join(text[start:stop].split()) for start, stop in ranges) == "".join(text.split())


def test_an_unknown_splitter_or_tagger_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="simple, syntok"):
        split_sentences("x", "punkt")
    with pytest.raises(ConfigError, match="'rules'"):
        make_tagger("crystal ball")


def spans(text: str) -> list[str]:
    return [text[start:stop] for start, stop, _ in RuleTagger().spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in July 1969 and", ["July 1969"]),
        ("on July 4, 1969, and on 4 July 1969", ["July 4, 1969", "4 July 1969"]),
        ("the 1960s, then 1971", ["1960s", "1971"]),
        ("on 12 May or July 4th", ["12 May", "July 4th"]),
        ("from 1914–18 to 1939-1945", ["1914–18", "1939-1945"]),
        ("a year 999 or 2100 or 1,969 or 19695", []),
        ("some 5.25% or $3.5 million or 42 km", ["5.25%", "$3.5 million", "42 km"]),
        ("you may march in the rain", []),
    ],
)
def test_dates_and_quantities_are_found(text: str, expected: list[str]) -> None:
    assert spans(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Bank of England and George R.R. Martin.", ["Bank of England", "George R.R. Martin"]),
        ("He met Mr. Smith in the U.S. Congress.", ["Mr. Smith", "U.S. Congress"]),
        ("Rivers flow. Nobody saw Rome.", ["Rome"]),
        ("Newton sat. Then an apple hit Newton.", ["Newton", "Newton"]),
        ("Water is wet, and water is life.", []),
        ("Zola's Paris, with Paris as Zola's home", ["Zola", "Paris", "Paris", "Zola"]),
        ("the United States July 18, 2018", ["United States", "July 18, 2018"]),
        ("THIS IS ALL SHOUTED", []),
        ("New York or the First World War", ["New York", "First World War"]),
    ],
)
def test_names_are_more_than_capitals_at_the_start_of_a_sentence(text: str, expected: list[str]) -> None:
    assert spans(text) == expected


def test_overlapping_spans_become_one_with_the_label_of_the_longest() -> None:
    assert merge_spans([(5, 9, "DATE"), (0, 6, "NAME"), (9, 12, "QUANTITY")]) == [(0, 9, "NAME"), (9, 12, "QUANTITY")]


def test_only_tokens_wholly_inside_a_span_count() -> None:
    assert tokens_within([0, 4, 9], [3, 8, 12], (3, 12)) == (1, 3)
    assert tokens_within([0, 4, 9], [3, 8, 12], (5, 8)) == (0, 0)


def test_a_missing_spacy_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(ConfigError, match="spacy is not installed"):
        make_tagger("spacy")
