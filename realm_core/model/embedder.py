"""Text to one vector: the embedder, and the retriever made of a query tower and a document tower."""

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from realm_core.errors import ConfigError
from realm_core.model.dropout import Dropout
from realm_core.model.encoder import Encoder, EncoderShape


class Embedder(nn.Module):
    """Pooled BERT, dense layer with bias, LayerNorm, dropout while training (original code: language/orqa, ICT model).

    Vectors are not normalised to unit length and inner products are not scaled. `projection_eps` is 1e-12 in the
    published weights and 1e-3 in the published ICT code. The REALM paper's formula (Guu et al. 2020, section 3.1) shows
    only the dense layer; the norm and the bias are in the code and the weights.
    """

    def __init__(
        self,
        shape: EncoderShape,
        projection_size: int = 128,
        projection_eps: float = 1e-12,
        projection_dropout: float | None = None,  # None: that of the encoder
    ) -> None:
        super().__init__()
        if projection_size < 1:
            raise ConfigError(f"embedder projection_size={projection_size}: must be at least 1")
        if not projection_eps > 0.0:
            raise ConfigError(f"embedder projection_eps={projection_eps}: must be positive")
        if projection_dropout is None:
            projection_dropout = shape.dropout
        if not 0.0 <= projection_dropout < 1.0:
            raise ConfigError(f"embedder projection_dropout={projection_dropout}: must lie in [0, 1)")
        self.shape = shape
        self.projection_size = projection_size
        self.projection_eps = projection_eps
        self.realm = Encoder(shape)  # attribute names `realm` and `cls` follow the published PyTorch weights
        self.cls = _Projection(shape.hidden_size, projection_size, projection_eps, projection_dropout)

    def forward(
        self,
        token_ids: Integer[Tensor, "B L"],
        segment_ids: Integer[Tensor, "B L"] | None = None,
        mask: Integer[Tensor, "B L"] | Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """One vector a text. Queries are `[CLS] x [SEP]`, documents `[CLS] title [SEP] body [SEP]`."""
        return self.project(self.realm.pooled(token_ids, segment_ids, mask))

    def project(self, pooled: Float[Tensor, "B H"]) -> Float[Tensor, "B D"]:
        """The head alone: dense, LayerNorm, dropout."""
        projected: Tensor = self.cls(pooled)
        return projected

    def initialise(self, generator: torch.Generator) -> None:
        """BERT's rule for the encoder; the projection Glorot uniform with zero bias, as in the original ICT code."""
        self.realm.initialise(generator)
        self.cls.initialise(generator)


class Retriever(nn.Module):
    """Relevance f(x, z) = <query vector, document vector> (Guu et al. 2020, section 3.1).

    With `share=True`, the original code's default, one embedder serves both sides and the state dict holds `embedder.*`
    alone. With `share=False` there is a second, independent `query_embedder.*`, as the paper's notation has it.
    """

    def __init__(
        self,
        shape: EncoderShape,
        projection_size: int = 128,
        projection_eps: float = 1e-12,
        projection_dropout: float | None = None,  # None: that of the encoder
        *,
        share: bool = True,
    ) -> None:
        super().__init__()
        self.share = share
        self.embedder = Embedder(shape, projection_size, projection_eps, projection_dropout)
        if not share:
            self.query_embedder = Embedder(shape, projection_size, projection_eps, projection_dropout)

    @property
    def query_tower(self) -> Embedder:
        """The embedder that reads queries."""
        return self.embedder if self.share else self.query_embedder

    @property
    def document_tower(self) -> Embedder:
        """The embedder that reads documents; the index is built with it."""
        return self.embedder

    @property
    def checkpointing(self) -> bool:
        """Whether layers are recomputed in backward, to save memory."""
        return self.embedder.realm.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        for tower in {self.query_tower, self.document_tower}:
            tower.realm.checkpointing = on

    def embed_queries(
        self,
        token_ids: Integer[Tensor, "B L"],
        segment_ids: Integer[Tensor, "B L"] | None = None,
        mask: Integer[Tensor, "B L"] | Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Vectors of `[CLS] x [SEP]`."""
        vectors: Tensor = self.query_tower(token_ids, segment_ids, mask)
        return vectors

    def embed_documents(
        self,
        token_ids: Integer[Tensor, "*batch L"],
        segment_ids: Integer[Tensor, "*batch L"] | None = None,
        mask: Integer[Tensor, "*batch L"] | Bool[Tensor, "*batch L"] | None = None,
    ) -> Float[Tensor, "*batch D"]:
        """Vectors of `[CLS] title [SEP] body [SEP]`; leading dimensions such as (query, candidate) are kept."""
        vectors_ND: Tensor = self.document_tower(
            token_ids.flatten(end_dim=-2),
            None if segment_ids is None else segment_ids.flatten(end_dim=-2),
            None if mask is None else mask.flatten(end_dim=-2),
        )
        return vectors_ND.view(*token_ids.shape[:-1], -1)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights. Separate towers start as equal copies, as in the original code, so that spaces agree."""
        self.embedder.initialise(generator)
        if not self.share:
            self.query_embedder.load_state_dict(self.embedder.state_dict())


def relevance(queries: Float[Tensor, "B D"], candidates: Float[Tensor, "B C D"]) -> Float[Tensor, "B C"]:
    """Inner product of each query with each of its own candidates, unscaled."""
    return torch.einsum("bd,bcd->bc", queries, candidates)


class _Projection(nn.Module):
    def __init__(self, inputs: int, outputs: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.LayerNorm = nn.LayerNorm(outputs, eps=eps)
        self.dropout = Dropout(dropout)

    def forward(self, pooled: Tensor) -> Tensor:
        projected: Tensor = self.dropout(self.LayerNorm(self.dense(pooled)))
        return projected

    def initialise(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            nn.init.xavier_uniform_(self.dense.weight, generator=generator)
            self.dense.bias.zero_()
            self.LayerNorm.weight.fill_(1.0)
            self.LayerNorm.bias.zero_()
