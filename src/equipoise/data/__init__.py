"""Preference data in: sources, transcripts, token rows, splits, plan. No torch."""
