"""BERT's optimiser, its schedule, clipping, grouping and state."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from realm_core.config import OptimizerConfig
from realm_core.errors import ArtifactError, ConfigError
from realm_core.train.optimizer import (
    BertAdam,
    bert_learning_rate,
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    warmup_steps,
)
from realm_core.train.update import Updater


def linear(seed: int = 0) -> nn.Linear:
    module = nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return module


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        torch.autograd.backward(module(inputs).square().sum())
        clip_gradients(module.parameters())
        set_learning_rate(optimizer, step, warmup=3, total=20)
        optimizer.step()


def test_bert_adam_equals_its_formula_written_out() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = BertAdam([weight], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.05)
    w, m, v = [1.0, -2.0, 3.0], [0.0] * 3, [0.0] * 3
    for step in range(5):
        grads = [0.5 * (step - 1), 2.0, -1.0 / (step + 1)]
        weight.grad = torch.tensor(grads, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(grads):
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.9 * v[i] + 0.1 * g * g
            w[i] -= 0.1 * (m[i] / (v[i] ** 0.5 + 1e-3) + 0.05 * w[i])
        torch.testing.assert_close(weight.detach(), torch.tensor(w, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_parameter_without_gradient_is_left_alone_decay_included() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    BertAdam([used, unused], lr=0.1).step()
    assert (used != 1).all()
    assert (unused == 1).all()


def test_the_first_update_has_rate_zero_and_warm_up_ends_with_a_jump_down() -> None:
    rates = [bert_learning_rate(step, 0.1, warmup=4, total=20) for step in range(22)]
    assert rates[0] == 0.0
    assert rates[1:4] == pytest.approx([0.025, 0.05, 0.075])
    assert rates[4] == pytest.approx(0.1 * 16 / 20)
    assert rates[19] == pytest.approx(0.1 / 20)
    assert rates[20:] == [0.0, 0.0]
    assert bert_learning_rate(0, 0.1, warmup=0, total=10) == 0.1


@pytest.mark.parametrize(
    ("total", "expected"),
    [(200_000, 10_000), (50_000, 5_000), (1_999, 199), (1_000, 100), (101, 100), (100, 100), (12, 100), (1, 100)],
)
def test_warm_up_follows_the_rule_of_the_original_however_short_the_run(total: int, expected: int) -> None:
    assert warmup_steps(total) == expected


@pytest.mark.parametrize(("total", "own", "expected"), [(8, None, 100), (8, 1, 1), (2_000, None, 200), (2_000, 7, 7)])
def test_a_run_may_name_its_own_warm_up_and_its_first_rate_is_zero_all_the_same(
    total: int, own: int | None, expected: int
) -> None:
    updater = Updater({"m": linear()}, {"m": 0.1}, total, OptimizerConfig(), warmup=own)
    assert updater.warmup == expected
    for step in (0, 1):
        updater.begin(step)
        rate = bert_learning_rate(step, 0.1, expected, total)
        assert [group["lr"] for group in updater.optimizer.param_groups] == [rate] * 2
        assert (rate == 0.0) == (step == 0)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps=0"):
        warmup_steps(0)


def test_clipping_uses_the_common_norm_and_leaves_small_gradients_alone() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients([first, second], 1.0) == 5.0
    assert (first.grad.item(), second.grad.item()) == pytest.approx((0.6, 0.8))
    first.grad, second.grad = torch.tensor([0.3]), torch.tensor([0.4])
    assert clip_gradients([first, second], 1.0).item() == pytest.approx(0.5)
    assert (first.grad.item(), second.grad.item()) == pytest.approx((0.3, 0.4))


def test_clipping_reports_a_norm_that_is_not_finite() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([float("nan"), 1.0])
    assert not clip_gradients([weight]).isfinite()


def test_norms_and_biases_do_not_decay_and_roles_have_their_own_rates() -> None:
    modules = {"retriever": nn.ModuleDict({"dense": linear(), "LayerNorm": nn.LayerNorm(2)}), "encoder": linear()}
    optimizer = build_optimizer(
        {role: module.named_parameters() for role, module in modules.items()},
        learning_rate={"retriever": 0.1, "encoder": 0.4},
        weight_decay=0.01,
    )
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert decay == {
        "retriever/dense.weight": 0.01,
        "retriever/dense.bias": 0.0,
        "retriever/LayerNorm.weight": 0.0,
        "retriever/LayerNorm.bias": 0.0,
        "encoder/weight": 0.01,
        "encoder/bias": 0.0,
    }
    assert set_learning_rate(optimizer, 5, warmup=2, total=10) == pytest.approx({"retriever": 0.05, "encoder": 0.2})
    assert all(group["lr"] == group["base_lr"] / 2 for group in optimizer.param_groups)


def test_frozen_parameters_are_left_out_and_an_empty_optimizer_is_refused() -> None:
    module = linear()
    module.bias.requires_grad_(False)
    optimizer = build_optimizer({"m": module.named_parameters()}, learning_rate=0.1)
    assert [name for group in optimizer.param_groups for name in group["param_names"]] == ["m/weight"]
    module.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter needs a gradient"):
        build_optimizer({"m": module.named_parameters()}, learning_rate=0.1)


def test_a_missing_rate_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="none for group 'm'"):
        build_optimizer({"m": linear().named_parameters()}, learning_rate={"n": 0.1})
    with pytest.raises(ConfigError, match="kind='sgd'"):
        build_optimizer({"m": linear().named_parameters()}, learning_rate=0.1, kind="sgd")


@pytest.mark.parametrize("kind", ["bert_adam", "adamw"])
def test_training_resumed_from_flat_tensors_is_bitwise_the_uninterrupted_one(kind: str) -> None:
    def start() -> tuple[nn.Linear, torch.optim.Optimizer]:
        module = linear()
        return module, build_optimizer({"m": module.named_parameters()}, kind=kind, learning_rate=0.1)

    whole, optimizer = start()
    train(whole, optimizer, range(8))
    half, optimizer = start()
    train(half, optimizer, range(4))
    saved = save(optimizer_tensors(optimizer))
    resumed, optimizer = start()
    resumed.load_state_dict(half.state_dict())
    load_optimizer_tensors(optimizer, load(saved))
    train(resumed, optimizer, range(4, 8))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])


def test_a_state_of_another_model_or_kind_is_refused() -> None:
    module = linear()
    optimizer = build_optimizer({"m": module.named_parameters()}, learning_rate=0.1)
    train(module, optimizer, range(2))
    state = optimizer_tensors(optimizer)
    with pytest.raises(ArtifactError, match="no such parameter"):
        load_optimizer_tensors(optimizer, {"other/weight/exp_avg": torch.zeros(2, 3)})
    with pytest.raises(ArtifactError, match="shape"):
        load_optimizer_tensors(optimizer, {"m/weight/exp_avg": torch.zeros(3, 3)})
    adamw = build_optimizer({"m": module.named_parameters()}, learning_rate=0.1, kind="adamw")
    with pytest.raises(ArtifactError, match="optimizer kind that wrote it"):
        load_optimizer_tensors(adamw, state)


@pytest.mark.parametrize("change", [{"lr": -1.0}, {"eps": 0.0}, {"weight_decay": -0.1}, {"betas": (1.0, 0.9)}])
def test_impossible_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        BertAdam([nn.Parameter(torch.zeros(1))], **({"lr": 0.1} | change))  # type: ignore[arg-type]
