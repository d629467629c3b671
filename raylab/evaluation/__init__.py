"""An encoder's evaluation: draws, freeze depths, probes, fine-tuning, baselines."""
