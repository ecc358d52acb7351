"""Histograms that stand in for all the numbers, and the summary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cadence import Histogram, percentiles_ms


@given(st.lists(st.floats(2e-6, 900.0), min_size=1, max_size=200), st.floats(1, 100))
def test_percentiles_are_those_of_the_numbers_to_a_percent(values: list[float], q: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = float(np.percentile(values, q, method="inverted_cdf"))
    assert exact * 0.989 <= histogram.percentile(q) <= exact * 1.011
    assert histogram.max_s == max(values)
    assert histogram.total_s == pytest.approx(sum(values))
    assert histogram.count == len(values)


def test_nothing_negative_nothing_lost() -> None:
    histogram = Histogram()
    assert percentiles_ms(histogram, 50) == {"p50": 0.0, "max": 0.0}
    for value in (-1.0, 0.0, 1e-9, 1e9):
        histogram.add(value)
    assert histogram.count == 4
    assert histogram.percentile(50) <= 1e-6
    assert histogram.max_s == 1e9
