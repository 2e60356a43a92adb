import math

import pytest
import torch

from difftrain.config import Config
from difftrain.schedule import PenaltyTensors, get_masking_penalties, learning_rate, masking_penalties

DEFAULT = Config()


@pytest.mark.parametrize(
    ("step", "pk", "pm"),
    [
        (0, 1.0, 0.0),
        (1, 1.0 + (1 / 1000) * (0.25 - 1.0), (1 / 1000) * 0.5),
        (250, 0.8125, 0.125),
        (500, 0.625, 0.25),
        (999, 1.0 + (999 / 1000) * (0.25 - 1.0), (999 / 1000) * 0.5),
        (1000, 0.25, 0.5),
        (1001, 0.25, 0.5),
        (10**9, 0.25, 0.5),
    ],
)
def test_penalties_equal_the_specifications_numbers_exactly(step, pk, pm):
    assert masking_penalties(step, DEFAULT) == (pk, pm)


def test_warmup_zero_means_the_final_penalties_at_once():
    assert masking_penalties(0, Config(masking_warmup_iters=0)) == (0.25, 0.5)


def test_penalties_follow_the_configured_end_points():
    config = Config(penalty_keep_mask=2.0, penalty_mask_correct=0.0, masking_warmup_iters=4)
    assert [masking_penalties(s, config) for s in (0, 1, 4)] == [(1.0, 0.0), (1.25, 0.0), (2.0, 0.0)]


@pytest.mark.parametrize("changes", [{"mode": "gpt2"}, {"recipe": "llada"}, {"recipe": "mdlm"}])
def test_penalties_are_1_where_no_target_is_mask(changes):
    assert {masking_penalties(step, Config(**changes)) for step in (0, 500, 10**6)} == {(1.0, 1.0)}


def test_the_specifications_name_is_the_same_function():
    assert get_masking_penalties is masking_penalties


def test_penalty_tensors_stay_and_follow_the_schedule(device):
    tensors = PenaltyTensors(device)
    pk, pm = tensors.pk, tensors.pm
    assert pk.isnan()
    assert pm.isnan()
    for step in (0, 1, 500, 1000, 10**6):
        assert tensors.update(step, DEFAULT) == (pk, pm)
        assert tensors.pk is pk
        assert tensors.pm is pm
        expected = torch.tensor(masking_penalties(step, DEFAULT), dtype=torch.float32)
        assert torch.equal(torch.stack((pk, pm)).cpu(), expected)
    assert (pk.shape, pk.dtype, pk.device.type) == ((), torch.float32, device.type)


def test_learning_rate_warms_up_decays_by_a_cosine_and_stays_at_its_minimum():
    config = Config(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109, max_iters=500)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(8, config) == pytest.approx(0.9)
    assert learning_rate(9, config) == 1.0
    assert learning_rate(59, config) == pytest.approx(0.55)  # half way down
    assert learning_rate(34, config) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(109, config) == learning_rate(400, config) == 0.1


def test_decay_ends_at_max_iters_unless_told_otherwise():
    config = Config(learning_rate=1.0, min_lr=0.1, warmup_iters=0, max_iters=200)
    assert learning_rate(100, config) == pytest.approx(0.55)
    assert learning_rate(200, config) == 0.1


def test_constant_learning_rate_ignores_the_warmup():
    config = Config(learning_rate=0.5, decay_lr=False, warmup_iters=10)
    assert {learning_rate(s, config) for s in (0, 5, 5000)} == {0.5}
