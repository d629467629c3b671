"""raylab: hyperparameter and ablation studies of text encoders for healthcare text, on Ray."""

__version__ = "0.1.0"
