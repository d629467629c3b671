"""A job run: planned, prepared, its trials started, watched and gone on with, here or on a cluster."""
