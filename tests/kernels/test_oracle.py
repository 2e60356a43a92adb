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


# Terms beyond the two penalties. SAYS_MASK has lse ln 8 and nll ln 4 at target 1.


def terms_of(logits=SAYS_MASK, y=1, x=MASK_ID, **terms):
    """The result for one position; both penalties are 1."""
    return diffusion_loss([logits], [y], [x], MASK_ID, **terms)


def test_a_token_weight_multiplies_loss_and_gradient_and_the_table_holds_both_sums():
    result = terms_of(token_weights=[-3.0])
    assert result.row_loss[0] == pytest.approx(-3 * LN(4), rel=1e-14)
    np.testing.assert_allclose(result.gradient[0], -3 * np.array([1, -6, 5]) / 8, rtol=1e-14)
    assert result.nll_sums[0, 0] == pytest.approx(LN(4), rel=1e-14)
    assert result.weighted_sums[0, 0] == pytest.approx(-3 * LN(4), rel=1e-14)


def test_a_token_weight_of_zero_is_no_case_whatever_the_row_holds():
    result = terms_of(logits=[math.nan] * 3, token_weights=[0.0])
    assert result.row_loss[0] == 0
    assert not result.gradient.any()
    assert not result.counts.any()
    assert result.case[0] == -1


def test_case_weights_stand_in_the_tables_order():
    weights = [[2, 3, 5], [7, 11, 13], [17, 19, 23]]
    kinds = [(MASK_ID, 1), (1, 1), (0, MASK_ID)]  # x, y: masked, intact, corrupted
    for kind, (x, y) in enumerate(kinds):
        for answer, logits in enumerate(([0, 0, 9], [0, 9, 0], [9, 0, 0])):
            result = terms_of(logits, y, x, case_weights=weights)
            if (kind, answer) != (2, 1):  # where [MASK] is the target, there is no other right answer
                assert result.weight[0] == weights[kind][answer]
                assert result.case[0] == 3 * kind + answer


def test_the_probability_gate_weighs_by_the_probability_of_mask():
    result = terms_of(pk=0.25, gate="probability")
    assert result.weight[0] == pytest.approx(1 + (0.25 - 1) * 5 / 8, rel=1e-14)
    np.testing.assert_allclose(result.weighted_sums[0], LN(4) * np.array([5, 2, 1]) / 8, rtol=1e-13)
    intact = terms_of(x=1, pm=0.5, gate="probability")
    assert intact.weight[0] == pytest.approx(1 + (0.5 - 1) * 5 / 8, rel=1e-14)
    nine = terms_of(case_weights=[[2, 3, 5], [1] * 3, [1] * 3], gate="probability")
    assert nine.weight[0] == pytest.approx((2 * 5 + 3 * 2 + 5 * 1) / 8, rel=1e-14)


def test_z_loss_adds_the_squared_log_sum_exp_without_the_case_weight():
    result = terms_of(pk=0.25, z_loss=0.1, token_weights=[2.0])
    assert result.row_loss[0] == pytest.approx(2 * (0.25 * LN(4) + 0.1 * LN(8) ** 2), rel=1e-14)
    p = np.array([1, 2, 5]) / 8
    expected = 2 * (0.25 * (p - [0, 1, 0]) + 0.2 * LN(8) * p)
    np.testing.assert_allclose(result.gradient[0], expected, rtol=1e-13)
    assert result.z_sum == pytest.approx(0.2 * LN(8) ** 2, rel=1e-14)


def test_label_smoothing_spreads_a_share_of_the_target():
    result = terms_of(label_smoothing=0.3)
    mean = (LN(8) + LN(4) + LN(8 / 5)) / 3
    assert result.smooth[0] == pytest.approx(0.7 * LN(4) + 0.3 * mean, rel=1e-14)
    assert result.nll[0] == pytest.approx(LN(4), rel=1e-14)
    assert result.smoothing_sums[0, 0] == pytest.approx(0.3 * (mean - LN(4)), rel=1e-13)
    np.testing.assert_allclose(
        result.gradient[0], np.array([1, 2, 5]) / 8 - [0.1, 0.8, 0.1], rtol=1e-13, atol=1e-15
    )


def test_softcap_bends_the_logits_and_their_gradient():
    bent = np.array(SAYS_MASK)
    result = terms_of(2 * np.arctanh(bent / 2), softcap=2.0)
    assert result.row_loss[0] == pytest.approx(LN(4), rel=1e-13)
    slope = 1 - (bent / 2) ** 2
    np.testing.assert_allclose(result.gradient[0], np.array([1, -6, 5]) / 8 * slope, rtol=1e-12)


def test_a_forbidden_mask_takes_part_in_nothing():
    result = terms_of(forbid_mask=True, label_smoothing=0.2)
    assert result.predicted[0] == 1
    assert result.p_mask[0] == 0
    assert result.lse[0] == pytest.approx(LN(3), rel=1e-14)
    assert result.smooth[0] == pytest.approx(0.8 * LN(3 / 2) + 0.2 * (LN(3) + LN(3 / 2)) / 2, rel=1e-13)
    np.testing.assert_allclose(result.gradient[0], [1 / 3 - 0.1, 2 / 3 - 0.9, 0], rtol=1e-12)
    assert math.isnan(terms_of(y=MASK_ID, x=0, forbid_mask=True).row_loss[0])


def test_a_logit_scale_multiplies_logits_and_gradient():
    result = terms_of(np.array(SAYS_MASK) / 4, logit_scale=4.0)
    assert result.row_loss[0] == pytest.approx(LN(4), rel=1e-14)
    np.testing.assert_allclose(result.gradient[0], np.array([1, -6, 5]) / 2, rtol=1e-13)


def test_what_a_row_shows():
    result = terms_of()
    assert result.lse[0] == pytest.approx(LN(8), rel=1e-14)
    assert (result.p_mask[0], result.confidence[0]) == (pytest.approx(5 / 8), pytest.approx(5 / 8))
    assert result.case[0] == 0
    entropy = LN(8) - (2 * LN(2) + 5 * LN(5)) / 8
    assert result.entropy[0] == pytest.approx(entropy, rel=1e-14)


def test_a_shift_reads_a_position_against_earlier_logits_and_leaves_out_the_boundary():
    logits = [SAYS_MASK, SAYS_WORD, SAYS_WORD, SAYS_MASK]
    result = diffusion_loss(logits, [0, 1, 0, 1], [MASK_ID] * 4, MASK_ID, shift=1, length=2)
    assert result.row_loss.tolist() == [0, pytest.approx(LN(4)), 0, pytest.approx(LN(8 / 5))]
    assert result.case.tolist() == [-1, 0, -1, 1]
    np.testing.assert_allclose(result.gradient[0], np.array([1, -6, 5]) / 8, rtol=1e-14)
    assert not result.gradient[1].any()
    assert not result.gradient[3].any()
