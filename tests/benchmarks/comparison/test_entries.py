"""Rates follow from an entry's time by the byte model."""

import pytest

pytest.importorskip("triton")  # the samples hold contenders

from bench_samples import entry_of
from comparison import entries


def test_bytes_are_those_of_the_traffic_model():
    assert entries.bytes_moved(8192, 50304, 2, with_gradient=False) == 824_180_736
    assert entries.bytes_moved(8192, 50304, 2, with_gradient=True) == 1_648_361_472
    # KERNELS section 4: 0.55 ms on an H100, whose copy moves 3.0 TB/s.
    assert round(1_648_361_472 / 3.0e12 * 1e3, 2) == 0.55


def test_rates_follow_from_time_and_model():
    both, forward = (entry_of("logits", measure=m) for m in (entries.BOTH, entries.FORWARD))
    entries.add_rates(both, 640e-6, {})
    assert both.gb_per_s == pytest.approx(8 * 10 * 2 * 2 / 2e-3 / 1e9)
    assert both.percent_of_limit == pytest.approx(25.0)
    assert both.times_the_products is None
    entries.add_rates(forward, 640e-6, {})
    assert forward.percent_of_limit == pytest.approx(12.5)
    linear = entry_of("linear")
    entries.add_rates(linear, 1.0, {True: 1.6, False: 0.5})
    assert linear.times_the_products == pytest.approx(1.25)
    assert linear.gb_per_s is None
