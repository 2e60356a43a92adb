"""Wrong arguments of the loss: each gives one message that says expected and got."""

import math

import pytest
import torch

from difftrain_kernels import fused_diffusion_loss


def call(**changes):
    arguments = {
        "logits": torch.randn(4, 6, 9),
        "y": torch.zeros(4, 6, dtype=torch.int64),
        "x": torch.zeros(4, 6, dtype=torch.int64),
        "mask_id": 8,
        "pk": 0.25,
        "pm": 0.5,
    } | changes
    return fused_diffusion_loss(**arguments)


def labels(*shape, dtype=torch.int64, device=None):
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [[1.0]]}, TypeError, r"logits must be a torch.Tensor, got list"),
        ({"logits": labels(4, 6, 9)}, ValueError, r"logits must have dtype .*, got torch.int64"),
        ({"logits": torch.randn(())}, ValueError, r"logits must have shape \(..., V\) .*, got \(\)"),
        ({"logits": torch.randn(4, 6, 0)}, ValueError, r"V >= 1, got \(4, 6, 0\)"),
        ({"y": labels(4, 5)}, ValueError, r"y must have shape \(4, 6\), got \(4, 5\)"),
        ({"x": labels(24)}, ValueError, r"x must have shape \(4, 6\), got \(24,\)"),
        ({"x": None}, TypeError, r"x must be a torch.Tensor, got NoneType"),
        ({"y": torch.zeros(4, 6)}, ValueError, r"y must have dtype .*int64 .*, got torch.float32"),
        ({"y": labels(4, 6, dtype=torch.int16)}, ValueError, r"y must have dtype .*, got torch.int16"),
        ({"y": labels(4, 6, device="meta")}, ValueError, r"y must be on device cpu, got meta"),
        ({"mask_id": 9}, ValueError, r"mask_id must be in \[0, 9\), got 9"),
        ({"mask_id": -1}, ValueError, r"mask_id must be in \[0, 9\), got -1"),
        ({"mask_id": 8.0}, TypeError, r"mask_id must be an int, got float"),
        ({"ignore_index": None}, TypeError, r"ignore_index must be an int, got NoneType"),
        ({"pk": -0.1}, ValueError, r"pk must be finite and >= 0, got -0.1"),
        ({"pk": 1e39}, ValueError, r"pk must be finite and >= 0, got 1e\+39"),
        ({"pk": 10**400}, ValueError, r"pk must be finite and >= 0, got 1000"),
        ({"ignore_index": 2**70}, ValueError, r"ignore_index must be a 64-bit integer"),
        (
            {"upstream_scale": 1e-50},
            ValueError,
            r"upstream_scale must be finite, not 0 and within fp32, got 1e-50",
        ),
        ({"upstream_scale": 0.0}, ValueError, r"upstream_scale must be finite, not 0"),
        ({"pm": math.nan}, ValueError, r"pm must be finite and >= 0, got nan"),
        ({"pm": "0.5"}, TypeError, r"pm must be a number or a 0-d tensor, got str"),
        ({"pk": torch.ones(2)}, ValueError, r"pk must be a 0-d .*, got shape \(2,\)"),
        ({"pk": torch.ones((), dtype=torch.int64)}, ValueError, r"pk must be .*, got .* torch.int64"),
        ({"pk": torch.ones((), device="meta")}, ValueError, r"pk must be on device cpu, got meta"),
        ({"reduction": "avg"}, ValueError, r"reduction must be one of mean, sum, none, got 'avg'"),
        ({"impl": "cuda"}, ValueError, r"impl must be one of auto, .*, got 'cuda'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_argument_is_named_with_expected_and_got(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


def test_checked_labels_name_the_position():
    y = labels(4, 6)
    y[2, 3], y[3, 1], y[0, 0] = 9, 11, -1
    with pytest.raises(ValueError, match=r"y must be in \[0, 9\) .*got 9 at position \(2, 3\) \(2 bad"):
        call(y=y, check_labels=True)
    y[2, 3] = y[3, 1] = 8
    assert call(y=y, check_labels=True).isfinite()
