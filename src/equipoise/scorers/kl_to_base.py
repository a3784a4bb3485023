"""How far a policy has moved from its base, on its own replies.

For a reply y sampled from the policy, (log π(y|x) − log π_base(y|x)) / |y| is a single-sample estimate of the KL
divergence from base to policy per token, in nats (J. Schulman, "Approximating KL divergence", 2020, the estimator k1).
It is unbiased for replies drawn at temperature 1 without truncation of the distribution; under greedy decoding it
measures the log-ratio along the modal reply instead. Single values may be negative. The end token counts as a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from equipoise.generation._base import Completion
from equipoise.scorers._base import Scorer, Verdict
from equipoise.scorers._ratios import LogRatios, RatioSettings


class KlToBase(Scorer):
    """`kl_to_base`: mean nats a token of log π − log π_base. None for completions without token ids."""

    name = "kl_to_base"

    def __init__(self, ratios: LogRatios) -> None:
        self._ratios = ratios

    def __call__(self, completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order."""
        return [
            Verdict(completion.id, self.name, None, ratio)
            if isinstance(ratio, str)
            else Verdict(completion.id, self.name, ratio.nats / ratio.tokens)
            for completion, ratio in zip(completions, self._ratios(completions), strict=True)
        ]


class KlToBaseSettings(RatioSettings):
    """KL to the base."""

    scorer: Literal["kl_to_base"] = "kl_to_base"

    def build(self) -> Scorer:
        """Load both models."""
        return KlToBase(self.ratios())


SETTINGS = KlToBaseSettings
