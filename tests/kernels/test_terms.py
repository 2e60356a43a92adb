"""Terms beyond the two penalties in the reference and in the losses around it, against the oracle in fp64."""

import math
import re

import numpy as np
import pytest
import torch

import term_problems
from difftrain_kernels import (
    diffusion_loss_reference,
    fused_diffusion_loss,
    fused_linear_diffusion_loss,
    sliced_reference,
)
from difftrain_kernels.reference import row_values, tabulate_cases
from difftrain_kernels.terms import make_terms
from term_problems import ALL, PAIRS, SINGLES, batch, check_rows, check_table, expected, options_of

MASK_ID = 6
NAMES = [*SINGLES, *PAIRS, *ALL]


def ids(names):
    return "+".join(names)


@pytest.mark.parametrize("names", NAMES, ids=ids)
def test_each_term_and_each_pair_is_what_the_oracle_says(names):
    logits, y, x = batch()
    options, y = options_of(names, y, MASK_ID)
    result, normalizer = expected(logits, y, x, MASK_ID, options)
    logits.requires_grad_()
    loss, cases, rows = diffusion_loss_reference(
        logits, y, x, MASK_ID, return_cases=True, return_rows=True, entropy=True, **options
    )
    assert loss.item() == pytest.approx(result.loss("mean", normalizer), rel=1e-12)
    loss.backward()
    divisor = normalizer or y.numel()
    np.testing.assert_allclose(
        logits.grad.reshape(y.numel(), -1), result.gradient / divisor, rtol=1e-11, atol=1e-14
    )
    check_table(cases, result, y.numel())
    check_rows(rows, result, y.shape)
    weights = {k: options[k] for k in ("pk", "pm", "case_weights") if k in options}
    assert cases.loss_at(**weights, normalizer=normalizer).item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("names", [*SINGLES, *ALL], ids=ids)
def test_sums_and_single_rows_too(names, reduction):
    names = tuple(n for n in names if n != "normalizer" or reduction == "sum")
    logits, y, x = batch(seed=1)
    options, y = options_of(names, y, MASK_ID)
    result, normalizer = expected(logits, y, x, MASK_ID, options)
    logits.requires_grad_()
    loss = fused_diffusion_loss(logits, y, x, MASK_ID, reduction=reduction, **options)
    upstream = torch.rand(loss.shape, dtype=loss.dtype)
    loss.backward(upstream)
    exact = result.loss("sum", normalizer) if reduction == "sum" else result.row_loss.reshape(y.shape)
    np.testing.assert_allclose(loss.detach(), exact, rtol=1e-12, atol=1e-15)
    if reduction == "sum":
        gradient = result.gradient * upstream.item() / (normalizer or 1)
    else:  # the gradient stands at the logits' rows, the upstream at the positions
        shift = options.get("shift", 0)
        moved = torch.nn.functional.pad(upstream[:, shift:], (0, shift)).reshape(-1, 1)
        gradient = result.gradient * moved.numpy()
    np.testing.assert_allclose(logits.grad.reshape(y.numel(), -1), gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("names", [*SINGLES, *ALL], ids=ids)
def test_the_linear_loss_is_that_of_its_logits(names, reduction, chunk_tokens):
    names = tuple(n for n in names if n != "normalizer" or reduction != "none")
    _, y, x = batch(seed=2)
    options, y = options_of(names, y, MASK_ID)
    generator = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((*y.shape, 4), (7, 4), (7,))
    ]
    results = []
    for loss_of in (
        lambda h, w, b: fused_diffusion_loss(
            h @ w.t() + b, y, x, MASK_ID, reduction=reduction, return_cases=True, return_rows=True, entropy=True,
            **options,
        ),
        lambda h, w, b: fused_linear_diffusion_loss(
            h, w, y, x, MASK_ID, bias=b, reduction=reduction, return_cases=True, return_rows=True, entropy=True,
            chunk_tokens=chunk_tokens, **options,
        ),
    ):  # fmt: skip
        leaves = [t.clone().requires_grad_() for t in tensors]
        loss, cases, rows = loss_of(*leaves)
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape)
        gradients = torch.autograd.grad(loss, leaves, upstream)
        shown = [rows.nll, rows.lse, rows.p_mask, rows.confidence, rows.entropy, rows.case]
        results.append([loss, *gradients, *shown, cases.to_vector()])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("sizes", [[3, 4], [6, 1], [2, 2, 3]], ids=str)
@pytest.mark.parametrize("names", [*SINGLES, *ALL], ids=ids)
def test_slices_of_the_vocabulary_make_the_whole_rows(names, sizes):
    """What processes exchange, without processes: test_parallel_loss.py has those."""
    names = tuple(n for n in names if n not in ("shift", "normalizer"))  # outside what is exchanged
    logits, y, x = batch(seed=4)
    options, y = options_of(names, y, MASK_ID)
    result, _ = expected(logits, y, x, MASK_ID, options)
    pk, pm = options.pop("pk", 1.0), options.pop("pm", 1.0)
    defaults = {"token_weights": None, "case_weights": None, "gate": "argmax", "softcap": None}
    defaults |= {"label_smoothing": 0.0, "z_loss": 0.0, "forbid_mask": False, "logit_scale": None}
    terms = make_terms(y.shape, y.device, rows=True, entropy=True, **defaults | options)
    flat, (y_N, x_N) = logits.reshape(y.numel(), -1), (t.reshape(-1) for t in (y, x))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    slices = [flat[:, start : start + size] for start, size in zip(starts, sizes, strict=True)]
    messages = torch.stack(
        [
            sliced_reference.describe_slice(part, y_N, MASK_ID, start=start, terms=terms)
            for part, start in zip(slices, starts, strict=True)
        ]
    )
    assert messages.shape[1] == sliced_reference.message_size(terms)
    labels = (y_N, x_N, MASK_ID, pk, pm, -1)
    statistics = sliced_reference.combine_slices(messages, *labels, vocab_size=7, terms=terms)
    np.testing.assert_allclose(statistics[1][0], result.row_loss, rtol=1e-11, atol=1e-13)
    upstream = torch.rand(y.numel(), dtype=torch.float64)
    gradient = torch.cat(
        [
            sliced_reference.slice_gradients(
                part, y_N - start, statistics, upstream, 2.0,
                mask_id=MASK_ID - start, vocab_size=7, terms=terms,
            )
            for part, start in zip(slices, starts, strict=True)
        ],
        dim=1,
    )  # fmt: skip
    np.testing.assert_allclose(
        gradient, result.gradient * upstream[:, None].numpy() / 2, rtol=1e-10, atol=1e-13
    )
    scores = sliced_reference.sliced_scores(statistics, terms)
    check_table(tabulate_cases(scores, terms), result, y.numel(), rtol=1e-11)
    _, values = row_values(scores, terms)
    for name, value in values.items():
        np.testing.assert_allclose(value, getattr(result, name), rtol=1e-10, atol=1e-12, err_msg=name)


# Single facts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(term_problems.B, 1), (term_problems.T,), (), (1, term_problems.T)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_token_weights_of_any_shape_and_real_dtype_are_their_expansion(shape, dtype):
    logits, y, x = batch()
    weights = (torch.rand(shape) * 3).to(dtype)
    plain = weights.expand(y.shape).double().contiguous()
    losses = [
        fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, token_weights=w) for w in (weights, plain)
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    head = torch.randn(7, 7, dtype=torch.float64)
    losses = [
        fused_linear_diffusion_loss(logits, head, y, x, MASK_ID, 0.25, 0.5, token_weights=w, chunk_tokens=4)
        for w in (weights, plain)
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("hostile", [math.nan, math.inf, -math.inf])
def test_a_row_of_weight_0_is_not_looked_at(hostile):
    logits, y, x = batch()
    logits[1] = hostile
    weights = torch.ones(y.shape)
    weights[1] = 0
    logits.requires_grad_()
    loss, cases, rows = diffusion_loss_reference(
        logits, y, x, MASK_ID, 0.25, 0.5, token_weights=weights, z_loss=0.1, label_smoothing=0.1,
        return_cases=True, return_rows=True, entropy=True,
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert not logits.grad[1].any()
    assert (rows.case[1] == -1).all()
    assert not torch.stack([rows.nll, rows.lse, rows.p_mask, rows.confidence, rows.entropy])[:, 1].any()
    assert cases.counts.sum() == (y[[0, 2]] != -1).sum()


@pytest.mark.parametrize(
    ("shape", "weights_shape"),
    [((4, 0), (4, 0)), ((4, 0), (4, 1)), ((4, 0), ()), ((0, 4), (0, 4)), ((0, 4), (4,)), ((0,), (0,))],
    ids=str,
)
def test_token_weights_of_no_position_make_0(shape, weights_shape):
    y = torch.zeros(shape, dtype=torch.int64)
    hidden = torch.zeros(*shape, 3, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    loss = fused_linear_diffusion_loss(
        hidden, head, y, y, MASK_ID, reduction="sum", token_weights=torch.ones(weights_shape)
    )
    gradients = torch.autograd.grad(loss, [hidden, head])
    assert loss == 0
    assert [g.shape for g in gradients] == [hidden.shape, head.shape]
    assert not gradients[1].any()


def test_a_hidden_state_of_weight_0_may_hold_nan():
    hidden, y, x = batch()
    hidden[1] = math.nan
    weights = torch.ones(y.shape)
    weights[1] = 0
    head = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    hidden.requires_grad_()
    loss = fused_linear_diffusion_loss(hidden, head, y, x, MASK_ID, 0.25, 0.5, token_weights=weights)
    gradients = torch.autograd.grad(loss, [hidden, head])
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][1].any()


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_no_number_shows_in_its_own_row(weight):
    logits, y, x = batch()
    weights = torch.ones(y.shape)
    weights[2, 3] = weight
    rows = fused_diffusion_loss(logits, y, x, MASK_ID, token_weights=weights, reduction="none")
    assert not rows[2, 3].isfinite()
    assert rows.isfinite().sum() == rows.numel() - 1


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("loss_name", ["logits", "linear"])
def test_a_normalizer_of_0_gives_loss_0_and_gradients_of_0(loss_name, kind):
    logits, y, x = batch()
    head = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    logits.requires_grad_()
    normalizer = 0.0 if kind == "number" else torch.zeros((), dtype=torch.int64)
    if loss_name == "logits":
        loss = fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5, normalizer=normalizer)
        (gradient,) = torch.autograd.grad(loss, [logits])
    else:
        loss = fused_linear_diffusion_loss(logits, head, y, x, MASK_ID, 0.25, 0.5, normalizer=normalizer)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [logits, head])])
    assert loss.item() == 0
    assert not gradient.any()
    _, cases = diffusion_loss_reference(logits, y, x, MASK_ID, 0.25, 0.5, return_cases=True)
    assert cases.loss_at(0.25, 0.5, normalizer=normalizer).item() == 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"pk": -1}, ValueError, "pk must be finite and >= 0, got -1"),
        (
            {"pk": 0.5, "case_weights": [[1] * 3] * 3},
            ValueError,
            "pk and pm must be None where case_weights",
        ),
        ({"case_weights": [[1, 1]] * 3}, ValueError, "case_weights must have shape (3, 3)"),
        (
            {"case_weights": torch.ones(4, 4)},
            ValueError,
            "case_weights must be a floating-point tensor of shape (3, 3)",
        ),
        ({"case_weights": [1, 2, 3]}, TypeError, "case_weights must be three rows of three numbers"),
        ({"normalizer": "3"}, TypeError, "normalizer must be a number, got str"),
    ],
    ids=str,
)
def test_the_table_refuses_what_the_losses_refuse(options, kind, message):
    logits, y, x = batch()
    _, cases = fused_diffusion_loss(logits, y, x, MASK_ID, return_cases=True)
    with pytest.raises(kind, match=re.escape(message)):
        cases.loss_at(**options)


def test_a_batch_in_which_nothing_counts_gives_0_over_its_own_count():
    logits, y, x = batch()
    y = torch.full_like(y, -1)
    logits.requires_grad_()
    count = (y != -1).sum()
    loss = fused_diffusion_loss(logits, y, x, MASK_ID, reduction="sum", normalizer=count)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_normalizer_of_all_positions_is_the_mean():
    logits, y, x = batch(dtype=torch.float32)
    mean = fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5)
    for normalizer in (y.numel(), torch.tensor(float(y.numel()))):
        for reduction in ("mean", "sum"):
            other = fused_diffusion_loss(
                logits, y, x, MASK_ID, 0.25, 0.5, normalizer=normalizer, reduction=reduction
            )
            torch.testing.assert_close(other, mean, rtol=1e-6, atol=0)


def test_two_penalties_are_two_of_the_nine_weights():
    logits, y, x = batch()
    nine = [[0.25, 1, 1], [0.5, 1, 1], [1, 1, 1]]
    plain = fused_diffusion_loss(logits, y, x, MASK_ID, 0.25, 0.5)
    for weights in (nine, np.array(nine), torch.tensor(nine, dtype=torch.float64)):
        assert fused_diffusion_loss(logits, y, x, MASK_ID, case_weights=weights) == plain
    assert fused_diffusion_loss(logits, y, x, MASK_ID) == fused_diffusion_loss(
        logits, y, x, MASK_ID, 1.0, 1.0
    )
    assert fused_diffusion_loss(logits, y, x, MASK_ID, pm=0.5) == fused_diffusion_loss(
        logits, y, x, MASK_ID, 1.0, 0.5
    )


def test_a_shift_beyond_the_sequence_leaves_nothing_that_counts():
    logits, y, x = batch()
    loss, cases = fused_diffusion_loss(logits, y, x, MASK_ID, shift=term_problems.T + 1, return_cases=True)
    assert loss.item() == 0
    assert cases.counts.sum() == 0


def test_a_shift_of_one_is_the_eager_shift_of_next_token_models():
    logits, y, x = batch()
    shifted = fused_diffusion_loss(logits, y, x, MASK_ID, shift=1, reduction="sum")
    eager = fused_diffusion_loss(logits[:, :-1], y[:, 1:], x[:, 1:], MASK_ID, reduction="sum")
    torch.testing.assert_close(shifted, eager, rtol=1e-12, atol=0)


def test_softcap_smoothing_and_scale_are_torchs():
    logits, y, x = batch(dtype=torch.float32)
    y = torch.where(y < 0, -100, y)
    bent = 3.0 * torch.tanh(logits * 0.7 / 3.0)
    eager = torch.nn.functional.cross_entropy(
        bent.flatten(0, 1), y.flatten(), label_smoothing=0.1, reduction="sum"
    )
    ours = fused_diffusion_loss(
        logits, y, x, MASK_ID, softcap=3.0, logit_scale=0.7, label_smoothing=0.1, reduction="sum", ignore_index=-100
    )  # fmt: skip
    torch.testing.assert_close(ours, eager, rtol=1e-6, atol=0)


def test_hidden_states_of_a_slice_of_sequences_are_read_in_place():
    """``hidden[:, :-1]`` is no evenly spaced (N, D): only a chunk of it may be copied."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    _, y, x = batch()
    views = []
    for states in (hidden[:, :-1], hidden[:, :-1].contiguous()):
        loss = fused_linear_diffusion_loss(states, head, y, x, MASK_ID, 0.25, 0.5, chunk_tokens=4)
        views.append((loss, *torch.autograd.grad(loss, [hidden])))
    for in_place, copied in zip(*views, strict=True):
        torch.testing.assert_close(in_place, copied, rtol=1e-12, atol=0)


GOOD = {"pk": None, "pm": None}
BAD = [
    ({"pk": 0.5, "case_weights": [[1] * 3] * 3}, ValueError, "pk and pm must be None where case_weights"),
    ({"case_weights": [[1, 1], [1, 1]]}, ValueError, "case_weights must have shape (3, 3)"),
    ({"case_weights": 3.0}, TypeError, "case_weights must be three rows of three numbers"),
    ({"case_weights": [[-1, 1, 1]] * 3}, ValueError, "case_weights[0][0] must be finite and >= 0.0, got -1"),
    ({"case_weights": torch.ones(9)}, ValueError, "case_weights must be a floating-point tensor of shape (3, 3)"),
    ({"gate": "softmax"}, ValueError, "gate must be one of argmax, probability"),
    ({"token_weights": 2.0}, TypeError, "token_weights must be a torch.Tensor, got float"),
    ({"token_weights": torch.ones(4)}, ValueError, "token_weights must broadcast to y's shape (3, 5), got (4,)"),
    ({"token_weights": torch.ones(2, 3, 5)}, ValueError, "token_weights must broadcast to y's shape (3, 5)"),
    ({"token_weights": torch.ones(5, requires_grad=True)}, ValueError, "token_weights must not require a gradient"),
    ({"token_weights": torch.ones(5, dtype=torch.complex64)}, ValueError, "token_weights must have a real dtype"),
    ({"softcap": 0.0}, ValueError, "softcap must be finite and > 0.0, got 0.0"),
    ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be finite and >= 0.0 and < 1.0, got 1.0"),
    ({"z_loss": math.nan}, ValueError, "z_loss must be finite and >= 0.0, got nan"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale must be finite and > 0.0, got -1.0"),
    ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale must be a floating-point tensor of no dimension"),
    ({"logit_scale": torch.ones((), requires_grad=True)}, ValueError, "logit_scale must not require a gradient"),
    ({"normalizer": -1.0}, ValueError, "normalizer must be finite and >= 0.0, got -1.0"),
    ({"normalizer": torch.ones(2)}, ValueError, "normalizer must be a 0-d real tensor"),
    ({"normalizer": torch.ones((), requires_grad=True)}, ValueError, "normalizer must not require a gradient"),
    ({"forbid_mask": "no"}, TypeError, "forbid_mask must be True or False, got no"),
    ({"normalizer": 2.0, "reduction": "none"}, ValueError, 'normalizer must be None for reduction "none"'),
    ({"entropy": True}, ValueError, "entropy must come with return_rows"),
    ({"shift": -1}, ValueError, "shift must be >= 0"),
    ({"shift": 0.5}, TypeError, "shift must be an int, got float"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_an_option_that_does_not_fit_is_named(options, kind, message):
    logits, y, x = batch()
    head = torch.randn(7, 7, dtype=torch.float64)
    for call in (
        lambda: fused_diffusion_loss(logits, y, x, MASK_ID, **options),
        lambda: fused_linear_diffusion_loss(logits, head, y, x, MASK_ID, **options),
        lambda: diffusion_loss_reference(logits, y, x, MASK_ID, **options),
    ):
        with pytest.raises(kind) as raised:
            call()
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_labels_are_checked_where_they_count_and_named_where_the_user_has_them():
    logits, y, x = batch()
    y[y == MASK_ID] = 0
    y[2, 3] = MASK_ID
    weights = torch.ones(y.shape)
    fused_diffusion_loss(logits, y, x, MASK_ID, check_labels=True)
    for shift in (0, 1):
        with pytest.raises(ValueError, match=r"without 6, which is forbidden.*got 6 at position \(2, 3\)"):
            fused_diffusion_loss(logits, y, x, MASK_ID, forbid_mask=True, check_labels=True, shift=shift)
    weights[2, 3] = 0
    fused_diffusion_loss(logits, y, x, MASK_ID, forbid_mask=True, check_labels=True, token_weights=weights)
