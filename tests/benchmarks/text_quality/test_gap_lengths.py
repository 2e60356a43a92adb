"""Lengths of gaps, on a model that knows its text by heart: a letter follows from those around it."""

import torch

import measuring.checkout  # noqa: F401
from ring_model import ring
from text_quality.gap_lengths import RULES, measure_lengths


def test_each_rule_takes_its_length_and_what_is_exact_follows():
    model = ring(block_size=32)
    clean = (torch.arange(16 * 32) % 5).view(16, 32)
    entries = measure_lengths(model, clean, 3)
    assert {(e["rule"], e["cut"]) for e in entries} == {(r, n) for r in RULES for n in range(1, 9)}
    assert {e["model"] for e in entries} == {3}
    figures = {(e["rule"], e["cut"]): e["figures"] for e in entries}
    for cut in range(1, 9):
        assert figures["known", cut] == {"right_length": 1, "exact": 1, "off": 0}
        assert figures["always 4", cut] == {
            "right_length": cut == 4,
            "exact": cut == 4,
            "off": abs(cut - 4),
        }
        assert figures["always the shortest", cut]["off"] == cut - 1
        assert figures["always the longest", cut]["off"] == 16 - cut
    # Five more or fewer fit as well, and of these the sums take the fewest.
    rule = "sum of log p, given words too"
    assert [figures[rule, cut]["right_length"] for cut in range(1, 6)] == [1] * 5
    assert [figures[rule, cut]["off"] for cut in range(6, 9)] == [5] * 3


def test_a_model_with_little_room_is_measured_over_shorter_gaps():
    entries = measure_lengths(ring(block_size=8), (torch.arange(40) % 5).view(5, 8), 0)
    assert {e["cut"] for e in entries} == {1, 2, 3, 4}
    assert {e["figures"]["right_length"] for e in entries if e["rule"] == "known"} == {1}
