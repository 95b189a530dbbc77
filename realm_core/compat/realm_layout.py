"""Writes the layout of transformers' Realm classes, so that an exported model can be read by them and come back here.

Tied tensors are stored once, and the masked-LM heads that embedders and readers carry without using them are left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realm_core.compat.bert_layout import CONFIG, WEIGHTS, save, shape_values, write_json, write_tokenizer
from realm_core.compat.projection import PROJECTION, PROJECTION_EPS, projection_names, scaled_projection
from realm_core.model.embedder import Embedder, Retriever
from realm_core.model.encoder import EncoderShape
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.reader import Reader
from realm_core.text.tokenizer import Tokenizer


def write_retriever(folder: Path, retriever: Retriever, tokenizer: Tokenizer) -> str:
    """A RealmEmbedder, or a RealmScorer where queries have a tower of their own; returns the name of the class."""
    if retriever.share:
        return write_embedder(folder, retriever.embedder, tokenizer)
    embedder = retriever.embedder
    tensors = _for_one_epsilon(folder, retriever.state_dict(), embedder)
    _write(folder, "RealmScorer", tensors, embedder.shape, tokenizer, retriever_proj_size=embedder.projection_size)
    return "RealmScorer"


def write_embedder(folder: Path, embedder: Embedder, tokenizer: Tokenizer) -> str:
    """A RealmEmbedder; returns the name of the class."""
    tensors = _for_one_epsilon(folder, embedder.state_dict(), embedder)
    _write(folder, "RealmEmbedder", tensors, embedder.shape, tokenizer, retriever_proj_size=embedder.projection_size)
    return "RealmEmbedder"


def _for_one_epsilon(folder: Path, tensors: Mapping[str, Tensor], embedder: Embedder) -> dict[str, Tensor]:
    """The tensors for classes that have one epsilon for every norm: a projection with another one is scaled to it.

    Scaling rounds, so the projection as it was goes into a file of its own, for the way back.
    """
    eps = embedder.projection_eps
    written = dict(tensors)
    if eps != embedder.shape.layer_norm_eps:
        exact = {name: tensors[name] for name in projection_names(tensors)}
        written |= scaled_projection(exact, eps, embedder.shape.layer_norm_eps)
        save(folder / PROJECTION, {**exact, PROJECTION_EPS: torch.tensor(eps, dtype=torch.float64)})
    return written


def write_encoder(folder: Path, encoder: KnowledgeEncoder, tokenizer: Tokenizer) -> str:
    """A RealmKnowledgeAugEncoder; returns the name of the class."""
    _write(folder, "RealmKnowledgeAugEncoder", encoder.state_dict(), encoder.shape, tokenizer)
    return "RealmKnowledgeAugEncoder"


def write_reader(folder: Path, reader: Reader, tokenizer: Tokenizer) -> str:
    """A RealmReader; returns the name of the class."""
    sizes = {
        "span_hidden_size": reader.qa_outputs.dense_output.in_features,
        "max_span_width": reader.max_span_width,
        "reader_layer_norm_eps": reader.eps,
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
