"""What everything stands on: errors, names by content, random numbers, the workers of a trial."""
