"""The BERT encoder: embeddings, self-attention layers, pooler. The only transformer in the project.

Attribute names give state-dict keys equal to those of published PyTorch BERT weights, so weights move both ways without
a table of names. The activation is the tanh approximation of GELU, as in the original TensorFlow BERT.
"""

from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from realm_core.errors import ConfigError
from realm_core.model.dropout import Dropout, dropout

INIT_STD = 0.02  # standard deviation of every kernel before truncation at two deviations, as in BERT
PAD_ID = 0  # its word embedding receives no gradient from look-ups


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of one BERT. `dropout` serves hidden states and attention weights alike."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    max_positions: int = 512  # longest sequence, in wordpieces
    segment_types: int = 2
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for size in fields(self):
            if size.type is int and getattr(self, size.name) < 1:
                raise ConfigError(f"encoder {size.name}={getattr(self, size.name)}: must be at least 1")
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"encoder hidden_size={self.hidden_size} is not a multiple of heads={self.heads}: change one of them"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"encoder dropout={self.dropout}: must lie in [0, 1)")
        if not self.layer_norm_eps > 0.0:
            raise ConfigError(f"encoder layer_norm_eps={self.layer_norm_eps}: must be positive")


class Encoder(nn.Module):
    """BERT (Devlin et al. 2018). Set `checkpointing` to trade time for memory: layers are recomputed in backward."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.checkpointing = False
        self.embeddings = _Embeddings(shape)
        self.encoder = _LayerStack(shape)
        self.pooler = _Pooler(shape)

    def forward(
        self,
        token_ids: Integer[Tensor, "B L"],
        segment_ids: Integer[Tensor, "B L"] | None = None,
        mask: Integer[Tensor, "B L"] | Bool[Tensor, "B L"] | None = None,
        positions: Integer[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B N H"]:
        """Contextual vectors of all wordpieces (N = L), or of `positions` alone (N = M), which spares most of a layer.

        `mask` is true (non-zero) for real wordpieces; None means that all are real. `segment_ids` None means all zero.
        A row whose mask is false everywhere gives finite, meaningless vectors.
        Raises ConfigError when a sequence is longer than `max_positions`.
        """
        length = token_ids.shape[1]
        if length > self.shape.max_positions:
            raise ConfigError(
                f"sequence of {length} wordpieces, but the encoder has max_positions={self.shape.max_positions}: "
                "shorten the sequence length of the stage or enlarge the encoder"
            )
        visible_B11L = None if mask is None else _visible(mask)
        hidden_BLH = self.embeddings(token_ids, segment_ids)
        *lower, last = self.encoder.layer
        for layer in lower:
            hidden_BLH = self._run(layer, hidden_BLH, visible_B11L, None)
        return self._run(last, hidden_BLH, visible_B11L, positions)

    def _run(self, layer: nn.Module, hidden: Tensor, visible: Tensor | None, positions: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, hidden, visible, positions, use_reentrant=False))
        return cast(Tensor, layer(hidden, visible, positions))

    def pool(self, hidden: Float[Tensor, "B L H"]) -> Float[Tensor, "B H"]:
        """tanh of a dense layer over the first vector, which belongs to [CLS]."""
        return torch.tanh(self.pooler.dense(hidden[:, 0]))

    def pooled(
        self,
        token_ids: Integer[Tensor, "B L"],
        segment_ids: Integer[Tensor, "B L"] | None = None,
        mask: Integer[Tensor, "B L"] | Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """Same as `pool(forward(...))`, with the last layer computed for [CLS] alone."""
        cls_position_B1 = token_ids.new_zeros((token_ids.shape[0], 1))
        return self.pool(self(token_ids, segment_ids, mask, cls_position_B1))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew, as BERT does: kernels and embeddings truncated normal, biases 0, norms 1."""
        initialise_bert_weights(self, generator)


def initialise_bert_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Truncated normal (std 0.02, cut at two deviations) for matrices, 0 for biases, 1 for norm scales."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD, generator=generator)
            elif name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()


def gather_positions(hidden: Float[Tensor, "B L H"], positions: Integer[Tensor, "B M"]) -> Float[Tensor, "B M H"]:
    """The vectors at the given positions of each sequence."""
    return hidden.gather(1, positions.long()[:, :, None].expand(-1, -1, hidden.shape[2]))


def _visible(mask_BL: Tensor) -> Tensor:
    """Which keys every query may see. A row of padding sees itself: no kernel then divides by a sum of nothing."""
    real_BL = mask_BL.bool()
    return (real_BL | ~real_BL.any(dim=1, keepdim=True))[:, None, None, :]


class _Embeddings(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size, padding_idx=PAD_ID)
        self.position_embeddings = nn.Embedding(shape.max_positions, shape.hidden_size)
        self.token_type_embeddings = nn.Embedding(shape.segment_types, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = Dropout(shape.dropout)

    def forward(self, token_ids_BL: Tensor, segment_ids_BL: Tensor | None) -> Tensor:
        if segment_ids_BL is None:
            segment_BLH = self.token_type_embeddings.weight[0]
        else:
            segment_BLH = self.token_type_embeddings(segment_ids_BL)
        position_LH = self.position_embeddings.weight[: token_ids_BL.shape[1]]
        summed_BLH = self.word_embeddings(token_ids_BL) + segment_BLH + position_LH
        return cast(Tensor, self.dropout(self.LayerNorm(summed_BLH)))


class _LayerStack(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))


class _Layer(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.attention = _Attention(shape)
        self.intermediate = _Dense(shape.hidden_size, shape.intermediate_size)
        self.output = _ResidualOutput(shape.intermediate_size, shape)

    def forward(self, hidden_BLH: Tensor, visible_B11L: Tensor | None, positions_BM: Tensor | None) -> Tensor:
        attended = self.attention(hidden_BLH, visible_B11L, positions_BM)
        widened = F.gelu(self.intermediate.dense(attended), approximate="tanh")
        return cast(Tensor, self.output(widened, attended))


class _Attention(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.self = _SelfAttention(shape)
        self.output = _ResidualOutput(shape.hidden_size, shape)

    def forward(self, hidden_BLH: Tensor, visible_B11L: Tensor | None, positions_BM: Tensor | None) -> Tensor:
        asking = hidden_BLH if positions_BM is None else gather_positions(hidden_BLH, positions_BM)
        return cast(Tensor, self.output(self.self(asking, hidden_BLH, visible_B11L), asking))


class _SelfAttention(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = shape.dropout
        self.query = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.key = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.value = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, asking_BNH: Tensor, hidden_BLH: Tensor, visible_B11L: Tensor | None) -> Tensor:
        query_BANh = self._split(self.query(asking_BNH))
        key_BALh, value_BALh = self._split(self.key(hidden_BLH)), self._split(self.value(hidden_BLH))
        rate = self.dropout if self.training else 0.0
        if rate and asking_BNH.device.type == "cpu":
            context_BANh = _attend_with_dropout(query_BANh, key_BALh, value_BALh, visible_B11L, rate)
        else:
            context_BANh = F.scaled_dot_product_attention(
                query_BANh, key_BALh, value_BALh, attn_mask=visible_B11L, dropout_p=rate
            )
        return context_BANh.transpose(1, 2).flatten(2)

    def _split(self, vectors_BNH: Tensor) -> Tensor:
        batch, length, _ = vectors_BNH.shape
        return vectors_BNH.view(batch, length, self.heads, -1).transpose(1, 2)


def _attend_with_dropout(
    query_BANh: Tensor, key_BALh: Tensor, value_BALh: Tensor, visible_B11L: Tensor | None, rate: float
) -> Tensor:
    """Attention step by step. torch has no fused kernel for a processor that drops out, and draws its mask slowly."""
    scores_BANL = (query_BANh * query_BANh.shape[-1] ** -0.5) @ key_BALh.transpose(-1, -2)
    if visible_B11L is not None:
        scores_BANL = scores_BANL.masked_fill(~visible_B11L, float("-inf"))
    weights_BANL = torch.softmax(scores_BANL, dim=-1, dtype=scores_BANL.dtype)
    return dropout(weights_BANL, rate) @ value_BALh


class _ResidualOutput(nn.Module):
    """Dense, dropout, residual sum, then the norm (post-norm, as in the original Transformer)."""

    def __init__(self, inputs: int, shape: EncoderShape) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = Dropout(shape.dropout)

    def forward(self, inputs: Tensor, residual: Tensor) -> Tensor:
        return cast(Tensor, self.LayerNorm(self.dropout(self.dense(inputs)) + residual))


class _Dense(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)


class _Pooler(_Dense):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__(shape.hidden_size, shape.hidden_size)
