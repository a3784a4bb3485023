"""Loading, packed batches, attention, token log-probs, weights."""
