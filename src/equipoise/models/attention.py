"""Attention over packed rows, through transformers' own registries: one attention function, one mask function.

The mask function hands every layer a `RowMask` (how the sequence is cut, and this layer's window) instead of a dense
mask; the attention function runs row by row: the prompt with its first reply causally, every further reply against the
prompt's keys and its own. On a CPU that is products over blocks of queries (`_rows`), on a CUDA device one kernel for all rows:
torch's variable-length flash kernel in 16 bits (`_varlen`), FlexAttention in float32 (`_flex`); elsewhere, and with dropout, SDPA.
Rules are applied on *positions*, so windows reach back into the shared prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from equipoise.core.errors import NumericsError
from equipoise.models import _flex, _rows, _varlen
from equipoise.models._elementwise import wide_dtype
from equipoise.models._readers import unwatched
from equipoise.models.batch import Span

Tensor = torch.Tensor
NAME = "equipoise_packed"

# What an attention layer may pass that changes the result in a way plain SDPA cannot express.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask", "alibi")
_current: ContextVar[tuple[Span, ...] | None] = ContextVar("equipoise_rows", default=None)


@dataclass
class RowMask:
    """What a layer needs to know instead of a dense mask. window: positions a token sees back, itself included; None: all."""

    rows: tuple[Span, ...]
    window: int | None
    _biases: dict[Any, Tensor] = field(default_factory=dict)
    _pieces: dict[torch.dtype, tuple[_rows.Piece, ...]] = field(default_factory=dict)
    _blocks: Any = None
    _layout: _varlen.Layout | None = None

    def bias(self, prompt: int, reply: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive mask [reply, prompt + reply] for a reply that attends to its prompt and itself. Kept for all layers."""
        key = (prompt, reply, dtype, device)
        if key not in self._biases:
            allowed = self._allowed(torch.arange(prompt, prompt + reply, device=device), torch.arange(prompt + reply, device=device))
            self._biases[key] = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)
        return self._biases[key]

    def causal(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Additive mask for a run of `length` positions from 0, or None where plain causal attention says the same."""
        if self.window is None or length <= self.window:
            return None
        return self.bias(0, length, dtype, device)

    def pieces(self, dtype: torch.dtype) -> tuple[_rows.Piece, ...]:
        """The rows as blocks of queries, as a CPU reads them. Kept for all layers. dtype: that of the scores."""
        if dtype not in self._pieces:
            self._pieces[dtype] = _rows.pieces(self.rows, self.window, dtype)
        return self._pieces[dtype]

    def layout(self, device: torch.device) -> _varlen.Layout:
        """The rows as segments of the variable-length kernel. Kept for all layers, the backward pass and recomputation."""
        if self._layout is None:
            self._layout = _varlen.layout(self.rows, device)
        return self._layout

    def blocks(self, device: torch.device) -> Any:
        """The same rule as FlexAttention's block mask. Kept for all layers, the backward pass and recomputation."""
        if self._blocks is None:
            self._blocks = _flex.block_mask(self.rows, self.window, device)
        return self._blocks

    def _allowed(self, query: Tensor, key: Tensor) -> Tensor:
        distance = query[:, None] - key[None, :]
        allowed = distance >= 0
        return allowed if self.window is None else allowed & (distance < self.window)


@contextmanager
def packed_rows(rows: tuple[Span, ...]) -> Iterator[None]:
    """Within this block, masks made by a model whose attention is ours follow these rows."""
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)


def row_mask(*_: Any, local_size: int | None = None, q_length: int | None = None, **kwargs: Any) -> RowMask:
    """The mask function registered with transformers. Raises NumericsError outside `packed_rows` or for a wrong length."""
    rows = _current.get()
    if rows is None:
        raise NumericsError("This model is set to packed attention and was called without packed rows; use `equipoise.models.logps`.")
    if q_length is not None and q_length != sum(row.length for row in rows):
        raise NumericsError(f"The model runs on {q_length} positions, the packed rows have {sum(row.length for row in rows)}.")
    if kwargs.get("chunk_size"):
        raise NumericsError("Chunked attention is not expressed on packed rows.")
    return RowMask(rows, local_size)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over packed rows. query [1, H, S, D], key and value [1, H_kv, S, D] → [1, S, H, D].

    Raises NumericsError where the layer asks for something this function does not do, so that it is never silently wrong.
    """
    with unwatched():
        return _attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs), None


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowMask | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> Tensor:
    if not isinstance(attention_mask, RowMask):
        raise NumericsError(f"{type(module).__name__} did not pass the row mask on; its attention cannot be packed.")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NumericsError(f"{type(module).__name__} uses {name}, which packed attention does not do.")
    window = kwargs.get("sliding_window")
    if (
        window is not None
        and attention_mask.window is None
        and attention_mask.rows
        and window < max(_reach(row) for row in attention_mask.rows)
    ):
        raise NumericsError(f"{type(module).__name__} has a window of {window} that its mask does not know of.")
    if key.shape[2] != query.shape[2]:
        raise NumericsError("Packed attention runs without a key-value cache.")
    if _varlen.usable(query, key, value, dropout):
        return _varlen.attend(query, key, value, attention_mask.layout(query.device), attention_mask.window, scaling)
    if _flex.usable(query, key, value, dropout):
        return _flex.attend(query, key, value, attention_mask.blocks(query.device), scaling)
    if _rows.usable(query, dropout):
        return _rows.attend(query, key, value, attention_mask.pieces(wide_dtype(query.dtype)), scaling)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # One split instead of many slices: its backward is one concatenation, a slice's would be a zero-filled copy each.
    heads = [length for row in attention_mask.rows for length in (row.prompt + row.branches[0], *row.branches[1:])]
    queries, keys, values = (iter(torch.split(part, heads, dim=2)) for part in (query, key, value))
    outputs = []
    for row in attention_mask.rows:
        first_q, first_k, first_v = next(queries), next(keys), next(values)
        bias = attention_mask.causal(first_q.shape[2], query.dtype, query.device)
        outputs.append(
            scaled_dot_product_attention(
                first_q, first_k, first_v, attn_mask=bias, is_causal=bias is None, scale=scaling, dropout_p=dropout
            )
        )
        for reply in row.branches[1:]:
            bias = attention_mask.bias(row.prompt, reply, query.dtype, query.device)
            joined_k = torch.cat([first_k[:, :, : row.prompt], next(keys)], dim=2)
            joined_v = torch.cat([first_v[:, :, : row.prompt], next(values)], dim=2)
            outputs.append(
                scaled_dot_product_attention(next(queries), joined_k, joined_v, attn_mask=bias, scale=scaling, dropout_p=dropout)
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _reach(row: Span) -> int:
    return row.prompt + max(row.branches)


def register() -> None:
    """Make `equipoise_packed` known to transformers. Safe to call again."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, row_mask)


@contextmanager
def attention_of(model: Any, name: str) -> Iterator[None]:
    """Run a model with another attention implementation inside this block, and put its own back afterwards."""
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
