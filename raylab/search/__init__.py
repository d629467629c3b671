"""Which trial comes next, and whether it goes on."""
