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


@dataclass(frozen=True)
class _Part:
    """The tensors of one part under the project's names, and the variable that each of them was."""

    tensors: Tensors
    variables: dict[str, str]

    def variable(self, name: str) -> str:
        """The name in the file; that of a tensor that is not there follows the variables that are."""
        return self.variables.get(name) or self._expected(name)

    def _expected(self, name: str) -> str:
        layers, leaf = name.rsplit(".", 1)
        norm = layers.endswith(("LayerNorm", "layer_normalization"))
        leaf = {"weight": "gamma" if norm else "kernel", "bias": "beta" if norm else "bias"}[leaf]
        if layers.startswith("qa_outputs."):
            inverse = {ours: theirs for theirs, ours in _SPAN_LAYERS.items()}
            return f"reader/{inverse[layers.removeprefix('qa_outputs.')]}/{leaf}"
        if layers.startswith("embedder.cls."):
            return (
                f"{self._before(_PROJECTION, 'layer', 'module/module/')}{layers.removeprefix('embedder.cls.')}/{leaf}"
            )
        path = re.sub(r"/layer/(\d+)/", r"/layer_\1/", f"{layers}/".replace(".", "/")).removeprefix("embedder/")
        path = f"bert/{path.removeprefix('realm/')}" if path.startswith("realm/") else path
        if path.endswith("_embeddings/"):
            leaf = ""
        elif path == "cls/predictions/":
            leaf = "output_bias"
        return (self._before(_BERT, "inner", "") + path + leaf).removesuffix("/")

    def _before(self, pattern: re.Pattern[str], group: str, default: str) -> str:
        """What stands before a group in the first variable that a pattern fits."""
        matches = (pattern.fullmatch(variable) for variable in self.variables.values())
        return next((match.string[: match.start(group)] for match in matches if match), default)


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
    parts = _parts(bundle)
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
        retriever=_retriever(parts["embedder"], heads, str(prefix)) if "embedder" in parts else None,
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


def _parts(bundle: Bundle) -> dict[str, _Part]:
    """What the checkpoint holds, by part. Raises DataError naming variables nobody knows."""
    parts: dict[str, _Part] = {}
    unknown = []
    for variable in bundle.entries:
        if _SKIPPED.fullmatch(variable) or _BLOCK_EMB.fullmatch(variable):
            continue
        place = place_of(variable)
        if place is None:
            unknown.append(variable)
        elif place.part is not None:
            part = parts.setdefault(place.part, _Part({}, {}))
            if place.name in part.variables:
                raise DataError(f"{bundle.prefix}: {part.variables[place.name]} and {variable} are both {place.name}")
            part.variables[place.name] = variable
            value = bundle.read(variable)
            part.tensors[place.name] = torch.from_numpy(np.array(value.T if variable.endswith("/kernel") else value))
    if unknown:
        raise DataError(f"{bundle.prefix}: extra: {', '.join(unknown)}; these are no variables of a REALM model")
    return parts


def _shape(part: _Part, prefix: str, heads: int | None, where: str) -> EncoderShape:
    """Sizes from the tensors themselves, those of the encoder standing behind `prefix`."""
    layers = len({name.split("encoder.layer.")[1].split(".")[0] for name in part.tensors if "encoder.layer." in name})
    require_layers(part.tensors, layers, where)
    size = lambda name: _present(part, f"{prefix}realm.{name}.weight", 2, where).shape  # noqa: E731
    vocabulary, hidden = size("embeddings.word_embeddings")
    if heads is None:
        if hidden % HEAD_SIZE:
            raise DataError(f"{where}: hidden size {hidden} is no multiple of {HEAD_SIZE}; pass --heads")
        heads = hidden // HEAD_SIZE
    try:
        return EncoderShape(
            vocab_size=vocabulary,
            hidden_size=hidden,
            layers=layers,
            heads=heads,
            intermediate_size=size("encoder.layer.0.intermediate.dense")[0],
            max_positions=size("embeddings.position_embeddings")[0],
            segment_types=size("embeddings.token_type_embeddings")[0],
        )
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None


def _present(part: _Part, name: str, dimensions: int, where: str) -> Tensor:
    """A tensor that sizes are read from."""
    found = part.tensors.get(name)
    if found is None or found.dim() != dimensions:
        kind = "vector" if dimensions == 1 else "matrix"
        raise DataError(f"{where}: missing: {part.variable(name)}, a {kind}; the checkpoint is not complete")
    return found


def _retriever(part: _Part, heads: int | None, where: str) -> RetrieverPart:
    shape = _shape(part, "embedder.", heads, where)
    width = len(_present(part, "embedder.cls.dense.bias", 1, where))
    eps = _projection_eps(part)
    return RetrieverPart(
        shape=shape,
        tensors=fitted(part.tensors, lambda: Retriever(shape, width, eps), where, part.variable),
        projection_size=width,
        projection_eps=eps,
        share=True,
    )


def _projection_eps(part: _Part) -> float:
    """The epsilon follows from the name that the norm goes by."""
    matches = (_PROJECTION.fullmatch(variable) for variable in part.variables.values())
    norms = {match["layer"] for match in matches if match} - {"dense"}
    return _KERAS_EPS if norms == {"layer_normalization"} else _CONTRIB_EPS


def _encoder(part: _Part, heads: int | None, where: str) -> EncoderPart:
    shape = _shape(part, "", heads, where)
    return EncoderPart(shape=shape, tensors=fitted(part.tensors, lambda: KnowledgeEncoder(shape), where, part.variable))


def _reader(part: _Part, heads: int | None, max_span_width: int, where: str) -> ReaderPart:
    shape = _shape(part, "", heads, where)
    width = len(_present(part, "qa_outputs.layer_normalization.weight", 1, where))
    fit = fitted(part.tensors, lambda: Reader(shape, width, max_span_width), where, part.variable)
    return ReaderPart(shape=shape, tensors=fit, span_hidden=width, max_span_width=max_span_width)


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
