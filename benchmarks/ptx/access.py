"""Instructions that load and store."""

from __future__ import annotations

import numpy as np

from ptx.arithmetic import NUMPY
from ptx.memory import WARP
from ptx.operands import Operands
from ptx.program import NotEmulated, split_operands


class Access(Operands):
    """Decodes them into steps over a slice of threads."""

    def _decode_ld(self, instruction, modifiers, kinds, operands, guard, where):
        kind = kinds[-1]
        targets = [self._target(t, kind) for t in split_operands(operands[0].strip("{} "))]
        if "param" in modifiers:
            name = operands[1].strip("[] ")
            if "+" in name:
                raise NotEmulated(where)

            def step(s):
                targets[0][s] = self.arguments[name].view(NUMPY[kind])

            return step
        space = self._space(modifiers, where)
        address, dtype = self._address(operands[1]), np.dtype(NUMPY[kind])
        width = dtype.itemsize * len(targets)

        def step(s):
            some = self._lanes(guard, s)
            if some is None:
                return
            at, threads = address(s)[some], self.thread[s][some]
            values = self.memory.access(at, width, threads, space, where).view(dtype)
            for i, target in enumerate(targets):
                target[s][some] = values[:, i]

        return step

    def _decode_st(self, instruction, modifiers, kinds, operands, guard, where):
        kind = kinds[-1]
        space, dtype, address = (
            self._space(modifiers, where),
            np.dtype(NUMPY[kind]),
            self._address(operands[0]),
        )
        sources = [self._source(t, kind) for t in split_operands(operands[1].strip("{} "))]
        width = dtype.itemsize * len(sources)

        def step(s):
            some = self._lanes(guard, s)
            if some is None:
                return
            at, threads = address(s)[some], self.thread[s][some]
            values = np.stack([x[s][some] for x in sources], axis=1)
            self.memory.access(at, width, threads, space, where, stored=values.view(np.uint8))

        return step

    def _space(self, modifiers, where):
        space = next(
            (m.split("::")[0] for m in modifiers if m.split("::")[0] in ("global", "shared")), None
        )
        if space is None:
            raise NotEmulated(where)
        return space

    def _matrix_rows(self, at, count):
        """For each of ``count`` 8x8 matrices: of each thread, its row's address and the pair in it that is its own."""
        rows = at.reshape(-1, WARP)
        for m in range(count):
            part = rows[:, 8 * m : 8 * m + 8]
            lane = np.arange(WARP)
            yield lambda row, part=part: part[:, row].ravel(), lane

    def _decode_ldmatrix(self, instruction, modifiers, kinds, operands, guard, where):
        if guard is not None or "m8n8" not in modifiers or kinds[-1] != "b16":
            raise NotEmulated(where)
        targets = [self._target(t, "b32") for t in split_operands(operands[0].strip("{} "))]
        address, is_transposed = self._address(operands[1]), "trans" in modifiers

        def step(s):
            threads = self.thread[s]
            for target, (row_of, lane) in zip(
                targets, self._matrix_rows(address(s), len(targets)), strict=True
            ):
                tiled = np.tile(lane, len(threads) // WARP)
                if is_transposed:
                    halves = [
                        self.memory.access(
                            row_of(2 * (lane % 4) + i) + 2 * (tiled // 4), 2, threads, "shared", where
                        )
                        for i in (0, 1)
                    ]
                    data = np.concatenate(halves, axis=1)
                else:
                    data = self.memory.access(
                        row_of(lane // 4) + 4 * (tiled % 4), 4, threads, "shared", where
                    )
                target[s] = np.ascontiguousarray(data).view(np.uint32)[:, 0]

        return step

    def _decode_stmatrix(self, instruction, modifiers, kinds, operands, guard, where):
        if guard is not None or "m8n8" not in modifiers or kinds[-1] != "b16":
            raise NotEmulated(where)
        sources = [self._source(t, "b32") for t in split_operands(operands[1].strip("{} "))]
        address, is_transposed = self._address(operands[0]), "trans" in modifiers

        def step(s):
            threads = self.thread[s]
            for source, (row_of, lane) in zip(
                sources, self._matrix_rows(address(s), len(sources)), strict=True
            ):
                tiled = np.tile(lane, len(threads) // WARP)
                data = np.ascontiguousarray(source[s]).view(np.uint8).reshape(-1, 4)
                if is_transposed:
                    for i in (0, 1):
                        at = row_of(2 * (lane % 4) + i) + 2 * (tiled // 4)
                        stored = np.ascontiguousarray(data[:, 2 * i : 2 * i + 2])
                        self.memory.access(at, 2, threads, "shared", where, stored=stored)
                else:
                    at = row_of(lane // 4) + 4 * (tiled % 4)
                    self.memory.access(at, 4, threads, "shared", where, stored=data)

        return step
