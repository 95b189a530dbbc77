"""Reads REALM checkpoints in the layout of transformers (its five Realm classes, last shipped in version 4.40).

RealmEmbedder            realm.* cls.dense.* cls.LayerNorm.*           and an unused masked-LM head
RealmScorer              embedder.* query_embedder.*                   equal tensors when one embedder serves both
RealmKnowledgeAugEncoder realm.* cls.predictions.*                     decoder tied to the word embeddings
RealmReader              realm.* qa_outputs.*                          and an unused masked-LM head
RealmForOpenQA           embedder.* reader.* block_emb                 with block_records.npy beside it, or .tfr from here
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realm_core.artifacts.manifest import file_sha256
from realm_core.compat.block_records import RECORDS, TITLES
from realm_core.compat.foreign import (
    FINE_TUNED,
    EncoderPart,
    Foreign,
    ReaderPart,
    RetrieverPart,
    Tensors,
    fitted,
    require_layers,
)
from realm_core.compat.projection import PROJECTION, PROJECTION_EPS, projection_names, scaled_projection
from realm_core.compat.weight_files import read_json, read_weights, weight_files
from realm_core.errors import ConfigError, DataError
from realm_core.model.embedder import Retriever
from realm_core.model.encoder import EncoderShape
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.reader import READER_EPS, Reader

CONFIG, TOKENIZER_CONFIG, VOCABULARY, PORT_RECORDS = (
    "config.json",
    "tokenizer_config.json",
    "vocab.txt",
    "block_records.npy",
)
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of the same function
_HEAD, _WORDS = "cls.predictions.", "realm.embeddings.word_embeddings.weight"
_HEAD_TENSORS = (
    "bias",
    "transform.dense.weight",
    "transform.dense.bias",
    "transform.LayerNorm.weight",
    "transform.LayerNorm.bias",
    "decoder.weight",
    "decoder.bias",
)
_TIED = {"decoder.weight": _WORDS, "decoder.bias": f"{_HEAD}bias"}  # of the masked-LM head


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    """What a `config.json` says; keys it leaves out have the defaults of transformers' RealmConfig."""

    architecture: str
    shape: EncoderShape
    projection_size: int
    span_hidden: int
    max_span_width: int
    span_eps: float
    block_records: int


def read_hf(folder: Path, vocabulary: Path | None = None, records: Path | None = None) -> Foreign:
    """One transformers folder. Raises DataError naming the file, and every tensor that is missing, extra or misshapen."""
    config = read_hf_config(folder / CONFIG)
    _require_uncased(folder / TOKENIZER_CONFIG)
    files = weight_files(folder)
    tensors = read_weights(files)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("embeddings.position_ids")}
    projection = folder / PROJECTION
    eps = config.shape.layer_norm_eps  # the port takes one epsilon for the projection and for every layer
    if projection.is_file():
        eps = _restore_projection(tensors, projection, eps)
        files.append(projection)
    parts = _READERS[config.architecture](_Folder(folder, config, tensors, eps))
    vocabulary = vocabulary or (folder / VOCABULARY if (folder / VOCABULARY).is_file() else None)
    titles = None
    if "block_vectors" in parts and records is None:
        records, titles = _texts_of(folder)
    used = [folder / CONFIG, *files, *(path for path in (vocabulary, records, titles) if path is not None)]
    return Foreign(
        origins=(f"transformers {config.architecture}",),
        vocabulary=vocabulary,
        block_records=records,
        block_titles=titles,
        sources={f"{config.architecture}/{path.name}": file_sha256(path) for path in used},
        **parts,
    )


def _texts_of(folder: Path) -> tuple[Path | None, Path | None]:
    """The files with the texts and the titles of the blocks."""
    records, titles = folder / RECORDS, folder / TITLES
    if records.is_file():
        return records, titles if titles.is_file() else None
    return (folder / PORT_RECORDS if (folder / PORT_RECORDS).is_file() else None), None


def read_hf_config(path: Path) -> HfConfig:
    """Sizes and settings. Raises DataError for another model, an impossible size, or what the project cannot compute."""
    values = read_json(path)
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if name not in _READERS:
        raise DataError(f"{path}: architectures is {names}; this command reads one of {', '.join(_READERS)}")
    act = values.get("hidden_act", "gelu_new")
    if act not in TANH_GELU:
        raise DataError(f"{path}: hidden_act is {act!r}; only the tanh form of GELU ({TANH_GELU[0]}) is computed")
    dropout = _real(values, "hidden_dropout_prob", 0.1, path)
    if _real(values, "attention_probs_dropout_prob", 0.1, path) != dropout:
        raise DataError(f"{path}: two different dropout rates, the model here has one; set both to the same")
    reader_eps = _real(values, "reader_layer_norm_eps", READER_EPS, path)
    if not 0.0 < reader_eps < 1.0:
        raise DataError(f"{path}: reader_layer_norm_eps is {reader_eps}, expected a small positive number")
    try:
        shape = EncoderShape(
            vocab_size=_whole(values, "vocab_size", 30522, path),
            hidden_size=_whole(values, "hidden_size", 768, path),
            layers=_whole(values, "num_hidden_layers", 12, path),
            heads=_whole(values, "num_attention_heads", 12, path),
            intermediate_size=_whole(values, "intermediate_size", 3072, path),
            max_positions=_whole(values, "max_position_embeddings", 512, path),
            segment_types=_whole(values, "type_vocab_size", 2, path),
            dropout=dropout,
            layer_norm_eps=_real(values, "layer_norm_eps", 1e-12, path),
        )
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from None
    return HfConfig(
        architecture=name,
        shape=shape,
        projection_size=_whole(values, "retriever_proj_size", 128, path),
        span_hidden=_whole(values, "span_hidden_size", 256, path),
        max_span_width=_whole(values, "max_span_width", 10, path),
        span_eps=reader_eps,
        block_records=_whole(values, "num_block_records", 13353718, path),
    )


class _Folder:
    """The tensors of one folder, taken apart by the prefixes of the modules they belong to."""

    def __init__(self, folder: Path, config: HfConfig, tensors: Tensors, projection_eps: float) -> None:
        self.folder, self.config, self.tensors, self.projection_eps = folder, config, tensors, projection_eps
        self.where = f"{folder} ({config.architecture})"

    def embedder(self) -> dict[str, Any]:
        head_free = _without_head(self.tensors, "")
        tensors = {f"embedder.{name}": tensor for name, tensor in head_free.items()}
        return {"retriever": self._retriever(tensors, in_file=lambda name: name.removeprefix("embedder."))}

    def scorer(self) -> dict[str, Any]:
        tensors = _without_head(_without_head(self.tensors, "embedder."), "query_embedder.")
        document, query = _below(tensors, "embedder."), _below(tensors, "query_embedder.")
        shared = all(_same(document[name], query[name]) for name in document.keys() & query.keys())
        if shared:  # a file that stores tied tensors once has each under one of the two names
            document = {**query, **document}
        foreign = {
            name: tensor for name, tensor in tensors.items() if not name.startswith(("embedder.", "query_embedder."))
        }
        towers = {f"embedder.{name}": tensor for name, tensor in document.items()}
        if not shared:
            towers |= {f"query_embedder.{name}": tensor for name, tensor in query.items()}
        return {"retriever": self._retriever({**foreign, **towers}, shared, self._of_either_tower)}

    def _of_either_tower(self, name: str) -> str:
        other = f"query_{name}"
        return other if name not in self.tensors and other in self.tensors else name

    def encoder(self) -> dict[str, Any]:
        require_layers(self.tensors, self.config.shape.layers, self.where)
        tensors = _untied(self.tensors, self.where)
        shape = self.config.shape
        return {
            "encoder": EncoderPart(shape=shape, tensors=fitted(tensors, lambda: KnowledgeEncoder(shape), self.where))
        }

    def reader(self, prefix: str = "") -> dict[str, Any]:
        tensors = _without_head(_below(self.tensors, prefix), "")
        config = self.config
        require_layers(tensors, config.shape.layers, self.where)
        build = lambda: Reader(config.shape, config.span_hidden, config.max_span_width, config.span_eps)  # noqa: E731
        part = ReaderPart(
            shape=config.shape,
            tensors=fitted(tensors, build, self.where, lambda name: prefix + name),
            span_hidden=config.span_hidden,
            max_span_width=config.max_span_width,
            span_eps=config.span_eps,
        )
        return {"reader": part}

    def open_qa(self) -> dict[str, Any]:
        rest = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("reader.")}
        vectors = self._block_vectors(rest.pop("block_emb", None))
        parts = {"retriever": self._retriever(_without_head(rest, "embedder."))}
        return {**parts, **self.reader("reader."), "block_vectors": vectors, "notes": (FINE_TUNED,)}

    def _retriever(
        self, tensors: Mapping[str, Tensor], share: bool = True, in_file: Callable[[str], str] = str
    ) -> RetrieverPart:
        shape, width = self.config.shape, self.config.projection_size
        require_layers([name for name in tensors if name.startswith("embedder.")], shape.layers, self.where)
        build = lambda: Retriever(shape, width, self.projection_eps, share=share)  # noqa: E731
        return RetrieverPart(
            shape=shape,
            tensors=fitted(tensors, build, self.where, in_file),
            projection_size=width,
            projection_eps=self.projection_eps,
            share=share,
        )

    def _block_vectors(self, found: Tensor | None) -> np.ndarray:
        expected = (self.config.block_records, self.config.projection_size)
        if found is None:
            raise DataError(f"{self.where}: missing: block_emb")
        if tuple(found.shape) != expected or found.dtype != torch.float32:
            raise DataError(
                f"{self.where}: block_emb is {found.dtype} {tuple(found.shape)}, "
                f"num_block_records and retriever_proj_size say float32 {expected}"
            )
        return found.detach().numpy()


_READERS: dict[str, Callable[[_Folder], dict[str, Any]]] = {
    "RealmEmbedder": _Folder.embedder,
    "RealmScorer": _Folder.scorer,
    "RealmKnowledgeAugEncoder": _Folder.encoder,
    "RealmReader": _Folder.reader,
    "RealmForOpenQA": _Folder.open_qa,
}


def _restore_projection(tensors: Tensors, path: Path, eps: float) -> float:
    """Put back the dense layers that an export had to scale to `eps`; returns the epsilon that they belong to."""
    exact = read_weights([path])
    stored = exact.pop(PROJECTION_EPS, None)
    if stored is None or stored.shape != () or not float(stored) > 0.0 or not exact:
        raise DataError(f"{path}: no {PROJECTION_EPS} above 0 and a dense layer with it; export the checkpoint again")
    scaled = scaled_projection(exact, float(stored), eps)
    whole = scaled.keys() == exact.keys() and sorted(exact) == projection_names(tensors)
    if not whole or not all(_same(tensor, tensors[name]) for name, tensor in scaled.items()):
        raise DataError(
            f"{path}: not the projection of the weights beside it; if those were trained on, delete this file"
        )
    tensors.update(exact)
    return float(stored)


def _without_head(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """Leave the masked-LM head aside, which embedders and readers carry without using it."""
    head = {f"{prefix}{_HEAD}{name}" for name in _HEAD_TENSORS}
    return {name: tensor for name, tensor in tensors.items() if name not in head}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _untied(tensors: Mapping[str, Tensor], where: str) -> Tensors:
    """The tensors without the two names that repeat others; a name that is absent is served by its twin."""
    kept = dict(tensors)
    for copy, original in _TIED.items():
        repeated = kept.pop(f"{_HEAD}{copy}", None)
        if repeated is None:
            continue
        if original in kept and not _same(repeated, kept[original]):
            raise DataError(f"{where}: {_HEAD}{copy} differs from {original}; a decoder of its own is not supported")
        kept.setdefault(original, repeated)
    return kept


def _require_uncased(path: Path) -> None:
    if path.is_file() and read_json(path).get("do_lower_case", True) is not True:
        raise DataError(f"{path}: a cased tokenizer; REALM's vocabulary is uncased, and so is the project's tokenizer")


def _whole(values: Mapping[str, Any], key: str, default: int, path: Path) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise DataError(f"{path}: {key} is {str(value)[:40]!r}, expected a whole number of at least 1")
    return value


def _real(values: Mapping[str, Any], key: str, default: float, path: Path) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise DataError(f"{path}: {key} is {str(value)[:40]!r}, expected a number")
    return float(value)
