"""Pieces objectives share: stable links and the meters every pairwise method reports under TRL's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import softplus

Tensor = torch.Tensor


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
