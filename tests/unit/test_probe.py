"""The probe that says whether the encoder can use a document, and the warm-up that listens to it."""

import math

import numpy as np
import pytest
import torch

from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device, resolve
from realm_core.params import load_config
from realm_core.ports import MemorySink
from realm_core.train import warmup
from realm_core.train.probe import Gain, Probe, gold_logp, without_sentence


@pytest.fixture
def parts(tiny_home: Store) -> tuple[RealmModel, Corpus, Config, Device]:
    config = load_config(None, "tiny", ["warmup.probe_queries=10"])
    return (
        RealmModel.load(tiny_home.newest("ict")),
        Corpus.open(tiny_home.newest("corpus")),
        config,
        resolve(config.runtime),
    )


def test_a_gain_counts_only_beyond_two_standard_errors() -> None:
    assert Gain(over_null=0.5, over_random=0.1, error=0.1).reaches(0.3)
    assert not Gain(over_null=0.5, over_random=0.1, error=0.1).reaches(0.31)


def test_the_probe_asks_the_same_question_every_time_and_leaves_the_model_as_it_was(parts: tuple) -> None:
    model, corpus, config, device = parts
    model.encoder.train()
    state = torch.get_rng_state()
    first, second = (Probe(corpus, config, model).measure(device) for _ in range(2))
    assert first == second
    assert model.encoder.training
    assert torch.equal(torch.get_rng_state(), state)  # dropout of training is not disturbed


def test_the_gain_is_the_mean_difference_of_likelihoods_sentence_by_sentence(parts: tuple) -> None:
    model, corpus, config, device = parts
    probe = Probe(corpus, config, model)
    assert len(probe.queries) == 10
    model.encoder.eval()
    gains = []
    with torch.no_grad():
        for query in probe.queries:
            own, real = gold_logp(model, [query], [without_sentence(corpus, query)], config, device)
            null, _ = gold_logp(model, [query], [[]], config, device)
            gains.append(float((own - null)[real].mean()))
    found = probe.measure(device)
    assert found.over_null == pytest.approx(np.mean(gains), abs=1e-5)
    assert found.error == pytest.approx(np.std(gains, ddof=1) / math.sqrt(10), abs=1e-5)


def test_what_the_probe_asks_is_never_trained_on(parts: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus, config, device = parts
    seen = []
    draw = warmup.draw
    monkeypatch.setattr(warmup, "draw", lambda c, row, *a, **k: (seen.append(row), draw(c, row, *a, **k))[1])
    warmup.warm_up(model, corpus, config, device, MemorySink())
    held_out = Probe(corpus, config, model).rows
    assert held_out and seen and not held_out & set(seen)


def test_the_warm_up_ends_when_the_probe_is_content(parts: tuple, capsys: pytest.CaptureFixture) -> None:
    model, corpus, config, device = parts
    ready = config.model_copy(
        update={"warmup": config.warmup.model_copy(update={"probe_every": 2, "ready_gain": -50.0})}
    )
    sink = MemorySink()
    metrics = warmup.warm_up(model, corpus, ready, device, sink)
    assert metrics["warmup/steps"] == len(sink.rows) == 2
    assert "warning" not in capsys.readouterr().err


def test_a_warm_up_that_ends_unready_says_so_and_what_to_do(parts: tuple, capsys: pytest.CaptureFixture) -> None:
    model, corpus, config, device = parts
    never = config.model_copy(update={"warmup": config.warmup.model_copy(update={"probe_every": 3, "ready_gain": 9.0})})
    sink = MemorySink()
    metrics = warmup.warm_up(model, corpus, never, device, sink)
    assert metrics["warmup/steps"] == config.warmup.steps
    assert [step for step, row in sink.rows if "warmup/gain_over_null" in row] == [2, 5]
    assert "wanted 9.00: the retriever will learn little; raise warmup.steps" in capsys.readouterr().err
