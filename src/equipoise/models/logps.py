"""Token log-probabilities of a packed batch: the only shift-and-gather of the package.

`source` and `target` of the batch already say which position predicts which token, so nothing is shifted here. The head
runs on reply positions only, inside the model's forward: chunked (`models/heads.py`), or through `logits_to_keep`, which
serves every family and is what the chunked one is checked against. The log-softmax is float32 whatever the model's dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch

from equipoise.core.errors import NumericsError
from equipoise.data.rows import Branch, TokenRow
from equipoise.models._elementwise import wide_dtype
from equipoise.models.attention import packed_rows
from equipoise.models.batch import PackedBatch, pack
from equipoise.models.gradients import replaced_embedding
from equipoise.models.heads import can_replace, head_logps, replaced_head
from equipoise.models.quantised import in_low_precision
from equipoise.models.stats import head_statistics, statistics

Tensor = torch.Tensor
Head = Literal["chunked", "logits"]
HEAD_TOLERANCE, HEAD_TOLERANCE_LOW = 1e-4, 0.1
"""Nats by which the two heads may differ on the probe, in float32 and with 16-bit numbers; a scale or cap moves them by far more."""
_heads: WeakKeyDictionary[Any, Head] = WeakKeyDictionary()


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target], float32, keeping one logits-sized buffer instead of autograd's three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """logits [R, V], any float dtype; target int64 [R] → [R] nats, float32 (float64 for float64 logits)."""
        wide = logits.to(wide_dtype(logits.dtype))
        lse = torch.logsumexp(wide, dim=-1)
        ctx.save_for_backward(logits, target, lse)
        return wide.gather(1, target[:, None]).squeeze(1) - lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """∂/∂logits = (onehot(target) − softmax) · gradient."""
        logits, target, lse = ctx.saved_tensors
        (gradient,) = gradients
        wide = logits.to(wide_dtype(logits.dtype))
        result = torch.exp(wide - lse[:, None]).mul_(-gradient[:, None])
        result.scatter_add_(1, target[:, None], gradient[:, None])
        return result.to(logits.dtype), None


def token_logps(logits: Tensor, target: Tensor) -> Tensor:
    """log π(target) under each row of logits. [R, V], [R] → [R] nats."""
    if logits.shape[:1] != target.shape:
        raise NumericsError(f"{tuple(logits.shape)} logits do not fit {tuple(target.shape)} targets.")
    return TokenLogps.apply(logits, target)  # type: ignore[no-untyped-call]


def policy_logps(model: Any, batch: PackedBatch, head: Head | None = None) -> Tensor:
    """Log-probs of every reply token. Returns [N, T], float32, 0 where a reply has no token.

    `model` is the wrapped model (DDP, PEFT, autocast), so its forward hooks run; the head runs inside that forward.
    head: None takes the one that serves this model.
    """
    chunked = (head or head_of(model, batch)) == "chunked"
    values = _chunked(model, batch) if chunked else token_logps(reply_logits(model, batch), batch.target)
    return by_reply(batch, values)


def policy_statistics(
    model: Any, batch: PackedBatch, names: Sequence[str], reference: Tensor | None = None, head: Head | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_logps`, and statistics of the whole distribution at each reply token (`models/stats.py`), in one forward pass.

    reference: [R, V] logits of the reference (`reply_logits`), for kl_ref. Returns [N, T] log-probs and name → [N, T], 0
    where a reply has no token.
    """
    if (head or head_of(model, batch)) == "chunked":

        def read(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return head_statistics(hidden, weight, bias, batch.target, names, reference)

        with replaced_head(unwrapped(model).get_output_embeddings(), batch.source, read):
            table = _run(model, batch)[0]
    else:
        table = statistics(reply_logits(model, batch), batch.target, names, reference)
    logps, *stats = (by_reply(batch, column) for column in table.unbind(1))
    return logps, dict(zip(names, stats, strict=True))


def by_reply(batch: PackedBatch, values: Tensor) -> Tensor:
    """[R] values of reply tokens as [N, T], 0 elsewhere."""
    empty = torch.zeros(batch.mask.shape, dtype=values.dtype, device=values.device)
    return empty.index_put((batch.branch, batch.offset), values)


def head_of(model: Any, batch: PackedBatch) -> Head:
    """Which head serves this model: `chunked` where it gives the model's own log-probs on two tokens of the first batch.

    It does not where the output layer is no plain matrix, or where the model scales or caps its logits afterwards.
    """
    base = unwrapped(model)
    if not can_replace(base.get_output_embeddings()):  # asked each time: an adapter may have been put on it since
        return "logits"
    if base not in _heads:
        _heads[base] = "chunked" if _heads_agree(model, batch) else "logits"
    return _heads[base]


def _heads_agree(model: Any, batch: PackedBatch) -> bool:
    ids = batch.ids.flatten()[:4].cpu().numpy().astype(np.int32)
    ids = np.resize(ids, 4)
    row = TokenRow("head", ids[:2], (Branch("sample", ids[2:], {"learn": np.ones(2, dtype=bool)}),))
    probe = pack([row], "separate" if batch.padding is None else "padded").to(batch.ids.device)
    with evaluating(model), torch.no_grad():
        ours, native = _chunked(model, probe), token_logps(reply_logits(model, probe), probe.target)
    low = in_low_precision(model) or torch.is_autocast_enabled(batch.ids.device.type)
    return bool((ours - native).abs().max() <= (HEAD_TOLERANCE_LOW if low else HEAD_TOLERANCE))


def _chunked(model: Any, batch: PackedBatch) -> Tensor:
    """[R] log-probs through the chunked head."""

    def read(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return head_logps(hidden, weight, bias, batch.target)[:, None]

    with replaced_head(unwrapped(model).get_output_embeddings(), batch.source, read):
        return _run(model, batch)[0, :, 0]


def scores(model: Any, batch: PackedBatch) -> Tensor:
    """[N] one score per reply from a sequence-classification model (its first logit), float32. Padded form only."""
    if batch.padding is None:
        raise NumericsError("Scores are read from padded rows.")
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.padding.long()}
    if getattr(_config(model), "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.segments
    return model(**inputs).logits[:, 0].float()


def _run(model: Any, batch: PackedBatch, **more: Any) -> Tensor:
    """What the model's forward gives as logits for this batch, in its form."""
    inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False, **more}
    with replaced_embedding(unwrapped(model).get_input_embeddings()):
        if batch.padding is None:
            with packed_rows(batch.rows):
                return model(**inputs, position_ids=batch.positions).logits
        return model(**inputs, attention_mask=batch.padding.long()).logits


def reply_logits(model: Any, batch: PackedBatch) -> Tensor:
    """[R, V] logits that predict each reply token, in the model's dtype: all of them at once."""
    if not takes_logits_to_keep(model):
        return _run(model, batch).flatten(0, 1).index_select(0, batch.source)
    if batch.padding is None:
        return _run(model, batch, logits_to_keep=batch.source).flatten(0, 1)
    width = batch.ids.shape[1]
    kept, place = torch.unique(batch.source % width, return_inverse=True)
    return _run(model, batch, logits_to_keep=kept)[batch.source // width, place]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode within this block; nothing is done to one that is in it."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


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
