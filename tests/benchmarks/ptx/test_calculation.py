"""Instructions that calculate, on PTX written by hand, against integers and exact rationals."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

from ptx.arithmetic import fma, to_bf16
from ptx_by_hand import THREADS, constant, result_of, run

NAN = math.nan


def bits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prmt.b32 %r3, 0x33221100, 0x77665544, 0x5410;", 0x55441100),
        (
            "prmt.b32 %r3, 0x800000FF, 0, 0xB840;",
            0xFFFF00FF,
        ),  # a nibble of 8 or more repeats the byte's sign
        ("lop3.b32 %r3, 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0xE8;", 0xE8E8E8E8),
        ("bfe.u32 %r3, 0xABCD1234, 8, 8;", 0x12),
        ("bfe.s32 %r3, 0xABCD1234, 24, 8;", 0xFFFFFFAB),
        ("bfi.b32 %r3, 0x5, 0xFFFFFFFF, 8, 4;", 0xFFFFF5FF),
        ("shf.l.wrap.b32 %r3, 0x80000001, 0x0000000F, 4;", 0xF8),
        ("shr.s32 %r3, -8, 40;", 0xFFFFFFFF),
        ("shl.b32 %r3, 1, 32;", 0),
        ("mul.hi.u32 %r3, 0xFFFFFFFF, 0xFFFFFFFF;", 0xFFFFFFFE),
        ("mul.hi.s32 %r3, -5, 3;", 0xFFFFFFFF),
        ("div.s32 %r3, -7, 2;", 0xFFFFFFFD),
        ("rem.s32 %r3, -7, 2;", 0xFFFFFFFF),
        ("cvt.s64.s32 %rd4, -3; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r3, %rd4;", 0xFFFFFFFF),
        ("popc.b32 %r3, 0xF0F1;", 9),
        ("clz.b32 %r3, 0x00010000;", 15),
        ("mad.lo.s32 %r3, -3, 4, 5;", 0xFFFFFFF9),
        ("min.s32 %r3, -3, 4;", 0xFFFFFFFD),
        ("min.u32 %r3, -3, 4;", 4),
    ],
)
def test_integers(text, expected):
    assert (result_of(text) == expected).all()


def test_words_are_packed_and_unpacked():
    swapped = result_of("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};")
    assert (swapped == THREADS << 16).all()


@pytest.mark.parametrize(
    ("operation", "a", "b", "expected"),
    [
        ("max.f32", NAN, 2.0, 2.0),
        ("max.f32", -0.0, 0.0, 0.0),
        ("min.f32", 0.0, -0.0, -0.0),
        ("max.NaN.f32", NAN, 2.0, NAN),
        ("add.f32", NAN, 2.0, NAN),
        ("add.ftz.f32", math.inf, -math.inf, NAN),
        ("mul.f32", -math.inf, 0.0, NAN),
        ("add.f32", 1.0, 2**-24, 1.0),
        ("div.full.f32", 1.0, 3.0, float(np.float32(1 / 3))),
        ("add.ftz.f32", 2**-127, 0.0, 0.0),
        ("add.f32", 2**-127, 0.0, 2**-127),
    ],
)
def test_floats(operation, a, b, expected):
    found = result_of(f"{operation} %r3, {constant(a)}, {constant(b)};")
    if math.isnan(expected):
        assert (found == 0x7FFFFFFF).all()
    else:
        assert (found == bits(expected)).all()


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("eq", NAN, NAN, 0),
        ("ne", NAN, NAN, 0),
        ("ne", 1.0, 2.0, 1),
        ("neu", NAN, 1.0, 1),
        ("neu", 1.0, 1.0, 0),
        ("equ", NAN, 1.0, 1),
        ("lt", NAN, 1.0, 0),
        ("ltu", NAN, 1.0, 1),
        ("geu", 0.0, 1.0, 0),
        ("num", 1.0, 2.0, 1),
        ("nan", 1.0, NAN, 1),
    ],
)
def test_comparisons_know_nan(name, a, b, expected):
    text = f"setp.{name}.f32 %p1, {constant(a)}, {constant(b)}; selp.b32 %r3, 1, 0, %p1;"
    assert (result_of(text) == expected).all()


def test_a_power_of_two_below_the_normal_numbers_is_flushed_where_the_instruction_says_so():
    assert (result_of(f"ex2.approx.ftz.f32 %r3, {constant(-127.0)};") == 0).all()
    assert (result_of(f"ex2.approx.f32 %r3, {constant(-127.0)};").view(np.float32) == 2.0**-127).all()


def nearest(a, b, c):
    """a * b + c as the nearest fp32, ties to even, by exact rationals."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    middle = np.float32(float(exact))
    neighbours = (middle, *(np.nextafter(middle, np.float32(side)) for side in (np.inf, -np.inf)))
    ranked = [
        (abs(Fraction(float(x)) - exact), int(np.array(x).view(np.uint32)) & 1, float(x))
        for x in neighbours
    ]
    return np.float32(min(ranked)[2])


def test_a_fused_product_is_rounded_once():
    generator = np.random.default_rng(0)
    normal = lambda: generator.standard_normal(1500).astype(np.float32)  # noqa: E731
    whole = lambda: (1 + generator.integers(0, 2**23, 250) * 2.0**-23).astype(np.float32)  # noqa: E731
    a, b = normal(), normal()
    c = (normal() * 2.0 ** generator.integers(-60, 30, 1500)).astype(np.float32)
    # Products next to a tie of c.
    a[:250], b[:250], c[:500] = whole(), whole() * np.float32(2.0**-49), 1.0
    a[250:500] = np.float32(2.0**-24)
    b[250:500] = 1 + generator.integers(-3, 3, 250) * 2.0**-23
    expected = np.array([nearest(*numbers) for numbers in zip(a, b, c, strict=True)])
    assert (fma(a, b, c).view(np.uint32) == expected.view(np.uint32)).all()


def test_bf16_is_rounded_to_the_nearest_even():
    numbers = {
        1 + 2**-8: 0x3F80, 1 + 3 * 2**-8: 0x3F82, 1 + 2**-8 + 2**-20: 0x3F81, math.inf: 0x7F80, -math.inf: 0xFF80,
        NAN: 0x7FFF, 3.4e38: 0x7F80, -0.0: 0x8000, 1e-40: 0x0001,
    }  # fmt: skip
    assert to_bf16(np.array(list(numbers), np.float32)).tolist() == list(numbers.values())
    assert (
        result_of(f"cvt.rn.bf16x2.f32 %r3, {constant(1.0)}, {constant(2.0)};") == 0x3F804000
    ).all()  # the first stands high


def test_a_float_is_cut_to_an_integer():
    assert (result_of(f"cvt.rzi.s32.f32 %r3, {constant(-2.7)};").view(np.int32) == -2).all()


def test_a_loop_runs_as_often_as_its_argument_says():
    text = """
      mov.b32 %r3, 0; mov.b32 %r4, 0;
    $L1:
      add.s32 %r3, %r3, %r2; add.s32 %r4, %r4, 1;
      setp.lt.s32 %p1, %r4, %r1;
      @%p1 bra $L1;
    """
    assert (result_of(text, argument=5, seed=1) == THREADS * 5).all()


@pytest.mark.parametrize(("operation", "bits_"), [("max.f16", 0x4000), ("min.f16", 0x3C00)])
def test_half_floats_are_compared_as_numbers(operation, bits_):
    text = f"mov.b32 %r4, 0x40003C00; mov.b32 {{%rs1, %rs2}}, %r4; {operation} %rs1, %rs1, %rs2; cvt.u32.u16 %r3, %rs1;"
    assert (result_of(text) == bits_).all()


def test_the_maximum_of_three():
    text = f"max.f32 %r3, {constant(-1.0)}, {constant(NAN)}, {constant(2.0)};"
    assert (result_of(text).view(np.float32) == 2.0).all()


def test_pairs_of_floats_are_calculated_at_once():
    text = f"""
      mov.b32 %r4, {constant(1.5)}; mov.b32 %r5, {constant(-2.0)};
      mov.b64 %rd4, {{%r4, %r5}};
      mul.rn.f32x2 %rd5, %rd4, %rd4;
      fma.rn.f32x2 %rd5, %rd4, %rd4, %rd5;
      mov.b64 {{%r3, %r6}}, %rd5;
    """
    assert (result_of(text).view(np.float32) == 4.5).all()
    assert (result_of(text, result="%r6").view(np.float32) == 8.0).all()


def test_nudging_moves_approximate_operations_by_a_unit_and_no_others():
    numbers = "add.s32 %r4, %r2, 1; cvt.rn.f32.u32 %r4, %r4; rcp.approx.f32 %r3, %r4;"
    exact, moved = result_of(numbers), result_of(numbers, nudge=1)
    assert set((moved.astype(np.int64) - exact).tolist()) == {-1, 0, 1}
    # Threads that calculate the same have the same, as in hardware.
    third = f"mov.b32 %r4, {constant(3.0)}; rcp.approx.f32 %r3, %r4;"
    assert len(set(result_of(third, nudge=1).tolist())) == 1
    added = f"add.f32 %r3, {constant(1.0)}, {constant(0.1)};"
    assert (result_of(added, nudge=1) == result_of(added)).all()


def test_a_register_that_nobody_set_holds_noise():
    found = run("st.global.b32 [%rd3], %r9;")[0]
    assert len(set(found.tolist())) > 32
