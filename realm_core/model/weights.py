"""Start weights: from the files that `weight_files` finds to tensors. Nothing but safetensors is read."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from realm_core.config import ModelConfig
from realm_core.errors import ArtifactError, ConfigError
from realm_core.model.encoder import EncoderShape
from realm_core.model.weight_files import CONFIG, WEIGHTS, check_digest, weights_folder


@dataclass(frozen=True)
class StartWeights:
    """A BERT-shaped start: its shape and tensors named `embeddings.*`, `encoder.*`, `pooler.*`, `cls.predictions.*`."""

    shape: EncoderShape
    tensors: dict[str, torch.Tensor]

    @property
    def has_mlm_head(self) -> bool:
        return any(name.startswith("cls.predictions.") for name in self.tensors)


def load_start_weights(config: ModelConfig, vocabulary_size: int) -> StartWeights:
    """Shape and tensors of the start; for `random` the tensors are empty and the caller draws them.

    Raises ConfigError or ArtifactError if the weights are missing, of another digest, or do not fit the vocabulary.
    """
    if config.weights == "random":
        return StartWeights(_random_shape(config, vocabulary_size), {})
    folder = weights_folder(config)
    check_digest(folder / WEIGHTS, config.weights_sha256, "model.weights_sha256")
    shape = _shape_of(folder, config)
    if shape.vocab_size != vocabulary_size:
        raise ArtifactError(
            f"{folder}: embeddings for {shape.vocab_size} wordpieces, the corpus was tokenised with {vocabulary_size}; "
            "build the corpus with the vocabulary of these weights"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises its own type for a damaged header
        raise ArtifactError(f"{folder / WEIGHTS}: cannot be read ({error}); fetch the weights again") from None
    return StartWeights(shape, _bert_tensors(tensors, shape.layers))


def _shape_of(folder: Path, config: ModelConfig) -> EncoderShape:
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        layers = int(values["num_hidden_layers"])
        if config.layers is not None and config.layers > layers:
            raise ConfigError(f"model.layers={config.layers}: {folder} has {layers}; lower it")
        return EncoderShape(
            vocab_size=int(values["vocab_size"]),
            hidden_size=int(values["hidden_size"]),
            layers=config.layers or layers,
            heads=int(values["num_attention_heads"]),
            intermediate_size=int(values["intermediate_size"]),
            max_positions=int(values["max_position_embeddings"]),
            segment_types=int(values["type_vocab_size"]),
            dropout=config.dropout,
            layer_norm_eps=float(values.get("layer_norm_eps", 1e-12)),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / CONFIG}: not a BERT configuration ({error}); choose other weights") from None


def _random_shape(config: ModelConfig, vocabulary_size: int) -> EncoderShape:
    return EncoderShape(
        vocab_size=vocabulary_size,
        hidden_size=config.hidden_size,
        layers=config.layers or 12,
        heads=config.heads,
        intermediate_size=config.intermediate_size,
        max_positions=config.max_positions,
        dropout=config.dropout,
    )


def _bert_tensors(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Drop the `bert.` prefix, tied and foreign tensors, and the layers that are not used; all in float32."""
    kept = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith("encoder.layer.") and int(name.split(".")[2]) >= layers:
            continue
        if name.startswith("cls.predictions.decoder.") or name.endswith("position_ids"):
            continue
        if name.startswith(("embeddings.", "encoder.", "pooler.", "cls.predictions.")):
            kept[name] = tensor.float()
    return kept
