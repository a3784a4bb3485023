"""Scorers: completions in, verdicts out."""
