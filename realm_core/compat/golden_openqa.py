"""The reference case that runs from a question to an answer: search, reader inputs, reading, losses, gradients.

The PyTorch port builds reader inputs in its own way (both texts are cut, longest first; special ids of the question are
dropped; padding to the longest block). That way is rebuilt here; the project itself never cuts a question.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers.decoders import WordPiece as WordPieceDecoder
from torch import Tensor

from realm_core.compat.golden_case import CaseFiles, Family, Record, from_outputs
from realm_core.compat.golden_model import embedder_of, gradients, read, reader_of
from realm_core.compat.golden_text import pad_gold
from realm_core.data.answers import gold_spans
from realm_core.data.formats import reader_inputs, stack
from realm_core.index.exact import exact_search
from realm_core.text.tokenizer import SPECIAL_TOKENS, Tokenizer


def _open_qa(case: CaseFiles, dtype: torch.dtype) -> dict[str, Any]:
    config, extra = case.json("config.json"), case.json("extra.json")
    tokenizer = Tokenizer(extra["vocab"])
    embedder, reader = embedder_of(config), reader_of(config)
    case.load(embedder, dtype, prefix="embedder.")
    case.load(reader, dtype, prefix="reader.")
    vectors = load_file(case.path("state.safetensors"))["block_emb"].to(dtype)
    blocks_ids = tokenizer.batch_ids(extra["blocks"])
    found: dict[str, Any] = {}
    for mode, beam in (("eval", config["reader_beam_size"]), ("train", config["searcher_beam_size"])):
        for number, question in enumerate(extra["questions"]):
            name, ids = f"{mode}/q{number}", tokenizer.ids(question)
            asked = torch.tensor([[tokenizer.cls_id, *ids, tokenizer.sep_id]])
            projection = embedder(asked)
            rows = exact_search(projection.detach().float(), vectors.float(), beam)[1][0]
            relevance = vectors[rows] @ projection[0]
            inputs = _reader_inputs(ids, [blocks_ids[row] for row in rows], config["reader_seq_len"], tokenizer)
            gold = _gold(inputs, extra["answer_ids"][f"q{number}"])
            width = config["reader_beam_size"]
            read_inputs = {key: tensor[:width] for key, tensor in inputs.items()}
            outputs = read(reader, read_inputs, inputs["block_mask"], relevance, **gold)
            torch.autograd.backward(outputs["loss"])
            span = slice(int(outputs["start_pos"]), int(outputs["end_pos"]) + 1)
            outputs |= {
                "question_projection": projection,
                "block_scores": projection @ vectors.T,
                "retrieved_block_ids": rows,
                "retrieved_logits": relevance,
                "block_mask": inputs["block_mask"],
                "predicted_answer_ids": inputs["input_ids"][int(outputs["block_idx"]), span],
                **{f"reader_{key}": tensor for key, tensor in read_inputs.items()},
                **gold,
                **gradients(embedder, "grad:embedder."),
                **gradients(reader, "grad:reader."),
            }
            found |= {f"{name}/{key}": value for key, value in outputs.items()}
    return found


def _reader_inputs(
    question_ids: Sequence[int], blocks: Sequence[Sequence[int]], length: int, tokenizer: Tokenizer
) -> dict[str, Tensor]:
    specials = [tokenizer.vocab.index(piece) for piece in SPECIAL_TOKENS]
    question = [piece for piece in question_ids if piece not in specials]
    rows = []
    for block in blocks:
        kept_question, kept_block = _longest_first(len(question), len(block), length - 3)
        rows.append(reader_inputs(question[:kept_question], block[:kept_block], length, tokenizer))
    batch = stack(rows, tokenizer.pad_id)
    return {
        "input_ids": torch.from_numpy(batch.token_ids),
        "token_type_ids": torch.from_numpy(batch.segment_ids),
        "attention_mask": torch.from_numpy(batch.mask),
        "block_mask": torch.from_numpy(batch.block_mask).bool(),
    }


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many pieces of two texts are kept: the longer one is cut until both fit or both are half of the room."""
    short, long = sorted((first, second))
    long = min(long, max(short, room - short))
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (short, long) if first <= second else (long, short)


def _gold(inputs: Mapping[str, Tensor], answer_ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Gold spans and labels of every block: an answer's pieces inside the part of the block that is read."""
    golds = []
    for ids, inside in zip(inputs["input_ids"].numpy(), inputs["block_mask"].numpy(), strict=True):
        golds.append(gold_spans(ids[inside], answer_ids, int(np.argmax(inside))))
    return {
        "start_positions": torch.from_numpy(pad_gold(golds, 0)),
        "end_positions": torch.from_numpy(pad_gold(golds, 1)),
        "has_answers": torch.tensor([len(gold) > 0 for gold in golds]),
    }


def _texts(case: CaseFiles, extra: Any, found: Mapping[str, Any]) -> Iterator[Record]:
    """What stands beside the arrays: ids of questions and answers, block texts as bytes, and answers in words."""
    tokenizer, inputs = Tokenizer(extra["vocab"]), case.arrays("inputs.npz")
    for number, question in enumerate(extra["questions"]):
        name = f"q{number}"
        asked = [[tokenizer.cls_id, *tokenizer.ids(question), tokenizer.sep_id]]
        yield f"{name}/input_ids", asked, inputs[f"{name}/input_ids"].tolist()
        yield f"answer_ids/{name}", tokenizer.batch_ids(extra["answers"][number]), extra["answer_ids"][name]
    yield "block_records_utf8", [text.encode() for text in extra["blocks"]], inputs["block_records_utf8"].tolist()
    for name, expected in extra["predictions"].items():
        yield f"predictions/{name}", _in_words(found[f"{name}/predicted_answer_ids"].tolist(), tokenizer), expected


def _in_words(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Wordpieces as the port prints them; the project itself copies an answer from the text of its block."""
    return WordPieceDecoder().decode(tokenizer.pieces(ids))


FAMILIES: dict[str, Family] = {"RealmForOpenQA": from_outputs(_open_qa, _texts)}
