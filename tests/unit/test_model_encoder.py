"""The BERT encoder: its keys, its masks, its short cuts, and its independence of global randomness."""

import pytest
import torch
from torch import Tensor

from realm_core.errors import ConfigError
from realm_core.model.encoder import Encoder, EncoderShape

SHAPE = EncoderShape(vocab_size=50, hidden_size=12, layers=2, heads=3, intermediate_size=20, max_positions=16)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_encoder(seed: int = 0) -> Encoder:
    """Evaluation mode, float64, and weights large enough for every part to matter."""
    encoder = Encoder(SHAPE).double().eval()
    generator = seeded(seed)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3)
    return encoder


def batch(rows: int = 3, length: int = 9, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(1, SHAPE.vocab_size, (rows, length), generator=seeded(seed))
    segments = (torch.arange(length) > 3).long().expand(rows, -1)
    mask = (torch.arange(length) < torch.tensor([length, length - 2, 4])[:rows, None]).long()
    return ids, segments, mask


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"heads": 5}, "multiple of heads"),
        ({"layers": 0}, "layers=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"segment_types": 0}, "segment_types=0"),
    ],
)
def test_impossible_shapes_are_refused_by_name(change: dict[str, float], complaint: str) -> None:
    values = {"vocab_size": 50, "hidden_size": 12, "layers": 2, "heads": 3, "intermediate_size": 20} | change
    with pytest.raises(ConfigError, match=complaint):
        EncoderShape(**values)  # type: ignore[arg-type]


def test_state_dict_keys_are_those_of_published_bert_weights() -> None:
    layer = [
        f"{part}.{kind}"
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        )
        for kind in ("weight", "bias")
    ]
    tables = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    norm = ["embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"]
    layers = [f"encoder.layer.{number}.{name}" for number in range(SHAPE.layers) for name in layer]
    assert set(Encoder(SHAPE).state_dict()) == {*tables, *norm, *layers, "pooler.dense.weight", "pooler.dense.bias"}


def test_a_sequence_longer_than_the_position_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"17 wordpieces.*max_positions=16"):
        random_encoder()(torch.ones(1, 17, dtype=torch.long))


def test_padding_never_changes_the_vectors_of_real_wordpieces() -> None:
    encoder, (ids, segments, mask) = random_encoder(), batch()
    padded = encoder(ids, segments, mask)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = encoder(ids[row : row + 1, :length], segments[row : row + 1, :length])
        torch.testing.assert_close(padded[row, :length], alone[0], rtol=1e-10, atol=1e-12)


def test_a_row_of_padding_alone_gives_finite_vectors_and_gradients() -> None:
    encoder, (ids, segments, mask) = random_encoder(), batch()
    mask[1] = 0
    torch.autograd.backward(encoder(ids, segments, mask).square().sum())
    for name, weight in encoder.named_parameters():
        assert weight.grad is None or weight.grad.isfinite().all(), name


def test_asking_for_some_positions_gives_the_same_vectors_and_gradients_as_asking_for_all() -> None:
    ids, segments, mask = batch()
    positions = torch.tensor([[0, 3, 3], [6, 0, 1], [2, 1, 0]])
    found = []
    for restricted in (True, False):
        encoder = random_encoder()
        if restricted:
            hidden = encoder(ids, segments, mask, positions)
        else:
            hidden = encoder(ids, segments, mask)[torch.arange(3)[:, None], positions]
        torch.autograd.backward((hidden * torch.arange(1, 13)).square().sum())
        found.append([hidden, *(weight.grad for weight in encoder.parameters() if weight.grad is not None)])
    assert len(found[0]) == len(found[1])
    for short, full in zip(*found, strict=True):
        torch.testing.assert_close(short, full, rtol=1e-9, atol=1e-10)


def test_pooled_equals_pool_of_all_vectors() -> None:
    encoder, inputs = random_encoder(), batch()
    torch.testing.assert_close(encoder.pooled(*inputs), encoder.pool(encoder(*inputs)), rtol=1e-10, atol=1e-12)


def test_omitted_mask_and_segments_mean_ones_and_zeros() -> None:
    encoder, (ids, _, _) = random_encoder(), batch()
    explicit = encoder(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(encoder(ids), explicit, rtol=1e-12, atol=1e-12)


def test_checkpointing_changes_no_gradient_even_with_dropout() -> None:
    inputs, gradients = batch(), []
    for checkpointing in (False, True):
        encoder = random_encoder().train()
        encoder.checkpointing = checkpointing
        with torch.random.fork_rng():
            torch.manual_seed(5)
            torch.autograd.backward(encoder(*inputs).square().sum())
        found = {name: weight.grad for name, weight in encoder.named_parameters() if weight.grad is not None}
        gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[0].items():
        assert torch.allclose(plain, gradients[1][name], rtol=1e-9, atol=1e-12), name


def test_initialise_is_reproducible_and_follows_the_rule_of_bert() -> None:
    first, second, other = (Encoder(SHAPE) for _ in range(3))
    before = torch.random.get_rng_state()
    for encoder, seed in ((first, 3), (second, 3), (other, 4)):
        encoder.initialise(seeded(seed))
    assert torch.equal(before, torch.random.get_rng_state())  # only the given generator is used
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
        if name.endswith("bias"):
            assert not weight.any()
        elif "LayerNorm" in name:
            assert (weight == 1).all()
        else:
            assert weight.abs().max() <= 0.04
            assert not torch.equal(weight, other.state_dict()[name])
    words = first.embeddings.word_embeddings.weight
    assert 0.014 < words.std() < 0.021


def test_half_precision_autocast_stays_close_to_float32() -> None:
    encoder, inputs = random_encoder().float(), batch()
    with torch.no_grad():
        exact = encoder(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(*inputs)
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()
