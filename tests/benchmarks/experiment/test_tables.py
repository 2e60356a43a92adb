"""The experiment's tables: what counts as a difference, and how it is shown."""

import pytest

import measuring.checkout  # noqa: F401
from experiment.tables import TABLES, compared, draw, table


def runs(**arms):
    return [
        {"arm": arm, "seed": seed, "figures": {"nll": value}}
        for arm, values in arms.items()
        for seed, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ([1.0, 1.1, 1.2], 1),  # less by 0.5 with every seed
        ([2.0, 2.1, 2.2], -1),
        ([1.5, 1.6, 1.7], 0),  # equal
        ([1.4, 1.5, 1.75], 0),  # one seed the other way
        ([0.7, 1.59, 1.69], 0),  # one sign, but the mean is within twice its error
        ([1.0, 1.1], 0),  # too few
    ],
)
def test_a_difference_must_show_with_each_of_three_seeds_and_beyond_twice_its_error(values, sign):
    base = {1: 1.5, 2: 1.6, 3: 1.7}
    found = dict(enumerate(values, 1))
    assert compared(found, base, is_less_better=True) == sign
    assert compared(found, base, is_less_better=False) == -sign


def test_better_is_bold_worse_in_brackets_and_missing_empty():
    records = runs(base=[1.5, 1.6, 1.7], good=[1.0, 1.1, 1.2], bad=[2.0, 2.1, 2.2], none=[None, None, None])
    lines = table(records, [("nll", "nll", 2, True)], "base").splitlines()
    assert lines == [
        "| arm | nll |", "|---|---|", "| base | 1.60 ± 0.10 |", "| good | **1.10 ± 0.10** |", "| bad | (2.10 ± 0.10) |",
        "| none |  |",
    ]  # fmt: skip


def test_the_picture_is_drawn_with_what_is_there(tmp_path):
    pytest.importorskip("matplotlib")
    names = {name for columns in TABLES.values() for _, name, *_ in columns}
    records = [{"arm": "a", "seed": s, "figures": dict.fromkeys(names, s / 10)} for s in (1, 2)]
    records += [{"arm": "b", "seed": 1, "figures": dict.fromkeys(names)}]
    draw(records, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
