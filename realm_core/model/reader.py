"""The open-QA reader: scores every short span of retrieved blocks (Lee et al. 2019; original code: language/orqa)."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from realm_core.errors import ConfigError
from realm_core.model.encoder import Encoder, EncoderShape, initialise_bert_weights

READER_EPS = 1e-3  # the Keras default, of the original code


class SpanScores(NamedTuple):
    """Scores without the retriever's part, and which spans lie inside the block text. Scores of others mean nothing."""

    score: Float[Tensor, "K S"]
    valid: Bool[Tensor, "K S"]


class Reader(nn.Module):
    """BERT over `[CLS] question [SEP] block [SEP]` and a two-layer scorer over (start, end) vectors.

    The LayerNorm after the ReLU has its own epsilon. Key names follow the published
    PyTorch weights: `realm.*` and `qa_outputs.*`.
    """

    def __init__(
        self, shape: EncoderShape, span_hidden: int = 256, max_span_width: int = 10, eps: float = READER_EPS
    ) -> None:
        super().__init__()
        if span_hidden < 1 or max_span_width < 1:
            raise ConfigError(
                f"reader span_hidden={span_hidden}, max_span_width={max_span_width}: both must be at least 1"
            )
        if not eps > 0.0:
            raise ConfigError(f"reader eps={eps}: must be positive")
        self.shape = shape
        self.max_span_width = max_span_width
        self.eps = eps
        self.realm = Encoder(shape)
        self.qa_outputs = _SpanHead(shape.hidden_size, span_hidden, eps)

    @property
    def checkpointing(self) -> bool:
        """Whether layers are recomputed in backward, to save memory."""
        return self.realm.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.realm.checkpointing = on

    def forward(
        self,
        token_ids: Integer[Tensor, "K L"],
        segment_ids: Integer[Tensor, "K L"] | None,
        mask: Integer[Tensor, "K L"] | Bool[Tensor, "K L"] | None,
        block_mask: Integer[Tensor, "K L"] | Bool[Tensor, "K L"],
    ) -> SpanScores:
        """Scores of all spans of K (question, block) pairs, in the order of `span_candidates(L, max_span_width)`.

        `block_mask` is true on the wordpieces of the block text only. A span is valid if both its ends are.
        """
        hidden_KLH = self.realm(token_ids, segment_ids, mask)
        score_KS = self.qa_outputs(hidden_KLH, self.max_span_width)
        starts_S, ends_S = span_candidates(token_ids.shape[1], self.max_span_width, token_ids.device)
        inside_KL = block_mask.bool()
        return SpanScores(score_KS, inside_KL[:, starts_S] & inside_KL[:, ends_S])

    def sizes(self) -> dict[str, Any]:
        """What `from_sizes` builds an equal reader from, as JSON. The usual epsilon is left out."""
        sizes = {
            "encoder": asdict(self.shape),
            "span_hidden": self.qa_outputs.dense_output.in_features,
            "max_span_width": self.max_span_width,
        }
        return sizes if self.eps == READER_EPS else {**sizes, "eps": self.eps}

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, Any]) -> "Reader":
        """A reader without weights, from what `sizes` gave."""
        shape = EncoderShape(**sizes["encoder"])
        return cls(shape, sizes["span_hidden"], sizes["max_span_width"], sizes.get("eps", READER_EPS))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew, by BERT's rule; the span head included, as in the original code."""
        initialise_bert_weights(self, generator)


def span_candidates(
    length: int, max_width: int, device: torch.device | str | None = None
) -> tuple[Int[Tensor, " S"], Int[Tensor, " S"]]:
    """All (start, inclusive end) pairs with end - start < max_width, listed by width, then by start."""
    widths = range(min(length, max_width))
    starts = [torch.arange(length - width, device=device) for width in widths]
    ends = [torch.arange(width, length, device=device) for width in widths]
    return torch.cat(starts), torch.cat(ends)


def correct_spans(
    starts: Integer[Tensor, " S"],
    ends: Integer[Tensor, " S"],
    gold_starts: Integer[Tensor, "K G"],
    gold_ends: Integer[Tensor, "K G"],
) -> Bool[Tensor, "K S"]:
    """Which candidates equal a gold span of their block. Gold lists are padded with -1, which equals no candidate."""
    same_start_KGS = gold_starts[:, :, None] == starts
    same_end_KGS = gold_ends[:, :, None] == ends
    return (same_start_KGS & same_end_KGS).any(dim=1)


def best_span(
    spans: SpanScores, relevance: Float[Tensor, " K"]
) -> tuple[Int[Tensor, ""], Int[Tensor, ""], Float[Tensor, ""]]:
    """Block, candidate and total score of the best valid span; the first one among equals.

    The total score is the span's plus the relevance of its block (original code: one softmax over block and span).
    """
    total_KS = (spans.score + relevance[:, None]).masked_fill(~spans.valid, -torch.inf)
    flat = total_KS.flatten().argmax()
    return flat // total_KS.shape[1], flat % total_KS.shape[1], total_KS.flatten()[flat]


class _SpanHead(nn.Module):
    def __init__(self, inputs: int, width: int, eps: float) -> None:
        super().__init__()
        self.dense_intermediate = nn.Linear(inputs, 2 * width)
        self.layer_normalization = nn.LayerNorm(width, eps=eps)
        self.dense_output = nn.Linear(width, 1)

    def forward(self, hidden_KLH: Tensor, max_span_width: int) -> Tensor:
        start_KLW, end_KLW = self.dense_intermediate(hidden_KLH).chunk(2, dim=2)
        length = hidden_KLH.shape[1]
        # Slices instead of an index look-up: backward adds whole slices and needs no scatter.
        pair_KSW = torch.cat(
            [start_KLW[:, : length - width] + end_KLW[:, width:] for width in range(min(length, max_span_width))],
            dim=1,
        )
        score_KS1: Tensor = self.dense_output(self.layer_normalization(F.relu(pair_KSW)))
        return score_KS1.squeeze(2)
