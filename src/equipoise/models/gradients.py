"""Gradients of the vocabulary's matrices, added where they are to stay instead of handed to autograd.

[V, H] is large beside a micro-batch: 113 MB for SmolLM2-135M, 1 GB for Llama-1B. For tied weights autograd would make one
such tensor for the output layer, one full of zeros for the embedding, and their sum, and then add that to `.grad`: in every
micro-batch, and on top of all it has in memory.

Only inside `gradients_in_place`, which the training step enters where `.grad` is all that anyone waits for: DDP and FSDP
hook into autograd's own accumulation, so a micro-batch whose gradients are exchanged does without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

Tensor = torch.Tensor
_in_place: ContextVar[bool] = ContextVar("equipoise_gradients_in_place", default=False)


@contextmanager
def gradients_in_place() -> Iterator[None]:
    """Forward passes inside this block are followed by `backward()`, which may write to `.grad` directly."""
    token = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(token)


def grows_in_place(weight: Tensor) -> bool:
    """Whether this weight's gradient may be added to `weight.grad` directly.

    It must be a leaf that nothing watches. Not in 16 bits, where a sum of many small parts would lose them.
    """
    return (
        _in_place.get()
        and weight.is_leaf
        and weight.requires_grad
        and weight.dtype in (torch.float32, torch.float64)
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )


def gradient_of(weight: Tensor) -> Tensor:
    """`weight.grad`, made of zeros where there is none yet."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@contextmanager
def replaced_embedding(embedding: Any) -> Iterator[None]:
    """Within this block a plain embedding adds its gradient in place, where that is allowed."""
    if type(embedding) is not torch.nn.Embedding or embedding.scale_grad_by_freq or embedding.sparse or embedding.max_norm is not None:
        yield
        return
    with replaced_forward(embedding, lambda ids: _embed(embedding, ids)) if grows_in_place(embedding.weight) else nullcontext():
        yield


@contextmanager
def replaced_forward(module: Any, forward: Any) -> Iterator[None]:
    """Within this block a module's forward is another function; its hooks run as ever."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class _InPlaceEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, ignored: int | None) -> Tensor:
        """weight [V, H], ids int64 of any shape, ignored: an id that gets no gradient → ids' shape + [H]."""
        ctx.weight, ctx.ignored = weight, ignored
        ctx.save_for_backward(ids)
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        """Adds to `weight.grad`; autograd gets nothing."""
        (ids,) = ctx.saved_tensors
        rows = gradients[0].flatten(0, -2).to(ctx.weight.dtype)
        if ctx.ignored is not None:
            rows = rows.masked_fill((ids.flatten() == ctx.ignored)[:, None], 0.0)
        # Sorted, where index_add_ would be in any order on a GPU: the same run gives the same bits.
        gradient_of(ctx.weight).index_put_((ids.flatten(),), rows, accumulate=True)
        return None, None, None


def _embed(embedding: torch.nn.Embedding, ids: Tensor) -> Tensor:
    return _InPlaceEmbedding.apply(embedding.weight, ids, embedding.padding_idx)  # type: ignore[no-untyped-call]
