"""The knowledge-augmented encoder of pre-training: BERT over (masked sentence, document), with the masked-LM head."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from realm_core.model.encoder import Encoder, EncoderShape, initialise_bert_weights


class KnowledgeEncoder(nn.Module):
    """p(y | z, x) of Guu et al. 2020, section 3.1: every masked wordpiece is predicted on its own, given one document.

    The decoder is the transposed word embedding plus a bias. State-dict keys: `realm.*` and `cls.predictions.*` of the
    published PyTorch weights, without the two keys that repeat tied tensors (`decoder.weight`, `decoder.bias`).
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.realm = Encoder(shape)
        self.cls = _Heads(shape)

    @property
    def checkpointing(self) -> bool:
        """Whether layers are recomputed in backward, to save memory."""
        return self.realm.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.realm.checkpointing = on

    def forward(
        self,
        token_ids: Integer[Tensor, "B L"],
        segment_ids: Integer[Tensor, "B L"] | None,
        mask: Integer[Tensor, "B L"] | Bool[Tensor, "B L"] | None,
        positions: Integer[Tensor, "B M"],
    ) -> Float[Tensor, "B M V"]:
        """Vocabulary logits at `positions` only; a padded position may point anywhere and is masked by the loss."""
        hidden_BMH = self.realm(token_ids, segment_ids, mask, positions)
        logits: Tensor = self.cls.predictions(hidden_BMH, self.realm.embeddings.word_embeddings.weight)
        return logits

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew, by BERT's rule."""
        initialise_bert_weights(self, generator)


class _Heads(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.predictions = _MaskedLanguageHead(shape)


class _MaskedLanguageHead(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.transform = _Transform(shape)
        self.bias = nn.Parameter(torch.zeros(shape.vocab_size))

    def forward(self, hidden_BMH: Tensor, word_VH: Tensor) -> Tensor:
        return F.linear(self.transform(hidden_BMH), word_VH, self.bias)


class _Transform(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        transformed: Tensor = self.LayerNorm(F.gelu(self.dense(hidden), approximate="tanh"))
        return transformed
