"""Global memory, and the shared memory of the block that runs: what is known of each byte, faults, traffic."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ptx.program import Fault

WARP = 32
SHARED_BASE = 1024  # of the shared window; nothing starts at 0


class Segment:
    """One allocation and what is known of each of its bytes."""

    def __init__(self, name: str, base: int, data: np.ndarray):
        n = len(data)
        self.name, self.base, self.data = name, base, data
        self.readable = np.ones(n, bool)
        self.writable = np.ones(n, bool)
        self.watched = True  # False: nobody may write, so no access can race
        self.writer = np.zeros(n, np.int32)  # thread
        self.writer_time = np.zeros(n, np.int64)
        self.writer_warp_time = np.zeros(n, np.int64)
        self.reader, self.reader_time = np.zeros(n, np.int32), np.zeros(n, np.int64)
        self.reader_warp_time, self.first_read = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.spread = np.zeros(
            n, np.uint8
        )  # readers since the barrier: 0 one thread, 1 one warp, 2 several
        self.was_read, self.was_written = np.zeros(n, bool), np.zeros(n, bool)


class Memory:
    """Global memory, the shared memory of the block that runs, the clocks of barriers, and findings."""

    def __init__(self):
        self.segments: list[Segment] = []
        self.faults: Counter = Counter()  # (kind, where) -> bytes concerned
        self.traffic: Counter = (
            Counter()
        )  # (segment, "load"/"store", bytes wide, "bytes"/"sectors"/...) -> n
        self.time = self.launch_start = self.block_start = 1
        self.warp_time = np.zeros(32, np.int64)
        self.block = -1

    def add(self, name: str, data: np.ndarray, phase: int = 0) -> int:
        """Map an array of bytes; its fake address is ``phase`` more than a multiple of 512."""
        base = (len(self.segments) + 1 << 36) + phase % 512
        self.segments.append(Segment(name, base, data))
        return base

    def start_launch(self) -> None:
        self.time += 1
        self.launch_start = self.time
        for segment in self.segments:
            segment.was_read[:] = segment.was_written[:] = False
            segment.watched = bool(segment.writable.any())

    def start_block(self, block: int, shared_bytes: int, generator) -> None:
        self.time += 1
        self.block_start, self.block = self.time, block
        noise = generator.integers(0, 256, max(shared_bytes, 1), dtype=np.uint8)
        self.shared = Segment("shared", SHARED_BASE, noise)
        self.shared.readable[:] = False

    def _find(self, address, width, space, where) -> Segment:
        if space == "shared":
            segment = self.shared
        else:
            index = int(address[0] >> 36) - 1
            if not 0 <= index < len(self.segments):
                raise Fault(f"no such address {int(address[0]):#x}: {where}")
            segment = self.segments[index]
        low, high = int(address.min()) - segment.base, int(address.max()) - segment.base + width
        if low < 0 or high > len(segment.data):
            raise Fault(
                f"{segment.name}[{low}:{high}] of {len(segment.data)} bytes, block {self.block}: {where}"
            )
        if (address % width).any():
            raise Fault(f"misaligned {width}-byte access to {segment.name}, block {self.block}: {where}")
        return segment

    def access(self, address, width, threads, space, where, stored=None):
        """Load (n, width) bytes, or store them."""
        segment = self._find(address, width, space, where)
        cells = (address - segment.base)[:, None] + np.arange(width)
        kind = "load" if stored is None else "store"
        name = (segment.name, kind, width)
        warps = threads // WARP
        self.traffic[(*name, "bytes")] += cells.size
        self.traffic[(*name, "sectors")] += np.unique(warps.astype(np.int64) << 48 | address >> 5).size
        self.traffic[(*name, "instructions")] += np.unique(warps).size
        if stored is None:
            if not (known := segment.readable[cells]).all():
                self.faults["undefined read", segment.name, where] += int((~known).sum())
            segment.was_read[cells] = True
        else:
            if not (allowed := segment.writable[cells]).all():
                self.faults["forbidden write", segment.name, where] += int((~allowed).sum())
            segment.was_written[cells] = True
        if segment.watched:
            self._check_order(segment, cells, threads[:, None], stored, where)
        if stored is None:
            return segment.data[cells]
        segment.data[cells] = stored
        segment.readable[cells] = True
        if segment.watched and (back := segment.writer[cells] != threads[:, None]).any():
            clash = back & (segment.data[cells] != stored)
            kind = (
                "race: two stores of one instruction" if clash.any() else "equal stores of one instruction"
            )
            self.faults[kind, segment.name, where] += int(back.sum())
        return None

    def _check_order(self, segment, cells, threads, stored, where) -> None:
        now, start, block = self.time, self.launch_start, self.block_start
        warps = threads // WARP
        warp_now = self.warp_time[warps]
        written = segment.writer_time[cells]
        if written.max() >= start:
            writer = segment.writer[cells]
            near = writer // WARP == warps
            clash = (written == now) & (writer != threads)
            clash &= ~near | (segment.writer_warp_time[cells] == warp_now)
            other = (written >= start) & (written < block)
            if (clash | other).any():
                equal = stored is not None and (segment.data[cells] == stored)[clash | other].all()
                kind = "load after store" if stored is None else "store after store"
                kind = ("equal " if equal else "race: ") + kind + (", blocks" if other.any() else "")
                self.faults[kind, segment.name, where] += int((clash | other).sum())
        read = segment.reader_time[cells]
        reader, spread = segment.reader[cells], segment.spread[cells]
        near = reader // WARP == warps
        ordered = near & (segment.reader_warp_time[cells] != warp_now)
        first = segment.first_read[cells]
        if stored is None:
            same = read == now
            spread = np.where(same, np.where(ordered & (spread == 1), 0, spread), 0).astype(np.uint8)
            spread = np.where(same & ~near, 2, spread)
            spread = np.where(same & near & ~ordered & (reader != threads), np.maximum(spread, 1), spread)
            segment.reader[cells] = threads
            segment.reader_time[cells], segment.reader_warp_time[cells] = now, warp_now
            segment.first_read[cells] = np.where(first >= start, first, now)
            back = segment.reader[cells]
            if (back != threads).any():
                spread = np.maximum(spread, np.where(back // WARP != warps, 2, back != threads))
            segment.spread[cells] = 0
            np.maximum.at(segment.spread, cells, spread.astype(np.uint8))
        else:
            if read.max() >= start:
                other = (read >= start) & ((read < block) | ((first >= start) & (first < block)))
                clash = (spread == 2) | ~near | (~ordered & ((spread == 1) | (reader != threads)))
                clash &= read == now
                if (clash | other).any():
                    kind = "race: store after load" + (", blocks" if other.any() else "")
                    self.faults[kind, segment.name, where] += int((clash | other).sum())
            segment.writer[cells] = threads
            segment.writer_time[cells], segment.writer_warp_time[cells] = now, warp_now
