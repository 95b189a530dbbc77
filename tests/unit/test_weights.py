"""Start weights: by one name, with their digest checked before anything is opened."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realm_core.artifacts.manifest import file_sha256
from realm_core.config import ModelConfig
from realm_core.errors import ArtifactError, ConfigError, RealmError
from realm_core.model.bundle import new_model
from realm_core.model.encoder import Encoder, EncoderShape
from realm_core.model.weight_files import (
    CONFIG,
    VOCABULARY,
    WEIGHTS,
    vocabulary_path,
    weights_folder,
    weights_sha256,
)
from realm_core.model.weights import load_start_weights
from realm_core.text.tokenizer import Tokenizer, build_vocabulary

SHAPE = EncoderShape(vocab_size=60, hidden_size=8, layers=2, heads=2, intermediate_size=16, max_positions=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as hubs and packages have it: a BERT with the names of the published files."""
    place = tmp_path / "weights"
    place.mkdir()
    bert = Encoder(SHAPE)
    bert.initialise(torch.Generator().manual_seed(1))
    tensors = {f"bert.{name}": tensor.contiguous() for name, tensor in bert.state_dict().items()}
    tensors["cls.seq_relationship.weight"] = torch.zeros(2, 8)  # foreign to REALM
    tensors["bert.embeddings.position_ids"] = torch.arange(32)
    save_file(tensors, place / WEIGHTS)
    (place / CONFIG).write_text(
        json.dumps(
            {
                "vocab_size": 60,
                "hidden_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "max_position_embeddings": 32,
                "type_vocab_size": 2,
            }
        )
    )
    (place / VOCABULARY).write_text("".join(f"{word}\n" for word in vocabulary().vocab))
    return place


def vocabulary() -> Tokenizer:
    made = build_vocabulary(["the snow fell on mount elbert in july"], 60)
    return Tokenizer([*made, *(f"[unused{i}]" for i in range(60 - len(made)))])


def config(folder: Path | str, **changes: object) -> ModelConfig:
    return ModelConfig(weights=f"folder:{folder}", projection_size=4, **changes)  # type: ignore[arg-type]


def test_weights_from_a_folder_reach_both_towers_and_the_encoder(folder: Path) -> None:
    start = load_start_weights(config(folder), 60)
    model = new_model(config(folder, share_embedders=False), start, vocabulary(), seed=3)
    word = start.tensors["embeddings.word_embeddings.weight"]
    for bert in (model.retriever.query_tower.realm, model.retriever.document_tower.realm, model.encoder.realm):
        assert torch.equal(bert.embeddings.word_embeddings.weight, word)
    assert not start.has_mlm_head


def test_only_the_layers_asked_for_are_used(folder: Path) -> None:
    start = load_start_weights(config(folder, layers=1), 60)
    assert start.shape.layers == 1
    assert not any(name.startswith("encoder.layer.1") for name in start.tensors)


def test_more_layers_than_there_are_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers=3: .* has 2; lower it"):
        load_start_weights(config(folder, layers=3), 60)


def test_half_precision_weights_become_full(folder: Path) -> None:
    halves = {f"bert.{name}": tensor.half() for name, tensor in load_start_weights(config(folder), 60).tensors.items()}
    save_file(halves, folder / WEIGHTS)
    assert {tensor.dtype for tensor in load_start_weights(config(folder), 60).tensors.values()} == {torch.float32}


def test_random_weights_have_no_files(folder: Path) -> None:
    random = ModelConfig(weights="random", layers=1)
    assert vocabulary_path(random) is None
    assert load_start_weights(random, 77).shape.vocab_size == 77


def test_the_digest_is_the_one_demanded_or_that_of_the_file(folder: Path) -> None:
    assert weights_sha256(config(folder)) == file_sha256(folder / WEIGHTS)
    assert weights_sha256(config(folder, weights_sha256="abc")) == "abc"


@pytest.mark.parametrize("name", [WEIGHTS, VOCABULARY])
def test_a_file_of_another_digest_is_refused_before_it_is_opened(folder: Path, name: str) -> None:
    setting = "weights_sha256" if name == WEIGHTS else "vocabulary_sha256"
    (folder / name).write_bytes(b"not what it claims to be")
    demanding = config(folder, **{setting: "0" * 64})
    with pytest.raises(ArtifactError, match=rf"sha256 \w{{64}}, model\.{setting} says 0{{64}}; do not use this file"):
        vocabulary_path(demanding) if name == VOCABULARY else load_start_weights(demanding, 60)


@pytest.mark.parametrize("name", [WEIGHTS, VOCABULARY])
def test_a_missing_file_is_named_with_what_the_folder_must_hold(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}: missing; model.weights must name a folder with config.json, model"):
        vocabulary_path(config(folder)) if name == VOCABULARY else weights_sha256(config(folder))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for act in (vocabulary_path, weights_sha256, lambda settings: load_start_weights(settings, 60)):
        with pytest.raises(ConfigError, match=f"{tmp_path}/absent/.*: missing; model.weights must name a folder"):
            act(config(tmp_path / "absent"))


def test_a_damaged_file_is_one_line(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x00" * 100)
    with pytest.raises(ArtifactError, match=r"cannot be read .*; fetch the weights again") as caught:
        load_start_weights(config(folder), 60)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"vocab_size": "many"}', "3"])
def test_a_configuration_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json: not a BERT configuration .*; choose other weights"):
        load_start_weights(config(folder), 60)


def test_weights_for_another_vocabulary_are_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="embeddings for 60 wordpieces, the corpus was tokenised with 61; build"):
        load_start_weights(config(folder), 61)


def test_weights_of_something_else_are_refused(folder: Path) -> None:
    save_file({"encoder.conv.weight": torch.zeros(3)}, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="these are not the weights of a BERT"):
        new_model(config(folder), load_start_weights(config(folder), 60), vocabulary(), seed=3)


@pytest.mark.parametrize("name", ["bert.embeddings.position_embeddings.weight", "cls.predictions.transform.dense.bias"])
def test_a_tensor_of_another_shape_is_named(folder: Path, name: str) -> None:
    save_file({**load_file(folder / WEIGHTS), name: torch.zeros(2, 3)}, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match=rf"of another shape: {name.removeprefix('bert.')} \(2, 3\) instead of"):
        new_model(config(folder), load_start_weights(config(folder), 60), vocabulary(), seed=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", "use hub:NAME@REVISION, package:NAME, folder:PATH or random"),
        ("ftp:x", "use hub:NAME@REVISION, package:NAME, folder:PATH or random"),
        ("package:no_such_package_here", "no such Python package; install the one"),
        ("package:", "no such Python package; install the one"),
        ("package:a.b", "no such Python package; install the one"),
        ("package:../x", "no such Python package"),
        ("package:json", r"json: .* holds no model\.safetensors; choose another package"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weights_folder(ModelConfig(weights=name))


def test_every_error_is_one_an_operator_can_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RealmError):
        vocabulary_path(config(tmp_path / "file"))
