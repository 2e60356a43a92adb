"""Faults seeded in the compiled kernels, each of which the emulator or the oracle must find."""

import math

import pytest
import torch

from difftrain_kernels.terms import PLAIN
from executed import Change, execute
from kernel_terms import WAYS, assert_near_oracle, expected_of, launch
from loss_problems import random_problem, strided_copy
from ptx.program import Fault

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.xdist_group("executed, streamed"),
]
MASK_ID = 9
STREAMED, SMALL = 5000, 66
WIDE = 17000  # several warps to a row
BARRIER = r"\bbar\.sync\s+0;"
# Accesses to rows, of an element or of several; numbers of a row are of 32 bits.
ROW_ACCESS = r"\.global\S*(?:\.b16|\.v\d\.b\d\d) "
ROW_STORE = rf"(@%p\d+ st{ROW_ACCESS}\[ %rd\d+ \+ )0"
SCALAR_STORE = r"^.*\bst\.global\.b32 .*$"


def tied_problem(vocab_size):
    """Rows whose maxima are several, of which the first decides; one with NaN, searched in another way; one ignored."""
    rows, y, x = random_problem(4, vocab_size, MASK_ID, torch.bfloat16, seed=5, tie_levels=1)
    y[:], x[:2] = torch.tensor([3, MASK_ID, vocab_size - 1, -1]), MASK_ID
    rows[0, 3] = rows[0, MASK_ID] = rows[0].max() + 1
    rows[1, MASK_ID] = rows[1, vocab_size - 2] = rows[1].max() + 1
    rows[2, vocab_size // 2] = rows[2, vocab_size - 1] = math.nan
    return rows, y, x


def findings(vocab_size, way, change):
    """What is found: kinds of fault, and whether the result is the oracle's."""
    rows, y, x = tied_problem(vocab_size)
    logits, _ = strided_copy(rows)
    over = ("logits",) if way.endswith("over the logits") else ()
    try:
        found = execute(
            launch, logits=logits, y=y, x=x, mask_id=MASK_ID, pk=0.25, pm=0.5, way=way, upstream=0.5,
            divisor=4.0, overwrites=over, change=change,
        )  # fmt: skip
    except Fault as fault:
        return {"misaligned" if str(fault).startswith("misaligned") else "outside"}
    kinds = {kind.split(":")[0] for _, kind, *_ in found.faults if not kind.startswith("equal store")}
    expected = expected_of(rows, y, x, MASK_ID, 0.25, 0.5, PLAIN)
    try:
        assert_near_oracle(found.result, expected, rows, y, MASK_ID, PLAIN, scale=0.125)
    except AssertionError:
        kinds.add("not the oracle's")
    return kinds


@pytest.mark.parametrize("vocab_size", [STREAMED, SMALL])
def test_nothing_is_found_without_a_fault(vocab_size):
    assert not findings(vocab_size, WAYS[3], None)


@pytest.mark.parametrize(
    ("vocab_size", "kernel", "pattern", "replacement", "which", "kinds"),
    [
        pytest.param(WIDE, "loss_and_gradient", BARRIER, "", 2, {"race"}, id="a barrier removed"),
        pytest.param(WIDE, "loss_and_gradient", BARRIER, "", -1, {"race"}, id="the last barrier removed"),
        pytest.param(SMALL, "small_loss_and_gradient", BARRIER, "", 0, {"race"}, id="a small row's barrier removed"),
        pytest.param(
            STREAMED, "loss_and_gradient", ROW_STORE, r"\g<1>2", 0, {"misaligned", "race", "not the oracle's"},
            id="an address off by one",
        ),
        pytest.param(
            SMALL, "small_loss_and_gradient", ROW_STORE, r"\g<1>2", 0, {"misaligned", "forbidden write", "not the oracle's"},
            id="a small row's address off by one",
        ),
        pytest.param(
            STREAMED, "loss_and_gradient", rf"@%p\d+ (st{ROW_ACCESS})", r"\1", 0,
            {"outside", "forbidden write", "race"},
            id="a store's mask dropped",
        ),
        pytest.param(
            STREAMED, "loss_and_gradient", rf"@%p\d+ (ld{ROW_ACCESS})", r"\1", -1, {"outside", "undefined read", "race"},
            id="a load's mask dropped",
        ),
        pytest.param(
            STREAMED, "loss_and_gradient", r"\bmin\.s32", "max.s32", None, {"not the oracle's"},
            id="the last of equal maxima wins",
        ),
        pytest.param(
            SMALL, "small_loss_and_gradient", SCALAR_STORE, "", -1, {"output not written"},
            id="an element of the statistics unwritten",
        ),
        pytest.param(
            STREAMED, "loss_and_gradient", r"(shfl\.sync\.bfly\.b32\s.*), 16, 31, -1;", r"\1, 8, 31, -1;", 1,
            {"not the oracle's"}, id="half of a warp left out of a sum",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_found(vocab_size, kernel, pattern, replacement, which, kinds):
    found = findings(vocab_size, WAYS[3], Change(f"_{kernel}_kernel", pattern, replacement, which))
    assert found & kinds, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab_size", "way", "guard"),
    [
        (STREAMED, WAYS[1], 0), (4097, WAYS[1], 0), (STREAMED, WAYS[3], -2), (4097, WAYS[3], -2), (SMALL, WAYS[3], -1),
    ],
)  # fmt: skip
def test_barriers_are_needed_but_for_the_guard_of_what_is_overwritten(vocab_size, way, guard):
    """The compiler's and our own: without any one of them there is a race, or the result is wrong.

    But for the one before a row is overwritten: what it guards, logits that all threads read, these terms have not,
    or they read them before a barrier that the compiler needs for sums.
    """
    name = "loss_and_gradient" if way == WAYS[3] else "gradient"
    kernel = f"_small_{name}_kernel" if vocab_size == SMALL else f"_{name}_kernel"
    which, missed = 0, []
    while True:
        try:
            found = findings(vocab_size, way, Change(kernel, BARRIER, "", which))
        except IndexError:
            break
        missed += [] if found else [which]
        which += 1
    assert which > 0
    assert missed == [guard % which], f"{missed} of {which}"
