"""Objectives: what a weight step learns from the program's runs. One small class each."""

from cotune.lightning_modules.objectives.objective import Objective, Weighted
from cotune.lightning_modules.objectives.rejection import Rejection

__all__ = ["Objective", "Rejection", "Weighted"]
