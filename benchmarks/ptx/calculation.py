"""Instructions that calculate: arithmetic, comparisons, conversions, moves between registers."""

from __future__ import annotations

import re
from functools import reduce

import numpy as np

from ptx.arithmetic import (
    FLOAT,
    INTEGER,
    JOIN,
    NUMPY,
    UNSIGNED,
    comparison,
    converter,
    flush,
    funnel_shift,
    high_product,
    one_nan,
    widen,
)  # fmt: skip
from ptx.operands import Operands
from ptx.program import NotEmulated, split_operands


class Calculation(Operands):
    """Decodes them into steps over a slice of threads."""

    def _decode_calculation(self, instruction, modifiers, kinds, operands, guard, where):
        base = instruction.opcode.split(".")[0]
        if not kinds:
            raise NotEmulated(where)
        kind = kinds[-1]
        if kind == "f32x2":
            return self._decode_pair(base, modifiers, operands, guard, where)
        if base in ("mul", "mad") and kind not in ("f32", "f64"):
            return self._decode_product(base, modifiers, kind, operands, guard)
        is_exact = base in ("abs", "neg") or (kind == "f16" and base in ("min", "max"))
        if kind in ("f16", "bf16", "f16x2", "bf16x2") and not is_exact:
            raise NotEmulated(where)
        if kind in ("bf16", "f16x2", "bf16x2"):
            mask = {"bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000}[kind]
            function = (
                (lambda a: a ^ a.dtype.type(mask)) if base == "neg" else (lambda a: a & ~a.dtype.type(mask))
            )
        elif NUMPY[kind] in (np.float16, np.float32, np.float64):
            function = self._float(base, modifiers, kind, where)
        elif base in INTEGER:
            function = INTEGER[base]
        elif base == "shf":
            function = funnel_shift("l" in modifiers, "wrap" in modifiers)
        elif base == "popc":
            function = lambda a: np.array([int(v).bit_count() for v in a], np.uint32)  # noqa: E731
        elif base == "clz":
            function = lambda a: np.array([a.itemsize * 8 - int(v).bit_length() for v in a], np.uint32)  # noqa: E731
        elif base == "brev":
            function = lambda a: np.array([int(f"{int(v):032b}"[::-1], 2) for v in a], np.uint32)  # noqa: E731
        else:
            raise NotEmulated(where)
        counts = {"shl": (1,), "shr": (1,), "bfe": (1, 2), "bfi": (2, 3), "shf": (2,)}.get(base, ())
        sources = [
            self._source(text, "u32" if i in counts else kind) for i, text in enumerate(operands[1:])
        ]
        result = "u32" if base in ("popc", "clz", "brev") else kind
        return self._step(guard, self._target(operands[0], result), function, *sources)

    def _float(self, base, modifiers, kind, where):
        if base not in FLOAT or any(m in ("rz", "rm", "rp", "sat") for m in modifiers):
            raise NotEmulated(where)
        if base in ("fma", "mad") and kind != "f32":
            raise NotEmulated(where)
        function = FLOAT[base]
        if base in ("min", "max") and "NaN" in modifiers:
            plain = function
            function = lambda a, b: np.where((a != a) | (b != b), a.dtype.type(np.nan), plain(a, b))  # noqa: E731
        if base in ("min", "max"):  # of two operands, on sm_100 and above of three too
            of_two = function
            function = lambda *values: reduce(of_two, values)  # noqa: E731
        if self.nudge and ("approx" in modifiers or "full" in modifiers):
            exact = function

            def function(*values):
                result = exact(*values)
                # By the result's own bits: equal operands give equal results, as in hardware.
                bits = np.ascontiguousarray(result).view(UNSIGNED[result.itemsize])
                noise = bits.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
                units = noise.astype(np.int64) % (2 * self.nudge + 1) - self.nudge
                moved = (bits.astype(np.int64) + units).astype(bits.dtype).view(result.dtype)
                return np.where((result == 0) | ~np.isfinite(result), result, moved)

        if "ftz" in modifiers:
            full = function
            function = lambda *values: flush(full(*(flush(v) for v in values)))  # noqa: E731
        return one_nan(function) if kind == "f32" and base not in ("neg", "abs", "copysign") else function

    def _decode_pair(self, base, modifiers, operands, guard, where):
        """Two fp32 in one register, as sm_100 and above calculate them."""
        if (
            guard is not None
            or base not in ("add", "sub", "mul", "fma")
            or not {*operands} <= {*self.registers}
        ):
            raise NotEmulated(where)
        pairs = [self.registers[name].view(np.float32).reshape(self.threads, 2) for name in operands]
        return self._step(None, pairs[0], self._float(base, modifiers, "f32", where), *pairs[1:])

    def _decode_product(self, base, modifiers, kind, operands, guard):
        if "wide" in modifiers:
            wide = kind[0] + str(2 * int(kind[1:]))
            multiply = lambda a, b: a.astype(NUMPY[wide]) * b.astype(NUMPY[wide])  # noqa: E731
        else:
            wide, multiply = kind, high_product if "hi" in modifiers else np.multiply
        sources = [self._source(operands[1], kind), self._source(operands[2], kind)]
        if base == "mul":
            return self._step(guard, self._target(operands[0], wide), multiply, *sources)
        sources.append(self._source(operands[3], wide))
        return self._step(
            guard, self._target(operands[0], wide), lambda a, b, c: multiply(a, b) + c, *sources
        )

    def _decode_mov(self, instruction, modifiers, kinds, operands, guard, where):
        kind = kinds[-1]
        target, source = operands
        if target.startswith("{") or source.startswith("{"):  # pack or unpack
            parts = split_operands((target if target.startswith("{") else source).strip("{} "))
            size = int(re.search(r"\d+", kind)[0]) // len(parts)
            whole = source if target.startswith("{") else target
            register = self.registers[whole].view(UNSIGNED[size // 8]).reshape(self.threads, len(parts))
            pieces = [
                self.registers.get(p) if whole == source else self._source(p, f"b{size}") for p in parts
            ]

            def step(s):
                keep = slice(None) if guard is None else guard(s)
                values = register[s] if whole == source else np.stack([p[s] for p in pieces], axis=1)
                if whole == target:
                    register[s][keep] = values[keep]
                else:
                    for i, piece in enumerate(pieces):
                        if piece is not None:
                            piece[s][keep] = values[:, i][keep]

            return step
        return self._step(guard, self._target(target, kind), lambda a: a, self._source(source, kind))

    def _decode_cvta(self, instruction, modifiers, kinds, operands, guard, where):
        if "shared" in modifiers:
            raise NotEmulated(where)
        return self._decode_mov(instruction, modifiers, kinds, operands, guard, where)

    def _decode_selp(self, instruction, modifiers, kinds, operands, guard, where):
        kind = {"f16": "b16", "bf16": "b16"}.get(kinds[-1], kinds[-1])
        a, b, p = (self._source(t, k) for t, k in zip(operands[1:], (kind, kind, "pred"), strict=True))
        return self._step(
            guard, self._target(operands[0], kind), lambda a, b, p: np.where(p, a, b), a, b, p
        )

    def _decode_setp(self, instruction, modifiers, kinds, operands, guard, where):
        kind = kinds[-1]
        if kind in ("bf16x2", "f16x2"):
            raise NotEmulated(where)
        compare = comparison(modifiers[0], kind == "bf16" or np.dtype(NUMPY[kind]).kind == "f")
        if kind == "bf16":
            narrow = compare
            compare = lambda a, b: narrow(widen(a), widen(b))  # noqa: E731
        targets = [t.strip() for t in operands[0].split("|")]
        sources = [self._source(t, kind) for t in operands[1:3]]
        join = next((JOIN[m] for m in modifiers[1:] if m in JOIN), None)
        if "ftz" in modifiers:
            plain = compare
            compare = lambda a, b: plain(flush(a), flush(b))  # noqa: E731
        if join is None:
            if len(targets) == 1:
                return self._step(guard, self._target(targets[0], "pred"), compare, *sources)
            sources.append(np.ones(self.threads, bool))
            join = np.logical_and
        else:
            name = operands[3]
            array = self._source(name.lstrip("!"), "pred")
            sources.append(array)
            if name.startswith("!"):
                plain_join = join
                join = lambda a, b: plain_join(a, ~b)  # noqa: E731
        steps = [
            self._step(guard, self._target(t, "pred"), f, *sources)
            for t, f in zip(
                targets,
                (lambda a, b, c: join(compare(a, b), c), lambda a, b, c: join(~compare(a, b), c)),
                strict=False,
            )
        ]
        return steps[0] if len(steps) == 1 else lambda s: [f(s) for f in steps]

    def _decode_cvt(self, instruction, modifiers, kinds, operands, guard, where):
        target, source = kinds
        if target in ("bf16x2", "f16x2"):
            half = converter(target[:-2], source, modifiers)

            def pack(high, low):
                return half(high).view(np.uint16).astype(np.uint32) << 16 | half(low).view(np.uint16)

            sources = [self._source(t, source) for t in operands[1:]]
            return self._step(guard, self._target(operands[0], "b32"), pack, *sources)
        convert = converter(target, source, modifiers)
        return self._step(
            guard, self._target(operands[0], target), convert, self._source(operands[1], source)
        )
