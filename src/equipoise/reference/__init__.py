"""The reference store: log-probs under the reference model, computed once, kept under an explicit key."""
