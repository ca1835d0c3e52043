"""Loggers: what W&B and metrics.csv get to see of a run."""
