"""Writes the layout of transformers' Realm classes, so that an exported model can be read by them and come back here.

Tied tensors are stored once, and the masked-LM heads that embedders and readers carry without using them are left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from realm_core.compat.bert_layout import CONFIG, WEIGHTS, save, shape_values, write_json, write_tokenizer
from realm_core.compat.hf import READER_EPS
from realm_core.compat.sentence_layout import rescaled
from realm_core.model.embedder import Retriever
from realm_core.model.encoder import EncoderShape
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.reader import Reader
from realm_core.text.tokenizer import Tokenizer


def write_retriever(folder: Path, retriever: Retriever, tokenizer: Tokenizer) -> str:
    """A RealmEmbedder, or a RealmScorer where queries have a tower of their own; returns the name of the class."""
    tensors = dict(retriever.state_dict())
    embedder = retriever.embedder
    shape = embedder.shape
    # These classes have one epsilon for every norm; a projection with another one is scaled to it.
    for name in [name.removesuffix(".weight") for name in tensors if name.endswith("cls.dense.weight")]:
        pair = (tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = rescaled(
            *pair, embedder.projection_eps, shape.layer_norm_eps
        )
    name = "RealmEmbedder" if retriever.share else "RealmScorer"
    if retriever.share:
        tensors = {name.removeprefix("embedder."): tensor for name, tensor in tensors.items()}
    _write(folder, name, tensors, shape, tokenizer, retriever_proj_size=embedder.projection_size)
    return name


def write_encoder(folder: Path, encoder: KnowledgeEncoder, tokenizer: Tokenizer) -> str:
    """A RealmKnowledgeAugEncoder; returns the name of the class."""
    _write(folder, "RealmKnowledgeAugEncoder", encoder.state_dict(), encoder.shape, tokenizer)
    return "RealmKnowledgeAugEncoder"


def write_reader(folder: Path, reader: Reader, tokenizer: Tokenizer) -> str:
    """A RealmReader; returns the name of the class."""
    sizes = {
        "span_hidden_size": reader.qa_outputs.dense_output.in_features,
        "max_span_width": reader.max_span_width,
        "reader_layer_norm_eps": READER_EPS,
    }
    _write(folder, "RealmReader", reader.state_dict(), reader.shape, tokenizer, **sizes)
    return "RealmReader"


def _write(
    folder: Path,
    architecture: str,
    tensors: Mapping[str, Tensor],
    shape: EncoderShape,
    tokenizer: Tokenizer,
    **sizes: Any,
) -> None:
    save(folder / WEIGHTS, tensors)
    known = {"architectures": [architecture], "model_type": "realm", **shape_values(shape), "pad_token_id": 0, **sizes}
    write_json(folder / CONFIG, known)
    write_tokenizer(folder, tokenizer, shape.max_positions)
