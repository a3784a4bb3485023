"""The rows a model continues together: prompts run without padding to each other, their keys and values joined in one cache.

    prompts of like length ──▶ one forward a group ──▶ keys and values ─┐
    rows that still write ────────────────────────────────────────────▶ joined, left-padded to the longest ──▶ steps

Rows leave when they are done and others take their places, so the batch stays full while prompts are waiting.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Tensor = torch.Tensor
Ids = NDArray[np.int32]

PREFIX = 16
"""Tokens that all prompts must begin with for this beginning to be run once: below, the copies cost more."""
POSITIONS = 4096
"""Positions of one forward over prompts, at most (a single longer prompt excepted): bounds its activations."""


class RoomyLayer(DynamicLayer):
    """A growing cache layer with spare room: a new token is written in place instead of copying all earlier ones."""

    _STEP = 64
    keys: Any
    values: Any

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no position and no room."""
        super().lazy_initialization(key_states, value_states)
        self._room: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [N, heads, new, size] keys and values; return all of them so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        total = used + key_states.shape[-2]
        if not self._room or self._room[0].shape[-2] < total:
            self._room = [
                _widened(old, new, used, total + self._STEP) for old, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., used:total, :] = new
        self.keys, self.values = (room[..., :total, :] for room in self._room)
        return self.keys, self.values


@dataclass
class _Part:
    """Keys and values of some rows, [N, heads, columns, size] a layer (None: a layer that keeps none), and which rows to take.

    A row of n tokens has its first `prefix` ones in the first columns and the others in the last n − prefix.
    """

    layers: list[tuple[Tensor, Tensor] | None]
    take: list[int]
    lengths: list[int]
    prefix: int = 0

    def into(self, target: Tensor, layer: int, which: int) -> None:
        """Write the rows taken, keys (0) or values (1) of a layer, into target [rows, heads, width, size], ending in its last column."""
        kept = self.layers[layer]
        assert kept is not None
        source = kept[which]
        columns, width = source.shape[2], target.shape[2]
        size = min(columns, width)
        chosen = source if self.take == list(range(len(source))) else source[torch.tensor(self.take, device=source.device)]
        target[:, :, width - size :] = chosen[:, :, columns - size :]
        if self.prefix:
            for row, length in enumerate(self.lengths):
                target[row, :, width - length : width - length + self.prefix] = source[0, :, : self.prefix]


class Rows:
    """Rows of a family whose cache can be cut and joined (see `joins`).

    Args:
        model: a causal language model in eval mode.
        prefix: tokens every prompt begins with, run once; may be empty.
    """

    def __init__(self, model: Any, prefix: Ids) -> None:
        self._call = _Call(model)
        self._cache: DynamicCache | None = None
        self._arrived: list[_Part] = []
        self._lengths: list[int] = []
        self._prefix = prefix
        self._begin: list[tuple[Tensor, Tensor] | None] = []

    def prefill(self, prompts: Sequence[Ids]) -> Tensor:
        """Run prompts, equal ones once; they wait for `settle`. Returns the logits [N, V] of their first new tokens."""
        if len(self._prefix) and not self._begin:
            cache = self._call.cache([])
            self._call(self._prefix[None], np.ones((1, len(self._prefix)), dtype=np.int64), cache)
            self._begin = _kept(cache)
        unlike = list({prompt.tobytes(): prompt for prompt in prompts}.values())
        place = {prompt.tobytes(): number for number, prompt in enumerate(unlike)}
        size = len(self._prefix)
        ids, mask = left_padded([prompt[size:] for prompt in unlike])
        mask = np.concatenate([np.ones((len(unlike), size), dtype=np.int64), mask], axis=1)
        cache = self._call.cache([pair and tuple(part.expand(len(unlike), -1, -1, -1) for part in pair) for pair in self._begin])
        logits = self._call(ids, mask, cache)
        take = [place[prompt.tobytes()] for prompt in prompts]
        self._arrived.append(_Part(_kept(cache), take, [len(prompt) for prompt in prompts], size))
        return logits[torch.tensor(take, device=logits.device)]

    def settle(self, stay: Sequence[int], join: Sequence[int]) -> None:
        """Go on with these of the current rows, in order, then these of the rows prefilled since (numbered across the calls)."""
        parts = [] if self._cache is None else [_Part(_kept(self._cache), list(stay), [self._lengths[row] for row in stay])]
        start = 0
        for part in self._arrived:
            mine = [number - start for number in join if start <= number < start + len(part.take)]
            parts.append(_Part(part.layers, [part.take[row] for row in mine], [part.lengths[row] for row in mine], part.prefix))
            start += len(part.take)
        parts = [part for part in parts if part.take]
        self._arrived, self._cache = [], None
        self._lengths = [length for part in parts for length in part.lengths]
        if parts:
            self._cache = self._joined(parts)

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Append a token to each row. lengths: tokens of each row, this one included. Returns the next logits [N, V]."""
        assert self._cache is not None
        self._lengths = list(lengths)
        width = self._cache.get_seq_length() + 1
        mask = (np.arange(width)[None, :] >= width - np.array(lengths)[:, None]).astype(np.int64)
        return self._call(np.array(tokens)[:, None], mask, self._cache)

    def _joined(self, parts: Sequence[_Part]) -> DynamicCache:
        cache = self._call.cache([])
        width, count = max(self._lengths), len(self._lengths)
        for number, layer in enumerate(cache.layers):
            pairs = [part.layers[number] for part in parts]
            if pairs[0] is None:
                continue  # a layer that reads another one's keys and values
            for which, name in enumerate(("keys", "values")):
                like = pairs[0][which]
                room = like.new_zeros((count, like.shape[1], width + RoomyLayer._STEP, like.shape[3]))
                start = 0
                for part in parts:
                    part.into(room[start : start + len(part.take), :, :width], number, which)
                    start += len(part.take)
                if not layer.is_initialized:
                    layer.lazy_initialization(like, like)
                layer._room.append(room)
                setattr(layer, name, room[..., :width, :])
            for part in parts:
                part.layers[number] = None  # freed as soon as copied: two whole caches are never held
        return cache


class Alone:
    """The same for families whose state cannot be joined (recurrent ones, other caches): one row at a time."""

    def __init__(self, model: Any) -> None:
        self._call = _Call(model)
        self._has_cache = "past_key_values" in inspect.signature(model.forward).parameters and not getattr(model, "_is_stateful", False)
        self._cache: Any = None
        self._ids: Ids = np.zeros(0, dtype=np.int32)

    def prefill(self, prompts: Sequence[Ids]) -> Tensor:
        """Run the one prompt. Returns logits [1, V]."""
        (self._ids,) = prompts
        self._cache = self._call.native_cache() if self._has_cache else None
        return self._call(self._ids[None], np.ones((1, len(self._ids)), dtype=np.int64), self._cache)

    def settle(self, stay: Sequence[int], join: Sequence[int]) -> None:
        """Nothing to join."""

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Append a token; without a cache everything is run again from the start. Returns logits [1, V]."""
        self._ids = np.append(self._ids, tokens)
        ids = self._ids if self._cache is None else self._ids[-1:]
        return self._call(ids[None], np.ones((1, len(self._ids)), dtype=np.int64), self._cache)


class _Call:
    """The model's forward on numpy ids and masks, with the arguments its family takes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        takes = set(inspect.signature(model.forward).parameters)
        self._positions = "position_ids" in takes
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def __call__(self, ids: Any, mask: Any, cache: Any) -> Tensor:
        """ids [N, new], mask [N, so far + new] → logits [N, V] after the last token."""
        inputs: dict[str, Any] = {"attention_mask": torch.from_numpy(mask).to(self._device), **self._extra}
        if self._positions:
            positions = (mask.cumsum(axis=1) - 1).clip(min=0)[:, mask.shape[1] - ids.shape[1] :]
            inputs["position_ids"] = torch.from_numpy(positions).to(self._device)
        if cache is not None:
            inputs |= {"past_key_values": cache, "use_cache": True}
        logits: Tensor = self._model(input_ids=torch.from_numpy(ids.astype(np.int64)).to(self._device), **inputs).logits
        return logits[:, -1]

    def native_cache(self) -> DynamicCache:
        """The family's own cache, empty."""
        return DynamicCache(config=self._model.config)

    def cache(self, begin: Sequence[Any]) -> DynamicCache:
        """A cache that keeps every position, beginning with these keys and values. The masks see to windows."""
        cache = self.native_cache()
        cache.layers = [RoomyLayer() if isinstance(layer, DynamicLayer) else layer for layer in cache.layers]
        for layer, pair in zip(cache.layers, begin, strict=False):
            if pair is not None:
                layer.update(*pair)
        return cache


def joins(model: Any) -> bool:
    """Whether rows of the family's cache can be cut out and joined: keys and values by position, all of them or a window's."""
    if "past_key_values" not in inspect.signature(model.forward).parameters or getattr(model, "_is_stateful", False):
        return False
    config = model.config.get_text_config()
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    chunked = getattr(config, "attention_chunk_size", None) or "chunked_attention" in (getattr(config, "layer_types", None) or ())
    return not chunked and all(type(layer) in kinds for layer in DynamicCache(config=model.config).layers)


def shared_prefix(model: Any, prompts: Sequence[Ids]) -> Ids:
    """What all prompts begin with (a system prompt), where running it once pays. Each keeps a token of its own.

    Not with windows: between the beginning and the rest of a shorter prompt is padding, and windows count it.
    """
    first = min(prompts, key=len)
    size = len(first) - 1
    for prompt in prompts:
        unlike = np.flatnonzero(prompt[:size] != first[:size])
        size = int(unlike[0]) if len(unlike) else size
    windows = any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers)
    return first[: size if len(prompts) > 1 and size >= PREFIX and not windows else 0]


def groups(lengths: Sequence[int], spare: int) -> list[list[int]]:
    """Numbers of prompts to run in one forward each. lengths fall; a group ends before its padding exceeds `spare` positions."""
    found: list[list[int]] = []
    padding = 0
    for number, length in enumerate(lengths):
        longest = lengths[found[-1][0]] if found else 0
        padding += longest - length
        if not found or padding > spare or longest * (len(found[-1]) + 1) > POSITIONS:
            found.append([])
            padding = 0
        found[-1].append(number)
    return found


def spare_padding(device: torch.device) -> int:
    """Padding [positions] that costs about as much as one more forward.

    Reading the weights once costs a CPU about 20 positions of SmolLM2-135M and starting its kernels some more; an
    accelerator starts many kernels for little work.
    """
    return 32 if device.type == "cpu" else 1024


def left_padded(prompts: Sequence[Ids]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """ids and mask, int64 [N, longest]. Padding takes id 0: masked, so which one does not matter."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _kept(cache: Any) -> list[tuple[Tensor, Tensor] | None]:
    return [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]


def _widened(old: Tensor, new: Tensor, used: int, room: int) -> Tensor:
    """A buffer of `room` positions shaped like `new`, holding the first `used` positions of `old`."""
    buffer = new.new_zeros((*new.shape[:-2], room, new.shape[-1]))
    if used:
        buffer[..., :used, :] = old
    return buffer
