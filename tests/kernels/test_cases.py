"""The case table as a value: it adds up, compares, prints, and travels without losing a position."""

import copy
import json
import math
import pickle
from dataclasses import fields, replace

import pytest
import torch

from difftrain_kernels import CaseTable
from difftrain_kernels.cases import VECTOR_SIZE
from every_loss import arguments_of, call

NAN, INF = math.nan, math.inf


def table_of(counts, nll=1.0, gap=2.0, n_positions=None, dtype=torch.float32):
    counts = torch.full((3, 3), counts) if isinstance(counts, int) else torch.tensor(counts)
    n = int(counts.sum()) if n_positions is None else n_positions
    return CaseTable(counts, torch.full((3, 3), nll, dtype=dtype), torch.full((3,), gap, dtype=dtype), n)


@pytest.fixture
def table():
    way = ("logits", "reference")
    return call(way, arguments_of(way), return_cases=True)[1]


# Adding --------------------------------------------------------------------------------------------


def test_sum_adds_tables_and_begins_at_zero(table):
    total = sum([table, table, table])
    assert total == table + table + table
    assert total.counts.tolist() == (table.counts * 3).tolist()
    assert total.n_positions == 3 * table.n_positions
    assert sum([table]) == table
    for other in (1, 0.0, None, table.counts):
        with pytest.raises(TypeError):
            other + table
        with pytest.raises(TypeError):
            table + other


def test_every_field_takes_part_in_everything(table):
    whole = CaseTable(*(getattr(table, field.name) for field in fields(CaseTable)))
    assert whole == table
    # Every field there is; a table of the plain loss has no smoothing and no z-loss.
    table = replace(
        table,
        weighted=table.nll * 2,
        smoothing=table.nll * 0.1,
        z_loss=torch.tensor(0.5, dtype=table.nll.dtype),
    )
    assert table != whole
    whole = CaseTable(*(getattr(table, field.name) for field in fields(CaseTable)))
    assert whole == table
    for field in fields(CaseTable):
        value = getattr(table, field.name)
        # One number changed in one place.
        for place in range(max(1, math.prod(field.metadata["shape"]))):
            other = value + 1
            if isinstance(value, torch.Tensor):
                other = value.clone()
                other.view(-1)[place] += 1
            changed = replace(table, **{field.name: other})
            assert changed != table, field.name
            assert CaseTable.from_vector(changed.to_vector()) == changed
            assert CaseTable.from_dict(changed.to_dict()) == changed
            assert (changed + table) != (table + table)


# Comparing -----------------------------------------------------------------------------------------


def test_equality_is_one_bool_whatever_the_dtype_and_nan_is_itself(table):
    assert (table == copy.deepcopy(table)) is True
    assert (table != copy.deepcopy(table)) is False
    wide = replace(table, nll=table.nll.double(), gap=table.gap.double())
    assert wide == table
    assert replace(wide, nll=wide.nll * (1 + 1e-12)) != table
    assert table_of(1, nll=NAN) == table_of(1, nll=NAN)
    assert table_of(1, nll=NAN) != table_of(1, nll=0.0)
    assert table_of(1, nll=INF) != table_of(1, nll=-INF)
    for other in (1, None, "table", table.to_vector()[0].item()):
        assert (table == other) is False
    assert table_of(2**62 + 1, n_positions=0) != table_of(2**62, n_positions=0)


def test_a_table_has_no_hash(table):
    with pytest.raises(TypeError, match="unhashable type: 'CaseTable'"):
        hash(table)


# Rates ---------------------------------------------------------------------------------------------


def test_rates_are_fp64_and_nan_for_a_kind_without_positions():
    rates = table_of([[1, 1, 1], [2**53 + 1, 0, 2**53 + 1], [0, 0, 0]]).rates()
    assert rates.dtype == torch.float64
    assert rates[0].tolist() == [1 / 3] * 3
    assert rates[1].tolist() == [0.5, 0.0, 0.5]
    assert rates[2].isnan().all()
    empty = table_of(0, nll=0.0, gap=0.0)
    for mean in (empty.mean_nll(), empty.mean_gap(), empty.loss_at(1.0, 1.0)):
        assert mean.isnan().all()


# Printing ------------------------------------------------------------------------------------------


def test_it_prints_as_a_table_of_counts_shares_and_mean_nll():
    table = CaseTable(
        counts=torch.tensor([[1, 3, 0], [0, 0, 0], [1000, 0, 3000]]),
        nll=torch.tensor([[2.0, 0.75, 0.0], [0.0, 0.0, 0.0], [500.0, 0.0, 9000.0]]),
        gap=torch.tensor([4.0, 0.0, 1000.0]),
        n_positions=4010,
    )
    assert repr(table).splitlines() == [
        "CaseTable of 4,010 positions, 6 ignored: count, share, mean nll",
        "                       mask        target             other               all  mean gap",
        "masked         1  25% 2.000  3  75% 0.250      0    -     -      4 100% 0.688     1.000",
        "intact         0    -     -  0    -     -      0    -     -      0    -     -         -",
        "corrupted  1,000  25% 0.500  0    -     -  3,000  75% 3.000  4,000 100% 2.375     0.250",
    ]
    assert str(table) == repr(table)


def test_numbers_that_are_none_and_an_empty_table_print_too():
    assert "nan" in repr(table_of(1, nll=NAN))
    assert "inf" in repr(table_of(1, nll=INF))
    assert repr(table_of(0)).startswith("CaseTable of 0 positions, 0 ignored")


# Travelling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_survives_pickle_copies_json_and_the_vector(dtype, table, device):
    table = replace(table, nll=table.nll.to(dtype), gap=table.gap.to(dtype)).to(device)
    assert all(getattr(table, name).device.type == device.type for name in ("counts", "nll", "gap"))
    back = [
        pickle.loads(pickle.dumps(table)),
        copy.copy(table),
        copy.deepcopy(table),
        CaseTable.from_dict(json.loads(json.dumps(table.to_dict(), allow_nan=False))),
    ]
    for other in back:
        assert other == table
        assert (other.nll.dtype, other.gap.dtype, other.counts.dtype) == (dtype, dtype, torch.int64)
        assert type(other.n_positions) is int
    vector = table.to_vector()
    assert (vector.shape, vector.dtype, vector.device.type) == ((VECTOR_SIZE,), torch.float64, "cpu")
    assert CaseTable.from_vector(vector) == table
    assert table.to("cpu") == table


@pytest.mark.parametrize("value", [NAN, INF, -INF, 5e-324, 1e308, 0.1])
def test_json_keeps_every_number_of_fp64(value):
    table = table_of(1, nll=value, gap=value, dtype=torch.float64)
    assert CaseTable.from_dict(json.loads(json.dumps(table.to_dict(), allow_nan=False))) == table


# Around 2^31, 2^32 and 2^53, where int32, a word of the vector and fp64 end; and the last of int64.
@pytest.mark.parametrize("count", [2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**60 + 2**32 - 1, 2**63 - 1])
def test_counts_stay_exact_as_far_as_int64_reaches(count):
    table = table_of(count, n_positions=count)
    assert CaseTable.from_vector(table.to_vector()) == table
    assert CaseTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert CaseTable.from_vector(table.to_vector()).counts.flatten().tolist() == [count] * 9


@pytest.mark.parametrize("share", [2**53 // 1024 + 1, 2**32 - 1, 2**52 + 2**31 + 1])
def test_counts_stay_exact_in_a_sum_over_many_processes(share):
    n = 1024
    total = CaseTable.from_vector(
        sum(table_of(share + i, n_positions=share + i).to_vector() for i in range(n))
    )
    expected = n * share + n * (n - 1) // 2
    assert total.counts.flatten().tolist() == [expected] * 9
    assert total.n_positions == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            None,
            "a case table must have the keys counts, nll, gap, n_positions, weighted, smoothing, z_loss and dtype, got list",
        ),
        (
            {"counts": ...},
            "must have the keys .*, got nll, gap, n_positions, weighted, smoothing, z_loss, dtype",
        ),
        ({"entropy": 1}, "must have the keys .*, got .*, entropy"),
        ({"counts": [[1, 2, 3]]}, r"counts must hold integers >= 0 of shape \(3, 3\), got \[\[1, 2, 3\]\]"),
        ({"counts": [[1.5] * 3] * 3}, r"counts must hold integers >= 0"),
        ({"counts": [[True] * 3] * 3}, r"counts must hold integers >= 0"),
        ({"counts": [[-1] * 3] * 3}, r"counts must hold integers >= 0"),
        ({"counts": [[2**63] * 3] * 3}, r"counts must hold integers >= 0"),
        ({"nll": [["a"] * 3] * 3}, r"nll must hold numbers of shape \(3, 3\), got \[\['a'"),
        ({"nll": None}, r"nll must hold numbers of shape \(3, 3\), got None"),
        ({"gap": [1.0, 2.0]}, r"gap must hold numbers of shape \(3,\), got \[1.0, 2.0\]"),
        ({"n_positions": -1}, r"n_positions must hold integers >= 0 of shape \(\), got -1"),
        ({"dtype": "int8"}, "dtype must be one of float32, float64, got int8"),
        ({"dtype": ["float32"]}, "dtype must be one of float32, float64, got"),
    ],
)
def test_a_dictionary_that_is_no_table_is_named_with_expected_and_got(changes, message, table):
    values = [] if changes is None else table.to_dict() | changes
    if changes is not None:
        values = {key: value for key, value in values.items() if value is not ...}
    with pytest.raises(ValueError, match=message) as caught:
        CaseTable.from_dict(values)
    assert "\n" not in str(caught.value)
