"""The registers of one block, and an instruction's operands as arrays over its threads."""

from __future__ import annotations

import re

import numpy as np

from ptx.arithmetic import NUMPY, UNSIGNED
from ptx.memory import SHARED_BASE, WARP
from ptx.program import NotEmulated, Program


class Operands:
    """Registers, special registers and arguments; what instructions read and write of them."""

    def __init__(self, program: Program):
        self.program, self.threads = program, program.threads
        self.thread = np.arange(self.threads, dtype=np.int64)
        # Lanes of a parted warp that go on alone; None while its warps are whole.
        self.active: np.ndarray | None = None
        widths = {"pred": np.bool_, "b8": np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
        self.registers = {}
        for name, kind in program.registers.items():
            dtype = widths.get(kind) or widths[int(re.search(r"\d+", kind)[0])]
            self.registers[name] = np.zeros(self.threads, dtype)
        lanes = self.thread.astype(np.uint32)
        full = lambda value: np.full(self.threads, value, np.uint32)  # noqa: E731
        self.special = {
            "%tid.x": lanes, "%ntid.x": full(self.threads), "%laneid": lanes % WARP, "%warpid": lanes // WARP,
            **{f"%{a}.{b}": full(a in ("ntid", "nctaid")) for a in ("tid", "ntid", "ctaid", "nctaid") for b in "yz"},
            "%ctaid.x": full(0), "%nctaid.x": full(1),
        }  # fmt: skip
        self.arguments: dict[str, np.ndarray] = {}

    def _view(self, array, dtype):
        dtype = np.dtype(dtype)
        if array.dtype == np.bool_ or dtype == np.bool_:
            if array.dtype != dtype:
                raise NotEmulated("a predicate as a number")
            return array
        if dtype.itemsize > array.itemsize:
            raise NotEmulated("a register narrower than its use")
        return array.view(dtype)[:: array.itemsize // dtype.itemsize]

    def _source(self, text: str, kind: str):
        """An operand as an array over threads; constants too."""
        dtype = np.dtype(NUMPY[kind])
        if text in self.registers:
            return self._view(self.registers[text], dtype)
        if text in self.special:
            return self._view(self.special[text], dtype)
        if text.startswith("!") and text[1:] in self.registers:
            raise NotEmulated("negated operand")
        if text == "global_smem":
            return np.full(self.threads, SHARED_BASE, dtype)
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            bits = np.array(int(match[1], 16), UNSIGNED[len(match[1]) // 2])
            value = bits.view(NUMPY[f"f{bits.itemsize * 8}"]) if dtype.kind == "f" else bits
            return np.full(self.threads, value, dtype)
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            raise NotEmulated(f"operand {text}")
        number = int(text.rstrip("U"), 0)
        if dtype == np.bool_:
            return np.full(self.threads, bool(number))
        bits = np.full(self.threads, number & ((1 << dtype.itemsize * 8) - 1), UNSIGNED[dtype.itemsize])
        return bits.view(dtype)

    def _guard(self, instruction):
        if instruction.guard is None:
            return None
        array = self.registers[instruction.guard.lstrip("!")]
        return (lambda s: ~array[s]) if instruction.guard[0] == "!" else (lambda s: array[s])

    def _lanes(self, guard, s):
        """Which threads of a slice load or store: an index of them, None where none does."""
        if guard is None and self.active is None:
            return slice(None)
        takes_part = np.ones(s.stop - s.start, bool) if guard is None else guard(s)
        if self.active is not None:
            takes_part = takes_part & self.active[s]
        some = np.flatnonzero(takes_part)
        return some if len(some) else None

    def _target(self, text: str, kind: str):
        """A register as the array that results of this type are written to; wider than the type, extended."""
        if text == "_":
            return np.zeros(self.threads, NUMPY[kind])
        register, dtype = self.registers[text], np.dtype(NUMPY[kind])
        if register.itemsize > dtype.itemsize and dtype.kind in "ui":
            return register.view(f"{dtype.kind}{register.itemsize}")
        return self._view(register, dtype)

    def _step(self, guard, target, function, *sources):
        if guard is not None:

            def step(s):
                mask = guard(s)
                if mask.any():
                    np.copyto(target[s], function(*[x[s] for x in sources]), where=mask, casting="unsafe")
        elif len(sources) == 1:
            (a,) = sources

            def step(s):
                target[s] = function(a[s])
        elif len(sources) == 2:
            a, b = sources

            def step(s):
                target[s] = function(a[s], b[s])
        else:

            def step(s):
                target[s] = function(*[x[s] for x in sources])

        return step

    def _address(self, text: str):
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        offset = int(match[2], 0) if match[2] else 0
        if match[1] in self.registers:
            array = self.registers[match[1]]
            return lambda s: array[s].astype(np.int64) + offset
        if match[1] == "global_smem":
            array = np.full(self.threads, SHARED_BASE + offset, np.int64)
            return lambda s: array[s]
        raise NotEmulated(f"address {text}")
