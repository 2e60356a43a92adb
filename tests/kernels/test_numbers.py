"""Numbers that a user passes: one rule for every loss, and an integer never wraps."""

import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from difftrain_kernels import fused_diffusion_loss, fused_linear_diffusion_loss
from every_loss import (
    EVERY_LOSS,
    IMPLS,
    MASK_ID,
    N,
    V,
    arguments_of,
    assert_equal,
    call,
    value_and_gradients,
)

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore:(divide|invalid):RuntimeWarning"),  # of the interpreter, about inf
]

QUARTERS = [
    Fraction(1, 4),
    Decimal("0.25"),
    np.float16(0.25),
    np.float32(0.25),
    np.float64(0.25),
    np.longdouble(0.25),
    np.array(0.25),
    np.array(0.25, dtype=np.float16),
]
WHOLE = [
    1,
    True,
    np.bool_(True),
    np.int8(1),
    np.uint8(1),
    np.int64(1),
    np.uint64(1),
    np.array(1),
    Decimal(1),
]
TENSORS = [
    torch.tensor(0.25, requires_grad=True),
    torch.tensor(0.25, dtype=torch.float64),
    torch.tensor(0.25, dtype=torch.bfloat16),
    torch.tensor([0.5, 0.25])[1],
    torch.nn.Parameter(torch.tensor(0.25)),
]


def kind_of(value):
    shape = "array of " if isinstance(value, np.ndarray) else ""
    return f"{shape}{getattr(value, 'dtype', type(value).__name__)}"


# Penalties -----------------------------------------------------------------------------------------


@EVERY_LOSS
@pytest.mark.parametrize("name", ["pk", "pm"])
def test_a_real_number_of_any_type_is_its_float(way, name):
    arguments = arguments_of(way)
    expected = {number: call(way, arguments | {name: number}) for number in (0.25, 1.0)}
    assert expected[0.25] != expected[1.0]
    for number in QUARTERS + WHOLE:
        found = call(way, arguments | {name: number})
        assert torch.equal(found, expected[float(number)]), kind_of(number)


@EVERY_LOSS
def test_a_penalty_in_a_tensor_of_any_float_dtype_counts_and_gets_no_gradient(way, device):
    arguments = arguments_of(way, device)
    for name in ("pk", "pm"):
        expected = call(way, arguments | {name: 0.25})
        for tensor in TENSORS:
            leaf = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
            found = call(way, arguments | {name: leaf})
            assert torch.equal(found, expected), kind_of(tensor)
            assert not found.requires_grad


@EVERY_LOSS
def test_a_penalty_that_is_no_real_number_is_refused_in_one_line(way):
    arguments = arguments_of(way)
    wrong = [
        ("0.25", TypeError, "a number or a 0-d tensor, got str"),
        (b"1", TypeError, "a number or a 0-d tensor, got bytes"),
        (0.25j, TypeError, "a number or a 0-d tensor, got complex"),
        (np.complex64(0.25), TypeError, "a number or a 0-d tensor, got complex64"),
        (np.array([0.25]), TypeError, "a number or a 0-d tensor, got ndarray"),
        (np.array("0.25"), TypeError, "a number or a 0-d tensor, got ndarray"),
        (np.datetime64(1, "D"), TypeError, "a number or a 0-d tensor, got datetime64"),
        ([0.25], TypeError, "a number or a 0-d tensor, got list"),
        (
            torch.tensor([0.25]),
            ValueError,
            "a 0-d floating-point tensor, got shape (1,) and dtype torch.fl",
        ),
        (torch.tensor(1), ValueError, "a 0-d floating-point tensor, got shape () and dtype torch.int64"),
        (torch.tensor(True), ValueError, "a 0-d floating-point tensor, got shape () and dtype torch.bool"),
        (
            torch.tensor(1j),
            ValueError,
            "a 0-d floating-point tensor, got shape () and dtype torch.complex64",
        ),
        (torch.ones((), device="meta"), ValueError, "on device cpu, got meta"),
        (Fraction(-1, 4), ValueError, "finite and >= 0, got -1/4"),
        (Decimal("sNaN"), ValueError, "finite and >= 0, got sNaN"),
        (Decimal("1e400"), ValueError, "finite and >= 0, got 1E+400"),
        (np.float16("inf"), ValueError, "finite and >= 0, got inf"),
        (np.longdouble("1e400"), ValueError, "finite and >= 0, got 1e+400"),
        (Fraction(10**400), ValueError, "finite and >= 0, got 1000"),
        (10**5000, ValueError, "finite and >= 0, got a int of thousands of digits"),
        (1e39, ValueError, "finite and >= 0, got 1e+39"),
    ]
    for name in ("pk", "pm"):
        for value, error, message in wrong:
            with pytest.raises(error, match=re.escape(f"{name} must be {message}")) as caught:
                call(way, arguments | {name: value})
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["logits", "linear"])
def test_the_stated_upstream_gradient_is_a_number_by_the_same_rule(name):
    for impl in IMPLS:
        way = (name, impl)
        arguments = arguments_of(way)
        inputs = "logits" if name == "logits" else "hidden"
        arguments[inputs].requires_grad_()
        expected = value_and_gradients(way, arguments, torch.tensor(0.25), upstream_scale=0.25)
        for number in QUARTERS:
            found = value_and_gradients(way, arguments, torch.tensor(0.25), upstream_scale=number)
            assert_equal(found, expected)
        for wrong, shown in (("0.25", "str"), (torch.tensor(0.25), "Tensor"), (0.25j, "complex")):
            with pytest.raises(TypeError, match=f"upstream_scale must be a number or None, got {shown}"):
                call(way, arguments, upstream_scale=wrong)


def test_the_tables_loss_takes_penalties_by_the_same_rule():
    table = call(("logits", "reference"), arguments_of(("logits", "reference")), return_cases=True)[1]
    for number in QUARTERS:
        assert torch.equal(table.loss_at(number, number), table.loss_at(0.25, 0.25))
    with pytest.raises(TypeError, match="pm must be a number or a 0-d tensor, got str"):
        table.loss_at(0.25, "0.25")


def test_a_budget_of_memory_in_half_precision_does_not_overflow():
    way = ("linear", "reference")
    arguments = arguments_of(way) | {"chunk_tokens": None}
    for mib in (np.float16(300), Fraction(1, 1000), Decimal("0.5")):
        assert torch.equal(call(way, arguments, workspace_mib=mib), call(way, arguments))


# Integers ------------------------------------------------------------------------------------------


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integers_of_numpy_are_ints(way, dtype):
    arguments = arguments_of(way)
    arguments |= {name: arguments[name].clamp(min=0).to(dtype) for name in ("y", "x")}
    expected = call(way, arguments, ignore_index=3, reduction="none")
    for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        given = arguments | {"mask_id": kind(MASK_ID), "ignore_index": kind(3)}
        if way[0] == "linear":
            given |= {"chunk_tokens": kind(10)}
        assert torch.equal(call(way, given, reduction="none"), expected), kind


def test_chunks_counted_in_bytes_reach_beyond_the_byte():
    way = ("linear", "reference")
    arguments = arguments_of(way)
    for name in ("hidden", "y", "x"):
        arguments[name] = torch.cat([arguments[name]] * 20)
    arguments["chunk_tokens"] = np.uint8(200)
    assert torch.isfinite(call(way, arguments))


@EVERY_LOSS
def test_an_ignore_index_beyond_the_labels_dtype_never_wraps(way):
    arguments = arguments_of(way)
    arguments |= {name: arguments[name].to(torch.int32) for name in ("y", "x")}
    assert (arguments["y"] == -1).any()
    for index in (2**32 - 1, 2**31, -(2**31) - 1, 2**40):
        message = f"ignore_index must fit y's dtype torch.int32, got {index}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call(way, arguments, ignore_index=index)
    # In 64 bits it is a label like another one: nothing is ignored, and -1 is no label.
    wide = arguments | {name: arguments[name].long() for name in ("y", "x")}
    rows = call(way, wide, ignore_index=2**32 - 1, reduction="none")
    assert torch.equal(rows.isnan(), wide["y"] == -1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index", [2**31 - 1, -(2**31)])
def test_the_ends_of_the_labels_dtype_are_ignored(impl, index):
    for way in (("logits", impl), ("linear", impl), ("parallel", impl)):
        arguments = arguments_of(way)
        expected = call(way, arguments, reduction="none")
        y = torch.where(arguments["y"] == -1, index, arguments["y"]).to(torch.int32)
        found = call(way, arguments | {"y": y}, ignore_index=index, reduction="none", check_labels=True)
        assert torch.equal(found, expected)


@EVERY_LOSS
def test_labels_are_int64_or_int32_and_no_other_integers(way):
    arguments = arguments_of(way)
    for name in ("y", "x"):
        for dtype in (
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.uint16,
            torch.uint32,
            torch.uint64,
            torch.bool,
        ):
            message = f"{name} must have dtype torch.int64 or torch.int32, got {dtype}"
            with pytest.raises(ValueError, match=f"^{message}$"):
                call(way, arguments | {name: arguments[name].clamp(min=0).to(dtype)})


@EVERY_LOSS
def test_an_integer_out_of_range_or_of_another_type_is_refused_in_one_line(way):
    arguments = arguments_of(way)
    wrong = [
        ({"mask_id": -1}, ValueError, f"mask_id must be in [0, {V}), got -1"),
        ({"mask_id": V}, ValueError, f"mask_id must be in [0, {V}), got {V}"),
        ({"mask_id": np.int8(-1)}, ValueError, f"mask_id must be in [0, {V}), got -1"),
        ({"mask_id": 2**32 + MASK_ID}, ValueError, f"mask_id must be in [0, {V}), got {2**32 + MASK_ID}"),
        ({"mask_id": True}, TypeError, "mask_id must be an int, got bool"),
        ({"mask_id": np.bool_(True)}, TypeError, "mask_id must be an int, got bool"),
        ({"mask_id": 8.0}, TypeError, "mask_id must be an int, got float"),
        ({"mask_id": torch.tensor(8)}, TypeError, "mask_id must be an int, got Tensor"),
        ({"ignore_index": False}, TypeError, "ignore_index must be an int, got bool"),
        (
            {"ignore_index": np.uint64(2**63)},
            ValueError,
            f"ignore_index must be a 64-bit integer, got {2**63}",
        ),
        (
            {"ignore_index": 10**5000},
            ValueError,
            "ignore_index must be a 64-bit integer, got a int of thous",
        ),
    ]
    if way[0] == "linear":
        wrong += [({"chunk_tokens": True}, TypeError, "chunk_tokens must be an int, got bool")]
        wrong += [({"workspace_mib": True}, TypeError, "workspace_mib must be a number, got bool")]
        wrong += [
            ({"workspace_mib": Decimal("Infinity")}, ValueError, "workspace_mib must be finite and > 0")
        ]
    if way[0] == "parallel":
        wrong += [
            ({"slice_sizes": [True]}, TypeError, "slice_sizes must be a sequence of 1 ints, got [True]"),
            ({"slice_sizes": torch.ones(2, 2)}, TypeError, "a sequence of 1 ints, got tensor([[1."),
        ]
    for changes, error, message in wrong:
        with pytest.raises(error, match=re.escape(message)) as caught:
            call(way, arguments | changes)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_vocabulary_that_32_bits_cannot_count_is_refused(impl):
    labels = torch.zeros(1, dtype=torch.int64, device="meta")
    logits = torch.empty(1, 2**31, device="meta")
    message = f"the vocabulary must have fewer than 2\\*\\*31 words, got {2**31}"
    with pytest.raises(ValueError, match=message):
        fused_diffusion_loss(logits, labels, labels, 0, 1.0, 1.0, impl=impl)
    hidden, weight = torch.empty(1, 1, device="meta"), torch.empty(2**31, 1, device="meta")
    with pytest.raises(ValueError, match=message):
        fused_linear_diffusion_loss(hidden, weight, labels, labels, 0, 1.0, 1.0, impl=impl)
    assert fused_diffusion_loss(logits[:, 1:], labels, labels, 0, 1.0, 1.0, impl=impl).is_meta


@pytest.mark.parametrize("value", [torch.ones(3, 4), np.ones((3, 4)), None, 1, "avg\nmean" * 100])
def test_a_choice_that_is_none_is_refused_in_one_short_line(value):
    arguments = arguments_of(("logits", "reference"))
    for name in ("reduction", "impl"):
        with pytest.raises(ValueError, match=f"^{name} must be one of ") as caught:
            fused_diffusion_loss(**arguments | {name: value})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


def test_the_problem_of_these_tests_uses_both_penalties():
    table = call(("logits", "reference"), arguments_of(("logits", "reference")), return_cases=True)[1]
    assert table.counts[0, 0] > 0
    assert table.counts[1, 0] > 0
    assert table.n_positions == N > table.counts.sum()
