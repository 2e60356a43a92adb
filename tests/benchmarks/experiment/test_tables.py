"""The experiment's tables: what counts as a difference, and how it is shown."""

import pytest

import measuring.checkout  # noqa: F401
from experiment.tables import TABLES, compared, draw, table


def runs(**arms):
    return [
        {"arm": arm, "base": "base", "seed": seed, "figures": {"nll": value}}
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
        ([1.3, 1.3, 1.5], 1),  # t = 7
        ([1.3, 1.5, 1.4], 0),  # t = 3.5, which chance exceeds more than once in 20 times
        ([1.0, 1.1], 0),  # too few
    ],
)
def test_a_difference_of_three_seeds_or_more_is_one_where_chance_explains_it_less_than_once_in_20_times(
    values, sign
):
    base = {1: 1.5, 2: 1.6, 3: 1.7}
    found = dict(enumerate(values, 1))
    assert compared(found, base, is_less_better=True) == sign
    assert compared(found, base, is_less_better=False) == -sign


def test_more_seeds_need_less_of_a_difference():
    base = dict.fromkeys(range(1, 5), 1.5)
    three = dict(enumerate([1.3, 1.35, 1.4], 1))  # t = 5.2
    four = dict(enumerate([1.2, 1.4, 1.3, 1.38], 1))  # t = 4.0, too little for three
    assert compared(three, base, is_less_better=True) == 1
    assert compared(four, base, is_less_better=True) == 1
    assert compared(four | {4: 1.5}, base, is_less_better=True) == 0


def test_better_is_bold_worse_in_brackets_and_missing_empty():
    records = runs(base=[1.5, 1.6, 1.7], good=[1.0, 1.1, 1.2], bad=[2.0, 2.1, 2.2], none=[None, None, None])
    lines = table(records, [("nll", "nll", 2, True)]).splitlines()
    assert lines == [
        "| arm | nll |", "|---|---|", "| *base* | 1.60 ± 0.10 |", "| good | **1.10 ± 0.10** |", "| bad | (2.10 ± 0.10) |",
        "| none |  |",
    ]  # fmt: skip


def test_a_figure_of_which_neither_more_nor_less_is_better_bears_no_mark():
    records = runs(base=[1.5, 1.6, 1.7], less=[1.0, 1.1, 1.2])
    assert table(records, [("nll", "nll", 2, None)]).endswith("| less | 1.10 ± 0.10 |")


def test_the_picture_is_drawn_with_what_is_there(tmp_path):
    pytest.importorskip("matplotlib")
    names = {name for columns in TABLES.values() for _, name, *_ in columns}
    records = [{"arm": "a", "seed": s, "figures": dict.fromkeys(names, s / 10)} for s in (1, 2)]
    records += [{"arm": "b", "seed": 1, "figures": dict.fromkeys(names)}]
    draw(records, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
