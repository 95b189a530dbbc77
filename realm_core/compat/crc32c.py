"""CRC-32C (Castagnoli), which TensorFlow stores beside every block, record and tensor; in numpy, a few 100 MB/s.

The bytes are cut into lanes that advance side by side, two bytes a step. Appending bytes is a linear map over GF(2) of
the remainder so far, so the lanes are joined afterwards with the map that stands for a lane's length.
"""

from functools import lru_cache

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected
_MASK_DELTA = 0xA282EAD8
_STEPS = 64  # byte pairs a lane
_FEW = 8192  # bytes that a plain loop is quicker with
_CHUNK = 4 << 20  # bytes joined at a time


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """Checksum of a contiguous run of bytes."""
    view = np.frombuffer(data, dtype=np.uint8)
    state = 0xFFFFFFFF
    if len(view) <= _FEW:
        for byte in view.tobytes():
            state = _BYTE_LIST[(state ^ byte) & 0xFF] ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    for start in range(0, len(view), _CHUNK):
        chunk = view[start : start + _CHUNK]
        state = int(_apply(_appending(len(chunk)), np.uint32(state))) ^ _remainder(chunk)
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """The checksum as files store it: a checksum over data that holds checksums would otherwise be weak."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _remainder(chunk: np.ndarray) -> int:
    """Remainder of a chunk that starts from state 0, which zeros in front leave as it is."""
    lanes = 1 << max(0, (len(chunk) // (2 * _STEPS)).bit_length() - 1)
    steps = -(-len(chunk) // (2 * lanes))
    padded = np.zeros(2 * lanes * steps, dtype=np.uint8)
    padded[len(padded) - len(chunk) :] = chunk
    pairs = np.ascontiguousarray(padded.view("<u2").reshape(lanes, steps).T).astype(np.uint32)
    state = np.zeros(lanes, dtype=np.uint32)
    for column in pairs:
        state = _PAIRS[(state ^ column) & 0xFFFF] ^ (state >> np.uint32(16))
    length = 2 * steps
    while len(state) > 1:
        state = _apply(_appending(length), state[0::2]) ^ state[1::2]
        length *= 2
    return int(state[0])


Map = tuple[int, ...]  # the image of each of the 32 bits


def _apply(linear: Map, states: np.ndarray | np.uint32) -> np.ndarray:
    result = np.zeros_like(states)
    for bit, image in enumerate(linear):
        result ^= ((states >> np.uint32(bit)) & np.uint32(1)) * np.uint32(image)
    return result


@lru_cache(maxsize=256)
def _appending(count: int) -> Map:
    """What `count` zero bytes do to a remainder."""
    if count == 0:
        return tuple(1 << bit for bit in range(32))
    if count == 1:
        return tuple(int(_BYTES[(1 << bit) & 0xFF]) ^ (1 << bit >> 8) for bit in range(32))
    half, rest = _appending(count // 2), _appending(count % 2)
    twice = _apply(half, _apply(half, np.array(rest, dtype=np.uint32)))
    return tuple(int(image) for image in twice)


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


def _pair_table(by_byte: np.ndarray) -> np.ndarray:
    table = np.arange(65536, dtype=np.uint32)
    for _ in range(2):
        table = by_byte[table & 0xFF] ^ (table >> np.uint32(8))
    return table


_BYTES = _byte_table()
_BYTE_LIST: list[int] = _BYTES.tolist()
_PAIRS = _pair_table(_BYTES)
