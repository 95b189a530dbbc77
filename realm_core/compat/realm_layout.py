"""Writes the layout of transformers' Realm classes, so that an exported model can be read by them and come back here.

Tied tensors are stored once, and the masked-LM heads that embedders and readers carry without using them are left out.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from realm_core.compat.bert_layout import CONFIG, WEIGHTS, save, shape_values, write_json, write_tokenizer
from realm_core.compat.block_records import RECORDS, TITLES, write_block_records
from realm_core.compat.projection import PROJECTION, PROJECTION_EPS, projection_names, scaled_projection
from realm_core.index.snapshot import as_tensor
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
    _write(folder, "RealmReader", reader.state_dict(), reader.shape, tokenizer, **_reader_sizes(reader))
    return "RealmReader"


def write_open_qa(
    folder: Path,
    embedder: Embedder,
    reader: Reader,
    vectors: Float[np.ndarray, "N D"],
    passages: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
) -> str:
    """A RealmForOpenQA; returns the name of the class. `embedder` reads questions, and was tuned with the reader.

    `passages` are (title, text) in the order of the vectors. Their texts become TFRecord files and not the object array
    of the port, which is a pickle. Embedder and reader must have the same sizes, for which the class has one setting.
    """
    assert embedder.shape == reader.shape, "a RealmForOpenQA has one size for both of its encoders"
    towers = {f"embedder.{name}": tensor for name, tensor in embedder.state_dict().items()}
    tensors = _for_one_epsilon(folder, towers, embedder)
    tensors |= {f"reader.{name}": tensor for name, tensor in reader.state_dict().items()}
    tensors["block_emb"] = as_tensor(vectors)
    beams = {"searcher_beam_size": min(5000, len(vectors)), "reader_beam_size": min(5, len(vectors))}
    sizes = {**_reader_sizes(reader), **beams, "num_block_records": len(vectors)}
    sizes["retriever_proj_size"] = embedder.projection_size
    _write(folder, "RealmForOpenQA", tensors, embedder.shape, tokenizer, **sizes)
    titles, texts = zip(*passages, strict=True)
    write_block_records(folder / RECORDS, (text.encode() for text in texts))
    if any(titles):
        write_block_records(folder / TITLES, (title.encode() for title in titles))
    return "RealmForOpenQA"


def _reader_sizes(reader: Reader) -> dict[str, Any]:
    return {
        "span_hidden_size": reader.qa_outputs.dense_output.in_features,
        "max_span_width": reader.max_span_width,
        "reader_layer_norm_eps": reader.eps,
    }


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
