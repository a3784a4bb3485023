"""Log-ratios of a policy to its base over a completion's own tokens: what `kl_to_base` and `implicit` read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from equipoise.data.rows import Branch, TokenRow
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompt_ids, prompts_ids
from equipoise.generation._base import Completion
from equipoise.generation._text import model_inputs
from equipoise.scorers._base import ScorerSettings, Verdict

_NO_LIMIT = 2**31
_TOLERANCE = 1e-4
"""Nats a token by which packed rows may differ from padded ones in float32: what training's start check allows."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """log π(y|x) − log π_base(y|x) of one completion: the sum in nats and its number of tokens."""

    nats: float
    tokens: int


class LogRatios:
    """Scores completions' tokens under two causal models that share a tokenizer.

    Args:
        policy: the model that wrote the completions (or another one to ask about them).
        base: the model it is compared with.
        tokenizer: the tokenizer of both.
        tokenise: how prompts became tokens when the completions were written.
        batch_tokens: tokens of a batch, padding included, at most; a single row may exceed it.
    """

    def __init__(self, policy: Any, base: Any, tokenizer: Any, tokenise: TokeniseSettings | None = None, batch_tokens: int = 8192) -> None:
        self._models, self._tokenizer = (policy, base), tokenizer
        self._tokenise, self._batch_tokens = tokenise or TokeniseSettings(), batch_tokens

    def __call__(self, completions: Sequence[Completion]) -> list[Ratio | None]:
        """One ratio per completion, in order; None where it carries no token ids."""
        told = [index for index, item in enumerate(completions) if item.token_ids]
        found: list[Ratio | None] = [None] * len(completions)
        if told:
            rows = self._rows([completions[index] for index in told])
            policy, base = (self._sums(model, rows) for model in self._models)
            for index, ours, theirs in zip(told, policy, base, strict=True):
                found[index] = Ratio(ours - theirs, len(completions[index].token_ids))
        return found

    def _rows(self, completions: Sequence[Completion]) -> list[TokenRow]:
        """A row for each completion; its id is its number."""
        unlimited = self._tokenise.model_copy(update={"max_length": _NO_LIMIT})
        prompts = prompts_ids([item.prompt for item in completions], self._tokenizer, unlimited)
        for number, item in enumerate(completions):
            if len(prompts[number]) + len(item.token_ids) > self._tokenise.max_length:
                prompts[number] = prompt_ids(item.prompt, self._tokenizer, self._tokenise, room=len(item.token_ids))
        return [
            token_row(str(number), prompt, item.token_ids) for number, (prompt, item) in enumerate(zip(prompts, completions, strict=True))
        ]

    def _sums(self, model: Any, rows: Sequence[TokenRow]) -> list[float]:
        """Summed log-probs of each row's reply."""
        from equipoise.generation._rows import spare_padding

        found: dict[str, float] = {}
        if self._packs(model, rows):
            # A prompt is run once for all its replies, and nothing is padded.
            units = shared_prompts(rows, self._batch_tokens)
            for batch in length_batches([unit.tokens for unit in units], self._batch_tokens, self._batch_tokens):
                members = [units[index] for index in batch]
                names = [row_id for unit in members for row_id in unit.id.split()]
                found.update(zip(names, self._run(model, members, "packed").sum(dim=1).tolist(), strict=True))
        else:
            spare = spare_padding(next(model.parameters()).device)
            for batch in length_batches([row.tokens for row in rows], self._batch_tokens, spare):
                members = [rows[index] for index in batch]
                found.update(zip([row.id for row in members], self._run(model, members, "padded").sum(dim=1).tolist(), strict=True))
        return [found[row.id] for row in rows]

    def _packs(self, model: Any, rows: Sequence[TokenRow]) -> bool:
        """Whether packed rows give the log-probs of the model's own attention, tried on the longest row twice over."""
        import torch

        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            return False  # rounding hides what is wrong
        longest = max(rows, key=lambda row: row.tokens)
        twice = TokenRow("twice", longest.prompt, longest.branches * 2)
        try:
            packed = self._run(model, [twice], "packed")
        # A family may fail in any way when its attention is replaced; whatever it raises, its rows are padded instead.
        except Exception:
            return False
        return bool((packed - self._run(model, [longest], "padded")).abs().max() <= _TOLERANCE)

    def _run(self, model: Any, rows: Sequence[TokenRow], form: Literal["packed", "padded"]) -> Any:
        """float64 [N, T] log-probs of every reply token."""
        import torch

        from equipoise.models.attention import NAME, attention_of, register
        from equipoise.models.batch import pack
        from equipoise.models.logps import policy_logps, unwrapped

        register()
        batch = pack(rows, form, pad_id=self._tokenizer.pad_token_id or 0).to(next(model.parameters()).device)
        with torch.inference_mode(), nullcontext() if form == "padded" else attention_of(unwrapped(model), NAME):
            return policy_logps(model, batch).double()


def shared_prompts(rows: Sequence[TokenRow], budget: int) -> list[TokenRow]:
    """One row for all replies to a prompt, as many as fit into `budget` tokens; its id holds theirs, in order."""
    units: list[TokenRow] = []
    open_units: dict[bytes, int] = {}
    for row in rows:
        key = row.prompt.tobytes()
        at = open_units.get(key)
        if at is not None and units[at].tokens + len(row.branches[0].ids) <= budget:
            units[at] = TokenRow(f"{units[at].id} {row.id}", row.prompt, units[at].branches + row.branches)
        else:
            open_units[key] = len(units)
            units.append(row)
    return units


def token_row(row_id: str, prompt: Any, reply: Sequence[int]) -> TokenRow:
    """A row of one prompt and one sampled reply."""
    ids = np.asarray(reply, dtype=np.int32)
    return TokenRow(row_id, np.asarray(prompt, dtype=np.int32), (Branch("sample", ids, {"learn": np.ones(len(ids), dtype=bool)}),))


def length_batches(lengths: Sequence[int], budget: int, spare: int) -> Iterator[list[int]]:
    """Numbers of the rows of each batch, longest first.

    rows × longest row is at most `budget` (a single row may exceed it), and a batch's padding at most `spare` positions.
    """
    batch: list[int] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        longest = lengths[batch[0]] if batch else lengths[index]
        padding += longest - lengths[index]
        if batch and (longest * (len(batch) + 1) > budget or padding > spare):
            yield batch
            batch, padding = [], 0
        batch.append(index)
    if batch:
        yield batch


class RatioSettings(ScorerSettings):
    """Two models and how their prompts become tokens."""

    model_name_or_path: str = Field(description="the policy: asset name, local folder (also a PEFT adapter's), or hub name")
    base_model_name_or_path: str = Field(description="the base it is compared with")
    tokenise: TokeniseSettings = Field(default=TokeniseSettings(), description="as when the completions were generated")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(default="float32", description="dtype of the weights")
    device: str | None = Field(default=None, description="where to run; None: the accelerator where there is one")
    batch_tokens: int = Field(default=8192, ge=1, description="tokens of a batch, padding included")

    def inputs(self) -> dict[str, str]:
        """Both models' files."""
        return {**model_inputs("policy", self.model_name_or_path), **model_inputs("base", self.base_model_name_or_path)}

    def ratios(self) -> LogRatios:
        """Load both models."""
        from equipoise.models.load import load_causal, load_tokenizer

        policy, base = (
            load_causal(name, dtype=self.dtype, device=self.device) for name in (self.model_name_or_path, self.base_model_name_or_path)
        )
        return LogRatios(policy, base, load_tokenizer(self.model_name_or_path), self.tokenise, self.batch_tokens)


def no_tokens(completion: Completion, by: str) -> Verdict:
    """The verdict on a completion that carries no token ids."""
    return Verdict(completion.id, by, None, "no token ids")
