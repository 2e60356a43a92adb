"""Bounds, undefined bytes, races and traffic, on PTX written by hand: races found, and none invented."""

import numpy as np
import pytest

from ptx.program import Fault
from ptx_by_hand import SHARED, THREADS, kinds, run

# Each thread leaves its number in shared memory and takes that of the thread in the other warp.
EXCHANGE = (
    SHARED
    + """
  st.shared.b32 [%r7], %r2;
  {barrier}
  xor.b32 %r8, %r6, 128;
  add.s32 %r9, %r5, %r8;
  ld.shared.b32 %r10, [%r9];
  st.global.b32 [%rd3], %r10;
"""
)
# The same with its neighbour, which then finds it in its own place.
NEIGHBOURS = (
    SHARED
    + """
  st.shared.b32 [%r7], %r2;
  {barrier}
  xor.b32 %r8, %r6, 4;
  add.s32 %r9, %r5, %r8;
  ld.shared.b32 %r10, [%r9];
  {barrier}
  st.shared.b32 [%r9], %r10;
  st.global.b32 [%rd3], %r10;
"""
)


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_warps_exchange_through_shared_memory_with_a_barrier(seed):
    found, memory = run(EXCHANGE.format(barrier="bar.sync 0;"), seed=seed)
    assert (found == THREADS ^ 32).all()
    assert not memory.faults


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_without_one_that_is_a_race_whatever_the_schedule(seed):
    _, memory = run(EXCHANGE.format(barrier=""), seed=seed)
    assert {"race: load after store", "undefined read", "race: store after load"} & kinds(memory)


def test_lanes_exchange_through_shared_memory_with_a_barrier_of_the_warp():
    found, memory = run(NEIGHBOURS.format(barrier="bar.warp.sync -1;"), seed=3)
    assert (found == THREADS ^ 1).all()
    assert not memory.faults


def test_without_one_that_is_a_race_too():
    assert "race: load after store" in kinds(run(NEIGHBOURS.format(barrier=""), seed=3)[1])


REVERSED = """
  xor.b32 %r8, %r2, 63;
  mul.wide.u32 %rd4, %r8, 4;
  add.s64 %rd5, %rd1, %rd4;
  ld.global.b32 %r10, [%rd5];
  {barrier}
  st.global.b32 [%rd3], %r10;
"""


def test_a_store_over_what_another_thread_loads_is_a_race():
    _, memory = run(REVERSED.format(barrier=""), seed=3)
    assert {"race: store after load", "race: load after store"} & kinds(memory)
    found, memory = run(REVERSED.format(barrier="bar.sync 0;"), data=THREADS.astype(np.uint32), seed=3)
    assert not memory.faults
    assert (found == 63 - THREADS).all()


ONE_STORES = (
    "ld.global.b32 %r10, [%rd1]; {barrier} setp.eq.s32 %p1, %r2, 0; @%p1 st.global.b32 [%rd1], %r2;"
)


def test_a_word_that_all_load_may_be_overwritten_after_a_barrier_alone():
    assert not run(ONE_STORES.format(barrier="bar.sync 0;"), seed=5)[1].faults
    assert kinds(run(ONE_STORES.format(barrier=""), seed=5)[1]) == {"race: store after load"}


def test_blocks_have_no_barrier_between_them():
    text = "mov.u32 %r9, %ctaid.x; st.global.b32 [%rd3], %r9;"
    assert "race: store after store, blocks" in kinds(run(text, grid=2, seed=1)[1])
    assert "race: load after store, blocks" in kinds(
        run("ld.global.b32 %r9, [%rd3];" + text, grid=2, seed=1)[1]
    )


def test_stores_of_equal_values_are_a_kind_of_their_own():
    assert kinds(run("st.global.b32 [%rd1], %r2;")[1]) == {"race: two stores of one instruction"}
    assert kinds(run("st.global.b32 [%rd1], %r1;")[1]) == {"equal stores of one instruction"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("st.global.b32 [%rd3+256], %r2;", "of 256 bytes"),
        ("ld.global.b32 %r3, [%rd3+-4];", "no such address"),
        ("st.global.v2.b32 [%rd1+4], {%r2, %r2};", "misaligned 8-byte access"),
        ("st.shared.b32 [%r2+1024], %r2;", "shared"),
        ("mov.b64 %rd4, 64; ld.global.b32 %r3, [%rd4];", "no such address"),
    ],
)
def test_an_access_outside_or_off_its_alignment_is_a_fault(text, message):
    with pytest.raises(Fault, match=message):
        run(text)


def test_bytes_that_nobody_wrote_must_not_be_read():
    assert kinds(run("ld.global.b32 %r3, [%rd3];", readable=False)[1]) == {"undefined read"}
    assert kinds(run(SHARED + "ld.shared.b32 %r3, [%r7];")[1]) == {"undefined read"}
    assert not run("st.global.b32 [%rd3], %r2; ld.global.b32 %r3, [%rd3];", readable=False)[1].faults


def test_bytes_that_must_stay_are_watched():
    _, memory = run("st.global.b32 [%rd3], %r2;", writable=False)
    assert kinds(memory) == {"forbidden write"}
    assert sum(memory.faults.values()) == 256


def test_a_predicated_vector_load_keeps_what_the_registers_held():
    text = """
      setp.lt.u32 %p1, %r2, 1; mov.b32 %r3, 77; mov.b32 %r4, 78;
      // begin inline asm
      @%p1 ld.global.v2.b32 { %r3, %r4 }, [ %rd3 + 0 ];
      // end inline asm
      bar.sync 0;
      st.global.b32 [%rd3], %r4;
    """
    found, memory = run(text, data=THREADS.astype(np.uint32))
    assert (found == np.where(THREADS == 0, 1, 78)).all()
    assert not memory.faults


def test_traffic_is_counted_in_bytes_sectors_and_instructions_of_warps():
    _, memory = run("ld.global.b32 %r3, [%rd3]; bra $L1; $L1: st.global.b8 [%rd3], %r3;")
    assert dict(memory.traffic) == {
        ("out", "load", 4, "bytes"): 256, ("out", "load", 4, "sectors"): 8, ("out", "load", 4, "instructions"): 2,
        ("out", "store", 1, "bytes"): 64, ("out", "store", 1, "sectors"): 8, ("out", "store", 1, "instructions"): 2,
    }  # fmt: skip
