"""Log-ratios of a policy to its base over a completion's own tokens: what `kl_to_base` and `implicit` read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from equipoise.data.rows import Branch, TokenRow
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompt_ids
from equipoise.generation._base import Completion
from equipoise.generation._text import model_inputs
from equipoise.scorers._base import ScorerSettings, Verdict


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
        rows = [(index, self._row(item)) for index, item in enumerate(completions) if item.token_ids]
        found: list[Ratio | None] = [None] * len(completions)
        for batch in length_batches([row.tokens for _, row in rows], self._batch_tokens):
            members = [rows[place] for place in batch]
            policy, base = (self._sums(model, [row for _, row in members]) for model in self._models)
            for (index, row), ours, theirs in zip(members, policy, base, strict=True):
                found[index] = Ratio(ours - theirs, len(row.branches[0].ids))
        return found

    def _row(self, completion: Completion) -> TokenRow:
        prompt = prompt_ids(completion.prompt, self._tokenizer, self._tokenise, room=len(completion.token_ids))
        return token_row(completion.id, prompt, completion.token_ids)

    def _sums(self, model: Any, rows: Sequence[TokenRow]) -> list[float]:
        import torch

        from equipoise.models.batch import pack
        from equipoise.models.logps import policy_logps

        batch = pack(rows, "padded", pad_id=self._tokenizer.pad_token_id or 0).to(next(model.parameters()).device)
        with torch.inference_mode():
            values: list[float] = policy_logps(model, batch).double().sum(dim=1).tolist()
        return values


def token_row(row_id: str, prompt: Any, reply: Sequence[int]) -> TokenRow:
    """A row of one prompt and one sampled reply."""
    ids = np.asarray(reply, dtype=np.int32)
    return TokenRow(row_id, np.asarray(prompt, dtype=np.int32), (Branch("sample", ids, {"learn": np.ones(len(ids), dtype=bool)}),))


def length_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Numbers of the rows of each batch, longest first, rows × longest row at most `budget` (a single row may exceed it)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
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
