"""Arithmetic of the instructions, on arrays over threads."""

from __future__ import annotations

import numpy as np

from ptx.program import NotEmulated

NUMPY = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "f16x2": np.uint32, "bf16x2": np.uint32, "f32x2": np.uint64,
}  # fmt: skip
NAN = np.uint32(0x7FFFFFFF).view(np.float32)
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def widen(values):
    """bf16 bits as fp32 numbers."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def fma(a, b, c):
    """a * b + c of fp32, rounded once: the sum is rounded to odd in fp64, then to fp32."""
    product, wide = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + wide
    virtual = total - product
    error = (product - (total - virtual)) + (wide - virtual)
    bits = np.array(total).view(np.int64)
    fix = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(fix, bits + step, bits).view(np.float64).astype(np.float32)


def to_bf16(x):
    """fp32 -> bits of bf16, to nearest even; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_f16(x):
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def one_nan(function):
    """The operation of fp32 with hardware's only NaN for a result; the host's has the bits of an operand."""

    def calculate(*values):
        result = function(*values)
        is_nan = result != result
        return np.where(is_nan, NAN, result) if is_nan.any() else result

    return calculate


def flush(x):
    """Subnormal fp32 to zero of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _maximum(a, b):
    bits = (a.view(UNSIGNED[a.itemsize]) & b.view(UNSIGNED[a.itemsize])).view(a.dtype)
    return np.where(a == b, bits, np.fmax(a, b))  # equal but different bits: the two zeros


def _minimum(a, b):
    bits = (a.view(UNSIGNED[a.itemsize]) | b.view(UNSIGNED[a.itemsize])).view(a.dtype)
    return np.where(a == b, bits, np.fmin(a, b))


def _quotient(a, b):
    """Integer division, towards zero."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    floor = a // safe
    if a.dtype.kind == "i":
        floor = np.where((floor < 0) & (floor * safe != a), floor + a.dtype.type(1), floor)
    return np.where(b == 0, ~a.dtype.type(0), floor)


def _remainder(a, b):
    return np.where(b == 0, a, a - _quotient(a, b) * b)


def _shift_left(a, b):
    width = a.itemsize * 8
    return np.where(b >= width, a.dtype.type(0), a << np.minimum(b, width - 1).astype(a.dtype))


def _shift_right(a, b):
    width = a.itemsize * 8
    filled = a >> np.minimum(b, width - 1).astype(a.dtype)
    return filled if a.dtype.kind == "i" else np.where(b >= width, a.dtype.type(0), filled)


def high_product(a, b):
    wide = a.astype(object) * b.astype(object)
    bits = a.itemsize * 8
    return np.array([(int(w) >> bits) & ((1 << bits) - 1) for w in wide], UNSIGNED[a.itemsize]).view(
        a.dtype
    )


def _permute(a, b, selector):
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(len(a), np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & 15
        byte = (both >> (8 * (nibble & 7)).astype(np.uint64)).astype(np.uint32) & 255
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def _logic(a, b, c, table):
    result = np.zeros(len(a), np.uint32)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result |= np.where(table >> np.uint32(i) & 1, term, np.uint32(0))
    return result


def _extract(a, position, length):
    """bfe: a field, sign-extended for signed types."""
    bits = a.itemsize * 8
    position, length = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
    values = [int(v) & ((1 << bits) - 1) for v in a]
    result = []
    for value, p, n in zip(values, position.tolist(), length.tolist(), strict=True):
        field = (value >> p) & ((1 << n) - 1) if p < bits else 0
        if a.dtype.kind == "i" and n:
            top = min(p + n - 1, bits - 1)
            n = min(n, bits)
            field = field | (-1 << min(n, top - p + 1 if top >= p else 0)) if value >> top & 1 else field
        result.append(field & ((1 << bits) - 1))
    return np.array(result, UNSIGNED[a.itemsize]).view(a.dtype)


def _insert(a, b, position, length):
    position, length = (position & 255).astype(np.uint64), (length & 255).astype(np.uint64)
    mask = ((np.uint64(1) << np.minimum(length, 32)) - np.uint64(1)) << np.minimum(position, 63)
    mask = mask.astype(a.dtype)
    return (_shift_left(a, position.astype(np.uint32)) & mask) | (b & ~mask)


def funnel_shift(left: bool, wrap: bool):
    def shift(a, b, count):
        both = b.astype(np.uint64) << np.uint64(32) | a
        count = ((count & 31) if wrap else np.minimum(count, 32)).astype(np.uint64)
        return ((both << count) >> np.uint64(32) if left else both >> count).astype(np.uint32)

    return shift


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip
JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name: str, is_float: bool):
    if name in COMPARE:
        plain = COMPARE[name]
        if name == "ne" and is_float:  # ordered: false with a NaN
            return lambda a, b: (a != b) & (a == a) & (b == b)
        return plain
    plain = COMPARE[name[:-1]]  # equ, neu, ltu, ...: true with a NaN
    return lambda a, b: plain(a, b) | (a != a) | (b != b)


INTEGER = {
    "add": np.add, "sub": np.subtract, "div": _quotient, "rem": _remainder, "min": np.minimum,
    "max": np.maximum, "abs": np.abs, "neg": np.negative, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "shl": _shift_left, "shr": _shift_right, "prmt": _permute,
    "bfe": _extract, "bfi": _insert, "lop3": _logic,
}  # fmt: skip
FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": _minimum,
    "max": _maximum, "abs": np.abs, "neg": np.negative, "sqrt": np.sqrt, "fma": fma, "mad": fma,
    "rcp": lambda x: (1 / x.astype(np.float64)).astype(x.dtype),
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype),
    "ex2": lambda x: np.exp2(x.astype(np.float64)).astype(x.dtype),
    "lg2": lambda x: np.log2(x.astype(np.float64)).astype(x.dtype),
    "sin": lambda x: np.sin(x.astype(np.float64)).astype(x.dtype),
    "cos": lambda x: np.cos(x.astype(np.float64)).astype(x.dtype),
    "tanh": lambda x: np.tanh(x.astype(np.float64)).astype(x.dtype),
    "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip
ROUND = {"rni": np.rint, "rn": np.rint, "rzi": np.trunc, "rz": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def converter(target: str, source: str, modifiers: list[str]):
    """cvt: from an array of the source type to one of the target type (bits for bf16)."""
    rounding = next((ROUND[m] for m in modifiers if m in ROUND), None)
    is_float = [t.startswith(("f", "bf")) for t in (target, source)]

    def widen(x):
        return (x.astype(np.uint32) << 16).view(np.float32) if source == "bf16" else x

    def convert(x):
        x = widen(x)
        if is_float == [True, True]:
            if any(m in ("rni", "rzi", "rmi", "rpi") for m in modifiers):
                x = rounding(x)
            if "ftz" in modifiers and x.dtype == np.float32:
                x = flush(x)
            if "sat" in modifiers:
                x = np.clip(np.nan_to_num(x, nan=0.0), 0, 1)
            if "relu" in modifiers:
                x = np.where(x > 0, x, x.dtype.type(0))
        if target in ("bf16", "f16"):
            if "rz" in modifiers or x.dtype == np.float64 or (not is_float[1] and x.itemsize > 4):
                raise NotEmulated(f"cvt to {target} from {source} {modifiers}")
            x = x.astype(np.float32)
            return to_bf16(x) if target == "bf16" else to_f16(x).view(np.float16)
        if is_float == [False, True]:
            limits = np.iinfo(NUMPY[target])
            whole = np.nan_to_num(rounding(x.astype(np.float64)), nan=0.0)
            low, high = whole <= limits.min, whole >= limits.max
            inside = np.where(low | high, 0, whole).astype(NUMPY[target])
            return np.where(low, limits.min, np.where(high, limits.max, inside)).astype(NUMPY[target])
        if "sat" in modifiers and is_float == [False, False]:
            limits = np.iinfo(NUMPY[target])
            return np.clip(x.astype(object), limits.min, limits.max).astype(NUMPY[target])
        return x.astype(NUMPY[target])

    return convert
