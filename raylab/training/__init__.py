"""Pre-training: encoders, batches, objectives, rungs, held-out measures."""
