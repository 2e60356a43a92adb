"""The goals, and figures of the made-up sample held against them."""

import pytest

pytest.importorskip("triton")  # the sample lists the contenders

from comparison.entries import ACCUMULATED, BOTH, FORWARD, TIMED
from reporting import goals
from sample_result import sample_result


def entries_with(change):
    """The sample's loss entries, each passed through ``change`` (None: dropped)."""
    changed = (change(dict(e)) for e in sample_result()["stages"]["loss"]["entries"])
    return [e for e in changed if e is not None]


def verdict(what, shape, entries):
    (goal,) = (g for g in goals.GOALS if (g.what, g.shape) == (what, shape))
    (found,) = goals.evaluate([goal], entries)
    return found


def setting(contender, measure, **values):
    def change(entry):
        is_it = (entry["contender"], entry["measure"]) == (contender, measure)
        return entry | values if is_it else entry

    return change


def test_the_goals_are_the_agreed_ones():
    asked = {(g.what, g.shape): (g.asked, g.at_least) for g in goals.GOALS}
    assert len(asked) == len(goals.GOALS) == 26
    sizes = {50304: 90, 50305: 90, 128256: 85, 151936: 85, 262144: 75}
    for vocab_size, share in sizes.items():
        assert asked["forward", (8192, vocab_size)] == (90, True)
        assert asked["loss and gradient", (8192, vocab_size)] == (share, True)
        assert asked["upstream 1/8 slower than 1", (8192, vocab_size)] == (5, False)
    assert asked["loss and gradient", (262144, 66)] == (50, True)
    assert asked["best peer with the same loss", (8192, 50304)] == (2, True)
    assert asked["best peer with the same loss", (8192, 128256)] == (1.3, True)
    assert asked["eager", (8192, 50304)] == (6, True)
    assert asked["torch.compile, tensor penalties", (8192, 50304)] == (2.5, True)
    assert asked["cost of the weights, loss and gradient", (8192, 50304)] == (2, False)
    assert asked["linear", (8192, 768, 50304)] == (1.25, False)
    assert asked["linear", (8192, 4096, 128256)] == (1.10, False)
    assert asked["linear, memory beside inputs and gradients", (8192, 4096, 128256)] == (1024, False)
    assert asked["linear, memory beside inputs and gradients", (65536, 768, 50304)] == (512, False)


@pytest.mark.parametrize(
    ("what", "shape", "change", "value", "outcome"),
    [
        ("forward", (8192, 50305), setting("ours", FORWARD, percent_of_limit=90.0), 90, "met: 90 % of the limit"),
        ("forward", (8192, 50305), setting("ours", FORWARD, percent_of_limit=87.5), 87.5,
         "missed by 2.5 % of the limit: 87.5 % of the limit"),
        ("loss and gradient", (262144, 66), setting("ours", BOTH, percent_of_limit=49.0), 49,
         "missed by 1 % of the limit: 49 % of the limit"),
        ("upstream 1/8 slower than 1", (8192, 50304),
         lambda e: setting("ours", ACCUMULATED, ms=1.1)(setting("ours", BOTH, ms=1.0)(e)),
         10, "missed by 5 %: 10 %"),
        ("eager", (8192, 50304),
         lambda e: setting("eager reference", BOTH, ms=7.0)(setting("ours", BOTH, ms=1.0)(e)),
         7, "met: 7 x our time"),
        ("cost of the weights, forward", (8192, 50304),
         lambda e: setting("plain cross-entropy, our kernel", FORWARD, ms=1.0)(setting("ours", FORWARD, ms=1.03)(e)),
         3, "missed by 1 %: 3 %"),
        ("linear", (8192, 768, 50304), setting("ours linear", BOTH, times_the_products=1.5), 1.5,
         "missed by 0.25 x its products: 1.5 x its products"),
        ("linear, memory beside inputs and gradients", (65536, 768, 50304),
         setting("ours linear", BOTH, peak_mib=900.0, gradients_mib=400.0), 500, "met: 500 MiB"),
    ],
)  # fmt: skip
def test_a_goal_is_met_or_missed_by_a_figure(what, shape, change, value, outcome):
    found = verdict(what, shape, entries_with(change))
    assert found.value == pytest.approx(value)
    assert found.outcome == outcome
    assert found.is_met == outcome.startswith("met")


def test_the_best_peer_is_the_fastest_that_computes_the_whole_loss_and_is_not_ours():
    key = "best peer with the same loss", (8192, 50304)

    def times(e):
        ms = {"ours": 1.0, "plain cross-entropy, our kernel": 0.5, "Liger cross-entropy": 3.0,
              "eager reference": 5.0, "torch.compile, float penalties": 2.5}.get(e["contender"], 9.0)  # fmt: skip
        return e | {"ms": ms} if e["outcome"] == TIMED else e

    entries = entries_with(times)
    liger = next(e for e in entries if (e["contender"], e["measure"]) == ("Liger cross-entropy", BOTH))
    plain = liger | {"contender": "plain", "lacks": "no weights", "ms": 0.1}
    found = verdict(*key, [*entries, plain])
    assert found.value == 2.5
    assert (
        found.note == "torch.compile, float penalties; without QuACK cross-entropy, QuACK, over the logits"
    )
    # Without another library among them it is no comparison with peers.
    without = entries_with(lambda e: None if e["contender"] == "Liger cross-entropy" else times(e))
    found = verdict(*key, without)
    assert found.value is None
    assert found.outcome.startswith("not measured (QuACK cross-entropy: not installed: ")


def test_a_contender_that_was_wrong_or_absent_leaves_its_goals_not_measured():
    def wrong(e):
        is_it = e["contender"] == "ours"
        return e | {"outcome": "wrong: loss off by 1", "ms": None, "measure": ""} if is_it else e

    found = verdict("loss and gradient", (8192, 50304), entries_with(wrong))
    assert found.outcome == "not measured (ours: wrong: loss off by 1)"
    assert not found.is_met
    found = verdict("forward", (8192, 50304), [])
    assert found.outcome == "not measured (no entry for ours)"
    other = entries_with(lambda e: e | {"dtype": "fp32"})
    assert verdict("forward", (8192, 50304), other).value is None, "goals are for bf16"
