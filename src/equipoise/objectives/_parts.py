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
