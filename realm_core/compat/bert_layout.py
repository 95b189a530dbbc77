"""Writes a BERT as transformers reads it: config.json, model.safetensors, and the tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from realm_core.model.encoder import EncoderShape
from realm_core.text.tokenizer import CLS, MASK, MAX_WORD_CHARACTERS, PAD, SEP, SPECIAL_TOKENS, UNK, Tokenizer

WEIGHTS, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocab.txt"


def write_backbone(
    folder: Path, tensors: Mapping[str, Tensor], prefix: str, shape: EncoderShape, tokenizer: Tokenizer
) -> None:
    """An encoder whose tensors carry `prefix`, as a BertModel."""
    save(
        folder / WEIGHTS,
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)},
    )
    write_json(folder / CONFIG, bert_config(shape, "BertModel"))
    write_tokenizer(folder, tokenizer, shape.max_positions)


def write_masked_lm(folder: Path, tensors: Mapping[str, Tensor], shape: EncoderShape, tokenizer: Tokenizer) -> None:
    """Tensors of a `KnowledgeEncoder` as a BertForMaskedLM. The pooler, which that class ignores, comes along: a reader
    or a new training starts from it. Tied tensors are stored once."""
    save(
        folder / WEIGHTS,
        {f"bert.{n.removeprefix('realm.')}" if n.startswith("realm.") else n: t for n, t in tensors.items()},
    )
    write_json(folder / CONFIG, bert_config(shape, "BertForMaskedLM"))
    write_tokenizer(folder, tokenizer, shape.max_positions)


def bert_config(shape: EncoderShape, architecture: str) -> dict[str, Any]:
    """`config.json` of a BERT with the tanh form of GELU."""
    return {"architectures": [architecture], "model_type": "bert", **shape_values(shape), "pad_token_id": 0}


def shape_values(shape: EncoderShape) -> dict[str, Any]:
    """The sizes under the names of transformers."""
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate_size,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.dropout,
        "max_position_embeddings": shape.max_positions,
        "type_vocab_size": shape.segment_types,
        "layer_norm_eps": shape.layer_norm_eps,
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, longest: int) -> None:
    """The tokenizer with its special tokens around one text or two. Text that looks like a special token stays text."""
    tokenizer.save(folder / VOCABULARY)
    index = {piece: number for number, piece in enumerate(tokenizer.vocab)}
    backend = Backend(WordPiece(index, unk_token=UNK, max_input_chars_per_word=MAX_WORD_CHARACTERS))
    backend.normalizer = BertNormalizer(lowercase=tokenizer.lowercase, strip_accents=None)
    backend.pre_tokenizer = BertPreTokenizer()
    backend.decoder = WordPieceDecoder()
    backend.post_processor = TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, tokenizer.cls_id), (SEP, tokenizer.sep_id)],
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": tokenizer.lowercase,
            "strip_accents": None,
            "tokenize_chinese_chars": True,
            "model_max_length": longest,
            "split_special_tokens": True,
            "pad_token": PAD,
            "unk_token": UNK,
            "cls_token": CLS,
            "sep_token": SEP,
            "mask_token": MASK,
        },
    )


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Safetensors, marked as PyTorch's as transformers demands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
