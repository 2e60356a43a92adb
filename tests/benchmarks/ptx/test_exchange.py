"""Lanes that exchange values, barriers, and warps that a branch parts, on PTX written by hand."""

import pytest

from ptx.program import Fault, NotEmulated
from ptx_by_hand import SHARED, THREADS, kinds, result_of, run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;", THREADS ^ 16),
        ("shfl.sync.idx.b32 %r3, %r2, 3, 31, -1;", THREADS // 32 * 32 + 3),
        (
            "shfl.sync.up.b32 %r3|%p1, %r2, 1, 0, -1; selp.b32 %r3, %r3, 999, %p1;",
            [999 if i % 32 == 0 else i - 1 for i in THREADS],
        ),
        ("shfl.sync.down.b32 %r3, %r2, 4, 31, -1;", [i if i % 32 > 27 else i + 4 for i in THREADS]),
        ("shfl.sync.bfly.b32 %r3, %r2, 4, 6175, -1;", THREADS ^ 4),  # within 8 lanes: (24 << 8) | 31
        ("setp.lt.u32 %p1, %r2, 3; vote.sync.ballot.b32 %r3, %p1, -1;", [7] * 32 + [0] * 32),
        ("redux.sync.add.s32 %r3, %r2, -1;", [496] * 32 + [1520] * 32),
        (
            "cvt.rn.f32.u32 %r4, %r2; redux.sync.max.f32 %r4, %r4, -1; cvt.rzi.u32.f32 %r3, %r4;",
            [31] * 32 + [63] * 32,
        ),
    ],
)
def test_lanes_exchange_values(text, expected):
    assert result_of(text).tolist() == list(expected)


def test_a_barrier_that_warps_meet_at_different_places_is_noted():
    text = """
      setp.lt.u32 %p1, %r2, 32;
      @%p1 bra $L1;
      bar.sync 0;
      bra $L2;
    $L1:
      bar.sync 0;
    $L2:
      st.global.b32 [%rd3], %r2;
    """
    assert kinds(run(text)[1]) == {"warps wait at different barriers"}


def test_a_barrier_that_a_warp_leaves_out_is_a_fault():
    with pytest.raises(Fault, match="left behind"):
        run("setp.lt.u32 %p1, %r2, 32; @%p1 bra $L1; bar.sync 0; $L1: st.global.b32 [%rd3], %r2;")


# Branches that part a warp.

ODD = "and.b32 %r4, %r2, 1; setp.eq.s32 %p1, %r4, 1; mov.b32 %r3, 7;\n"


@pytest.mark.parametrize("seed", [None, 1])
def test_lanes_go_apart_and_meet_again(seed):
    text = """
      @%p1 bra $L1;
      add.s32 %r3, %r3, %r2;
      bra $L2;
    $L1:
      sub.s32 %r3, %r3, %r2;
    $L2:
      shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;
    """
    found = result_of(ODD + text, seed=seed).astype("int32")
    assert found.tolist() == [7 + i - 1 if i % 2 else 7 - (i + 1) for i in THREADS]


def test_lanes_of_a_warp_may_repeat_a_loop_unlike_often():
    text = """
      mov.b32 %r3, 0; and.b32 %r4, %r2, 3;
    $L1:
      add.s32 %r3, %r3, 10;
      sub.s32 %r4, %r4, 1;
      setp.ge.s32 %p1, %r4, 0;
      @%p1 bra $L1;
    """
    assert result_of(text).tolist() == [10 * (i % 4 + 1) for i in THREADS]


def test_the_lanes_of_a_parted_warp_alone_load_and_store():
    text = "@%p1 bra $L1; ld.global.b32 %r3, [%rd3]; add.s32 %r3, %r3, 1; st.global.b32 [%rd3], %r3; $L1:"
    found, memory = run(ODD + text + "\n mov.b32 %r9, 0;")
    assert found.tolist() == [0 if i % 2 else 1 for i in THREADS]
    assert memory.traffic["out", "store", 4, "bytes"] == 128
    # What the others hold is as it was.
    assert result_of(ODD + "@%p1 bra $L1; mov.b32 %r3, 8; $L1:").tolist() == [
        7 if i % 2 else 8 for i in THREADS
    ]


def test_a_parted_warp_waits_at_a_barrier_until_it_is_whole():
    text = SHARED + ODD + """
      @%p1 bra $L1;
      st.shared.b32 [%r7], %r2;
      bra $L2;
    $L1:
      st.shared.b32 [%r7], %r1;
    $L2:
      bar.sync 0;
      xor.b32 %r8, %r6, 132;
      add.s32 %r9, %r5, %r8;
      ld.shared.b32 %r3, [%r9];
    """  # fmt: skip
    for seed in (None, 1, 2):
        assert result_of(text, seed=seed).tolist() == [5 if (i ^ 33) % 2 else i ^ 33 for i in THREADS]


def test_parted_lanes_race_without_a_barrier_of_their_warp():
    text = SHARED + ODD + """
      @%p1 bra $L1;
      st.shared.b32 [%r7], %r2;
    $L1:
      and.b32 %r8, %r6, 248;
      add.s32 %r9, %r5, %r8;
      ld.shared.b32 %r3, [%r9];
    """  # fmt: skip
    assert kinds(run(text)[1]) == {"race: load after store"}


@pytest.mark.parametrize("meeting", ["bar.sync 0;", "shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;"])
def test_a_meeting_that_some_lanes_never_reach_is_a_fault(meeting):
    with pytest.raises(Fault, match="wait at different places"):
        run(f"{ODD} @%p1 bra $L1; {meeting} $L1: st.global.b32 [%rd3], %r2;")


def test_lanes_that_end_before_their_warp_are_not_emulated():
    with pytest.raises(NotEmulated, match="leave their warp"):
        run(f"{ODD} @%p1 ret; st.global.b32 [%rd3], %r2;")


def test_what_the_machine_does_not_know_it_refuses():
    for text in (
        "atom.global.add.u32 %r3, [%rd3], 1;",
        "mbarrier.init.shared.b64 [%r2], 1;",
        "nonsense.b32 %r3, %r2;",
    ):
        with pytest.raises(NotEmulated):
            run(text)
