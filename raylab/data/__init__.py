"""From files to tokens: tables of texts, splits, labels, hygiene checks, the synthetic corpus."""
