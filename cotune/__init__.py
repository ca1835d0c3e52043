"""cotune: tunes the prompts and the weights of multi-stage LM programs, by turns, in one Lightning run."""

__version__ = "0.1.0"
