"""What a published checkpoint holds once its names and layouts are the project's own; and the check that it fits.

The readers of foreign formats end here, the writer of artifacts begins here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from realm_core.errors import ConfigError, DataError
from realm_core.model.encoder import EncoderShape
from realm_core.model.reader import READER_EPS

Tensors = dict[str, Tensor]
FINE_TUNED = "block vectors belong to the embedder before fine-tuning: search them, do not embed blocks with this one"
_LISTED = 20  # of many names that are only a hint


@dataclass(frozen=True, kw_only=True)
class RetrieverPart:
    """Tensors of a `Retriever` and all its sizes."""

    shape: EncoderShape
    tensors: Tensors
    projection_size: int
    projection_eps: float
    share: bool


@dataclass(frozen=True, kw_only=True)
class EncoderPart:
    """Tensors of a `KnowledgeEncoder` and its sizes."""

    shape: EncoderShape
    tensors: Tensors


@dataclass(frozen=True, kw_only=True)
class ReaderPart:
    """Tensors of a `Reader` and all its sizes."""

    shape: EncoderShape
    tensors: Tensors
    span_hidden: int
    max_span_width: int
    span_eps: float = READER_EPS


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """One or more published checkpoints. `block_vectors` may be a map of a file larger than memory."""

    origins: tuple[str, ...]  # what was read, for people: "transformers RealmEmbedder"
    retriever: RetrieverPart | None = None
    encoder: EncoderPart | None = None
    reader: ReaderPart | None = None
    block_vectors: np.ndarray | None = None  # "N D", float32
    block_records: Path | None = None  # their texts, one a row
    block_titles: Path | None = None  # and titles, where there are any
    vocabulary: Path | None = None
    sources: Mapping[str, str]  # file -> sha256
    notes: tuple[str, ...] = ()


def combined(parts: Sequence[Foreign]) -> Foreign:
    """Several checkpoints as one. Raises DataError if two bring the same part, or if their vocabularies differ."""
    whole = parts[0]
    for part in parts[1:]:
        for name in ("retriever", "encoder", "reader", "block_vectors"):
            if getattr(whole, name) is not None and getattr(part, name) is not None:
                raise DataError(f"{whole.origins[0]} and {part.origins[0]} both hold a {name}; leave one of them out")
        whole = replace(
            whole,
            origins=whole.origins + part.origins,
            retriever=whole.retriever or part.retriever,
            encoder=whole.encoder or part.encoder,
            reader=whole.reader or part.reader,
            block_vectors=part.block_vectors if whole.block_vectors is None else whole.block_vectors,
            block_records=whole.block_records or part.block_records,
            block_titles=whole.block_titles or part.block_titles,
            vocabulary=_one_vocabulary(whole, part),
            sources={**whole.sources, **part.sources},
            notes=whole.notes + part.notes,
        )
    return whole


def vocabulary_size(found: Foreign) -> int:
    """Rows of the word embeddings. Raises DataError if the parts have different ones."""
    sizes = {part.shape.vocab_size for part in (found.retriever, found.encoder, found.reader) if part is not None}
    if len(sizes) != 1:
        raise DataError(f"{' + '.join(found.origins)}: embeddings for {sorted(sizes)} wordpieces; combine equal ones")
    return sizes.pop()


def fitted(
    tensors: Mapping[str, Tensor],
    build: Callable[[], nn.Module],
    where: str,
    in_file: Callable[[str], str] = str,
) -> Tensors:
    """The tensors as float32 copies, if they are exactly those of the module that `build` makes.

    Raises DataError naming every tensor that is missing, extra, of another shape, or not a finite number everywhere.
    `in_file` gives the name that a tensor has in the file, which is where its owner looks for it.
    """
    expected = _shapes_of(build, where)
    if problems := _differences(tensors, expected, in_file):
        raise DataError(f"{where}: the tensors do not fit the configuration; {problems}")
    unusable = [in_file(name) for name, each in tensors.items() if not each.is_floating_point() or each.is_sparse]
    if unusable:
        raise DataError(f"{where}: not plain real numbers: {', '.join(unusable)}; use an unquantised checkpoint")
    copies = {name: tensors[name].detach().to(torch.float32, copy=True).contiguous() for name in expected}
    broken = [in_file(name) for name, tensor in copies.items() if not tensor.isfinite().all()]
    if broken:
        raise DataError(f"{where}: values that are not finite in {', '.join(broken)}; the checkpoint is damaged")
    return copies


def _differences(
    tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], in_file: Callable[[str], str]
) -> str:
    """What is missing, extra and misshapen, all of it by name; nothing if everything fits."""
    lists = {
        "missing": [in_file(name) for name in sorted(expected.keys() - tensors.keys())],
        "extra": [in_file(name) for name in sorted(tensors.keys() - expected.keys())],
        "misshapen": [
            f"{in_file(name)} {_size(tensors[name].shape, in_file(name))} instead of {_size(shape, in_file(name))}"
            for name, shape in sorted(expected.items())
            if name in tensors and tensors[name].shape != shape
        ],
    }
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in lists.items() if names)


def _size(shape: torch.Size, name: str) -> tuple[int, ...]:
    """The shape in the file: TensorFlow's kernels have their inputs first."""
    return tuple(reversed(shape)) if name.endswith("/kernel") else tuple(shape)


def require_layers(names: Iterable[str], layers: int, where: str) -> None:
    """Raise DataError unless the tensors are those of so many layers. Asked before any module of that size is built."""
    found = {
        part for name in names if "encoder.layer." in name for part in [name.split("encoder.layer.")[1].split(".")[0]]
    }
    if found != {str(number) for number in range(min(layers, len(found) + 1))}:
        raise DataError(f"{where}: tensors of layers {listed(sorted(found))}, the configuration says {layers} layers")


def listed(names: Sequence[str]) -> str:
    """The names, the first of many."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _shapes_of(build: Callable[[], nn.Module], where: str) -> dict[str, torch.Size]:
    """Shapes of a module's tensors; nothing is allocated for them."""
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in build().state_dict().items()}
    except (ConfigError, RuntimeError, TypeError, OverflowError) as error:
        raise DataError(f"{where}: impossible sizes ({str(error).splitlines()[0]}); check its configuration") from None


def _one_vocabulary(first: Foreign, second: Foreign) -> Path | None:
    both = [path for path in (first.vocabulary, second.vocabulary) if path is not None]
    if len(both) == 2 and both[0].read_bytes() != both[1].read_bytes():
        raise DataError(f"{both[1]}: another vocabulary than {both[0]}; the two checkpoints do not belong together")
    return both[0] if both else None
