"""Counts of rows as people see them: small ones are not told, as a patient might be known by one."""

FEWEST = 10


def show_count(count: int) -> str:
    """A count of rows for people; under 10 it is not told."""
    return f"<{FEWEST}" if count < FEWEST else f"{count:,}"
