"""A batch computed in parts is the batch computed at once, and padding it to fixed shapes changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.batches import rng_for_step, rows_for_step, split_evenly
from realm_core.data.ict import ict_examples
from realm_core.errors import ConfigError, RealmError
from realm_core.index.embed import embed_blocks
from realm_core.model.device import resolve
from realm_core.model.objectives import ict_loss
from realm_core.model.world import World
from realm_core.params import config_from, load_config
from realm_core.ports import MemorySink
from realm_core.train import contrastive, loop
from realm_core.train.contrastive import contrast
from realm_core.train.ict import train_ict
from realm_core.train.parts import parts_of
from realm_core.train.step import StepResult
from tests import training

EXACT = {"dtype": torch.float64}
CLOSE = 1e-10  # in float64: what the order of a sum may cost
ALONE = World()

STAGES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "ict": (training.trained_ict, ("ict.steps=3", "ict.batch=24")),
    "warmup": (training.warmed_up, ("warmup.steps=3", "warmup.batch=12")),
    "pretrain": (training.pretrained, ("pretrain.batch=6",)),
    "pretrain joint": (training.pretrained, ("pretrain.batch=6", "pretrain.marginal=joint")),
}


def trained(store: Store, stage: str, *overrides: str, **model: object) -> tuple[training.Tensors, list[float]]:
    train, base = STAGES[stage]
    return train(store, training.settings(*base, *overrides), **{**EXACT, **model})


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_train_as_the_whole_batch_does(tiny_home: Store, stage: str, micro: int) -> None:
    section = stage.split()[0]
    whole, losses = trained(tiny_home, stage)
    parts, same = trained(tiny_home, stage, f"{section}.micro_batch={micro}")
    assert same == pytest.approx(losses, rel=CLOSE)
    assert training.farthest(parts, whole) < CLOSE


@pytest.mark.parametrize("stage", STAGES)
def test_training_moves_the_weights_so_that_the_comparisons_mean_something(tiny_home: Store, stage: str) -> None:
    after, losses = trained(tiny_home, stage)
    model = training.lively_model(tiny_home, **EXACT)
    modules = {"ict": [model.retriever], "warmup": [model.encoder]}.get(stage, [model.retriever, model.encoder])
    assert training.farthest(after, training.weights(*modules)) > 1e-5
    assert len(set(losses)) == len(losses)


def test_every_micro_batch_has_dropout_of_its_own_and_the_same_in_every_run(tiny_home: Store) -> None:
    runs = [trained(tiny_home, "pretrain", "pretrain.micro_batch=2", dropout=0.1) for _ in range(2)]
    assert training.farthest(runs[0][0], runs[1][0]) == 0.0
    other, _ = trained(tiny_home, "pretrain", "pretrain.micro_batch=3", dropout=0.1)
    assert training.farthest(runs[0][0], other) > CLOSE


class Towers(nn.Module):
    """Two small towers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.query, self.document = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()

    def parts(self, sizes: list[int]) -> list[Callable]:
        generator = torch.Generator().manual_seed(4)
        inputs = [torch.randn(2, size, 5, generator=generator, dtype=torch.float64) for size in sizes]

        def embed(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(number)
            towers = zip((self.query, self.document), inputs[number], strict=True)
            queries, documents = (nn.functional.dropout(tower(x), 0.3) for tower, x in towers)
            return queries, documents

        return [lambda number=number: embed(number) for number in range(len(sizes))]

    def gradients(self) -> torch.Tensor:
        return torch.cat([weight.grad.flatten() for weight in self.parameters() if weight.grad is not None])


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 5, 2, 2]])
def test_cached_gradients_are_those_of_one_graph_over_all_micro_batches(sizes: list[int]) -> None:
    """The second forward pass repeats the dropout of the first: the oracle keeps every graph and goes back once."""
    total, oracle, cached = sum(sizes), Towers(), Towers()
    pairs = [embed() for embed in oracle.parts(sizes)]
    expected = ict_loss(torch.cat([q for q, _ in pairs]), torch.cat([d for _, d in pairs]))
    expected.backward()
    found = contrast(cached.parts(sizes), torch.ones(total, dtype=torch.bool), total=total, width=4, world=ALONE)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(cached.gradients(), oracle.gradients(), rtol=1e-12, atol=1e-14)


def test_padded_pairs_are_no_negatives_and_teach_nothing() -> None:
    real = torch.tensor([True, True, False, True, True, False, False])
    towers, left = Towers(), Towers()
    found = contrast(towers.parts([3, 4]), real, total=4, width=4, world=ALONE)
    pairs = [embed() for embed in left.parts([3, 4])]
    queries, documents = (torch.cat([pair[side] for pair in pairs])[real] for side in (0, 1))
    expected = ict_loss(queries, documents)
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(towers.gradients(), left.gradients(), rtol=1e-12, atol=1e-14)
    assert not found.hits[~real].any()


def test_one_bad_micro_batch_skips_the_whole_step(tiny_home: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = loop.realm_step, []

    def spoiled(*arguments: Any) -> StepResult:
        calls.append(arguments)
        found = honest(*arguments)
        return replace(found, loss=found.loss * float("nan")) if len(calls) == 2 else found

    monkeypatch.setattr(loop, "realm_step", spoiled)
    config = training.settings("pretrain.batch=6", "pretrain.micro_batch=2", "pretrain.max_nan_steps=2")
    trainer, index = training.realm_trainer(tiny_home, config), training.opened_index(tiny_home, config)
    before = training.weights(trainer.model.retriever, trainer.model.encoder)
    assert trainer.step(1, index) == {"skipped": 1.0}
    assert len(calls) == 3
    assert training.farthest(before, training.weights(trainer.model.retriever, trainer.model.encoder)) == 0.0
    assert "loss" in trainer.step(2, index)
    assert training.farthest(before, training.weights(trainer.model.retriever, trainer.model.encoder)) > 0.0


def test_a_bad_score_ends_the_inverse_cloze_task_without_touching_the_weights(
    tiny_home: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, before = contrastive.ict_loss, training.weights(training.lively_model(tiny_home).retriever)
    monkeypatch.setattr(contrastive, "ict_loss", lambda *a, **options: honest(*a, **options) * float("nan"))
    model = training.lively_model(tiny_home)
    monkeypatch.setattr(training, "lively_model", lambda *_, **__: model)
    with pytest.raises(RealmError, match="step 2: loss or gradient not finite 3 times in a row"):
        trained(tiny_home, "ict", "ict.micro_batch=2")
    assert training.farthest(before, training.weights(model.retriever)) == 0.0


@pytest.mark.parametrize(("count", "parts"), [(0, 1), (1, 3), (7, 3), (12, 4)])
def test_parts_are_contiguous_and_even(count: int, parts: int) -> None:
    split = split_evenly(range(count), parts)
    assert [item for part in split for item in part] == list(range(count))
    assert len(split) == parts and max(map(len, split)) - min(map(len, split)) <= 1


# --- fixed shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "micro"), [("pretrain", None), ("ict", None), *((stage, 2) for stage in STAGES)])
def test_padded_to_fixed_shapes_a_run_has_the_same_losses_and_one_set_of_shapes(
    tiny_home: Store, stage: str, micro: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, shapes = stage.split()[0], []
    make = training.lively_model

    def watched(*arguments: object, **options: object) -> object:
        model = make(*arguments, **options)
        shapes.append(training.note_shapes(model.retriever.embedder, model.encoder))
        return model

    overrides = [f"{section}.micro_batch={micro}"] if micro else []
    trimmed, losses = trained(tiny_home, stage, *overrides)
    monkeypatch.setattr(training, "lively_model", watched)
    padded, same = trained(tiny_home, stage, *overrides, "runtime.static_shapes=true")
    shapes = shapes[0]
    assert same == pytest.approx(losses, rel=CLOSE)
    assert training.farthest(padded, trimmed) < CLOSE
    kinds = {"ict": 2, "warmup": 1}.get(section, 3)  # queries and documents; joint inputs
    assert len(set(shapes)) == kinds, sorted(set(shapes))
    assert shapes == shapes[:kinds] * (len(shapes) // kinds)  # so every pass of every step is like the first


def test_blocks_are_embedded_in_one_shape_too(tiny_home: Store) -> None:
    corpus, model = Corpus.open(tiny_home.newest("corpus")), training.lively_model(tiny_home)
    vectors = {}
    for static in (False, True):
        device = resolve(training.settings(f"runtime.static_shapes={static}").runtime)
        shapes = training.note_shapes(model.retriever.embedder, training=False)
        vectors[static] = embed_blocks(
            model.retriever, corpus, range(21), tokenizer=model.tokenizer, length=64, batch=8, device=device
        )
    assert set(shapes) == {((8, 64),) * 3}
    assert np.allclose(vectors[True], vectors[False], atol=1e-5)


def test_without_it_shapes_follow_the_batch(tiny_home: Store) -> None:
    config = training.settings("pretrain.batch=6")
    trainer, index = training.realm_trainer(tiny_home, config), training.opened_index(tiny_home, config)
    shapes = training.note_shapes(trainer.model.retriever.embedder)
    for step in range(3):
        trainer.step(step, index)
    assert len(set(shapes)) > 2


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_cloze_task_logs_both_accuracies_and_how_full_its_sequences_are(
    tiny_home: Store, micro_batch: int | None
) -> None:
    size = ("ict.batch=32", f"ict.micro_batch={micro_batch or 'null'}")
    config = training.settings("ict.steps=1", "ict.mask_rate=0.5", *size)
    model, sink, corpus = training.lively_model(tiny_home), MemorySink(), Corpus.open(tiny_home.newest("corpus"))
    train_ict(model, corpus, config, resolve(config.runtime), sink)
    ((_, found),) = sink.rows
    rows = np.unique(rows_for_step(len(corpus), config.ict.batch, 0, config.seed))
    drawn = [example for _, example in ict_examples(corpus, rows, rng_for_step(config.seed, 0, purpose=1), 0.5)]
    out = sum(example.removed for example in drawn) / len(drawn)
    assert 0 < out < 1 and found["ict/removed_share"] == pytest.approx(out)
    together = out * found["ict/masked_accuracy"] + (1 - out) * found["ict/unmasked_accuracy"]
    assert found["ict/accuracy"] == pytest.approx(together)
    lengths = config.lengths
    queries = [min(len(each.query_ids) + 2, lengths.ict_query) for each in drawn]
    documents = [min(len(each.title_ids) + len(each.body_ids) + 3, lengths.document) for each in drawn]
    assert found["ict/query_fill"] == pytest.approx(np.mean(queries) / lengths.ict_query)
    assert found["ict/doc_fill"] == pytest.approx(np.mean(documents) / lengths.document)


def test_padding_on_a_device_with_static_shapes_changes_no_metric_of_the_cloze_task(tiny_home: Store) -> None:
    rows = []
    for static in ("false", "true"):
        config = training.settings(
            "ict.steps=1", "ict.mask_rate=0.5", "ict.batch=32", f"runtime.static_shapes={static}"
        )
        sink, corpus = MemorySink(), Corpus.open(tiny_home.newest("corpus"))
        train_ict(training.lively_model(tiny_home), corpus, config, resolve(config.runtime), sink)
        rows.append(sink.rows[0][1])
    assert rows[0] == pytest.approx(rows[1], abs=1e-4)


def test_a_step_logs_what_the_documents_of_a_query_add_each_on_its_own(
    tiny_home: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over queries and their documents of equation 2 of the paper, whatever the micro-batches."""
    step, seen = loop.realm_step, []

    def watch(model: Any, batch: Any, *rest: Any) -> StepResult:
        result = step(model, batch, *rest)
        for present, real, gold in zip(batch.present, batch.real, result.gold_logp.detach(), strict=True):
            added = [float((gold[c] - gold[0])[real].sum()) for c in range(1, len(present)) if present[c]]
            seen.append(float(np.mean(added)))
        return result

    monkeypatch.setattr(loop, "realm_step", watch)
    index = training.opened_index(tiny_home, training.settings())
    for size in (4, 1):
        seen.clear()
        trainer = training.realm_trainer(tiny_home, training.settings(f"pretrain.micro_batch={size}"))
        assert trainer.step(1, index)["document_utility"] == pytest.approx(np.mean(seen), abs=1e-5) != 0.0


# --- what cannot hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.micro_batch=3", r"pretrain\.batch=4 is not a multiple of pretrain\.micro_batch=3; change one"),
        ("ict.micro_batch=16", r"ict\.batch=8 is not a multiple of ict\.micro_batch=16"),
        ("warmup.micro_batch=0", r"warmup\.micro_batch: .*greater than 0"),
        ("runtime.processes=3", r"ict\.batch=8 is not a multiple of 3 processes"),
        ("runtime.processes=0", r"runtime\.processes: .*greater than 0"),
        ("pretrain.max_masks=0", r"pretrain\.max_masks: "),
        ("lengths.query=200", r"lengths\.query=200 exceeds model\.max_positions=128"),
    ],
)
def test_settings_that_cannot_hold_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, "tiny", [override])
    assert "\n" not in str(caught.value)


def test_micro_batches_must_come_out_even_among_the_processes() -> None:
    with pytest.raises(ConfigError, match=r"makes 2 micro-batches of 2, which 4 processes cannot share evenly; lower"):
        load_config(None, "tiny", ["pretrain.micro_batch=2", "runtime.processes=4"])
    with pytest.raises(ConfigError, match=r"pretrain\.batch=4 is not a multiple of 3 processes"):
        parts_of(load_config(None, "tiny").pretrain, "pretrain", World(0, 3))


def test_xla_trains_in_one_process() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.processes=2 with runtime\.device=xla: XLA trains in one process"):
        load_config(None, "tiny", ["runtime.device=xla", "runtime.processes=2"])


@pytest.mark.parametrize("stage", ["ict", "warmup", "pretrain"])
def test_sequences_longer_than_the_model_are_refused_before_the_first_step(tiny_home: Store, stage: str) -> None:
    """The settings may promise more positions than published weights turn out to have."""
    with pytest.raises(ConfigError, match=r"lengths\.\w+=\d+ exceeds the 128 positions of the model; shorten it"):
        trained(tiny_home, stage, "model.max_positions=512", "lengths.query=100", "lengths.ict_query=200")


def test_the_number_of_processes_is_no_part_of_what_a_result_depends_on() -> None:
    def digest(*overrides: str) -> str:
        return load_config(None, "tiny", overrides).digest("runtime", "pretrain")

    assert digest("runtime.processes=2") == digest()
    assert digest("pretrain.micro_batch=2") != digest()
    assert digest("runtime.static_shapes=true") != digest()


def test_settings_written_before_there_were_micro_batches_are_read(tiny_home: Store) -> None:
    values = tiny_home.settings()["config"]
    for section, key in (("runtime", "processes"), ("pretrain", "micro_batch")):
        del values[section][key]
    assert config_from(values, "home.json") == Config.model_validate(tiny_home.settings()["config"])
