"""The response-only head: log-probs of reply tokens from hidden states, in chunks, without a full logits tensor.

For one chunk of positions, logits become e = exp(logits − max) in place, and z = Σe. Everything after that is a matrix
product with e or a sum over R rows, since with log π = logit[target] − max − log z

    ∂log π/∂hidden = W[target] − (e W)/z        ∂log π/∂W = onehot(target) hiddenᵀ − (e/z) hiddenᵀ

and 1/z and the incoming gradient scale rows of hidden states, never rows of V. So no pass over [R, V] is made in the
backward but its two matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from equipoise.models._elementwise import current, forward_dtype, wide_dtype
from equipoise.models.gradients import gradient_of, grows_in_place, replaced_forward

Tensor = torch.Tensor
CHUNK_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}
"""float32 size of one chunk's logits: on a CPU near what a last-level cache holds, on a GPU enough rows for a full-speed product."""
KEEP_BYTES = 2**30
"""Where W is trained, e is kept for the backward up to this size (three products a token); above it, it is computed again (four)."""


class HeadLogps(torch.autograd.Function):
    """log softmax(hidden Wᵀ + bias)[target] in float32 nats (float64 for float64 inputs), keeping at most `KEEP_BYTES`.

    With W frozen (LoRA) ∂/∂hidden is computed in the forward, where e is at hand: two products a token, nothing kept but [R, H].
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        """hidden [R, H] and weight [V, H] of any float dtypes (hidden's is computed in), bias [V] or None, target int64 [R] → [R]."""
        matrix = weight.to(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ctx.kind = "trained" if needs_weight or needs_bias else ("frozen" if needs_hidden else "none")
        rows, vocabulary = len(hidden), len(weight)
        keep = ctx.kind == "trained" and rows * vocabulary * hidden.element_size() <= KEEP_BYTES
        kept = hidden.new_empty(rows, vocabulary) if keep else None
        values = torch.empty(rows, dtype=wide_dtype(hidden.dtype), device=hidden.device)
        tops, sums = torch.empty_like(values), torch.empty_like(values)
        direction = torch.empty_like(hidden) if ctx.kind == "frozen" else None
        ctx.kernels = current()
        for cut in chunks(hidden, vocabulary):
            exponentials = _logits(hidden[cut], matrix, bias, None if kept is None else kept[cut])
            picked, tops[cut], sums[cut] = ctx.kernels.exponentials(exponentials, target[cut], None)
            values[cut] = picked - sums[cut].log()
            if direction is not None:
                direction[cut] = _direction(exponentials, sums[cut], matrix, target[cut])
        ctx.save_for_backward(hidden, weight, bias, target, tops, sums, kept, direction)
        ctx.grows = weight if needs_weight and grows_in_place(weight) else None
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients with respect to hidden, weight and bias, each in the dtype of its tensor; the weight's may be added in place."""
        hidden, weight, bias, target, tops, sums, kept, direction = ctx.saved_tensors
        (gradient,) = gradients
        if direction is not None:
            return direction * gradient[:, None].to(direction.dtype), None, None, None
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        matrix = weight.to(hidden.dtype)
        to_hidden = torch.empty_like(hidden) if needs_hidden else None
        in_place = ctx.grows is not None
        to_weight = None
        if needs_weight:
            to_weight = gradient_of(ctx.grows) if in_place else torch.empty_like(weight, dtype=wide_dtype(weight.dtype))
        to_bias = torch.zeros_like(bias, dtype=wide_dtype(weight.dtype)) if needs_bias else None
        # What is kept is there as a whole, and so are its products: W's gradient is read and written once.
        for number, cut in enumerate(chunks(hidden, len(weight)) if kept is None else (slice(None),)):
            exponentials = kept
            if exponentials is None:
                exponentials = _logits(hidden[cut], matrix, bias)
                ctx.kernels.exponentials(exponentials, target[cut], tops[cut])
            scale = gradient[cut]
            if to_hidden is not None:
                to_hidden[cut] = _direction(exponentials, sums[cut], matrix, target[cut]).mul_(scale[:, None])
            shrunk = -(scale / sums[cut])
            if to_weight is not None:
                rows = (hidden[cut] * shrunk[:, None]).to(hidden.dtype)
                holds = in_place or number > 0  # else it is empty, and what lies there is not to be read
                if to_weight.dtype == hidden.dtype:
                    torch.addmm(to_weight, exponentials.t(), rows, beta=float(holds), out=to_weight)
                elif not isinstance(hidden, FakeTensor) and adds_wide(to_weight.dtype, hidden.dtype, hidden.device):
                    torch.addmm(to_weight, exponentials.t(), rows, out_dtype=to_weight.dtype, beta=float(holds), out=to_weight)
                elif holds:
                    to_weight += exponentials.t() @ rows
                else:
                    to_weight.copy_(exponentials.t() @ rows)
            if to_bias is not None:
                to_bias += (exponentials.t() @ shrunk.to(exponentials.dtype)[:, None])[:, 0]
        if to_weight is not None:
            to_weight.index_add_(0, target, (hidden * gradient[:, None]).to(to_weight.dtype))
        if to_bias is not None:
            to_bias.index_add_(0, target, gradient.to(to_bias.dtype))
        return (
            to_hidden,
            None if to_weight is None or in_place else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(bias.dtype),
            None,
        )


def head_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """log π(target) of each row of hidden states. [R, H], [V, H], [V] or None, [R] → [R] nats. Under autocast in its dtype."""
    hidden = hidden.to(forward_dtype(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        return HeadLogps.apply(hidden, weight, bias, target)  # type: ignore[no-untyped-call]


def can_replace(head: Any) -> bool:
    """Whether a model's output layer is a plain linear map, so that `head_logps` can stand in for it."""
    return type(head) is torch.nn.Linear


@contextmanager
def replaced_head(head: Any, source: Tensor, read: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Iterator[None]:
    """Within this block an output layer returns what `read` makes of the hidden states at flat positions `source`, not logits.

    read: (hidden [R, H], weight [V, H], bias [V] or None) → [R, C], which the model hands on as its logits [1, R, C]. It
    still runs inside the model's own forward, where DDP, FSDP and PEFT expect the layer's weight to be read.
    """

    def forward(hidden: Tensor) -> Tensor:
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, source)
        return read(chosen, head.weight, head.bias)[None]

    with replaced_forward(head, forward):
        yield


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """[C, V] of one chunk, in `out` where given."""
    logits = torch.mm(hidden, weight.t(), out=out) if out is not None else torch.mm(hidden, weight.t())
    return logits if bias is None else logits.add_(bias)


def _direction(exponentials: Tensor, sums: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """W[target] − (e W)/z, [C, H]: which way the log-probs grow."""
    mean = torch.mm(exponentials, weight)
    return torch.sub(weight.index_select(0, target), mean.mul_((1 / sums)[:, None].to(mean.dtype)), out=mean)


@cache
def adds_wide(wide: torch.dtype, low: torch.dtype, device: torch.device) -> bool:
    """Whether a product of 16-bit matrices can be added to a float32 one without being rounded on the way. No CPU does."""
    if device.type == "cpu":
        return False
    total, part = torch.ones(16, 16, dtype=wide, device=device), torch.full((16, 16), 1 / 16, dtype=low, device=device)
    try:
        torch.addmm(total, part, part, out_dtype=wide, beta=1.0, out=total)
    except (RuntimeError, TypeError):  # an older torch, or a device without it
        return False
    return bool(torch.all(total == 1 + 1 / 16))


def chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    """Slices of the rows of `hidden`, as equal as can be, each with float32 logits of at most `CHUNK_BYTES`."""
    rows = len(hidden)
    size = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary))
    # Equal chunks rather than a small rest, which would be a slow product.
    count = max(1, -(-rows // size))
    return (slice(first, last) for first, last in pairwise(round(rows * number / count) for number in range(count + 1)))
