"""An exact emulator of the PTX that Triton makes for sm_80 to sm_120, in NumPy, one thread block at a time.

    machine = Machine(ptx, shared_bytes)            # decode once
    memory = Memory()
    address = memory.add("logits", bytes_array)     # a fake address; the array itself is read and written
    machine.launch(grid, [address, 7, 0.5], memory, seed=3)
    memory.faults, memory.traffic

Every register is an array over the threads of the block, and an instruction is one NumPy operation
over a slice of whole warps. Each warp has its own program counter; with a seed, random runs of
neighbouring warps that stand at the same instruction go on together, in random order, up to the next
branch or barrier; without one all go in step. Where a branch parts a warp, its lanes go on apart, those
with the lowest instruction first, and meet again where they stand alike.

What is checked, beside the values:

- bounds and natural alignment of each access (``Fault`` is raised),
- reads of bytes that nobody wrote, writes to bytes that must not be written (both recorded),
- races: two accesses to one byte by different threads, one a store, with no barrier between them;
  in shared and global memory, within a block and between the blocks of one launch (recorded). It is
  a check of happens-before, not of one schedule. Stores of equal values are a kind of their own,
- barriers that not all warps reach, exchanges that not all lanes of a warp reach (raised).

Registers start as random bits, so that what depends on an undefined one shows. Rounding is that of
the hardware for add, sub, mul, fma, div.rn and all cvt; ``approx`` and ``full`` operations are
rounded correctly (hardware is allowed 1 or 2 units more), or moved by ``nudge`` units in the last
place at random, to see whether a result depends on them.

Not there: tensor cores, TMA, mbarriers, atomics, clusters, weak memory order, f64 ``approx``.

Reading order: ``program`` (the text), ``arithmetic``, ``memory``, ``operands``, then the instructions
(``calculation``, ``access``, ``exchange``), ``machine``, and ``device``, which puts it in the place of
the GPU under Triton's own launcher.
"""
