"""Lightning modules: the weights. The shared LM with its adapter, the rollout engine, and the module that trains."""

from cotune.lightning_modules.foreign import ModelNotFoundError
from cotune.lightning_modules.language_model import LanguageModel
from cotune.lightning_modules.learning_rate import LearningRate
from cotune.lightning_modules.lora import LoRA
from cotune.lightning_modules.program_module import ProgramModule
from cotune.lightning_modules.usage import Usage

__all__ = ["LanguageModel", "LearningRate", "LoRA", "ModelNotFoundError", "ProgramModule", "Usage"]
