"""Text and data code against what the original TensorFlow code and the later PyTorch port produced."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realm_core.corpus.readers import Document, is_list_page
from realm_core.data.answers import gold_spans, has_answer
from realm_core.data.candidates import NULL_ROW, select_candidates
from realm_core.data.formats import document_inputs, joint_inputs, query_inputs, reader_inputs
from realm_core.data.ict import ict_example, ict_inputs
from realm_core.data.masking import NO_TOKENS, TRUNCATED, mask_tokens, pad_masks
from realm_core.data.questions import orqa_bucket, split_of
from realm_core.text.blocks import Block, document_uid, pack_document
from realm_core.text.spans import tokens_within
from realm_core.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "tf_original_a.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(golden: dict[str, Any]) -> Tokenizer:
    return Tokenizer(golden["vocab"])


def splitter(text: str, sentences: list[str]) -> Callable[[str], list[tuple[int, int]]]:
    """The sentence borders the reference used."""
    ranges, place = [], 0
    for sentence in sentences:
        start = text.index(sentence, place)
        place = start + len(sentence)
        ranges.append((start, place))
    return lambda _: ranges


def block_of(case: dict[str, Any]) -> Block:
    return Block(
        block_id="",
        doc_id="",
        title="",
        text="",
        title_ids=case["title_ids"],
        token_ids=case["token_ids"],
        sentence_starts=case["sentence_starts"],
        sentences=[],
        spans=[],
        start=0,
        stop=0,
    )


def test_packing_makes_the_blocks_of_the_original(golden: dict[str, Any], tokenizer: Tokenizer) -> None:
    for case in golden["wiki_preprocessor"]["blocks"]:
        split = splitter(case["text"], case["sentences"])
        document = Document("1", case["title"], case["text"])
        blocks = pack_document(document, tokenizer, case["max_block_length"], split, split_long=False)
        made = [
            {
                "block": block.text,
                "title_ids": list(block.title_ids),
                "token_ids": list(block.token_ids),
                "sentence_starts": list(block.sentence_starts),
            }
            for block in blocks
        ]
        assert made == case["blocks"]


def test_list_pages_are_those_of_the_original(golden: dict[str, Any]) -> None:
    expected = golden["wiki_preprocessor"]["remove_doc"]
    assert {title: is_list_page(title) for title in expected} == expected


def test_ict_pairs_are_those_of_the_original(golden: dict[str, Any], tokenizer: Tokenizer) -> None:
    for case in golden["ict_examples"]:
        expected, block = case["result"], block_of(case)
        if not expected["keep_example"]:
            assert all(ict_example(block, np.random.default_rng(seed), 1.0) is None for seed in range(20))
            continue
        sentences = [
            case["token_ids"][low:high] for low, high in pairwise([*case["sentence_starts"], len(case["token_ids"])])
        ]
        matches = []
        for seed in range(40):  # which sentence the reference drew is known from its query only
            example = ict_example(block, np.random.default_rng(seed), case["mask_rate"])
            assert example is not None
            assert example.removed == expected["mask_query"]
            assert list(example.query_ids) in sentences
            query, document = ict_inputs(example, case["query_seq_len"], case["block_seq_len"], tokenizer)
            if query.token_ids.tolist() == expected["query_ids"]:
                assert query.mask.tolist() == expected["query_mask"]
                assert document.token_ids.tolist() == expected["block_ids"]
                assert document.mask.tolist() == expected["block_mask"]
                assert document.segment_ids.tolist() == expected["block_segment_ids"]
                matches.append(seed)
        assert matches


def test_masked_features_are_those_of_the_original(golden: dict[str, Any], tokenizer: Tokenizer) -> None:
    errors = {"Masks would be truncated.": TRUNCATED, "Masks do not cover any tokens.": NO_TOKENS}
    assert {case.get("error") for case in golden["featurizer"]} == {None, *errors}
    for case in golden["featurizer"]:
        ids, starts, stops = tokenizer.ids_with_offsets(case["text"])
        assert ids == case["token_ids"]
        assert [list(offset) for offset in zip(starts, stops, strict=True)] == case["token_offsets"]
        chosen = np.arange(*tokens_within(starts, stops, tuple(case["span"])))
        query, reason = mask_tokens(ids, chosen, 0, case["query_seq_len"], case["max_masks"], tokenizer.mask_id)
        if "error" in case:
            assert query is None
            assert reason == errors[case["error"]]
            continue
        assert query is not None
        assert query.token_ids.tolist() == case["mask_query"]["token_ids_after_masking"]
        assert chosen.tolist() == case["mask_query"]["mask_indices"]
        check_features(case, query.token_ids, tokenizer)
        positions, targets, mask = pad_masks([query], case["max_masks"])
        assert positions[0].tolist() == case["features"]["mlm_positions"]
        assert targets[0].tolist() == case["features"]["mlm_targets"]
        assert mask[0].tolist() == case["features"]["mlm_mask"]


def check_features(case: dict[str, Any], query_ids: np.ndarray, tokenizer: Tokenizer) -> None:
    query_len, length = case["query_seq_len"], case["candidate_seq_len"]
    made = {
        "query_inputs": [query_inputs(query_ids, query_len, tokenizer)],
        "candidate_inputs": [document_inputs(title, body, length, tokenizer) for title, body in case["docs"]],
        "joint_inputs": [joint_inputs(query_ids, body, query_len, length, tokenizer) for _, body in case["docs"]],
    }
    for name, inputs in made.items():
        for field, expected in case["features"][name].items():
            found = [getattr(item, field).tolist() for item in inputs]
            assert (found[0] if name == "query_inputs" else found) == expected, (name, field)


def test_document_identity_is_that_of_the_original(golden: dict[str, Any]) -> None:
    for case in golden["document_uid"]:
        assert document_uid(case["title"], case["body"]) == case["uid_hex"]


def test_candidates_are_chosen_as_in_the_original(golden: dict[str, Any]) -> None:
    for case in golden["postprocess_candidates"]:
        uids = [str(row) for row in case["retrieved"]]
        chosen = select_candidates(case["retrieved"], str(case["query_doc"]), uids, len(case["result"]))
        assert ["NULL" if row == NULL_ROW else row for row in chosen.rows.tolist()] == case["result"]
        assert chosen.origin_removed == (case["query_doc"] in case["retrieved"])


def test_questions_are_split_as_in_the_original(golden: dict[str, Any]) -> None:
    pytest.importorskip("farmhash")
    for case in golden["resplit_hash"]:
        assert orqa_bucket(case["question"]) == case["bucket"]
        assert split_of(case["question"]) == case["split"]


class ReaderSpecials:
    pad_id, cls_id, sep_id = 0, 2, 3


def test_reader_inputs_and_gold_spans_are_those_of_the_original(golden: dict[str, Any]) -> None:
    for case in golden["orqa_ops"]["reader_inputs"]:
        expected, length = case["result"], case["max_sequence_len"]
        for number, block in enumerate(case["blocks"]):
            made = reader_inputs(case["question"], block, length, ReaderSpecials())
            for field in ("token_ids", "segment_ids", "mask", "block_mask"):
                assert getattr(made, field).tolist() == expected[field][number], field
            kept = int(made.block_mask.sum())
            spans = gold_spans(block, case["answers"], len(case["question"]) + 2, kept)
            padding = [-1] * (len(expected["gold_starts"][number]) - len(spans))
            assert [*spans[:, 0].tolist(), *padding] == expected["gold_starts"][number]
            assert [*spans[:, 1].tolist(), *padding] == expected["gold_ends"][number]
            token_map = np.full(length, -1)
            token_map[made.block_mask == 1] = case["block_token_map"][number][:kept]
            assert token_map.tolist() == expected["token_map"][number]


def test_an_answer_is_found_as_in_the_original(golden: dict[str, Any]) -> None:
    for case in golden["orqa_ops"]["has_answer"]:
        assert [has_answer(block, case["answers"]) for block in case["blocks"]] == case["out"]


def test_the_tokenizer_agrees_with_the_published_one(golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "RealmTokenizerFast_a.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(golden["vocab_file"])
    for row, texts in enumerate(golden["text"]):
        ids = tokenizer.batch_ids(texts)
        assert [query_inputs(one, None, tokenizer).token_ids.tolist() for one in ids] == golden["encode"][row]
        batch = golden["batch_encode_candidates_max_length_10"]
        for column, one in enumerate(ids):
            made = query_inputs(one, 10, tokenizer)
            assert made.token_ids.tolist() == batch["input_ids"][row][column]
            assert made.mask.tolist() == batch["attention_mask"][row][column]
            assert made.segment_ids.tolist() == batch["token_type_ids"][row][column]
