"""A kernel decoded, and its blocks run: which warps, and which lanes of a parted warp, go on next."""

from __future__ import annotations

import re

import numpy as np

from ptx.access import Access
from ptx.arithmetic import NUMPY, UNSIGNED
from ptx.calculation import Calculation
from ptx.exchange import Exchange
from ptx.memory import WARP, Memory
from ptx.program import Fault, Instruction, NotEmulated, parse


class Machine(Calculation, Access, Exchange):
    """A decoded program with the registers of one block.

    Args:
        ptx: the text of one kernel.
        shared_bytes: how much shared memory its launch gives to a block.
        nudge: by how many units in the last place, at most, approximate operations are moved.

    Raises NotEmulated where the program holds what this machine does not know.
    """

    def __init__(self, ptx: str, shared_bytes: int, nudge: int = 0):
        super().__init__(parse(ptx))
        self.shared_bytes, self.nudge = shared_bytes, nudge
        self.generator = np.random.default_rng(0)
        self.executed = 0  # instructions of warps, in all launches
        self.steps, self.control = [], {}
        self.meetings = set()  # where all lanes of a warp have to be: barriers, exchanges, the end
        for pc, instruction in enumerate(self.program.instructions):
            self.steps.append(self._decode(pc, instruction))
        leaders = {0, *self.program.labels.values(), *(pc + 1 for pc in self.control), *self.meetings}
        self.runs = {}  # leader -> (steps without control, where control is or the next leader)
        for leader in leaders:
            end = leader
            while (
                end < len(self.steps) and end not in self.control and (end == leader or end not in leaders)
            ):
                end += 1
            self.runs[leader] = (self.steps[leader:end], end)

    def _decode(self, pc: int, instruction: Instruction):
        base, *modifiers = instruction.opcode.split(".")
        kinds = [m for m in modifiers if m in NUMPY]
        operands, guard = instruction.operands, self._guard(instruction)
        where = f"#{pc} {instruction.text} (line {instruction.line})"
        if base in ("bar", "barrier", "ret", "exit", "shfl", "vote", "redux", "ldmatrix", "stmatrix"):
            self.meetings.add(pc)
        if base in ("bra", "ret", "exit", "trap") or (
            base in ("bar", "barrier") and "warp" not in modifiers
        ):
            if base in ("bar", "barrier"):
                if guard is not None or "sync" not in modifiers or int(operands[0], 0) != 0:
                    raise NotEmulated(where)
                if len(operands) > 1 and int(operands[1], 0) != self.threads:
                    raise NotEmulated(where)
            goal = self.program.labels[operands[-1]] if base == "bra" else None
            self.control[pc] = (base, guard, goal)
            return None
        handler = getattr(self, f"_decode_{base}", self._decode_calculation)
        return handler(instruction, modifiers, kinds, operands, guard, where)

    def launch(
        self, grid: tuple, arguments: list, memory: Memory, *, seed: int | None = None, blocks=None
    ) -> None:
        """Run the blocks of a one-dimensional grid (or only some), in random order with a seed.

        Args:
            arguments: addresses and integers as int, the others as float, in the order of the kernel's
                parameters; those that are left out at the end are 0.
        """
        grid = (*grid, 1, 1)[:3]
        if grid[1:] != (1, 1):
            raise NotEmulated("a grid of more than one dimension")
        self.memory, self.generator = memory, np.random.default_rng(seed)
        self._set_arguments(arguments)
        self.special["%nctaid.x"][:] = grid[0]
        memory.start_launch()
        blocks = list(range(grid[0]) if blocks is None else blocks)
        if seed is not None:
            self.generator.shuffle(blocks)
        with np.errstate(all="ignore"):
            for block in blocks:
                self.special["%ctaid.x"][:] = block
                self._fill_registers()
                memory.start_block(block, self.shared_bytes, self.generator)
                self._run_block(seed is not None)

    def _set_arguments(self, arguments: list) -> None:
        arguments = [*arguments, *[0] * (len(self.program.parameters) - len(arguments))]
        for (name, kind), value in zip(self.program.parameters, arguments, strict=True):
            size = int(re.search(r"\d+", kind)[0]) // 8
            if isinstance(value, float):
                self.arguments[name] = np.array([value], f"f{size}")
            else:
                self.arguments[name] = np.array([value & ((1 << size * 8) - 1)], UNSIGNED[size])

    def _fill_registers(self) -> None:
        """With noise: what depends on a register that nobody set shows."""
        for register in self.registers.values():
            limit = 2 if register.dtype == np.bool_ else 256
            register.view(np.uint8)[:] = self.generator.integers(0, limit, register.nbytes, dtype=np.uint8)

    def _run_block(self, is_shuffled: bool) -> None:
        n = self.threads // WARP
        self.counters, self.parted = [0] * n, {}
        waiting, done = [False] * n, [False] * n
        while not all(done):
            ready = [w for w in range(n) if not waiting[w] and not done[w]]
            if not ready:
                self._pass_barrier(done)
                waiting = [False] * n
                continue
            first = ready[self.generator.integers(len(ready))] if is_shuffled else ready[0]
            if first in self.parted:
                self._run_lanes(first)
                continue
            counter, last = self.counters[first], first + 1
            limit = first + 1 + int(self.generator.integers(n)) if is_shuffled else n
            while (
                last < min(n, limit) and last not in self.parted and self.counters[last] == counter
                and not waiting[last] and not done[last]
            ):  # fmt: skip
                last += 1
            s = slice(first * WARP, last * WARP)
            steps, end = self.runs[counter]
            for step in steps:
                step(s)
            self.executed += (len(steps) + (end in self.control)) * (last - first)
            if end not in self.control:
                self.counters[first:last] = [end] * (last - first)
                continue
            base, guard, goal = self.control[end]
            votes = np.ones((last - first, WARP), bool) if guard is None else guard(s).reshape(-1, WARP)
            for warp, lanes in zip(range(first, last), votes, strict=True):
                takes = lanes.all()
                if lanes.any() != takes:
                    self._part(warp, lanes, end)
                    continue
                self.counters[warp] = goal if takes and base == "bra" else end + 1
                if takes and base in ("ret", "exit"):
                    done[warp] = True
                elif takes and base == "trap":
                    raise Fault(f"trap in block {self.memory.block}")
                elif base in ("bar", "barrier"):
                    waiting[warp] = True

    def _pass_barrier(self, done: list[bool]) -> None:
        if any(done):
            raise Fault("a barrier that some warps have left behind")
        if len(set(self.counters)) > 1:
            places = str(sorted(set(self.counters)))
            self.memory.faults["warps wait at different barriers", "", places] += 1
        self.memory.time += 1

    # Parted warps: warp -> {program counter: its lanes}.

    def _part(self, warp: int, lanes: np.ndarray, end: int) -> None:
        base, _, goal = self.control[end]
        if base != "bra":
            raise NotEmulated(f"lanes leave their warp: {self.program.instructions[end].text}")
        self.parted[warp] = {goal: lanes.copy(), end + 1: ~lanes}

    def _run_lanes(self, warp: int) -> None:
        """The lanes of a parted warp that are furthest behind, up to the next branch or meeting."""
        places = self.parted[warp]
        ready = [counter for counter in places if counter not in self.meetings]
        if not ready:
            texts = [self.program.instructions[counter].text for counter in sorted(places)]
            raise Fault(f"lanes of one warp wait at different places, block {self.memory.block}: {texts}")
        counter = min(ready)
        lanes = places.pop(counter)
        steps, end = self.runs[counter]
        s = slice(warp * WARP, (warp + 1) * WARP)
        self.active = np.zeros(self.threads, bool)
        self.active[s] = lanes
        kept = [(register[s], register[s][~lanes]) for register in self.registers.values()]
        for step in steps:
            step(s)
        for register, values in kept:
            register[~lanes] = values
        self.active = None
        self.executed += len(steps)
        if end in self.control and end not in self.meetings:
            base, guard, goal = self.control[end]
            self.executed += 1
            takes = lanes if guard is None else lanes & guard(s)
            if base == "trap" and takes.any():
                raise Fault(f"trap in block {self.memory.block}")
            self._arrive(places, goal, takes)
            self._arrive(places, end + 1, lanes & ~takes)
        else:
            self._arrive(places, end, lanes)
        if len(places) == 1:
            (self.counters[warp],) = places
            del self.parted[warp]

    @staticmethod
    def _arrive(places: dict[int, np.ndarray], counter: int, lanes: np.ndarray) -> None:
        if lanes.any():
            places[counter] = places.get(counter, False) | lanes
