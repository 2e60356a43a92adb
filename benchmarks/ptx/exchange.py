"""Instructions in which the lanes of a warp exchange values, or wait for each other."""

from __future__ import annotations

from functools import reduce

import numpy as np

from ptx.arithmetic import INTEGER
from ptx.memory import WARP
from ptx.operands import Operands
from ptx.program import NotEmulated


class Exchange(Operands):
    """Decodes them into steps over a slice of whole warps."""

    def _decode_shfl(self, instruction, modifiers, kinds, operands, guard, where):
        if guard is not None or int(operands[4], 0) & 0xFFFFFFFF != 0xFFFFFFFF:
            raise NotEmulated(where)
        names = [t.strip() for t in operands[0].split("|")]
        target, source = self._target(names[0], "b32"), self._source(operands[1], "b32")
        lane, clamp = self._source(operands[2], "b32"), self._source(operands[3], "b32")
        valid = self._target(names[1], "pred") if len(names) > 1 else np.zeros(self.threads, bool)
        mode, own = modifiers[1], self.thread % WARP

        def step(s):
            b, c, me = lane[s].astype(np.int64) & 31, clamp[s].astype(np.int64), own[s]
            part = c >> 8 & 31
            low, high = me & part, me & part | c & 31 & ~part
            other = {"bfly": me ^ b, "idx": low | b & ~part, "up": me - b, "down": me + b}[mode]
            good = other >= high if mode == "up" else other <= high
            index = np.where(good, other, me) + (self.thread[s] - self.thread[s][0]) // WARP * WARP
            target[s] = source[s][index]
            valid[s] = good

        return step

    def _decode_vote(self, instruction, modifiers, kinds, operands, guard, where):
        if guard is not None:
            raise NotEmulated(where)
        name = operands[1].lstrip("!")
        source, mode = self._source(name, "pred"), modifiers[1]
        target = self._target(operands[0], kinds[-1])

        def step(s):
            votes = source[s].reshape(-1, WARP) != operands[1].startswith("!")
            if mode == "ballot":
                value = (votes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=1)
            else:
                value = {"all": votes.all(1), "any": votes.any(1), "uni": votes.all(1) | ~votes.any(1)}[
                    mode
                ]
            target[s] = np.repeat(value, WARP).astype(target.dtype)

        return step

    def _decode_redux(self, instruction, modifiers, kinds, operands, guard, where):
        name, kind = modifiers[1], kinds[-1]
        if guard is not None or "abs" in modifiers:
            raise NotEmulated(where)
        function = self._float(name, modifiers, kind, where) if kind == "f32" else INTEGER[name]
        source, target = self._source(operands[1], kind), self._target(operands[0], kind)

        def step(s):
            lanes = source[s].reshape(-1, WARP)
            target[s] = np.repeat(reduce(function, lanes.T), WARP)

        return step

    def _decode_bar(self, instruction, modifiers, kinds, operands, guard, where):
        """bar.warp.sync."""
        if guard is not None or int(operands[0], 0) & 0xFFFFFFFF != 0xFFFFFFFF:
            raise NotEmulated(where)

        def step(s):
            self.memory.warp_time[self.thread[s][::WARP] // WARP] += 1

        return step
