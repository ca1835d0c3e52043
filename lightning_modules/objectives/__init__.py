"""Objectives: what a weight step learns from the program's runs. One small class each."""

from cotune.lightning_modules.objectives.distil import Distil
from cotune.lightning_modules.objectives.objective import Objective, Reference, Weighted
from cotune.lightning_modules.objectives.policy import GRPO
from cotune.lightning_modules.objectives.preference import DPO, KTO
from cotune.lightning_modules.objectives.rejection import Rejection

__all__ = ["DPO", "GRPO", "KTO", "Distil", "Objective", "Reference", "Rejection", "Weighted"]
