"""Fourth link: the kernels as they are compiled for a GPU, executed by the emulator, against the oracle.

What the interpreter cannot show: the compiler's own work, barriers between warps, layouts, predicates, rounding as the
instructions have it, each byte that is touched. Every case runs under two orders of the warps and must find no race,
no access outside, no undefined byte and no byte left unwritten. Compiling takes most of the time, so cases share
variants; the slow ones repeat them for each type, tile, term and device.
"""

import math

import pytest
import torch

from difftrain_kernels.terms import PLAIN, Terms
from every_loss import arguments_of, inputs_of, value_and_gradients
from executed import run_clean
from kernel_terms import CELLS, WAYS, every_term, expected_of, in_slices, launch
from kernel_terms import assert_near_oracle as assert_found_near_oracle
from loss_problems import MODES, assert_near_oracle, loss_and_gradient, random_problem, strided_copy

# numpy warns where hardware computes inf and NaN in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INF, NAN = math.inf, math.nan
MASK_ID = 9
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check_call(
    vocab_size, dtype=BF16, *, mode="in backward", reduction="mean", upstream=0.5, n=3, padding=0, phase=0,
    label_dtype=torch.int64, pk_on_device=False, **options,
):  # fmt: skip
    """The public call, forward and backward, on rows that lie ``vocab_size + padding`` apart."""
    rows, y, x = random_problem(n, vocab_size, min(MASK_ID, vocab_size - 1), dtype, seed=vocab_size)
    logits, _ = strided_copy(rows, padding=padding, phase=phase)
    stated, overwrite = MODES[mode]
    given = torch.full((n,) if reduction == "none" else (), upstream)
    if reduction == "none":
        given[::2] = 0.5  # so that some rows meet the statement and some do not
    mask_id = min(MASK_ID, vocab_size - 1)
    found = run_clean(
        loss_and_gradient, logits=logits, y=y.to(label_dtype), x=x.to(label_dtype), mask_id=mask_id,
        pk=torch.tensor(0.25) if pk_on_device else 0.25, reduction=reduction, upstream=given, upstream_scale=stated,
        overwrite_logits=overwrite, overwrites=("logits",) if overwrite else (), **options,
    )  # fmt: skip
    expected = expected_of(rows, y, x, mask_id, 0.25, 0.5, PLAIN)
    assert_near_oracle(*found.result, expected, given, reduction, stated=stated if overwrite else None)


def check_launches(
    rows, y, x, terms=PLAIN, *, way=WAYS[0], pk=0.25, pm=0.5, padding=0, phase=0, mask_id=MASK_ID, **options
):
    """The launchers alone, with what they leave of each row."""
    logits, _ = strided_copy(rows, padding=padding, phase=phase)
    is_over = way.endswith("over the logits")
    pk, pm = (1.0, 1.0) if terms.case_weights is not None else (pk, pm)
    found = run_clean(
        launch, logits=logits, y=y, x=x, mask_id=mask_id, pk=pk, pm=pm, terms=terms, way=way, upstream=0.5,
        divisor=4.0, overwrites=("logits",) if is_over else (), **options,
    )  # fmt: skip
    expected = expected_of(rows, y, x, mask_id, float(pk), float(pm), terms)
    assert_found_near_oracle(found.result, expected, rows, y, mask_id, terms, scale=0.125)


def hostile_problem(vocab_size, dtype):
    """Rows of ties, infinities, NaN and far offsets, and labels that are none."""
    rows, y, x = random_problem(10, vocab_size, MASK_ID, dtype, seed=5, tie_levels=1)
    y[:] = torch.tensor([3, MASK_ID, vocab_size - 1, 0, 3, 4, 7, 5, vocab_size, -7])
    x[:4] = MASK_ID
    rows[0, 3] = rows[0, MASK_ID] = rows[0].max() + 1  # the target comes first of two maxima
    rows[1, MASK_ID] = rows[1, vocab_size - 2] = rows[1].max() + 1  # [MASK] does
    rows[2, 1:] = -INF
    rows[3] = -INF
    rows[4, 3] = INF
    rows[5, vocab_size // 2] = rows[5, vocab_size - 1] = NAN
    rows[6] = NAN
    rows[7] += 3e4
    return rows, y, x


def cut_rows(vocab_size, dtype=BF16):
    """All but the last position of two sequences, (2, 3, V): a view whose rows are not evenly spaced."""
    whole, _, _ = random_problem(8, vocab_size, MASK_ID, dtype, seed=3)
    rows = whole.view(2, 4, vocab_size)[:, :-1]
    _, y, x = random_problem(6, vocab_size, MASK_ID, dtype, seed=4)
    return rows, y, x


def check_cut(vocab_size, dtype, way, **options):
    rows, y, x = cut_rows(vocab_size, dtype)
    copy = rows.reshape(-1, vocab_size).clone()
    weights = torch.tensor([[1.0, 2.0, 0.0, 9.0], [0.5, 1.5, 1.0, 9.0]])[:, :-1]
    terms = Terms(token_weights=weights)
    is_over = way.endswith("over the logits")
    found = run_clean(
        launch, logits=rows, y=y, x=x, mask_id=MASK_ID, pk=0.25, pm=0.5, terms=terms, way=way, upstream=0.5,
        divisor=4.0, overwrites=("logits",) if is_over else (), **options,
    )  # fmt: skip
    expected = expected_of(copy, y, x, MASK_ID, 0.25, 0.5, terms)
    assert_found_near_oracle(found.result, expected, copy, y, MASK_ID, terms, scale=0.125)


def check_slices(sizes, dtype=BF16, terms=PLAIN, n=4, **options):
    """The vocabulary in slices, the targets and [MASK] in whichever."""
    vocab_size = sum(sizes)
    rows, y, x = random_problem(n, vocab_size, MASK_ID, dtype, seed=6, tie_levels=4)
    y[:4] = torch.tensor([sizes[0], vocab_size - 1, MASK_ID, -1])[:n]
    rows[1, vocab_size - 1] = rows[1].max() + 1
    found = run_clean(
        in_slices, logits=rows, y=y, x=x, mask_id=MASK_ID, pk=0.25, pm=0.5, terms=terms, sizes=sizes,
        upstream=0.5, divisor=4.0, **options,
    )  # fmt: skip
    expected = expected_of(rows, y, x, MASK_ID, 0.25, 0.5, terms)
    assert_found_near_oracle(found.result, expected, rows, y, MASK_ID, terms, scale=0.125)


# Streamed rows: the tile of V from 4097 to 16384, its first V odd; a row holds one whole block, head and tail.

streamed = pytest.mark.xdist_group("executed, streamed")
small = pytest.mark.xdist_group("executed, small")


@streamed
@pytest.mark.parametrize("mode", MODES)
def test_streamed_rows_in_each_mode(mode):
    check_call(5000, mode=mode, upstream=0.5)
    check_call(5000, mode=mode, upstream=-0.3, seeds=(3,))


@streamed
def test_hostile_streamed_rows():
    rows, y, x = hostile_problem(5000, BF16)
    check_launches(rows, y, x, way=WAYS[0])
    check_launches(rows, y, x, way=WAYS[3])
    check_launches(rows, y, x, Terms(softcap=15.0), way=WAYS[0])


@streamed
def test_streamed_rows_with_approximations_a_unit_off():
    check_call(5000, nudge=1)


@streamed
def test_streamed_rows_off_a_16_byte_boundary():
    check_call(4097, mode="stated", reduction="none", upstream=-0.3)
    check_call(4097, mode="stated, over the logits", padding=5, phase=3)


@streamed
def test_streamed_rows_of_other_types_and_with_penalties_on_the_device():
    check_call(4100, FP32, mode="stated", label_dtype=torch.int32)
    check_call(5000, FP16, pk_on_device=True)


@streamed
def test_streamed_rows_with_every_term():
    rows, y, x = random_problem(3, 4101, MASK_ID, BF16, seed=8)
    check_launches(rows, y, x, every_term(3, "cpu"), way=WAYS[0])


@streamed
def test_streamed_rows_with_weights_and_scale_on_the_device():
    rows, y, x = random_problem(3, 5000, MASK_ID, BF16, seed=8)
    terms = Terms(
        token_weights=torch.tensor([1.0, 0.0, 2.0]).bfloat16(), case_weights=torch.tensor(CELLS).view(3, 3),
        logit_scale=torch.tensor(0.5),
    )  # fmt: skip
    check_launches(rows, y, x, terms, way=WAYS[3])


@streamed
def test_streamed_rows_with_gaps_between_sequences():
    check_cut(4104, BF16, WAYS[3])


@streamed
def test_slices_of_which_some_are_streamed():
    check_slices([4200, 70])


# Small rows.


@small
@pytest.mark.parametrize("mode", MODES)
def test_small_rows_in_each_mode(mode):
    check_call(66, mode=mode, upstream=0.5, n=9)
    check_call(66, mode=mode, upstream=-0.3, n=9, seeds=(3,))


@small
def test_hostile_small_rows():
    rows, y, x = hostile_problem(66, BF16)
    check_launches(rows, y, x, way=WAYS[0])
    check_launches(rows, y, x, way=WAYS[3])
    check_launches(rows, y, x, Terms(softcap=15.0), way=WAYS[0])


@small
def test_small_rows_of_one_word():
    check_call(1, FP32, mode="stated", n=5, pk_on_device=True)


@small
def test_small_rows_with_every_term():
    rows, y, x = random_problem(5, 66, MASK_ID, BF16, seed=8)
    check_launches(rows, y, x, every_term(5, "cpu"), way=WAYS[0])


@small
def test_slices_of_small_rows():
    check_slices([30, 1, 35], n=130)


@small
def test_many_rows_in_the_table_of_cases():
    # Several blocks of rows, the last of them not full.
    rows, y, x = random_problem(600, 10, MASK_ID, BF16, seed=8)
    check_launches(rows, y, x, way=WAYS[2], seeds=(1,))


# The rest of what the public calls can choose.

TERMS = {
    "token weights": Terms(token_weights=torch.tensor([1.0, 0.0, 2.0])),
    "token weights of a byte": Terms(token_weights=torch.tensor([True, False, True])),
    "token weights for all": Terms(token_weights=torch.tensor([0.5]).expand(3)),
    "case weights": Terms(case_weights=CELLS),
    "case weights on the device": Terms(case_weights=torch.tensor(CELLS).view(3, 3)),
    "gate": Terms(gate="probability"),
    "gate and case weights": Terms(gate="probability", case_weights=CELLS),
    "soft cap": Terms(softcap=15.0),
    "smoothing": Terms(label_smoothing=0.1),
    "z-loss": Terms(z_loss=0.5),
    "forbidden [MASK]": Terms(forbid_mask=True),
    "scale": Terms(logit_scale=0.375),
    "scale on the device": Terms(logit_scale=torch.tensor(2.5)),
    "scale and cap": Terms(logit_scale=torch.tensor(2.5), softcap=15.0),
    "rows": Terms(rows=True),
    "entropy": Terms(rows=True, entropy=True),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("vocab_size", [66, 4097, 5000])
def test_each_term(name, vocab_size):
    rows, y, x = random_problem(3, vocab_size, MASK_ID, BF16, seed=8)
    for way in (WAYS[0], WAYS[3]):
        check_launches(rows, y, x, TERMS[name], way=way)


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_each_term_in_slices(name):
    check_slices([40, 26], terms=TERMS[name], n=3)
    check_slices([4200, 4097], terms=TERMS[name], n=3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    "vocab_size",
    [1, 2, 16, 66, 128, 1000, 4095, 4096, 4097, 8192, 16384, 16385, 32000, 50257, 50304, 65537],
)
def test_each_type_and_tile(vocab_size, dtype, mode):
    check_call(vocab_size, dtype, mode=mode, reduction="sum", n=2)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("padding", [0, 1, 8])
@pytest.mark.parametrize("phase", [0, 1, 8])
@pytest.mark.parametrize("vocab_size", [66, 4097, 5000])
def test_rows_that_lie_anywhere(vocab_size, phase, padding, reduction):
    for mode in ("in backward", "stated, over the logits"):
        check_call(vocab_size, mode=mode, reduction=reduction, padding=padding, phase=phase, upstream=-0.3)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_other_devices(capability, dtype):
    for vocab_size in (66, 4097, 5000):
        rows, y, x = hostile_problem(vocab_size, dtype)
        for way in (WAYS[0], WAYS[3]):
            check_launches(rows, y, x, way=way, capability=capability)
    check_slices([4200, 70], dtype, capability=capability)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("vocab_size", [66, 4097, 5000])
def test_hostile_rows_of_other_types(vocab_size, dtype):
    rows, y, x = hostile_problem(vocab_size, dtype)
    for way in WAYS:
        check_launches(rows, y, x, way=way, nudge=1)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vocab_size", [66, 4097, 4104, 5000])
def test_gaps_between_sequences_in_each_way(vocab_size, way):
    check_cut(vocab_size, BF16, way)
    check_cut(vocab_size, FP32, way)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [[30, 1, 35], [4200, 4097], [4097, 4200, 5], [5, 4200], [66] * 5, [50304 // 8] * 2]
)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_slices_of_each_size(sizes, dtype):
    check_slices(sizes, dtype)
    check_slices(sizes, dtype, terms=every_term(4, "cpu"))


@pytest.mark.slow
def test_the_linear_loss_in_chunks():
    way = ("linear", "triton")
    # Chunks whose labels begin at any 8-byte address.
    arguments = arguments_of(way) | {"chunk_tokens": 7}
    for name in inputs_of(way):
        arguments[name].requires_grad_()
    found = run_clean(value_and_gradients, way=way, arguments=arguments).result
    expected = value_and_gradients(("linear", "reference"), arguments)
    torch.testing.assert_close(found[0], expected[0], rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1].counts, expected[1].counts)
