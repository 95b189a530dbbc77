"""A trainable REALM: retriever, knowledge-augmented encoder and tokenizer, and the files they live in.

A folder holds `model.json` (shapes), `embedder.safetensors`, `encoder.safetensors` and `vocab.txt`. The ICT artifact and every
rolling checkpoint have this layout; a checkpoint adds the optimiser.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from realm_core.config import ModelConfig
from realm_core.errors import ArtifactError
from realm_core.model.embedder import Retriever
from realm_core.model.encoder import Encoder, EncoderShape
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.weights import StartWeights
from realm_core.text.tokenizer import Tokenizer

EMBEDDER, ENCODER, SHAPES, VOCABULARY = "embedder.safetensors", "encoder.safetensors", "model.json", "vocab.txt"
M = TypeVar("M", bound=nn.Module)


@dataclass
class RealmModel:
    """Everything REALM pre-training updates."""

    retriever: Retriever
    encoder: KnowledgeEncoder
    tokenizer: Tokenizer

    def to(self, device: torch.device) -> "RealmModel":
        self.retriever.to(device)
        self.encoder.to(device)
        return self

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self.retriever.train(mode)
        self.encoder.train(mode)

    def save(self, folder: Path) -> None:
        """Write the four files."""
        save_module(self.retriever, folder / EMBEDDER)
        save_module(self.encoder, folder / ENCODER)
        embedder = self.retriever.embedder
        shapes = {
            "embedder": asdict(embedder.shape),
            "encoder": asdict(self.encoder.shape),
            "projection_size": embedder.projection_size,
            "projection_eps": embedder.projection_eps,
            "share_embedders": self.retriever.share,
        }
        (folder / SHAPES).write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")
        self.tokenizer.save(folder / VOCABULARY)

    @classmethod
    def load(cls, folder: Path) -> "RealmModel":
        """Read what `save` wrote. Raises ArtifactError naming the file and what does not fit."""
        retriever, tokenizer = load_retriever(folder)
        encoder = _unset(lambda: KnowledgeEncoder(encoder_shape(folder)))
        load_module(encoder, folder / ENCODER)
        return cls(retriever, encoder, tokenizer)


def load_retriever(folder: Path) -> tuple[Retriever, Tokenizer]:
    """Retriever and tokenizer of a checkpoint: all that embedding and searching need."""
    shapes = _read_shapes(folder)
    retriever = _unset(
        lambda: Retriever(
            shapes["embedder"],
            shapes["projection_size"],
            shapes["projection_eps"],
            share=shapes["share_embedders"],
        )
    )
    load_module(retriever, folder / EMBEDDER)
    return retriever, Tokenizer.from_file(folder / VOCABULARY)


def encoder_shape(folder: Path) -> EncoderShape:
    """Shape of the knowledge-augmented encoder of a checkpoint, which the reader shares."""
    shape: EncoderShape = _read_shapes(folder)["encoder"]
    return shape


def new_model(config: ModelConfig, start: StartWeights, tokenizer: Tokenizer, seed: int) -> RealmModel:
    """Build the model: BERT from the start weights in both towers and the encoder, everything else drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    retriever = Retriever(start.shape, config.projection_size, config.projection_eps, share=config.share_embedders)
    retriever.initialise(generator)
    encoder = KnowledgeEncoder(replace(start.shape, layers=config.encoder_layers or start.shape.layers))
    encoder.initialise(generator)
    if start.tensors:
        for bert in {retriever.embedder.realm, retriever.query_tower.realm, encoder.realm}:
            _fill_backbone(bert, start, config.weights)
        head = {name: tensor for name, tensor in start.tensors.items() if name.startswith("cls.")}
        if head:
            known = {name: tensor for name, tensor in encoder.state_dict().items() if name in head}
            _require_fit(known, head, config.weights, "these are not the weights of a BERT")
            encoder.load_state_dict(head, strict=False)
    return RealmModel(retriever, encoder, tokenizer)


def _fill_backbone(bert: Encoder, start: StartWeights, where: str) -> None:
    wanted = bert.state_dict()
    tensors = {name: tensor for name, tensor in start.tensors.items() if name in wanted}
    _require_fit(wanted, tensors, where, "these are not the weights of a BERT with a pooler")
    bert.load_state_dict(tensors)


def _read_shapes(folder: Path) -> dict[str, Any]:
    try:
        shapes = json.loads((folder / SHAPES).read_text(encoding="utf-8"))
        towers = {name: EncoderShape(**shapes[name]) for name in ("embedder", "encoder")}
        return {**{key: shapes[key] for key in _SHAPE_KEYS}, **towers}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / SHAPES}: unreadable ({error}); the checkpoint is not complete") from None


_SHAPE_KEYS = ("embedder", "encoder", "projection_size", "projection_eps", "share_embedders")


def _unset(make: Callable[[], M]) -> M:
    """A module whose weights hold no values yet, to be filled by `load_module`.

    Nothing is drawn: torch's global generator is the trainer's, and an index is opened on a thread beside it.
    """
    with torch.device("meta"):
        module = make()
    return module.to_empty(device="cpu")


def save_module(module: nn.Module, path: Path) -> None:
    """State dict as safetensors, contiguous and on the CPU."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}, path)


def load_module(module: nn.Module, path: Path) -> None:
    """Fill a module. Raises ArtifactError naming missing, unexpected or misshapen tensors."""
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own type for a damaged header and OSError for a missing file
        raise ArtifactError(f"{path}: cannot be read ({error}); restore it or use another checkpoint") from None
    _require_fit(module.state_dict(), tensors, path, "restore it or use another checkpoint")
    module.load_state_dict(tensors)


def _require_fit(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], where: object, advice: str
) -> None:
    """Raise ArtifactError naming every tensor that is missing, extra or of another shape."""
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in sorted(expected.items())
            if name in found and found[name].shape != tensor.shape
        ],
    }
    if any(wrong.values()):
        told = "; ".join(f"{kind}: {_listed(names)}" for kind, names in wrong.items() if names)
        raise ArtifactError(f"{where}: {told}; {advice}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


_NAMED = 20  # of a kind, in one message
