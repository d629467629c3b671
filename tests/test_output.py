"""What is printed for people."""

import pytest

from raylab.commands.output import show_count


@pytest.mark.parametrize(("count", "shown"), [(0, "<10"), (1, "<10"), (9, "<10"), (10, "10"), (12345, "12,345")])
def test_small_counts_are_not_told(count: int, shown: str) -> None:
    assert show_count(count) == shown
