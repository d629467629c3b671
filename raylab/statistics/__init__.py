"""What can be concluded: comparisons, effects, importances, correlations, diagnosis."""
