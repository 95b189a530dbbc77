"""Folders of the five Realm classes: what is read, what is named when it does not fit, and what is never run."""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from realm_core.compat.foreign import combined
from realm_core.compat.hf import read_hf
from realm_core.errors import DataError
from realm_core.model.embedder import Retriever
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.reader import Reader
from tests.published import (
    PROJECTION,
    SHAPE,
    SPAN_HIDDEN,
    SPAN_WIDTH,
    STATES,
    State,
    embedder_state,
    encoder_state,
    port_folder,
    scorer_state,
)

WORDS = "realm.embeddings.word_embeddings.weight"


def as_pytorch(folder: Path) -> Path:
    """The same folder with a PyTorch file, in which tied tensors share their memory."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("as_file", [lambda folder: folder, as_pytorch], ids=["safetensors", "pytorch"])
@pytest.mark.parametrize("architecture", list(STATES))
def test_every_class_gives_the_tensors_of_the_projects_own_modules(
    tmp_path: Path, architecture: str, as_file: Callable[[Path], Path]
) -> None:
    state = STATES[architecture]()
    found = read_hf(as_file(port_folder(tmp_path / "hf", architecture, state)))
    modules = {
        "retriever": (Retriever(SHAPE, PROJECTION), {"RealmEmbedder": "embedder."}.get(architecture, "")),
        "encoder": (KnowledgeEncoder(SHAPE), ""),
        "reader": (Reader(SHAPE, SPAN_HIDDEN, SPAN_WIDTH), {"RealmForOpenQA": "reader."}.get(architecture, "")),
    }
    parts = {name: getattr(found, name) for name in modules if getattr(found, name) is not None}
    expected = {
        "RealmEmbedder": {"retriever"},
        "RealmScorer": {"retriever"},
        "RealmKnowledgeAugEncoder": {"encoder"},
        "RealmReader": {"reader"},
        "RealmForOpenQA": {"retriever", "reader"},
    }
    assert parts.keys() == expected[architecture]
    for name, part in parts.items():
        module, prefix = modules[name]
        module.load_state_dict(part.tensors)  # strict: every name, every shape
        for key, tensor in part.tensors.items():
            origin = key.removeprefix(prefix) if name == "retriever" else prefix + key
            assert torch.equal(tensor, state[origin]), key
    if architecture == "RealmForOpenQA":
        np.testing.assert_array_equal(found.block_vectors, state["block_emb"].numpy())
        assert found.block_records == tmp_path / "hf" / "block_records.npy"


def test_a_scorer_has_one_tower_if_its_tensors_are_equal_and_two_if_not(tmp_path: Path) -> None:
    shared = read_hf(port_folder(tmp_path / "one", "RealmScorer", scorer_state())).retriever
    separate = read_hf(port_folder(tmp_path / "two", "RealmScorer", scorer_state(query_seed=5))).retriever
    assert shared is not None and shared.share and not any(n.startswith("query_") for n in shared.tensors)
    assert separate is not None and not separate.share
    Retriever(SHAPE, PROJECTION, share=False).load_state_dict(separate.tensors)


def test_a_scorer_that_stores_shared_tensors_once_is_complete_whichever_name_they_have(tmp_path: Path) -> None:
    state = scorer_state()
    names = sorted(name for name in state if name.startswith("embedder."))
    once = {name if i % 2 else f"query_{name}": state[name] for i, name in enumerate(names)}
    found = read_hf(port_folder(tmp_path / "hf", "RealmScorer", once)).retriever
    assert found is not None and found.share
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, state[name])


def test_separate_towers_do_not_lend_each_other_tensors(tmp_path: Path) -> None:
    state = scorer_state(query_seed=5)
    del state["query_embedder.cls.dense.bias"]
    with pytest.raises(DataError, match=r"missing: query_embedder\.cls\.dense\.bias$"):
        read_hf(port_folder(tmp_path / "hf", "RealmScorer", state))


@pytest.mark.parametrize("absent", [["decoder.weight"], ["decoder.bias"], ["decoder.weight", "decoder.bias"], ["bias"]])
def test_tied_tensors_of_the_encoder_may_be_stored_once(tmp_path: Path, absent: list[str]) -> None:
    whole = encoder_state()
    state = {
        name: tensor for name, tensor in whole.items() if name not in {f"cls.predictions.{each}" for each in absent}
    }
    found = read_hf(port_folder(tmp_path / "hf", "RealmKnowledgeAugEncoder", state)).encoder
    assert found is not None
    assert torch.equal(found.tensors[WORDS], whole[WORDS])
    assert torch.equal(found.tensors["cls.predictions.bias"], whole["cls.predictions.bias"])


def test_the_decoder_may_stand_for_the_word_embeddings_but_not_differ_from_them(tmp_path: Path) -> None:
    state = encoder_state()
    words = state.pop(WORDS)
    found = read_hf(port_folder(tmp_path / "one", "RealmKnowledgeAugEncoder", state)).encoder
    assert found is not None and torch.equal(found.tensors[WORDS], words)
    untied = encoder_state() | {"cls.predictions.decoder.weight": words + 1}
    with pytest.raises(DataError, match=r"decoder\.weight differs from realm\.embeddings\.word_embeddings\.weight"):
        read_hf(port_folder(tmp_path / "two", "RealmKnowledgeAugEncoder", untied))


def test_missing_extra_and_misshapen_tensors_are_each_named_as_in_the_file(tmp_path: Path) -> None:
    state = embedder_state()
    del state["realm.pooler.dense.bias"], state["cls.LayerNorm.weight"]
    others = [f"extra.thing.{number:02d}" for number in range(40)]
    state |= {name: torch.zeros(1) for name in others}
    state["cls.dense.weight"] = torch.zeros(PROJECTION + 1, 16)
    with pytest.raises(DataError) as error:
        read_hf(port_folder(tmp_path / "hf", "RealmEmbedder", state))
    message = str(error.value)
    assert "missing: cls.LayerNorm.weight, realm.pooler.dense.bias;" in message
    assert f"extra: {', '.join(others)};" in message
    assert message.endswith("misshapen: cls.dense.weight (9, 16) instead of (8, 16)")
    assert "\n" not in message


def test_both_parts_of_an_open_qa_model_name_their_tensors_as_in_the_file(tmp_path: Path) -> None:
    for name in ("reader.qa_outputs.dense_output.bias", "embedder.cls.dense.bias"):
        state = STATES["RealmForOpenQA"]()
        del state[name]
        with pytest.raises(DataError, match=f"missing: {re.escape(name)}$"):
            read_hf(port_folder(tmp_path / name, "RealmForOpenQA", state))


def test_a_shared_tower_is_called_what_the_file_calls_it(tmp_path: Path) -> None:
    once = {name: tensor for name, tensor in scorer_state().items() if name.startswith("query_embedder.")}
    once["query_embedder.extra"] = torch.zeros(1)
    with pytest.raises(DataError, match=r"extra: query_embedder\.extra$"):
        read_hf(port_folder(tmp_path / "hf", "RealmScorer", once))


def test_old_position_buffers_are_left_aside(tmp_path: Path) -> None:
    state = embedder_state() | {"realm.embeddings.position_ids": torch.arange(32)[None]}
    assert read_hf(port_folder(tmp_path / "hf", "RealmEmbedder", state)).retriever is not None


def test_half_precision_becomes_float32_and_other_numbers_are_refused(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in embedder_state().items()}
    found = read_hf(port_folder(tmp_path / "half", "RealmEmbedder", half)).retriever
    assert found is not None and all(tensor.dtype == torch.float32 for tensor in found.tensors.values())
    for value, message in (
        (torch.zeros(8, dtype=torch.int8), "not plain real numbers"),
        (torch.full((8,), torch.nan), "finite"),
    ):
        state = embedder_state() | {"cls.dense.bias": value}
        with pytest.raises(DataError, match=rf"{message}.* cls\.dense\.bias"):
            read_hf(port_folder(tmp_path / message[:3], "RealmEmbedder", state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, r"architectures is \['BertModel'\]"),
        ({"architectures": None}, "architectures is None"),
        ({"hidden_act": "gelu"}, "only the tanh form"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"hidden_size": 2**40}, "hidden_size is"),
        ({"hidden_size": True}, "hidden_size is"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_hidden_layers": 1_000_000_000}, "the configuration says 1000000000 layers"),
        ({"num_hidden_layers": 1}, "the configuration says 1 layers"),
        ({"vocab_size": 2_000_000_000}, r"misshapen: .*word_embeddings\.weight"),
        ({"layer_norm_eps": 0}, "must be positive"),
        ({"attention_probs_dropout_prob": 0.2}, "two different dropout rates, the model here has one"),
        ({"reader_layer_norm_eps": 0}, "reader_layer_norm_eps"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_hf(port_folder(tmp_path / "hf", "RealmEmbedder", **change))


def test_values_that_a_configuration_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    left_out = {"hidden_act": None, "layer_norm_eps": None, "type_vocab_size": None, "hidden_dropout_prob": None}
    found = read_hf(port_folder(tmp_path / "hf", "RealmEmbedder", attention_probs_dropout_prob=None, **left_out))
    assert found.retriever is not None
    assert found.retriever.shape == SHAPE and found.retriever.projection_eps == 1e-12


def test_block_vectors_must_be_as_many_as_the_configuration_says(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"block_emb is torch\.float32 \(4, 8\), .* say float32 \(5, 8\)"):
        read_hf(port_folder(tmp_path / "hf", "RealmForOpenQA", num_block_records=5))


def test_a_cased_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = port_folder(tmp_path / "hf", "RealmEmbedder")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(DataError, match="a cased tokenizer"):
        read_hf(folder)


def test_a_checkpoint_in_several_files_is_read_and_its_index_may_not_lead_elsewhere(tmp_path: Path) -> None:
    folder = port_folder(tmp_path / "hf", "RealmEmbedder")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    listing = {name: file for file, chosen in parts.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))
    assert read_hf(folder).retriever is not None
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(DataError, match=r"not a \.safetensors file of this folder"):
        read_hf(folder)


def in_two_files(folder: Path, **options: Any) -> Path:
    """The same folder with its weights in two PyTorch files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    listing = {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in chosen}, folder / file, **options)
        listing |= dict.fromkeys(chosen, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listing}))
    return folder


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "stream from before torch 1.6"])
def test_pytorch_files_in_several_parts_and_of_either_age_are_read(tmp_path: Path, archive: bool) -> None:
    state = embedder_state()
    folder = port_folder(tmp_path / "hf", "RealmEmbedder", state)
    found = read_hf(in_two_files(folder, _use_new_zipfile_serialization=archive)).retriever
    assert found is not None
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, state[name.removeprefix("embedder.")])


@pytest.mark.parametrize("file", ["../pytorch_model.bin", "model.safetensors", "sub/a.bin"])
def test_the_index_of_pytorch_files_may_not_lead_elsewhere(tmp_path: Path, file: str) -> None:
    folder = in_two_files(port_folder(tmp_path / "hf", "RealmEmbedder"))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(DataError, match=r"not a \.bin file of this folder"):
        read_hf(folder)


def test_another_epsilon_of_the_span_head_stays_with_the_reader(tmp_path: Path) -> None:
    found = read_hf(port_folder(tmp_path / "hf", "RealmReader", reader_layer_norm_eps=1e-5)).reader
    assert found is not None and found.span_eps == 1e-5


def test_parts_that_cannot_be_combined_are_named(tmp_path: Path) -> None:
    embedder = read_hf(port_folder(tmp_path / "a", "RealmEmbedder"))
    with pytest.raises(DataError, match="both hold a retriever"):
        combined([embedder, read_hf(port_folder(tmp_path / "b", "RealmScorer"))])
    other = port_folder(tmp_path / "c", "RealmKnowledgeAugEncoder")
    (other / "vocab.txt").write_text("another\n")
    with pytest.raises(DataError, match="another vocabulary than"):
        combined([embedder, read_hf(other)])


# --- hostile files ---------------------------------------------------------------------------------------------------


class Payload:
    """Its pickle creates a folder when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def with_pytorch_file(folder: Path, write: Callable[[Path, State], None]) -> Path:
    port_folder(folder, "RealmEmbedder")
    write(folder / "pytorch_model.bin", load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    return folder


def rewritten(
    path: Path, state: Any, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """A file of torch.save with its entries changed."""
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "place",
    ["as a value", "instead of the pickle", "as a bare pickle", "as a value of an old stream", "in an old stream"],
)
def test_code_in_a_pytorch_file_is_never_run(tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Payload(canary))

    def write(path: Path, state: State) -> None:
        if place == "as a value":
            torch.save({**state, "cls.dense.bias": Payload(canary)}, path)
        elif place == "instead of the pickle":
            rewritten(path, state, lambda name, content: payload if name.endswith("data.pkl") else content)
        elif place == "as a bare pickle":
            path.write_bytes(payload)
        else:
            value = {**state, "cls.dense.bias": Payload(canary)}
            torch.save(value, path, _use_new_zipfile_serialization=False)
            if place == "in an old stream":
                path.write_bytes(path.read_bytes()[:15] + payload)

    with pytest.raises(DataError, match=r"refused by the loader that runs no code|neither an archive nor a stream"):
        read_hf(with_pytorch_file(tmp_path / "hf", write))
    assert not canary.exists()


def test_the_payload_of_these_tests_would_run_if_it_were_loaded(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "canary"), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_an_environment_that_asks_for_the_old_loader_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    write: Callable[[Path, State], None] = lambda path, _: torch.save(Payload(canary), path)  # noqa: E731
    with pytest.raises(DataError):
        read_hf(with_pytorch_file(tmp_path / "hf", write))
    assert not canary.exists()


def test_a_view_that_claims_more_than_the_file_holds_is_not_copied(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)
    for archive in (True, False):
        write: Callable[[Path, State], None] = lambda path, state, archive=archive: torch.save(  # noqa: E731
            {**state, "cls.dense.weight": huge}, path, _use_new_zipfile_serialization=archive
        )
        with pytest.raises(DataError, match="in a much smaller file; refused"):
            read_hf(with_pytorch_file(tmp_path / str(archive), write))


def test_an_old_stream_that_is_cut_off_is_refused_at_any_length(tmp_path: Path) -> None:
    whole = tmp_path / "whole.bin"
    torch.save(embedder_state(), whole, _use_new_zipfile_serialization=False)
    content = whole.read_bytes()
    for share in (0.002, 0.1, 0.5, 0.99):
        cut = content[: int(share * len(content))]
        with pytest.raises(DataError, match=r"pytorch_model\.bin"):
            read_hf(with_pytorch_file(tmp_path / str(share), lambda path, _, cut=cut: path.write_bytes(cut)))


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    write: Callable[[Path, State], None] = lambda path, state: rewritten(  # noqa: E731
        path, state, lambda _, content: content, zipfile.ZIP_DEFLATED
    )
    with pytest.raises(DataError, match="compressed archive"):
        read_hf(with_pytorch_file(tmp_path / "hf", write))


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"a": {"b": torch.zeros(1)}}, torch.zeros(3)])
def test_a_pytorch_file_without_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    write: Callable[[Path, State], None] = lambda path, _: torch.save(content, path)  # noqa: E731
    with pytest.raises(DataError, match="something else than named tensors"):
        read_hf(with_pytorch_file(tmp_path / "hf", write))


DAMAGE = (b"", b"{", b"[1]", b"PK\3\4" + bytes(50), b"\xff" * 64)
DAMAGED = [
    *((name, content) for name in ("config.json", "tokenizer_config.json") for content in DAMAGE),
    *((name, content) for name in ("model.safetensors", "pytorch_model.bin") for content in (*DAMAGE, b'{"a": 1}')),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = port_folder(tmp_path / "hf", "RealmEmbedder")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_hf(folder)


def test_a_truncated_checkpoint_is_named_at_any_length(tmp_path: Path) -> None:
    whole = port_folder(tmp_path / "whole", "RealmEmbedder")
    torch.save(embedder_state(), whole / "pytorch_model.bin")
    for name in ("model.safetensors", "pytorch_model.bin"):
        for share in (0.01, 0.5, 0.99):
            folder = tmp_path / f"{name}-{share}"
            shutil.copytree(whole, folder)
            if name == "pytorch_model.bin":
                (folder / "model.safetensors").unlink()
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: int(share * len(content))])
            with pytest.raises(DataError, match=name.replace(".", r"\.")):
                read_hf(folder)
