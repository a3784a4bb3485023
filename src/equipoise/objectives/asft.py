"""Aligned supervised fine-tuning (ASFT): likelihood of the chosen reply and unlikelihood of the rejected one, no reference.

Not to be taken for *anchored* supervised fine-tuning, which shares the abbreviation: that one is `anchored_sft`.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import log_odds, logistic, pair_meters


class AlignedSFT(Objective):
    """L = −s·ℓ_w + λ(−log σ(β o_w) − log σ(−β o_l)), o = log p − log(1 − p), p = exp(ℓ).

    ℓ is the mean log-probability per token [nats], so p is the geometric mean of a reply's token probabilities; o is
    its log-odds. At β = s = 1 this is −(1+λ) log p_w − λ log(1 − p_l): two separate binary cross-entropies, with
    ∂L/∂ℓ_w = −(1+λ) and ∂L/∂ℓ_l = λ p_l/(1 − p_l), which fades as the rejected reply becomes unlikely.
    """

    paper: ClassVar[str] = (
        "arXiv 2409.10571 (abstract); the loss as restated in arXiv 2502.01237, sections 2.3 to 3.1 and appendix E, which also adds β"
    )
    departures: ClassVar[str] = (
        "The formula is third-party: read in 2502.01237, not in the paper's own text. The paper's λ is unknown, and that it normalises by "
        "length is 2502.01237's word. β (temperature) comes from 2502.01237 and s from its authors' code; β = s = 1 is the original loss. "
        "p is capped one rounding step below 1."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"))

    align_weight: float = Field(default=1.0, ge=0, description="λ: weight of the two alignment terms (some code calls it beta)")
    beta: float = Field(default=1.0, gt=0, description="temperature of the log-odds (no unit); 1 is the original loss")
    sft_weight: float = Field(
        default=1.0, ge=0, description="s: weight of the chosen reply's negative log-likelihood; 0 after an SFT stage"
    )
    length_normalize: bool = Field(
        default=True,
        description="mean log-probability per token; false takes the sum, where log(1 − p_l) vanishes for any reply of some length",
    )

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs. Raises DataError where a reply has no token to learn."""
        chosen, rejected = scored.side("chosen"), scored.side("rejected")
        chosen_logps, rejected_logps = chosen.policy_logps(), rejected.policy_logps()
        chosen_mean, rejected_mean = chosen_logps / chosen.lengths(), rejected_logps / rejected.lengths()
        chosen_score, rejected_score = (chosen_mean, rejected_mean) if self.length_normalize else (chosen_logps, rejected_logps)
        chosen_rewards = self.beta * log_odds(chosen_score)
        rejected_rewards = self.beta * log_odds(rejected_score)
        align = logistic(chosen_rewards) + logistic(-rejected_rewards)
        loss = self.align_weight * align - self.sft_weight * chosen_score
        meters = {
            **pair_meters(chosen_rewards, rejected_rewards, chosen_logps, rejected_logps),
            "nll": -chosen_mean.detach(),
        }
        return Losses(loss, meters)
