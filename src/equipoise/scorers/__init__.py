"""Scorers (completions in, verdicts out) and the `score` stage."""

from equipoise.scorers._stage import ScoreSettings, score

__all__ = ["ScoreSettings", "score"]
