"""Dropout drawn four elements a random number: the rate, the scale, the gradient, and that seeds fix it."""

import pytest
import torch
from torch import nn

from realm_core.model.dropout import Dropout, dropout
from realm_core.model.encoder import Encoder, EncoderShape


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_vanish_at_the_rate_and_the_mean_stays(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(400_003, dtype=dtype)  # no multiple of four
    out = dropout(x, rate)
    dropped = float((out == 0).float().mean())
    assert dropped == pytest.approx(rate, abs=5 * (rate * (1 - rate) / len(x)) ** 0.5)
    assert out.dtype == dtype
    kept = out[out != 0]
    assert torch.equal(kept, torch.full_like(kept, float(kept[0])))
    assert float(kept[0]) == pytest.approx(1 / (1 - rate), rel=0.01 if dtype == torch.bfloat16 else 1e-4)


def test_every_lane_of_a_random_number_is_fair_and_neighbours_are_independent() -> None:
    torch.manual_seed(1)
    zeros = (dropout(torch.ones(400_000), 0.25) == 0).view(-1, 4).float()
    assert zeros.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.007)
    together = zeros.T @ zeros / len(zeros)
    assert together.fill_diagonal_(0.0625).flatten().tolist() == pytest.approx([0.0625] * 16, abs=0.006)


def test_the_gradient_goes_where_the_value_went() -> None:
    torch.manual_seed(2)
    x = torch.randn(1000, requires_grad=True)
    out = dropout(x, 0.3)
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    assert torch.allclose(x.grad * x, out)


def test_a_seed_fixes_the_mask_and_evaluation_draws_nothing() -> None:
    layer = Dropout(0.4)
    first = (torch.manual_seed(3), layer(torch.ones(99)))[1]
    assert torch.equal(first, (torch.manual_seed(3), layer(torch.ones(99)))[1])
    assert not torch.equal(first, layer(torch.ones(99)))
    x = torch.randn(7)
    assert layer.eval()(x) is x
    assert dropout(x, 0.0) is x


def test_attention_that_drops_out_is_attention_in_the_mean() -> None:
    shape = EncoderShape(
        vocab_size=50, hidden_size=16, layers=1, heads=2, intermediate_size=8, max_positions=16, dropout=0.2
    )
    encoder = Encoder(shape)
    encoder.initialise(torch.Generator().manual_seed(0))
    attention = encoder.encoder.layer[0].attention.self
    for weight in attention.parameters():
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(2))
    visible = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    visible[1, ..., 5:] = False
    wanted = attention.eval()(hidden, hidden, visible)
    torch.manual_seed(3)
    attention.train()
    with torch.no_grad():
        drawn = torch.stack([attention(hidden, hidden, visible) for _ in range(2000)])
    error = drawn.std(0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - wanted).abs() < 6 * error + 1e-4).all())
    attention.dropout = 1e-9  # the same steps, nothing dropped
    assert torch.allclose(attention(hidden, hidden, visible), wanted, atol=1e-5)
