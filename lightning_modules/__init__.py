"""Lightning modules: the weights. The shared LM with its adapter, the rollout engine, and the module that trains."""

from cotune.lightning_modules.foreign import ModelNotFoundError
from cotune.lightning_modules.language_model import LanguageModel, Usage
from cotune.lightning_modules.lora import LoRA
from cotune.lightning_modules.program_module import LearningRate, ProgramModule

__all__ = ["LanguageModel", "LearningRate", "LoRA", "ModelNotFoundError", "ProgramModule", "Usage"]
