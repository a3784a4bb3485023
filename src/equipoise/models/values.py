"""Q, V and a reward for every token, read off a causal language model's logits.

    Q(s, a) = β logit(s, a)      V(s) = β logsumexp_a logit(s, a)      r_t = Q(s_t, y_t) − V(s_{t+1}),  V after the end = 0

Derived here, not read in a paper: arXiv 2507.00018 ("Implicit Reward as the Bridge") names the relation in its abstract;
the rest is a token MDP with known transitions and no discount. Then Q − V = β log π, and over a reply the rewards telescope:

    Σ_t r_t = β Σ_t log π(y_t | s_t) + V(s_0)

A policy fixes its logits only up to a constant for each state, and no loss on log-probs sees that constant: V, and with it
how the reward is spread over tokens, is a property of the parametrisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from equipoise.core.errors import NumericsError
from equipoise.models.batch import PackedBatch
from equipoise.models.logps import policy_statistics

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class TokenValues:
    """q, v, reward: [R] each, in β·nats; float32, or float64 for float64 logits."""

    q: Tensor
    v: Tensor
    reward: Tensor


def token_values(logits: Tensor, target: Tensor, ends: Tensor, beta: float = 1.0) -> TokenValues:
    """Q, V and reward of R tokens, reply after reply, each reply's tokens in order.

    Args:
        logits: [R, V], of the state each token was chosen in.
        target: int64 [R], the tokens chosen.
        ends: bool [R], True at the last token of each reply; the last one of all must be.
        beta: nats to reward.

    Raises:
        NumericsError: shapes that do not fit, or a last reply without an end.
    """
    if not logits.shape[:1] == target.shape == ends.shape:
        raise NumericsError(f"{tuple(logits.shape)} logits, {tuple(target.shape)} targets and {tuple(ends.shape)} ends do not fit.")
    if len(ends) and not ends[-1]:
        raise NumericsError("The last token must end its reply.")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    q = beta * wide.gather(1, target[:, None]).squeeze(1)
    v = beta * torch.logsumexp(wide, dim=-1)
    after = torch.where(ends, 0.0, v.roll(-1))
    return TokenValues(q, v, q - after)


def reply_rewards(model: Any, batch: PackedBatch, beta: float = 1.0) -> Tensor:
    """The reward r_t of every reply token. Returns [N, T], 0 where a reply has no token."""
    logps, stats = policy_statistics(model, batch, ["lse"])
    v = stats["lse"]
    # Where a reply has ended the statistics are 0, as V after the end is.
    after = torch.nn.functional.pad(v[:, 1:], (0, 1))
    return beta * (logps + v - after)
