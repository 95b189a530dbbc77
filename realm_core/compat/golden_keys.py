"""JSON of a reference case that remembers which of its keys were used.

A value that no check looks at would agree with anything. So every object notes the keys that are asked for, a compared
object counts as read with all it holds, and what is left over is a miss.
"""

from collections.abc import Collection, Iterator
from typing import Any


class Noted(dict[str, Any]):
    """A JSON object that notes which of its keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({key: noted(value) for key, value in values.items()})
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self.asked.update(self)
        return super().items()

    def values(self) -> Any:
        self.asked.update(self)
        return super().values()


def noted(value: Any) -> Any:
    """A copy of a JSON value in which all objects take notes."""
    if isinstance(value, dict):
        return Noted(value)
    return [noted(each) for each in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The JSON value as it was; everything in it counts as asked for."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def unread(value: Any, inputs: Collection[str], place: str = "") -> Iterator[str]:
    """Places of all keys that nobody asked for and that are not said to be inputs or descriptions."""
    if isinstance(value, Noted):
        missed = [key for key in value if key not in value.asked and key not in inputs]
        yield from (f"{place}{key}" for key in missed)
        for key in value.keys() - set(missed):
            yield from unread(dict.__getitem__(value, key), inputs, f"{place}{key}/")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from unread(each, inputs, f"{place}{number}/")
