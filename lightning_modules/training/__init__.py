"""Training: batches as log-probabilities, losses and gradients."""
