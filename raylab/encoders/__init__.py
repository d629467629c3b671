"""What is done with encoders that are there: other corpora, the test split, export, profile."""
