"""Counts that people see."""

import pytest

from raylab.base.counts import show_count


@pytest.mark.parametrize(("count", "shown"), [(0, "<10"), (1, "<10"), (9, "<10"), (10, "10"), (12345, "12,345")])
def test_small_counts_are_not_told(count: int, shown: str) -> None:
    assert show_count(count) == shown
