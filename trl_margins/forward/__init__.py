"""From a model and a batch to log-probabilities."""
