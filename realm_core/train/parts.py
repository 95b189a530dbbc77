"""A batch in parts: micro-batches, and the processes that share them."""

from collections.abc import Mapping, Sequence

from realm_core.config import Config, InParts, micro_batches
from realm_core.errors import ConfigError
from realm_core.model.bundle import RealmModel
from realm_core.model.encoder import EncoderShape
from realm_core.model.world import World


def parts_of(settings: InParts, section: str, world: World) -> int:
    """In how many micro-batches a step is computed, all processes together. Raises ConfigError if they do not come out even."""
    try:
        return micro_batches(settings, section, world.size)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def require_positions(shape: EncoderShape, **lengths: int) -> None:
    """Raise ConfigError unless sequences of these lengths fit the model."""
    for name, length in lengths.items():
        if length > shape.max_positions:
            raise ConfigError(
                f"lengths.{name}={length} exceeds the {shape.max_positions} positions of the model; shorten it"
            )


def require_lengths(model: RealmModel, config: Config) -> None:
    """Raise ConfigError unless every sequence of the settings fits the model that its start weights made."""
    lengths = config.lengths
    require_positions(
        model.retriever.embedder.shape,
        ict_query=lengths.ict_query,
        query=lengths.query,
        document=lengths.document,
    )
    require_positions(model.encoder.shape, joint=lengths.joint, reader=lengths.reader)


def sum_metrics(world: World, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums over the micro-batches of all processes, in the same order whoever computed them. Collective."""
    rows = [row for rows in world.exchange([dict(row) for row in found]) for row in rows]
    totals: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals
