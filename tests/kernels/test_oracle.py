"""First link of the chain of trust: the oracle against numbers worked out by hand.

Two tokens and a [MASK] (id 2). The logits are logs of small integers, so that softmax is a ratio
of integers: [ln 1, ln 2, ln 5] gives p = 1/8, 2/8, 5/8 and predicts [MASK].
"""

import math

import numpy as np
import pytest

from oracle import diffusion_loss, first_maximum

MASK_ID = 2
SAYS_MASK = [math.log(1), math.log(2), math.log(5)]
SAYS_WORD = [math.log(1), math.log(5), math.log(2)]
LN = math.log


def test_masked_position_answered_mask_costs_pk():
    result = diffusion_loss([SAYS_MASK], [1], [MASK_ID], MASK_ID, pk=0.25, pm=0.5)
    assert result.loss() == pytest.approx(0.25 * LN(8 / 2), rel=1e-14)
    assert result.counts.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(result.gradient[0], 0.25 * np.array([1 / 8, -6 / 8, 5 / 8]), rtol=1e-14)


def test_intact_position_answered_mask_costs_pm():
    result = diffusion_loss([SAYS_MASK], [1], [1], MASK_ID, pk=0.25, pm=0.5)
    assert result.loss() == pytest.approx(0.5 * LN(8 / 2), rel=1e-14)
    assert result.counts.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert result.gap_sums[1] == 0


def test_every_other_position_has_weight_one():
    logits = [SAYS_WORD, SAYS_WORD, SAYS_MASK]
    result = diffusion_loss(logits, [1, 1, MASK_ID], [MASK_ID, 1, 0], MASK_ID, pk=0.25, pm=0.5)
    assert result.weight.tolist() == [1, 1, 1]
    assert result.loss() == pytest.approx((LN(8 / 5) + LN(8 / 5) + LN(8 / 5)) / 3, rel=1e-14)
    assert result.counts.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert result.gap_sums[0] == pytest.approx(LN(5 / 2), rel=1e-14)


def test_ignored_position_costs_nothing_but_counts_in_the_mean():
    result = diffusion_loss([SAYS_WORD, SAYS_WORD], [1, -1], [1, 1], MASK_ID, pk=1.0, pm=1.0)
    assert result.loss("mean") == pytest.approx(LN(8 / 5) / 2, rel=1e-14)
    assert not result.gradient[1].any()


def test_first_maximum_wins_and_nan_is_a_maximum():
    assert first_maximum(np.array([1.0, 3.0, 3.0])) == 1
    assert first_maximum(np.array([1.0, math.nan, 3.0, math.nan])) == 1
    assert first_maximum(np.array([-math.inf, -math.inf])) == 0
