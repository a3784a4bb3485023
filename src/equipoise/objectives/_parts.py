"""Pieces objectives share: stable links, labels, ranks, the two sides of a pair, and the meters methods report under TRL's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import softplus

from equipoise.core.errors import DataError
from equipoise.objectives._base import Losses, Scored

Tensor = torch.Tensor
Reduction = Literal["mean", "sum"]

EXPONENT_LIMIT = 80.0
"""Largest exponent an objective may raise e to: e^80 ≈ 5.5e34 stays finite in float32."""


def logistic(margin: Tensor) -> Tensor:
    """−log σ(margin), elementwise and stable for any size of margin."""
    return softplus(-margin)


def pair_meters(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_logps: Tensor | None = None, rejected_logps: Tensor | None = None
) -> Mapping[str, Tensor]:
    """[U] meters of a pair: rewards, their margin, and 1 where the chosen reply is preferred (½ at a tie)."""
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    right = (chosen > rejected).to(chosen.dtype) + 0.5 * (chosen == rejected).to(chosen.dtype)
    meters = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": right,
    }
    if chosen_logps is not None and rejected_logps is not None:
        meters |= {"logps/chosen": chosen_logps.detach(), "logps/rejected": rejected_logps.detach()}
    return meters


def desirable(sample: Scored, method: str) -> Tensor:
    """[U] True where the reply is labelled desirable. Raises DataError where a label is missing."""
    label = sample.facts.get("label")
    if label is None or bool(torch.isnan(label).any()):
        raise DataError(f"{method} needs a label (true or false) for every reply.")
    return label > 0.5


def label_meters(sample: Scored, good: Tensor, rewards: Tensor) -> Mapping[str, Tensor]:
    """[U] meters of labelled replies: rewards and log-probs, of desirable ones as chosen and of others as rejected, else NaN."""
    reward, logps = rewards.detach(), sample.policy_logps().detach()
    missing = torch.full_like(reward, torch.nan)
    return {
        "rewards/chosen": torch.where(good, reward, missing),
        "rewards/rejected": torch.where(good, missing, reward),
        "logps/chosen": torch.where(good, logps, missing),
        "logps/rejected": torch.where(good, missing, logps),
    }


def of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """[U] for each value, the one of `others` that has its rank in ascending order; ties rank in the order given."""
    ranks = torch.argsort(torch.argsort(values, stable=True))
    return torch.sort(others).values[ranks]


def log1mexp(logps: Tensor) -> Tensor:
    """log(1 − e^a) for log-probabilities a ≤ 0, elementwise, keeping its digits near 0 and far below it.

    At a = 0 (probability one) the value is −∞; a is capped one rounding step below 0, so value and gradient stay finite.
    """
    safe = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    near = safe > -0.6931471805599453
    # Each branch gets a harmless argument where the other is taken: `where` multiplies the unused gradient by 0, not away.
    close = torch.log(-torch.expm1(torch.where(near, safe, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, safe)))
    return torch.where(near, close, far)


def log_odds(logps: Tensor) -> Tensor:
    """log p − log(1 − p) from log-probabilities log p."""
    return logps - log1mexp(logps)


def power_score(logs: Tensor, alpha: float) -> Tensor:
    """(1 − u^{−α})/α of u = e^logs, elementwise; log u at α = 0. The exponent is capped at EXPONENT_LIMIT, where the gradient ends."""
    if alpha == 0:
        return logs
    return -torch.expm1((-alpha * logs).clamp(max=EXPONENT_LIMIT)) / alpha


def negative_log_likelihood(side: Scored, reduction: Reduction) -> Tensor:
    """[N] −log π_θ(y|x) of each reply: its sum over tokens, or its mean per token [nats]."""
    return -_reduced(side, side.policy_logps(), reduction)


@dataclass(frozen=True)
class Pair:
    """The two sides of each unit with their rewards [U], of which a pairwise method makes its loss."""

    chosen: Scored
    rejected: Scored
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margin(self) -> Tensor:
        """[U] chosen reward − rejected reward."""
        return self.chosen_rewards - self.rejected_rewards

    def losses(self, loss: Tensor, **more: Tensor) -> Losses:
        """These losses [U] with the meters of a pair and more of them, by name."""
        logps = self.chosen.policy_logps(), self.rejected.policy_logps()
        more = {name: value.detach() for name, value in more.items()}
        return Losses(loss, {**pair_meters(self.chosen_rewards, self.rejected_rewards, *logps), **more})


def ratio_pair(scored: Scored, beta: float, reduction: Reduction = "sum") -> Pair:
    """Rewards β·(log π_θ − log π_ref), summed over each reply's tokens or their mean."""
    chosen, rejected = scored.side("chosen"), scored.side("rejected")
    rewards = [beta * _reduced(side, side.logratios(), reduction) for side in (chosen, rejected)]
    return Pair(chosen, rejected, *rewards)


def policy_pair(scored: Scored, beta: float, reduction: Reduction) -> Pair:
    """Rewards β·log π_θ without a reference, summed over each reply's tokens or their mean."""
    chosen, rejected = scored.side("chosen"), scored.side("rejected")
    rewards = [beta * _reduced(side, side.policy_logps(), reduction) for side in (chosen, rejected)]
    return Pair(chosen, rejected, *rewards)


def _reduced(side: Scored, sums: Tensor, reduction: Reduction) -> Tensor:
    """Sums [N] as they are, or divided by each reply's tokens. An empty reply raises either way."""
    lengths = side.lengths()
    return sums / lengths if reduction == "mean" else sums
