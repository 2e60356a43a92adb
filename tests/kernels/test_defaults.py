"""The losses give the same bits whatever torch's default dtype and device are, and in inference mode."""

import pytest
import torch

from defaults import UNDER_EACH_DEFAULT
from difftrain_kernels import CaseTable
from every_loss import EVERY_LOSS, REDUCTIONS, arguments_of, assert_equal, inputs_of, value_and_gradients

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore:(divide|invalid):RuntimeWarning"),  # of the interpreter, about inf
]
# 0.3 and 0.6 are no numbers of bf16 or fp16.
PENALTIES = {
    "numbers": {"pk": 0.3, "pm": 0.6},
    "a number and a tensor": {"pk": 0.3, "pm": torch.tensor(0.6)},
    "a tensor and a number": {"pk": torch.tensor(0.3), "pm": 0.6},
    "tensors": {"pk": torch.tensor(0.3), "pm": torch.tensor(0.6)},
}


def results(way, arguments, **options):
    """Everything that a call gives, and everything that its table gives."""
    upstream = torch.ones(
        (24,) if options["reduction"] == "none" else (), dtype=torch.float32, device="cpu"
    )
    loss, table, gradients = value_and_gradients(way, arguments, upstream, **options)
    parts = [table.rates(), table.mean_nll(), table.mean_gap(), table.loss_at(0.3, 0.6), table.to_vector()]
    copies = [CaseTable.from_vector(table.to_vector()), CaseTable.from_dict(table.to_dict())]
    assert all(copy == table for copy in copies)
    assert all(part.device == loss.device for part in parts)
    return loss, table, (*gradients, *parts)


@pytest.fixture(scope="module")
def expected():
    """Results under torch's own defaults, kept."""
    kept = {}

    def of(way, names, reduction, *, trained):
        key = (way, names, reduction, trained)
        if key not in kept:
            kept[key] = results(way, problem(way, names, trained=trained), reduction=reduction)
        return kept[key]

    return of


def problem(way, names, *, trained):
    arguments = arguments_of(way) | PENALTIES[names]
    for name in inputs_of(way):
        arguments[name].requires_grad_(trained)
    return arguments


@EVERY_LOSS
@UNDER_EACH_DEFAULT
def test_defaults_change_no_bit(way, changed, expected):
    for reduction in REDUCTIONS:
        for names in PENALTIES:
            if names == "numbers" or reduction == "mean":
                before = expected(way, names, reduction, trained=True)
                arguments = problem(way, names, trained=True)
                with changed():
                    found = results(way, arguments, reduction=reduction)
                assert_equal(found, before)


@EVERY_LOSS
def test_inference_mode_changes_no_bit(way, expected):
    for reduction in REDUCTIONS:
        before = expected(way, "a number and a tensor", reduction, trained=False)
        with torch.inference_mode():
            found = results(way, problem(way, "a number and a tensor", trained=False), reduction=reduction)
        assert_equal(found, before)
