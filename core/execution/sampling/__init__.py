"""Parts of the sampler: random numbers, edits of logits, filters and draws, log-probabilities."""
