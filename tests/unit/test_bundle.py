"""The files of a model: what was saved is loaded, and nothing else is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realm_core.artifacts.store import Store
from realm_core.config import ModelConfig
from realm_core.errors import ArtifactError
from realm_core.index.version import open_version
from realm_core.model.bundle import EMBEDDER, ENCODER, SHAPES, RealmModel, load_retriever, new_model
from realm_core.model.device import resolve
from realm_core.model.weights import load_start_weights
from realm_core.text.tokenizer import Tokenizer, build_vocabulary

SMALL = ModelConfig(weights="random", layers=2, hidden_size=8, heads=2, intermediate_size=16, projection_size=4)


def small(**changes: object) -> RealmModel:
    tokenizer = Tokenizer(build_vocabulary(["snow fell on mount elbert in july"], 80))
    settings = SMALL.model_copy(update=changes)
    return new_model(settings, load_start_weights(settings, tokenizer.vocab_size), tokenizer, seed=5)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("changes", [{}, {"share_embedders": False}, {"encoder_layers": 1}, {"projection_eps": 1e-3}])
def test_what_was_saved_is_loaded(tmp_path: Path, changes: dict[str, object]) -> None:
    model = small(**changes)
    model.save(tmp_path)
    loaded = RealmModel.load(tmp_path)
    assert same(model.retriever, loaded.retriever) and same(model.encoder, loaded.encoder)
    assert loaded.retriever.embedder.projection_eps == model.retriever.embedder.projection_eps
    assert loaded.tokenizer.digest == model.tokenizer.digest
    assert all(weight.requires_grad for weight in loaded.encoder.parameters())


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        small().save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_new_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    first = small()
    torch.manual_seed(2)
    assert same(first.encoder, small().encoder) and same(first.retriever, small().retriever)


def test_opening_an_index_version_draws_no_random_number(tiny_home: Store) -> None:
    """It happens on a thread beside the trainer, whose dropout comes from torch's one global generator."""
    index = tiny_home.path("indexes", "r1-s0000004")
    before = torch.get_rng_state()
    open_version(
        index,
        checkpoint=tiny_home.parent(index, "checkpoint"),
        corpus=tiny_home.parent(index, "corpus"),
        device=resolve(tiny_home.config().runtime),
    )
    RealmModel.load(tiny_home.path("checkpoints", "r1-s0000004"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    small().save(tmp_path)
    (tmp_path / ENCODER).write_bytes(b"torn")
    with pytest.raises(ArtifactError, match=r"encoder\.safetensors: cannot be read .*; restore it or use another"):
        RealmModel.load(tmp_path)


def test_a_missing_tensor_an_extra_one_and_another_shape_are_named(tmp_path: Path) -> None:
    small().save(tmp_path)
    tensors = load_file(tmp_path / EMBEDDER)
    del tensors["embedder.cls.dense.bias"]
    tensors["stranger"] = torch.zeros(1)
    tensors["embedder.cls.dense.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / EMBEDDER)
    with pytest.raises(ArtifactError) as caught:
        load_retriever(tmp_path)
    message = str(caught.value)
    assert message.endswith(
        "embedder.safetensors: missing: embedder.cls.dense.bias; extra: stranger; of another shape: "
        "embedder.cls.dense.weight (3, 3) instead of (4, 8); restore it or use another checkpoint"
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", "3"])
def test_a_checkpoint_without_its_shapes_is_not_complete(tmp_path: Path, text: str) -> None:
    small().save(tmp_path)
    (tmp_path / SHAPES).write_text(text)
    with pytest.raises(ArtifactError, match=r"model\.json: unreadable .*; the checkpoint is not complete"):
        load_retriever(tmp_path)


def test_shapes_that_no_model_has_are_an_operators_error(tmp_path: Path) -> None:
    small().save(tmp_path)
    values = json.loads((tmp_path / SHAPES).read_text())
    (tmp_path / SHAPES).write_text(json.dumps({**values, "embedder": {"colour": "blue"}}))
    with pytest.raises(ArtifactError, match=r"model\.json: unreadable"):
        load_retriever(tmp_path)
