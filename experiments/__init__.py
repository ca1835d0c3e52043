"""Experiments: tasks, LMs, presets, strategies and seeds as one table with error bars, beside the paper's numbers."""
