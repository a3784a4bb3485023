"""Statistics of the whole next-token distribution at each reply token, beside the log-prob of the token itself.

They are computed by plain autograd from one chunk of logits at a time; a chunk's logits are dropped after the forward and
made again in the backward, so that no full logits tensor is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from equipoise.core.errors import NumericsError
from equipoise.models._elementwise import forward_dtype, wide_dtype
from equipoise.models.heads import chunks

Tensor = torch.Tensor
NAMES = ("lse", "entropy", "log_sum_sq", "kl_ref")


def statistics(logits: Tensor, target: Tensor, names: Sequence[str], reference: Tensor | None = None) -> Tensor:
    """The target's log-prob and the statistics asked for, as columns. All carry gradient to `logits`, none to `reference`.

    Args:
        logits: [R, V] of the policy. target: int64 [R].
        names: of `NAMES`; V a vocabulary, π the policy's distribution, π_ref the reference's:
            lse log Σ_v e^logit, entropy −Σ π log π, log_sum_sq log Σ π², kl_ref Σ π_ref log(π_ref/π); all in nats.
        reference: [R, V] logits of the reference, for kl_ref.

    Returns:
        [R, 1 + len(names)], float32 (float64 for float64 logits).

    Raises:
        NumericsError: an unknown name, or kl_ref without reference logits.
    """
    wide = logits.to(wide_dtype(logits.dtype))
    lse = torch.logsumexp(wide, 1)
    logps = wide - lse[:, None]
    columns = [logps.gather(1, target[:, None])[:, 0]]
    for name in names:
        if name == "lse":
            columns.append(lse)
        elif name == "entropy":
            columns.append(-(logps.exp() * logps).sum(1))
        elif name == "log_sum_sq":
            columns.append(torch.logsumexp(2 * logps, 1))
        elif name == "kl_ref" and reference is not None:
            theirs = torch.log_softmax(reference.detach().to(wide.dtype), 1)
            columns.append((theirs.exp() * (theirs - logps)).sum(1))
        else:
            raise NumericsError(f"The statistic {name!r} " + ("needs reference logits." if name in NAMES else "is not known."))
    return torch.stack(columns, 1)


def head_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, names: Sequence[str], reference: Tensor | None = None
) -> Tensor:
    """`statistics` of logits = hidden Wᵀ + bias, chunk by chunk. [R, H], [V, H], [V] or None, [R] → [R, 1 + len(names)]."""
    hidden = hidden.to(forward_dtype(hidden))

    def one(rows: Tensor, matrix: Tensor, offset: Tensor | None, targets: Tensor, theirs: Tensor | None) -> Tensor:
        logits = torch.nn.functional.linear(rows, matrix.to(rows.dtype), None if offset is None else offset.to(rows.dtype))
        return statistics(logits, targets, names, theirs)

    with torch.autocast(hidden.device.type, enabled=False):
        parts = [
            checkpoint(
                one,
                hidden[cut],
                weight,
                bias,
                target[cut],
                None if reference is None else reference[cut],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for cut in chunks(hidden, len(weight))
        ]
    return torch.cat(parts)
