"""Reads REALM checkpoints as the original code published them: TF-Hub modules and plain TensorFlow checkpoints.

    embedder    module/module/module/bert/…  module/module/{dense,LayerNorm}/…     encoded/encoded.ckpt: block_emb
    encoder     bert/…  cls/predictions/…
    fine-tuned  one module/ more in front of the embedder; reader/module/bert/…  reader/{dense,dense_1,layer_normalization}/…

Kernels are stored input first and are transposed here. Slots of the optimiser are left aside.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from realm_core.artifacts.manifest import file_sha256
from realm_core.compat.foreign import (
    FINE_TUNED,
    EncoderPart,
    Foreign,
    ReaderPart,
    RetrieverPart,
    Tensors,
    fitted,
    listed,
    require_layers,
)
from realm_core.compat.tf_bundle import Bundle, index_of
from realm_core.errors import ConfigError, DataError
from realm_core.model.embedder import Retriever
from realm_core.model.encoder import EncoderShape
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.reader import Reader

HEAD_SIZE = 64  # of every published BERT; attention heads leave no other trace in a checkpoint
_SKIPPED = re.compile(r"(?:.*/)?(?:adam_m|adam_v|global_step|_CHECKPOINTABLE_OBJECT_GRAPH)")
_BLOCK_EMB = re.compile(r"(?:.*/)?block_emb")
_BERT = re.compile(r"(?P<reader>reader/)?(?P<modules>(?:module/)*)(?P<inner>(?:bert|cls/predictions)/.+)")
_PROJECTION = re.compile(r"(?:module/)+(?P<layer>dense|LayerNorm|layer_normalization)/(?P<inner>\w+)")
_SPAN_HEAD = re.compile(r"reader/(?P<layer>dense|dense_1|layer_normalization)/(?P<inner>\w+)")
_PROJECTION_LAYERS = {"dense": "dense", "LayerNorm": "LayerNorm", "layer_normalization": "LayerNorm"}
_SPAN_LAYERS = {
    "dense": "dense_intermediate",
    "dense_1": "dense_output",
    "layer_normalization": "layer_normalization",
}
_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias", "output_bias": "bias"}
_KERAS_EPS, _CONTRIB_EPS = 1e-3, 1e-12  # of the layers that call themselves layer_normalization and LayerNorm


@dataclass(frozen=True)
class Place:
    """Where a variable goes: the part, and the name of its tensor there; a part of None is a head that is not used."""

    part: str | None  # embedder, encoder or reader
    name: str


def read_tf(
    path: Path,
    vocabulary: Path | None = None,
    records: Path | None = None,
    titles: Path | None = None,
    heads: int | None = None,
    max_span_width: int = 10,
) -> Foreign:
    """A TF-Hub module, the folder of a fine-tuned model, or the prefix of a checkpoint.

    `heads` None means hidden size / 64. Raises DataError naming the file, and every variable that does not fit.
    """
    prefix = find_prefix(path)
    bundle = Bundle.open(prefix)
    parts, layer_norms = _tensors(bundle)
    encoded = path / "encoded" / "encoded.ckpt"
    vectors_in = Bundle.open(encoded) if index_of(encoded).is_file() else bundle
    vectors = _block_vectors(vectors_in)
    found = sorted(parts)
    if not found:
        raise DataError(f"{prefix}: no variable of a REALM model among {listed(sorted(bundle.entries))}")
    if vocabulary is None and (path / "assets" / "vocab.txt").is_file():
        vocabulary = path / "assets" / "vocab.txt"
    origin = f"TensorFlow {' and '.join(found)}"
    used = {prefix: bundle} | ({encoded: vectors_in} if vectors is not None else {})
    if vectors is None:
        records = titles = None
    return Foreign(
        origins=(origin,),
        retriever=_retriever(parts["embedder"], heads, layer_norms, str(prefix)) if "embedder" in parts else None,
        encoder=_encoder(parts["encoder"], heads, str(prefix)) if "encoder" in parts else None,
        reader=_reader(parts["reader"], heads, max_span_width, str(prefix)) if "reader" in parts else None,
        block_vectors=vectors,
        block_records=records,
        block_titles=titles,
        vocabulary=vocabulary,
        sources={
            f"{origin}/{file.name}": file_sha256(file)
            for file in [*_files(used), *(each for each in (vocabulary, records, titles) if each is not None)]
        },
        notes=(FINE_TUNED,) if "reader" in parts else (),
    )


def find_prefix(path: Path) -> Path:
    """The prefix of the checkpoint that `path` means. Raises DataError if there is none or more than one."""
    if path.name.endswith(".index"):
        path = path.with_name(path.name.removesuffix(".index"))
    if index_of(path).is_file():
        return path
    for place in (path / "variables", path / "export" / "best_default" / "checkpoint", path):
        indexes = sorted(place.glob("*.index")) if place.is_dir() else []
        if len(indexes) > 1:
            names = listed([each.name.removesuffix(".index") for each in indexes])
            raise DataError(f"{place}: several checkpoints ({names}); name one of them")
        if indexes:
            return place / indexes[0].name.removesuffix(".index")
    raise DataError(f"{path}: no checkpoint (*.index) here; name a TF-Hub module, or a checkpoint by its prefix")


def place_of(variable: str) -> Place | None:
    """Where a variable belongs; None if its name is none of a REALM model."""
    if match := _BERT.fullmatch(variable):
        part = "reader" if match["reader"] else "embedder" if match["modules"] else "encoder"
        inner = _inner(match["inner"])
        if inner is None:
            return None
        if inner.startswith("cls.") and part != "encoder":
            return Place(None, inner)
        prefix = "" if inner.startswith("cls.") else "embedder.realm." if part == "embedder" else "realm."
        return Place(part, f"{prefix}{inner.removeprefix('bert.')}")
    match = _PROJECTION.fullmatch(variable)
    if match and match["inner"] in _LEAVES:
        return Place("embedder", f"embedder.cls.{_PROJECTION_LAYERS[match['layer']]}.{_LEAVES[match['inner']]}")
    match = _SPAN_HEAD.fullmatch(variable)
    if match and match["inner"] in _LEAVES:
        return Place("reader", f"qa_outputs.{_SPAN_LAYERS[match['layer']]}.{_LEAVES[match['inner']]}")
    return None


def _inner(path: str) -> str | None:
    """`bert/encoder/layer_3/…/kernel` -> `bert.encoder.layer.3.….weight`."""
    *stem, leaf = re.sub(r"/layer_(\d+)/", r"/layer/\1/", path).split("/")
    if leaf.endswith("_embeddings"):
        return ".".join([*stem, leaf, "weight"])
    return ".".join([*stem, _LEAVES[leaf]]) if leaf in _LEAVES else None


def _tensors(bundle: Bundle) -> tuple[dict[str, Tensors], set[str]]:
    """(tensors by part, names the projection's norm goes by). Raises DataError naming variables nobody knows."""
    parts: dict[str, Tensors] = {}
    origin: dict[Place, str] = {}
    unknown = []
    norms = set()
    for variable in bundle.entries:
        if _SKIPPED.fullmatch(variable) or _BLOCK_EMB.fullmatch(variable):
            continue
        place = place_of(variable)
        if place is None:
            unknown.append(variable)
        elif place.part is not None:
            if place in origin:
                raise DataError(f"{bundle.prefix}: {origin[place]} and {variable} are both {place.name}")
            origin[place] = variable
            value = bundle.read(variable)
            kernel = variable.endswith("/kernel")
            tensor = torch.from_numpy(np.array(value.T if kernel else value))
            parts.setdefault(place.part, {})[place.name] = tensor
            if (match := _PROJECTION.fullmatch(variable)) and match["layer"] != "dense":
                norms.add(match["layer"])
    if unknown:
        raise DataError(f"{bundle.prefix}: extra: {listed(unknown)}; these are no variables of a REALM model")
    return parts, norms


def _shape(tensors: Mapping[str, Tensor], heads: int | None, where: str) -> EncoderShape:
    """Sizes from the tensors themselves."""
    layers = len({name.split("encoder.layer.")[1].split(".")[0] for name in tensors if "encoder.layer." in name})
    require_layers(tensors, layers, where)
    words = _matrix(tensors, "embeddings.word_embeddings.weight", where)
    hidden = words.shape[1]
    if heads is None:
        if hidden % HEAD_SIZE:
            raise DataError(f"{where}: hidden size {hidden} is no multiple of {HEAD_SIZE}; pass --heads")
        heads = hidden // HEAD_SIZE
    try:
        return EncoderShape(
            vocab_size=words.shape[0],
            hidden_size=hidden,
            layers=layers,
            heads=heads,
            intermediate_size=_matrix(tensors, "encoder.layer.0.intermediate.dense.weight", where).shape[0],
            max_positions=_matrix(tensors, "embeddings.position_embeddings.weight", where).shape[0],
            segment_types=_matrix(tensors, "embeddings.token_type_embeddings.weight", where).shape[0],
        )
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None


def _matrix(tensors: Mapping[str, Tensor], end: str, where: str) -> Tensor:
    for name, tensor in tensors.items():
        if name.endswith(f"realm.{end}") and tensor.dim() == 2:
            return tensor
    raise DataError(f"{where}: missing: realm.{end}, a matrix; the checkpoint is not complete")


def _retriever(tensors: Tensors, heads: int | None, norms: set[str], where: str) -> RetrieverPart:
    shape = _shape(tensors, heads, where)
    eps = _KERAS_EPS if norms == {"layer_normalization"} else _CONTRIB_EPS
    bias = tensors.get("embedder.cls.dense.bias")
    if bias is None or bias.dim() != 1:
        raise DataError(f"{where}: missing: embedder.cls.dense.bias, a vector; the checkpoint is not complete")
    width = len(bias)
    return RetrieverPart(
        shape=shape,
        tensors=fitted(tensors, lambda: Retriever(shape, width, eps), where),
        projection_size=width,
        projection_eps=eps,
        share=True,
    )


def _encoder(tensors: Tensors, heads: int | None, where: str) -> EncoderPart:
    shape = _shape(tensors, heads, where)
    return EncoderPart(shape=shape, tensors=fitted(tensors, lambda: KnowledgeEncoder(shape), where))


def _reader(tensors: Tensors, heads: int | None, max_span_width: int, where: str) -> ReaderPart:
    shape = _shape(tensors, heads, where)
    width = tensors.get("qa_outputs.layer_normalization.weight")
    if width is None or width.dim() != 1:
        raise DataError(f"{where}: missing: qa_outputs.layer_normalization.weight, a vector; it is not complete")
    build = lambda: Reader(shape, len(width), max_span_width)  # noqa: E731
    fit = fitted(tensors, build, where)
    return ReaderPart(shape=shape, tensors=fit, span_hidden=len(width), max_span_width=max_span_width)


def _block_vectors(bundle: Bundle) -> np.ndarray | None:
    names = [name for name in bundle.entries if _BLOCK_EMB.fullmatch(name)]
    if not names:
        return None
    vectors = bundle.read(names[0])
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise DataError(f"{bundle.prefix}: {names[0]} is {vectors.dtype} {vectors.shape}, expected a float32 matrix")
    return vectors


def _files(bundles: Mapping[Path, Bundle]) -> list[Path]:
    return [
        file
        for prefix, bundle in bundles.items()
        for file in (index_of(prefix), *(bundle.data_file(shard) for shard in range(bundle.shards)))
        if file.is_file()
    ]
