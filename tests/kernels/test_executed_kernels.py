"""Fourth link: the kernels as they are compiled for a GPU, executed by the emulator, against the oracle.

What the interpreter cannot show: the compiler's own work, barriers between warps, layouts, predicates, rounding as the
instructions have it, each byte that is touched. Compiling takes most of the time, so cases share variants.
"""

import pytest
import torch

from difftrain_kernels.terms import PLAIN
from executed import run_clean
from kernel_terms import expected_of
from loss_problems import (
    MODES,
    assert_near_oracle,
    loss_and_gradient,
    random_problem,
    strided_copy,
)

# numpy warns where hardware computes inf and NaN in silence.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.xdist_group("executed"),  # one process compiles for all
]
MASK_ID = 9


def check(vocab_size, dtype=torch.bfloat16, *, mode="default", reduction="mean", upstream=0.5, n=3, padding=0, phase=0,
          label_dtype=torch.int64, pk_on_device=False, **options):  # fmt: skip
    """The public call, forward and backward, on rows that lie ``vocab_size + padding`` apart."""
    rows, y, x = random_problem(n, vocab_size, MASK_ID, dtype, seed=vocab_size)
    logits, _ = strided_copy(rows, padding=padding, phase=phase)
    stated, overwrite = MODES[mode]
    given = torch.full((n,) if reduction == "none" else (), upstream)
    if reduction == "none":
        given[::2] = 0.5  # so that some rows meet the statement and some do not
    found = run_clean(
        loss_and_gradient, logits=logits, y=y.to(label_dtype), x=x, mask_id=MASK_ID,
        pk=torch.tensor(0.25) if pk_on_device else 0.25, reduction=reduction, upstream=given, upstream_scale=stated,
        overwrite_logits=overwrite, overwrites=("logits",) if overwrite else (), **options,
    )  # fmt: skip
    expected = expected_of(rows, y, x, MASK_ID, 0.25, 0.5, PLAIN)
    assert_near_oracle(*found.result, expected, given, reduction, stated=stated if overwrite else None)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_streamed_rows(mode):
    check(5000, mode=mode)
    check(5000, mode=mode, upstream=1.0)
