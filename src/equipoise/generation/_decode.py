"""The decoding loop: prompts enter a batch, each step writes a token of every row, finished rows make room for waiting prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise.generation._base import Sampling
from equipoise.generation._rows import Alone, Ids, Rows, groups, joins, shared_prefix, spare_padding

Tensor = torch.Tensor
_KEEP = 0.75
"""Finished rows leave once fewer than this share of the batch still writes: copying the cache for each one costs more."""


@dataclass
class Reply:
    """Tokens of one reply so far, its end token included, and whether the model ended it."""

    ids: list[int]
    ended: bool = False


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Ids],
    sampling: Sampling,
    uniforms: NDArray[np.float64],
    ends: frozenset[int],
    stopped: Callable[[list[int]], bool] | None = None,
    batch_tokens: int | None = None,
) -> list[Reply]:
    """Continue each prompt until an end token, a stop string or the length limit.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids of each prompt, each at least one.
        sampling: temperature, nucleus and the rest.
        uniforms: [N, max_new_tokens] numbers in [0, 1); row n, column t decides token t of reply n. Unused at
            temperature 0, where one column is enough.
        ends: ids that end a reply.
        stopped: told a reply's ids so far, says whether they end in a stop string.
        batch_tokens: rows × (longest row + max_new_tokens) written at a time, at most; None: all at once.

    Returns:
        One reply per prompt, in order.
    """
    writer = _Writer(model, prompts, sampling, uniforms, ends, stopped)
    joint = joins(model)
    batch: Rows | Alone = Rows(model, shared_prefix(model, prompts)) if joint else Alone(model)
    spare = spare_padding(writer.device)
    waiting = deque(sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index)))
    rows: list[int] = []  # which reply each row of the batch writes
    while True:
        stay = [place for place, row in enumerate(rows) if not writer.done(row)]
        if len(stay) < _KEEP * len(rows) or not rows:
            rows = [rows[place] for place in stay]
            fresh = _admitted(waiting, [writer.length(row) for row in rows], prompts, sampling.max_new_tokens, batch_tokens if joint else 0)
            for group in groups([len(prompts[index]) for index in fresh], spare):
                members = [fresh[number] for number in group]
                writer.write(members, batch.prefill([prompts[index] for index in members]))
            join = [number for number, index in enumerate(fresh) if not writer.done(index)]
            batch.settle(stay, join)
            rows += [fresh[number] for number in join]
            if not rows and not waiting:
                return writer.replies
            if not rows:
                continue
        writer.write(rows, batch.step([writer.replies[row].ids[-1] for row in rows], [writer.length(row) for row in rows]))


def _admitted(waiting: deque[int], lengths: Sequence[int], prompts: Sequence[Ids], new: int, budget: int | None) -> list[int]:
    """Take from the front of `waiting` what fits beside rows of these lengths; at least one where there are none."""
    fresh: list[int] = []
    width = max(lengths, default=0)
    while waiting:
        width = max(width, len(prompts[waiting[0]]))
        count = len(lengths) + len(fresh) + 1
        if count > 1 and budget is not None and count * (width + new) > budget:
            break
        fresh.append(waiting.popleft())
    return fresh


class _Writer:
    """The replies, and what turns logits into their next tokens."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Ids],
        sampling: Sampling,
        uniforms: NDArray[np.float64],
        ends: frozenset[int],
        stopped: Callable[[list[int]], bool] | None,
    ) -> None:
        self.replies = [Reply([]) for _ in prompts]
        self.device = next(model.parameters()).device
        self._prompts, self._sampling, self._uniforms, self._ends, self._stopped = prompts, sampling, uniforms, ends, stopped

    def done(self, index: int) -> bool:
        """Whether a reply is complete."""
        reply = self.replies[index]
        return reply.ended or len(reply.ids) >= self._sampling.max_new_tokens

    def length(self, index: int) -> int:
        """Tokens of prompt and reply so far."""
        return len(self._prompts[index]) + len(self.replies[index].ids)

    def write(self, rows: Sequence[int], logits: Tensor) -> None:
        """Append a token to each of these replies that is not done. logits [rows, V]."""
        steps = [min(len(self.replies[row].ids), self._uniforms.shape[1] - 1) for row in rows]
        draws = torch.from_numpy(self._uniforms[rows, steps]).to(logits.device)
        tokens = choose(logits, self._sampling, draws, self._seen(rows, logits))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not self.done(row):
                reply = self.replies[row]
                reply.ids.append(token)
                reply.ended = token in self._ends or (self._stopped is not None and self._stopped(reply.ids))

    def _seen(self, rows: Sequence[int], logits: Tensor) -> Tensor | None:
        """bool [rows, V]: tokens that stand in each prompt and reply, where a penalty asks for them."""
        if self._sampling.repetition_penalty == 1.0:
            return None
        seen = np.zeros((len(rows), logits.shape[1]), dtype=bool)
        for place, row in enumerate(rows):
            seen[place, self._prompts[row]] = True
            seen[place, self.replies[row].ids] = True
        return torch.from_numpy(seen).to(logits.device)


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
