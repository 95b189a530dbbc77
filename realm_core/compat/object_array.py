"""Walks the pickle of a numpy object array of bytes without unpickling it.

A small stack machine knows the few instructions and the three names that numpy writes for such an array. It builds nothing
but numbers, short strings and ranges of the file, looks nothing up, calls nothing, and refuses whatever else there is.
"""

import mmap
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_RECORD = 1 << 20  # bytes; a block has some 600
MAX_STACK = 5000  # picklers hand out the items of a list by the thousand
MAX_NAMED = 1000  # memo entries that are not records; numpy makes some 20


class _Name(NamedTuple):
    """A class or function the pickle names. It is compared, never looked up."""

    module: str
    name: str


class _Bytes(NamedTuple):
    """A bytes object, as the range of the file that holds it."""

    start: int
    stop: int


class _Mark:
    """The start of a group on the stack."""


class _List:
    """The one list of the file. Its items are handed out as they come, and only counted here."""


@dataclass
class _Built:
    """An array or a dtype under construction."""

    kind: str
    ready: bool = False


_RECONSTRUCT = {_Name(module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")}
_ARRAY, _DTYPE = _Name("numpy", "ndarray"), _Name("numpy", "dtype")
_ALLOWED = {*_RECONSTRUCT, _ARRAY, _DTYPE}
_DTYPE_STATE = (3, "|", None, None, None, -1, -1, 63)
_DTYPE_CODES = ("O8", "|O8", "O", "|O")


class ObjectArray:
    """One walk over the pickle of an array."""

    def __init__(self, data: mmap.mmap, start: int, count: int) -> None:
        self.data, self.at, self.count = data, start, count
        self.stack: list[Any] = []
        self.others: dict[int, Any] = {}  # memo of everything but bytes
        self.places = array("Q")  # memo of bytes: where the instruction stands; 0 for others
        self.last = 0  # where the instruction before this one stands
        self.listed: _List | None = None
        self.found = 0
        self.ended = False

    def records(self) -> Iterator[bytes]:
        """Walk to the end, handing out every item of the list."""
        while not self.ended:
            here, code = self.at, self.data[self.at]
            self.at += 1
            if code in _APPENDING:
                for item in _APPENDING[code](self):
                    self.found += 1
                    yield self.data[item.start : item.stop]
            elif code in _INSTRUCTIONS:
                _INSTRUCTIONS[code](self)
            else:
                raise ValueError(f"instruction {chr(code)!r} at byte {here} has no place in an array of bytes; refused")
            if len(self.stack) > MAX_STACK or len(self.others) > MAX_NAMED or self.found > self.count:
                raise ValueError("more items than an array of bytes has; refused")
            self.last = here

    # --- reading ---------------------------------------------------------------------------------------------------

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise IndexError
        piece = self.data[self.at : self.at + size]
        self.at += size
        return piece

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def protocol(self) -> None:
        if (found := self.number(1)) not in (3, 4, 5):
            raise ValueError(f"pickle protocol {found}, numpy writes 3 to 5; refused")

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise ValueError("a name does not end")
        return self.take(end + 1 - self.at)[:-1].decode("ascii")

    def string(self, size: int) -> None:
        length = self.number(size)
        if length > 256:
            raise ValueError(f"text of {length} bytes where an array of bytes has none; refused")
        self.stack.append(self.take(length).decode("utf-8"))

    def record(self, size: int) -> None:
        length = self.number(size)
        if self.at + length > len(self.data) or length > MAX_RECORD:
            raise ValueError(f"a record of {length} bytes at byte {self.at}: cut off or longer than {MAX_RECORD}")
        self.stack.append(_Bytes(self.at, self.at + length))
        self.at += length

    # --- stack -----------------------------------------------------------------------------------------------------

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(item := self.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def group(self, size: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(size)][::-1]))

    def memoize(self, index: int | None = None) -> None:
        """Numbered in order by all picklers; any other number would let a small file ask for a large table."""
        if index is not None and index != len(self.places):
            raise ValueError(f"memo entry {index} out of order; refused")
        top = self.stack[-1] if self.stack else None
        if not isinstance(top, _Bytes):
            self.others[len(self.places)] = top
        self.places.append(self.last if isinstance(top, _Bytes) else 0)

    def recall(self, index: int) -> None:
        if index >= len(self.places):
            raise ValueError(f"memo entry {index} does not exist")
        if index in self.others:
            self.stack.append(self.others[index])
            return
        back, self.at = self.at, self.places[index] + 1
        _INSTRUCTIONS[self.data[self.at - 1]](self)
        self.at = back

    # --- the three objects -----------------------------------------------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is not text; refused")
        if (found := _Name(module, name)) not in _ALLOWED:
            raise ValueError(f"it names {module}.{name}, which an array of bytes does not need; refused")
        self.stack.append(found)

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self) -> None:
        arguments, called = self.pop(), self.pop()
        if isinstance(called, _Name) and called in _RECONSTRUCT and self._is_empty_array(arguments):
            self.stack.append(_Built("array"))
        elif called == _DTYPE and any(arguments == (code, False, True) for code in _DTYPE_CODES):
            self.stack.append(_Built("dtype"))
        else:
            raise ValueError("a call that an array of bytes does not need; refused")

    def _is_empty_array(self, arguments: Any) -> bool:
        """Whether the arguments are (ndarray, (0,), b"b"): an empty array to be filled."""
        if not isinstance(arguments, tuple) or len(arguments) != 3 or not isinstance(arguments[2], _Bytes):
            return False
        kind, shape, code = arguments
        return kind == _ARRAY and shape == (0,) and self.data[code.start : code.stop] == b"b"

    def build(self) -> None:
        state, built = self.pop(), self.stack[-1] if self.stack else None
        if not isinstance(built, _Built) or built.ready or not isinstance(state, tuple):
            raise ValueError("a state without an object it belongs to; refused")
        if built.kind == "array":
            self._require_array(state)
        elif state != _DTYPE_STATE:
            raise ValueError("a dtype other than plain objects; refused")
        built.ready = True

    def _require_array(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, items = state if len(state) == 5 else (None,) * 5
        plain = isinstance(dtype, _Built) and dtype.kind == "dtype" and dtype.ready
        if version != 1 or not plain or fortran is not False or items is not self.listed:
            raise ValueError("an array state that numpy does not write; refused")
        if shape != (self.count,) or self.found != self.count:
            raise ValueError(f"{self.found} records where the header says {self.count}")

    def new_list(self) -> None:
        if self.listed is not None:
            raise ValueError("more than one list; refused")
        self.listed = _List()
        self.stack.append(self.listed)

    def append(self) -> Iterator[_Bytes]:
        return self._extend([self.pop()])

    def appends(self) -> Iterator[_Bytes]:
        return self._extend(self.since_mark())

    def _extend(self, items: list[Any]) -> Iterator[_Bytes]:
        if self.listed is None or not self.stack or self.stack[-1] is not self.listed:
            raise ValueError("items that do not belong to the list of the array; refused")
        for number, item in enumerate(items, start=self.found):
            if not isinstance(item, _Bytes):
                raise ValueError(f"record {number} is not a bytes object; refused")
            yield item

    def stop(self) -> None:
        (result,) = self.stack if len(self.stack) == 1 else (None,)
        if not isinstance(result, _Built) or result.kind != "array" or not result.ready or self.at != len(self.data):
            raise ValueError("the file does not end with one array")
        self.ended = True


_APPENDING: dict[int, Callable[[ObjectArray], Iterator[_Bytes]]] = {
    ord("a"): ObjectArray.append,
    ord("e"): ObjectArray.appends,
}
_INSTRUCTIONS: dict[int, Callable[[ObjectArray], Any]] = {
    0x80: ObjectArray.protocol,
    0x95: lambda walk: walk.take(8),  # length of a frame: a hint for readers of streams
    ord("c"): lambda walk: walk.name(walk.line(), walk.line()),
    0x93: ObjectArray.stack_name,
    0x8C: lambda walk: walk.string(1),
    ord("X"): lambda walk: walk.string(4),
    ord("C"): lambda walk: walk.record(1),
    ord("B"): lambda walk: walk.record(4),
    0x8E: lambda walk: walk.record(8),
    0x94: ObjectArray.memoize,
    ord("q"): lambda walk: walk.memoize(walk.number(1)),
    ord("r"): lambda walk: walk.memoize(walk.number(4)),
    ord("h"): lambda walk: walk.recall(walk.number(1)),
    ord("j"): lambda walk: walk.recall(walk.number(4)),
    ord("("): lambda walk: walk.stack.append(_Mark()),
    ord(")"): lambda walk: walk.group(0),
    0x85: lambda walk: walk.group(1),
    0x86: lambda walk: walk.group(2),
    0x87: lambda walk: walk.group(3),
    ord("t"): lambda walk: walk.stack.append(tuple(walk.since_mark())),
    ord("K"): lambda walk: walk.stack.append(walk.number(1)),
    ord("M"): lambda walk: walk.stack.append(walk.number(2)),
    ord("J"): lambda walk: walk.stack.append(walk.number(4, signed=True)),
    0x8A: lambda walk: walk.stack.append(walk.number(walk.number(1), signed=True)),
    ord("N"): lambda walk: walk.stack.append(None),
    0x88: lambda walk: walk.stack.append(True),
    0x89: lambda walk: walk.stack.append(False),
    ord("]"): ObjectArray.new_list,
    ord("R"): ObjectArray.reduce,
    ord("b"): ObjectArray.build,
    ord("."): ObjectArray.stop,
}
