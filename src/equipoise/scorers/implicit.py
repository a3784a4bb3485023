"""A DPO-trained policy as a reward model of its own: β (log π(y|x) − log π_ref(y|x)).

Rafailov et al., arXiv 2305.18290, equation 5, without the prompt's constant β log Z(x): values compare replies to one
prompt, never replies to different prompts. Any pair of models with one tokenizer will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from equipoise.generation._base import Completion
from equipoise.scorers._base import Scorer, Verdict
from equipoise.scorers._ratios import LogRatios, RatioSettings


class ImplicitReward(Scorer):
    """`implicit`: β times the summed log-ratio, in nats. None, with the reason, where the reply has no tokens to score."""

    def __init__(self, ratios: LogRatios, beta: float = 0.1, name: str = "implicit") -> None:
        self._ratios, self._beta, self.name = ratios, beta, name

    def __call__(self, completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order."""
        return [
            Verdict(completion.id, self.name, None, ratio)
            if isinstance(ratio, str)
            else Verdict(completion.id, self.name, self._beta * ratio.nats)
            for completion, ratio in zip(completions, self._ratios(completions), strict=True)
        ]


class ImplicitSettings(RatioSettings):
    """The policy whose implicit reward is read, and its reference as the base."""

    scorer: Literal["implicit"] = "implicit"
    beta: float = Field(default=0.1, gt=0, description="the β the policy was trained with")
    name: str = Field(default="implicit", min_length=1, description="what the verdicts are signed with")
    text: Literal["missing", "always"] = Field(
        default="missing",
        description="when a reply's text is read instead of its token ids; always: other models' replies, with another tokenizer's ids",
    )

    def build(self) -> Scorer:
        """Load both models."""
        return ImplicitReward(self.ratios(self.text), self.beta, self.name)


SETTINGS = ImplicitSettings
