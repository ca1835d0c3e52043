"""The command line of `fit`, `validate` and `test`: options, their errors in plain words, and the run's identity."""
