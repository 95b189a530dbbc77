"""FarmHash Fingerprint64, which TensorFlow's string buckets stand on, in plain Python.

Written after the published algorithm (Pike and Alakuijala, FarmHash 1.1); the fingerprint is fixed for all time. A hash of
a question takes some microseconds, so no compiled package is needed for the split rule of ORQA.
"""

_ALL = (1 << 64) - 1
_K0, _K1, _K2 = 0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F


def fingerprint64(data: bytes) -> int:
    """The 64-bit fingerprint, without sign."""
    if len(data) <= 16:
        return _up_to_16(data)
    if len(data) <= 32:
        return _up_to_32(data)
    return _up_to_64(data) if len(data) <= 64 else _long(data)


def _up_to_16(data: bytes) -> int:
    size = len(data)
    factor = _K2 + 2 * size
    if size >= 8:
        first, last = _word(data, 0) + _K2, _word(data, size - 8)
        return _mix(_turn(last, 37) * factor + first, (_turn(first, 25) + last) * factor, factor)
    if size >= 4:
        first, last = int.from_bytes(data[:4], "little"), int.from_bytes(data[-4:], "little")
        return _mix(size + (first << 3), last, factor)
    if size:
        low, high = data[0] + (data[size >> 1] << 8), size + (data[-1] << 2)
        return _fold((low * _K2 & _ALL) ^ (high * _K0 & _ALL)) * _K2 & _ALL
    return _K2


def _up_to_32(data: bytes) -> int:
    size = len(data)
    factor = _K2 + 2 * size
    a, b = _word(data, 0) * _K1, _word(data, 8)
    c, d = _word(data, size - 8) * factor, _word(data, size - 16) * _K2
    return _mix(_turn(a + b, 43) + _turn(c, 30) + d, a + _turn(b + _K2, 18) + c, factor)


def _up_to_64(data: bytes) -> int:
    size = len(data)
    factor = _K2 + 2 * size
    a, b = _word(data, 0) * _K2, _word(data, 8)
    c, d = _word(data, size - 8) * factor, _word(data, size - 16) * _K2
    y = _turn(a + b, 43) + _turn(c, 30) + d
    z = _mix(y, a + _turn(b + _K2, 18) + c, factor)
    e, f = _word(data, 16) * factor, _word(data, 24)
    g, h = (y + _word(data, size - 32)) * factor, (z + _word(data, size - 24)) * factor
    return _mix(_turn(e + f, 43) + _turn(g, 30) + h, e + _turn(f + a, 18) + g, factor)


def _long(data: bytes) -> int:
    x = (81 * _K2 + _word(data, 0)) & _ALL
    y = (81 * _K1 + 113) & _ALL
    z = _fold((y * _K2 + 113) & _ALL) * _K2 & _ALL
    v = w = (0, 0)
    rest = (len(data) - 1) & 63
    end = (len(data) - 1) // 64 * 64
    for at in range(0, end, 64):
        x, y, z, v, w = _round(data, at, x, y, z, v, w, _K1, 1)
    factor = (_K1 + ((z & 0xFF) << 1)) & _ALL
    low = (v[0] + w[0] + rest) & _ALL
    w = ((w[0] + rest + low) & _ALL, w[1])
    x, y, z, v, w = _round(data, end + rest - 63, x, y, z, (low, v[1]), w, factor, 9)
    return _mix(_mix(v[0], w[0], factor) + _fold(y) * _K0 + z, _mix(v[1], w[1], factor) + x, factor)


Pair = tuple[int, int]


def _round(
    data: bytes, at: int, x: int, y: int, z: int, v: Pair, w: Pair, factor: int, weight: int
) -> tuple[int, int, int, Pair, Pair]:
    """One block of 64 bytes."""
    x = _turn(x + y + v[0] + _word(data, at + 8), 37) * factor & _ALL
    y = _turn(y + v[1] + _word(data, at + 48), 42) * factor & _ALL
    x ^= w[1] * weight & _ALL
    y = (y + v[0] * weight + _word(data, at + 40)) & _ALL
    z = _turn(z + w[0], 33) * factor & _ALL
    v = _weak(data, at, v[1] * factor, x + w[0])
    w = _weak(data, at + 32, z + w[1], y + _word(data, at + 16))
    return z, y, x, v, w


def _weak(data: bytes, at: int, a: int, b: int) -> Pair:
    first, second, third, fourth = (_word(data, at + shift) for shift in (0, 8, 16, 24))
    a = (a + first) & _ALL
    b = _turn(b + a + fourth, 21)
    c = (a + second + third) & _ALL
    return (c + fourth) & _ALL, (b + _turn(c, 44) + a) & _ALL


def _mix(u: int, v: int, factor: int) -> int:
    u, v = u & _ALL, v & _ALL
    a = _fold((u ^ v) * factor & _ALL)
    return _fold((v ^ a) * factor & _ALL) * factor & _ALL


def _fold(value: int) -> int:
    value &= _ALL
    return value ^ (value >> 47)


def _turn(value: int, bits: int) -> int:
    value &= _ALL
    return (value >> bits) | (value << (64 - bits) & _ALL)


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")
