"""PTX written by hand, run by the emulator: two warps, %r2 the thread, %rd3 the address of its word."""

import struct

import numpy as np

from ptx.machine import Machine
from ptx.memory import Memory

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
  .param .u64 .ptr .global .align 1 k_param_0,
  .param .u32 k_param_1,
  .param .u64 .ptr .global .align 1 k_param_2
)
.reqntid 64
{
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<30>; .reg .b64 %rd<9>;
  ld.param.b64 %rd1, [k_param_0];
  ld.param.b32 %r1, [k_param_1];
  mov.u32 %r2, %tid.x;
  mul.wide.u32 %rd2, %r2, 4;
  add.s64 %rd3, %rd1, %rd2;
"""
THREADS = np.arange(64)
# %r6 is the thread's offset, %r7 its address in shared memory.
SHARED = "mov.b32 %r5, global_smem; shl.b32 %r6, %r2, 2; add.s32 %r7, %r5, %r6;\n"


def run(body, *, data=None, seed=None, nudge=0, grid=1, readable=True, writable=True, argument=5):
    """The words of global memory afterwards, and the memory."""
    machine = Machine(f"{HEAD}{body}\n ret;\n}}\n", 1024, nudge)
    memory = Memory()
    data = np.zeros(64, np.uint32) if data is None else data
    address = memory.add("out", data.view(np.uint8))
    memory.segments[0].readable[:] = readable
    memory.segments[0].writable[:] = writable
    machine.launch((grid,), [address, argument, 0], memory, seed=seed)
    return data, memory


def result_of(text, *, result="%r3", **options):
    """The words that all threads store after the instructions."""
    return run(f"{text}\n st.global.b32 [%rd3], {result};", **options)[0]


def kinds(memory):
    """The kinds of fault that were found."""
    return {kind for kind, *_ in memory.faults}


def constant(x):
    """A number as PTX writes an fp32."""
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"
