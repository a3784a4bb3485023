"""Verdicts in, estimates and paired comparisons out."""
