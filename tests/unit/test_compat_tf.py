"""The original code's checkpoints: their names, their layouts, and what is said about the ones that do not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from realm_core.compat.foreign import Foreign, combined
from realm_core.compat.tf import Place, find_prefix, place_of, read_tf
from realm_core.errors import DataError
from tests.published import (
    PROJECTION,
    SHAPE,
    SPAN_HIDDEN,
    SPAN_WIDTH,
    VOCABULARY,
    embedder_state,
    encoder_state,
    reader_state,
    tf_embedder,
    tf_encoder,
    tf_reader,
    write_bundle,
)

HEADS = SHAPE.heads


def hub_module(folder: Path, variables: dict[str, np.ndarray], vectors: np.ndarray | None = None) -> Path:
    """A folder as TF-Hub has it; an embedder may bring its block vectors along."""
    write_bundle(folder / "variables" / "variables", variables)
    (folder / "assets").mkdir()
    (folder / "assets" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    if vectors is not None:
        write_bundle(folder / "encoded" / "encoded.ckpt", {"block_emb": vectors})
    return folder


def assert_equal(part: object, state: dict[str, torch.Tensor], prefix: str = "") -> None:
    tensors = part.tensors  # type: ignore[attr-defined]
    assert tensors
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name.removeprefix(prefix)]), name


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        (
            "module/module/module/bert/encoder/layer_11/attention/self/query/kernel",
            Place("embedder", "embedder.realm.encoder.layer.11.attention.self.query.weight"),
        ),
        ("module/module/dense/kernel", Place("embedder", "embedder.cls.dense.weight")),
        ("module/module/LayerNorm/gamma", Place("embedder", "embedder.cls.LayerNorm.weight")),
        ("module/module/module/layer_normalization/beta", Place("embedder", "embedder.cls.LayerNorm.bias")),
        ("module/module/module/cls/predictions/output_bias", Place(None, "cls.predictions.bias")),
        ("bert/embeddings/word_embeddings", Place("encoder", "realm.embeddings.word_embeddings.weight")),
        ("bert/embeddings/LayerNorm/beta", Place("encoder", "realm.embeddings.LayerNorm.bias")),
        ("cls/predictions/transform/dense/kernel", Place("encoder", "cls.predictions.transform.dense.weight")),
        ("cls/predictions/output_bias", Place("encoder", "cls.predictions.bias")),
        ("reader/module/bert/pooler/dense/bias", Place("reader", "realm.pooler.dense.bias")),
        (
            "reader/module/cls/predictions/transform/LayerNorm/gamma",
            Place(None, "cls.predictions.transform.LayerNorm.weight"),
        ),
        ("reader/dense/kernel", Place("reader", "qa_outputs.dense_intermediate.weight")),
        ("reader/dense_1/bias", Place("reader", "qa_outputs.dense_output.bias")),
        ("reader/layer_normalization/gamma", Place("reader", "qa_outputs.layer_normalization.weight")),
        ("bert/pooler/dense/moving_mean", None),
        ("dense/kernel", None),
        ("something", None),
    ],
)
def test_every_variable_has_its_place(variable: str, place: Place | None) -> None:
    assert place_of(variable) == place


def test_the_two_hub_modules_make_one_checkpoint(tmp_path: Path) -> None:
    embedder = read_tf(hub_module(tmp_path / "embedder", tf_embedder()), heads=HEADS)
    encoder = read_tf(hub_module(tmp_path / "bert", tf_encoder()), heads=HEADS)
    found = combined([embedder, encoder])
    assert found.retriever is not None and found.encoder is not None and found.reader is None
    assert found.retriever.shape == found.encoder.shape == SHAPE
    assert (found.retriever.projection_size, found.retriever.projection_eps) == (PROJECTION, 1e-12)
    assert_equal(found.retriever, embedder_state(), "embedder.")
    assert_equal(found.encoder, encoder_state())
    assert found.vocabulary == tmp_path / "embedder" / "assets" / "vocab.txt"


def test_a_fine_tuned_checkpoint_holds_embedder_and_reader_and_its_optimiser_is_left_aside(tmp_path: Path) -> None:
    variables = {**tf_embedder(depth=4), **tf_reader()}
    slots = {f"{name}/{slot}": array for name, array in variables.items() for slot in ("adam_m", "adam_v")}
    steps = {"global_step": np.array(300_000, dtype=np.int64)}
    folder = tmp_path / "orqa_nq_model_from_realm"
    write_bundle(
        folder / "export" / "best_default" / "checkpoint" / "model.ckpt-300000", variables | slots | steps, shards=2
    )
    found = read_tf(folder, heads=HEADS, max_span_width=SPAN_WIDTH)
    assert found.retriever is not None and found.reader is not None and found.encoder is None
    assert_equal(found.retriever, embedder_state(), "embedder.")
    assert_equal(found.reader, reader_state())
    assert (found.reader.span_hidden, found.reader.max_span_width) == (SPAN_HIDDEN, SPAN_WIDTH)


def test_block_vectors_are_read_beside_the_embedder(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((5, PROJECTION), dtype=np.float32)
    found = read_tf(hub_module(tmp_path / "embedder", tf_embedder(), vectors), heads=HEADS)
    np.testing.assert_array_equal(found.block_vectors, vectors)
    assert sum("encoded.ckpt" in name for name in found.sources) == 2


def test_the_name_of_the_last_norm_tells_its_epsilon(tmp_path: Path) -> None:
    keras = {name.replace("module/LayerNorm/", "module/layer_normalization/"): a for name, a in tf_embedder().items()}
    assert any("layer_normalization" in name for name in keras)
    found = read_tf(write_bundle(tmp_path / "ict", keras), heads=HEADS)
    assert found.retriever is not None and found.retriever.projection_eps == 1e-3


def test_heads_follow_from_the_hidden_size_or_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hidden size 16 is no multiple of 64; pass --heads"):
        read_tf(write_bundle(tmp_path / "m", tf_encoder()))
    with pytest.raises(DataError, match="not a multiple of heads=3"):
        read_tf(write_bundle(tmp_path / "m", tf_encoder()), heads=3)


def without(variables: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    assert set(names) <= variables.keys()
    return {name: array for name, array in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            without(tf_encoder(), "bert/pooler/dense/bias", "cls/predictions/output_bias"),
            "missing: cls/predictions/output_bias, bert/pooler/dense/bias$",
        ),
        (
            {**tf_encoder(), "bert/pooler/dense/bias": np.zeros(3, np.float32)},
            r"misshapen: bert/pooler/dense/bias \(3,\) instead of \(16,\)",
        ),
        (
            {**tf_encoder(), "cls/seq_relationship/weights": np.zeros(3, np.float32)},
            "extra: cls/seq_relationship/weights",
        ),
        (
            without(tf_encoder(), "bert/embeddings/word_embeddings"),
            "missing: bert/embeddings/word_embeddings",
        ),
        (without(tf_embedder(), "module/module/dense/bias"), "missing: module/module/dense/bias"),
        (without(tf_reader(), "reader/layer_normalization/gamma"), "missing: reader/layer_normalization/gamma"),
        (
            {name.replace("layer_1/", "layer_7/"): array for name, array in tf_encoder().items()},
            "tensors of layers 0, 7, the configuration says 2 layers",
        ),
        (
            {**tf_embedder(), "module/dense/bias": np.zeros(3, np.float32)},
            "module/dense/bias and module/module/dense/bias are",
        ),
        ({"global_step": np.array(1, dtype=np.int64)}, "no variable of a REALM model"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, variables: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tf(write_bundle(tmp_path / "m", variables), heads=HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("variables", [tf_embedder(), tf_embedder(depth=4), tf_encoder(), tf_reader()])
def test_whichever_variable_is_missing_has_its_own_name(tmp_path: Path, variables: dict[str, np.ndarray]) -> None:
    unused = [name for name in variables if (place := place_of(name)) is None or place.part is None]
    for number, name in enumerate(sorted(variables.keys() - set(unused))):
        prefix = write_bundle(tmp_path / str(number), without(variables, name))
        with pytest.raises(DataError, match=f"missing: {name}(,|$)"):
            read_tf(prefix, heads=HEADS)


def test_the_shape_of_a_kernel_is_that_in_the_file(tmp_path: Path) -> None:
    variables = {**tf_encoder(), "bert/pooler/dense/kernel": np.zeros((16, 3), np.float32)}
    with pytest.raises(DataError, match=r"misshapen: bert/pooler/dense/kernel \(16, 3\) instead of \(16, 16\)$"):
        read_tf(write_bundle(tmp_path / "m", variables), heads=HEADS)


def test_a_path_means_a_module_a_fine_tuned_folder_a_prefix_or_an_index(tmp_path: Path) -> None:
    prefix = write_bundle(tmp_path / "model.ckpt-5", {"x": np.zeros(1, np.float32)})
    assert find_prefix(prefix) == find_prefix(tmp_path) == find_prefix(tmp_path / "model.ckpt-5.index") == prefix
    write_bundle(tmp_path / "model.ckpt-6", {"x": np.zeros(1, np.float32)})
    with pytest.raises(DataError, match=r"several checkpoints \(model\.ckpt-5, model\.ckpt-6\); name one"):
        find_prefix(tmp_path)
    with pytest.raises(DataError, match="no checkpoint"):
        find_prefix(tmp_path / "nowhere")


def test_block_vectors_that_are_no_matrix_of_floats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"block_emb is int64 \(4,\), expected a float32 matrix"):
        read_tf(hub_module(tmp_path / "m", tf_embedder(), np.zeros(4, np.int64)), heads=HEADS)


def test_texts_without_vectors_are_not_taken_along(tmp_path: Path) -> None:
    (tmp_path / "blocks.tfr").touch()
    module = hub_module(tmp_path / "bert", tf_encoder())
    found: Foreign = read_tf(module, records=tmp_path / "blocks.tfr", heads=HEADS)
    assert found.block_records is None
