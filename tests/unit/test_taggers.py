"""Taggers by name, links of the source, and what they leave in a block."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from realm_core.corpus.documents import Document
from realm_core.errors import ConfigError
from realm_core.text.blocks import Block, pack_document
from realm_core.text.spans import LabelledSpan
from realm_core.text.taggers import make_tagger
from realm_core.text.tokenizer import Tokenizer, build_vocabulary

TEXT = "The river Tiber rose in 1901.\0 It met the old sea. The Tiber is long."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_vocabulary([TEXT], 200))


def masked(block: Block, tokenizer: Tokenizer) -> list[str]:
    _, starts, stops = tokenizer.ids_with_offsets(block.text)
    return [block.text[starts[low] : stops[high - 1]] for low, high in block.spans]


def ranges(*words: str) -> tuple[tuple[int, int], ...]:
    return tuple((TEXT.index(word), TEXT.index(word) + len(word)) for word in words)


def test_links_become_spans_wherever_their_sentence_lands(tokenizer: Tokenizer) -> None:
    document = Document("x", "t", TEXT, ranges("river Tiber", "old sea"))
    labels: Counter[str] = Counter()
    (block,) = pack_document(document, tokenizer, tagger=make_tagger("links"), labels=labels)
    assert masked(block, tokenizer) == ["river Tiber", "1901", "old sea"]
    assert labels == {"LINK": 2, "DATE": 1}
    parts = pack_document(document, tokenizer, limit=16, tagger=make_tagger("links"))
    assert [span for part in parts for span in masked(part, tokenizer)] == ["river Tiber", "1901", "old sea"]


def test_a_link_across_sentences_or_outside_is_left_out(tokenizer: Tokenizer) -> None:
    across = (TEXT.index("1901"), TEXT.index("old"))
    for links in ((across,), ((3, 3),), ((len(TEXT), len(TEXT) + 5),)):
        (block,) = pack_document(Document("x", "t", TEXT, links), tokenizer, tagger=make_tagger("links"))
        assert masked(block, tokenizer) == ["1901"]


def test_a_sum_of_taggers_finds_what_any_of_them_finds(tokenizer: Tokenizer) -> None:
    tagger = make_tagger("rules+links")
    assert (tagger.name, tagger.version) == ("rules+links", "1+1")
    (block,) = pack_document(Document("x", "t", TEXT, ranges("old sea")), tokenizer, tagger=tagger)
    assert masked(block, tokenizer) == ["Tiber", "1901", "old sea", "Tiber"]
    assert make_tagger("none").spans(TEXT, [(0, 3, "LINK")]) == []


@pytest.mark.parametrize("name", ["crystal ball", "links:x", "hf", "rules+", "rules+magic"])
def test_an_unknown_tagger_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match="'links', 'none', 'spacy'"):
        make_tagger(name)


def test_spacy_is_asked_for_entities_only(monkeypatch: pytest.MonkeyPatch) -> None:
    entity = SimpleNamespace(start_char=4, end_char=15, label_="LOC")
    other = SimpleNamespace(start_char=0, end_char=3, label_="CARDINAL")
    asked = {}

    class Pipeline:
        meta = {"version": "9"}

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(ents=[other, entity])

    def load(name: str, exclude: tuple[str, ...]) -> Pipeline:
        asked[name] = exclude
        return Pipeline()

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load, __version__="3"))
    tagger = make_tagger("spacy:some_model")
    assert (tagger.name, tagger.version) == ("spacy:some_model", "3/9")
    assert "parser" in asked["some_model"]
    assert [TEXT[a:b] for a, b, _ in tagger.spans(TEXT)] == ["river Tiber", "1901"]


def test_a_hub_model_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def pipeline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files")

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(pipeline=pipeline))
    with pytest.raises(
        ConfigError, match=r"tagger 'hf:nobody/nothing': cannot be loaded \(We couldn't .*name a folder"
    ):
        make_tagger("hf:nobody/nothing")


@pytest.mark.slow
def test_a_token_classifier_of_a_local_folder_tags_its_words(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertForTokenClassification

    vocabulary = build_vocabulary([TEXT], 200)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 40}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=64, id2label={0: "O", 1: "B-LOC"}, label2id={"O": 0, "B-LOC": 1},
    )  # fmt: skip
    model = BertForTokenClassification(config)
    with torch.no_grad():  # every word that is "tiber" is a place, by construction
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0]))
    model.save_pretrained(tmp_path)
    tagger = make_tagger(f"hf:{tmp_path}")
    assert tagger.name == f"hf:{tmp_path.name}"
    found: list[LabelledSpan] = tagger.spans("The river rose. " * 20)  # longer than the model can read at once
    assert found[0][:2] == (0, 3)
    assert max(stop for _, stop, _ in found) >= len("The river rose. " * 20) - 2
    assert {label for _, _, label in found} == {"LOC"}
    assert tagger.spans("  ") == []
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "x": 1}))
    assert make_tagger(f"hf:{tmp_path}").version != tagger.version
