"""Token log-probabilities of a packed batch: the only shift-and-gather of the package.

`source` and `target` of the batch already say which position predicts which token, so nothing is shifted here; the
head runs on reply positions only (`logits_to_keep`), and the log-softmax is taken in float32 whatever the model's dtype.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from equipoise.core.errors import NumericsError
from equipoise.models.attention import packed_rows
from equipoise.models.batch import PackedBatch

Tensor = torch.Tensor


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target], float32, keeping one logits-sized buffer instead of autograd's three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """logits [R, V], any float dtype; target int64 [R] → [R] nats, float32 (float64 for float64 logits)."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        lse = torch.logsumexp(wide, dim=-1)
        ctx.save_for_backward(logits, target, lse)
        return wide.gather(1, target[:, None]).squeeze(1) - lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """∂/∂logits = (onehot(target) − softmax) · gradient."""
        logits, target, lse = ctx.saved_tensors
        (gradient,) = gradients
        wide = logits if logits.dtype == torch.float64 else logits.float()
        result = torch.exp(wide - lse[:, None]).mul_(-gradient[:, None])
        result.scatter_add_(1, target[:, None], gradient[:, None])
        return result.to(logits.dtype), None


def token_logps(logits: Tensor, target: Tensor) -> Tensor:
    """log π(target) under each row of logits. [R, V], [R] → [R] nats."""
    if logits.shape[:1] != target.shape:
        raise NumericsError(f"{tuple(logits.shape)} logits do not fit {tuple(target.shape)} targets.")
    return TokenLogps.apply(logits, target)  # type: ignore[no-untyped-call]


def policy_logps(model: Any, batch: PackedBatch) -> Tensor:
    """Log-probs of every reply token. Returns [N, T], float32, 0 where a reply has no token.

    `model` is the wrapped model (DDP, PEFT, autocast), so its forward hooks run; the head runs inside that forward.
    """
    logits = _logits(model, batch)
    values = token_logps(logits, batch.target)
    empty = torch.zeros(batch.mask.shape, dtype=values.dtype, device=values.device)
    return empty.index_put((batch.branch, batch.offset), values)


def scores(model: Any, batch: PackedBatch) -> Tensor:
    """[N] one score per reply from a sequence-classification model (its first logit), float32. Padded form only."""
    if batch.padding is None:
        raise NumericsError("Scores are read from padded rows.")
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.padding.long()}
    if getattr(_config(model), "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.segments
    return model(**inputs).logits[:, 0].float()


def _logits(model: Any, batch: PackedBatch) -> Tensor:
    """[R, V] logits that predict each reply token."""
    if batch.padding is None:
        with packed_rows(batch.rows):
            inputs = {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False}
            if takes_logits_to_keep(model):
                return model(**inputs, logits_to_keep=batch.source).logits[0]
            return model(**inputs).logits[0].index_select(0, batch.source)
    width = batch.ids.shape[1]
    row, column = batch.source // width, batch.source % width
    inputs = {"input_ids": batch.ids, "attention_mask": batch.padding.long(), "use_cache": False}
    if not takes_logits_to_keep(model):
        return model(**inputs).logits[row, column]
    kept, place = torch.unique(column, return_inverse=True)
    return model(**inputs, logits_to_keep=kept).logits[row, place]


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model's forward can run its head on chosen positions only."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP, FSDP and PEFT wrappers."""
    model = getattr(model, "module", model)
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def _config(model: Any) -> Any:
    return unwrapped(model).config
