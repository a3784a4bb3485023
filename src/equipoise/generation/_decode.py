"""The decoding loop: left-padded batches, one key-value cache, finished rows dropped on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from equipoise.generation._base import Sampling

Tensor = torch.Tensor
_KEEP = 0.75
"""The batch is compacted once fewer than this share of its rows still write: copying the cache for each one costs more."""


@dataclass
class Reply:
    """Tokens of one reply so far, its end token included, and whether the model ended it."""

    ids: list[int]
    ended: bool = False


class RoomyLayer(DynamicLayer):
    """A growing cache layer with spare room: a new token is written in place instead of copying all earlier ones."""

    _STEP = 64
    keys: Any
    values: Any

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [N, heads, new, size] keys and values; return all of them so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room: list[Tensor] = []
        used = self.get_seq_length()
        total = used + key_states.shape[-2]
        if not self._room or self._room[0].shape[-2] < total or self._room[0].shape[0] != key_states.shape[0]:
            self._room = [
                _widened(old, new, used, total + self._STEP) for old, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., used:total, :] = new
        self.keys, self.values = (room[..., :total, :] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        if self.is_initialized:
            used = self.get_seq_length()
            self._room = [room[indices] for room in self._room]
            self.keys, self.values = (room[..., :used, :] for room in self._room)


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[NDArray[np.int32]],
    sampling: Sampling,
    uniforms: NDArray[np.float64],
    ends: frozenset[int],
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[Reply]:
    """Continue each prompt until an end token, a stop string or the length limit.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids of each prompt, each at least one.
        sampling: temperature, nucleus and the rest.
        uniforms: [N, max_new_tokens] numbers in [0, 1); row n, column t decides token t of reply n. Unused at temperature 0.
        ends: ids that end a reply.
        stopped: told a reply's ids so far, says whether they end in a stop string.

    Returns:
        One reply per prompt, in order.
    """
    device = next(model.parameters()).device
    step_forward = _Forward(model)
    ids, mask = _left_padded(prompts, device)
    draws = torch.from_numpy(uniforms).to(device)
    seen = _seen(ids, mask, model.config.get_text_config().vocab_size) if sampling.repetition_penalty != 1.0 else None
    replies = [Reply([]) for _ in prompts]
    rows = list(range(len(prompts)))  # which reply each row of the batch writes
    for step in range(sampling.max_new_tokens):
        tokens = choose(step_forward(ids, mask), sampling, draws[rows, step], seen)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            reply = replies[row]
            if not reply.ended:
                reply.ids.append(token)
                reply.ended = token in ends or (stopped is not None and stopped(reply.ids))
        writing = [place for place, row in enumerate(rows) if not replies[row].ended]
        if not writing:
            break
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if len(writing) < _KEEP * len(rows):
            kept = torch.tensor(writing, device=device)
            ids, mask, seen = ids[kept], mask[kept], None if seen is None else seen[kept]
            step_forward.keep(kept)
            rows = [rows[place] for place in writing]
    return replies


def choose(logits: Tensor, sampling: Sampling, draws: Tensor, seen: Tensor | None = None) -> Tensor:
    """The next token of each row. logits [N, V], draws [N] in [0, 1), seen bool [N, V] → int64 [N].

    Penalty, temperature, top-k, then top-p, in transformers' order. The draw is turned into a token by inverting the
    cumulative distribution, so one number a token is all the randomness there is, on any device.
    """
    logits = logits.float()
    if seen is not None:
        penalised = torch.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    index: Tensor | None = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, index = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        logits, index = logits.sort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(logits.double(), dim=-1)
    if sampling.top_p < 1:
        before = mass.cumsum(dim=-1) - mass
        mass = torch.where(before < sampling.top_p, mass, 0.0)
    cumulative = mass.cumsum(dim=-1)
    target = draws.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    # A draw next to 1 may round to the total; the last token with any mass is then the one meant.
    last = (mass > 0).long().mul(torch.arange(mass.shape[-1], device=mass.device)).amax(dim=-1, keepdim=True)
    place = torch.minimum(place, last)
    return (place if index is None else index.gather(1, place)).squeeze(1)


class _Forward:
    """One step of the model: the whole prompt first, then one token a row, on a cache where the family has one."""

    def __init__(self, model: Any) -> None:
        self._model = model
        takes = set(inspect.signature(model.forward).parameters)
        self._positions = "position_ids" in takes
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._cache: DynamicCache | None = None
        if supports_cache(model):
            self._cache = DynamicCache(config=model.config)
            self._cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self._cache.layers]

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask int64 [N, L] from the first token on → logits [N, V] of the next token."""
        inputs: dict[str, Any] = {"attention_mask": mask, **self._extra}
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        if self._cache is not None:
            done = self._cache.get_seq_length()
            ids, positions = ids[:, done:], positions[:, done:]
            inputs |= {"past_key_values": self._cache, "use_cache": True}
        if self._positions:
            inputs["position_ids"] = positions
        logits: Tensor = self._model(input_ids=ids, **inputs).logits
        return logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these from the cache."""
        if self._cache is not None:
            self._cache.batch_select_indices(rows)


def supports_cache(model: Any) -> bool:
    """Whether the family keeps keys and values that rows can be dropped from. Others (Mamba) run again from the start."""
    return "past_key_values" in inspect.signature(model.forward).parameters and not getattr(model, "_is_stateful", False)


def _left_padded(prompts: Sequence[NDArray[np.int32]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [N, longest]. Padding takes id 0: masked, so which one does not matter."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _seen(ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """bool [N, V]: which tokens stand in each row's prompt, padding left out."""
    counts = torch.zeros((len(ids), vocabulary), dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(1, ids, mask).bool()


def _widened(old: Tensor, new: Tensor, used: int, room: int) -> Tensor:
    """A buffer of `room` positions shaped like `new`, holding the first `used` positions of `old`."""
    buffer = new.new_zeros((*new.shape[:-2], room, new.shape[-1]))
    if used:
        buffer[..., :used, :] = old
    return buffer
