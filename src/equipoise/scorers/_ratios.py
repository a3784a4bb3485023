"""Log-ratios of a policy to its base over a reply's tokens: what `kl_to_base`, `implicit` and `token_credit` read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from equipoise.core.records import Record, Reply
from equipoise.data._encode import Encoder
from equipoise.data.accounting import Accounting
from equipoise.data.rows import Branch, TokenRow
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import OVER_LIMIT, fitted_prompts, tokenise_units
from equipoise.generation._base import Completion
from equipoise.generation._text import model_inputs
from equipoise.scorers._base import ScorerSettings

Floats = NDArray[np.float64]
Text = Literal["never", "missing", "always"]
NO_TOKENS = "no token ids"
_FEW = 12
"""Rows with no prompt in common up to which packing is not tried: it would cost more than it saves."""
_TOLERANCE = 1e-4
"""Nats a token by which packed rows may differ from padded ones in float32: what training's start check allows."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Log-probs of one reply's tokens under policy and base, [T] nats each, and the tokens."""

    ids: tuple[int, ...]
    policy: Floats
    base: Floats

    @property
    def nats(self) -> float:
        """log π(y|x) − log π_base(y|x)."""
        return float(self.policy.sum() - self.base.sum())

    @property
    def tokens(self) -> int:
        """How many tokens the reply has, its end included."""
        return len(self.ids)


class LogRatios:
    """Scores replies' tokens under two causal models that share a tokenizer.

    Args:
        policy: the model that wrote the completions (or another one to ask about them).
        base: the model it is compared with.
        tokenizer: the tokenizer of both.
        tokenise: how prompts became tokens when the completions were written.
        batch_tokens: tokens of a batch, padding included, at most; a single row may exceed it.
        text: when a reply's text is made tokens, its end included, as in training: `never`; `missing`, where it carries no
            token ids; `always`, also where another tokenizer may have written those it carries.
    """

    def __init__(
        self,
        policy: Any,
        base: Any,
        tokenizer: Any,
        tokenise: TokeniseSettings | None = None,
        batch_tokens: int = 8192,
        text: Text = "never",
    ) -> None:
        self._models, self.tokenizer = (policy, base), tokenizer
        self._tokenise, self._batch_tokens, self._text = tokenise or TokeniseSettings(), batch_tokens, text

    def __call__(self, completions: Sequence[Completion]) -> list[Ratio | str]:
        """One ratio per completion, in order; where there is none, the reason."""
        rows = self._rows(completions)
        told = [row for row in rows if isinstance(row, TokenRow)]
        if not told:
            return [row for row in rows if isinstance(row, str)]
        policy, base = (self._read(model, told) for model in self._models)
        return [row if isinstance(row, str) else Ratio(tuple(row.branches[0].ids.tolist()), policy[row.id], base[row.id]) for row in rows]

    def rewards(self, completions: Sequence[Completion], beta: float) -> list[Floats | str]:
        """The policy's own reward of every token, [T] in β·nats (`models/values.py`), in order; where there is none, the reason."""
        from equipoise.models.values import reply_rewards

        rows = self._rows(completions)
        told = [row for row in rows if isinstance(row, TokenRow)]
        found = self._read(self._models[0], told, partial(reply_rewards, beta=beta)) if told else {}
        return [row if isinstance(row, str) else found[row.id] for row in rows]

    def _rows(self, completions: Sequence[Completion]) -> list[TokenRow | str]:
        """A row for each completion, its number as its id; or why there is none."""
        from_ids = [number for number, item in enumerate(completions) if item.token_ids and self._text != "always"]
        rest = sorted({*range(len(completions))} - {*from_ids})
        found: dict[int, TokenRow | str] = dict(zip(from_ids, self._rows_of_ids(completions, from_ids), strict=True))
        found |= self._rows_of_texts(completions, rest) if self._text != "never" else dict.fromkeys(rest, NO_TOKENS)
        return [found[number] for number in range(len(completions))]

    def _rows_of_ids(self, completions: Sequence[Completion], numbers: Sequence[int]) -> Iterator[TokenRow | str]:
        """Rows of the very tokens that were generated, or the reason for which their prompt cannot stand before them."""
        items = [completions[number] for number in numbers]
        rooms = [len(item.token_ids) for item in items]
        prompts = fitted_prompts([item.prompt for item in items], self.tokenizer, self._tokenise, rooms) if items else []
        for number, item, prompt in zip(numbers, items, prompts, strict=True):
            yield self._reason(prompt) if isinstance(prompt, str) else token_row(str(number), prompt, item.token_ids)

    def _rows_of_texts(self, completions: Sequence[Completion], numbers: Sequence[int]) -> dict[int, TokenRow | str]:
        """Rows as training makes them of a prompt and a reply, or the reason for which training would drop one."""
        encoder = Encoder(self.tokenizer, self._tokenise.model_copy(update={"learn": "reply"}))
        found: dict[int, TokenRow | str] = {}
        for number in numbers:
            accounting = Accounting()
            item = completions[number]
            rows = tokenise_units([Record(str(number), item.prompt, (Reply(item.text, "sample"),))], encoder, accounting)
            found[number] = rows[0] if rows else self._reason(next(iter(accounting.dropped)))
        return found

    def _reason(self, why: str) -> str:
        return f"{why} ({self._tokenise.max_length} tokens)" if why == OVER_LIMIT else why

    def _read(self, model: Any, rows: Sequence[TokenRow], read: Callable[[Any, Any], Any] | None = None) -> dict[str, Floats]:
        """What `read` (None: the log-probs) says of each reply's tokens, [T] by the row's id."""
        from equipoise.generation._rows import spare_padding

        # Packed, a prompt is run once for all its replies, and nothing is padded. To try it costs three rows.
        units = shared_prompts(rows, self._batch_tokens)
        packs = (len(rows) > _FEW or len(units) < len(rows)) and self._packs(model, rows)
        units = units if packs else list(rows)
        spare = self._batch_tokens if packs else spare_padding(next(model.parameters()).device)
        found: dict[str, Floats] = {}
        for batch in length_batches([unit.tokens for unit in units], self._batch_tokens, spare):
            members = [units[index] for index in batch]
            values = self._run(model, members, "packed" if packs else "padded", read).cpu().numpy()
            names = [(name, branch) for unit in members for name, branch in zip(unit.id.split(), unit.branches, strict=True)]
            found |= {name: line[: len(branch.ids)] for (name, branch), line in zip(names, values, strict=True)}
        return found

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

    def _run(self, model: Any, rows: Sequence[TokenRow], form: Literal["packed", "padded"], read: Any = None) -> Any:
        """float64 [N, T] of every reply token."""
        import torch

        from equipoise.models.attention import NAME, attention_of, register
        from equipoise.models.batch import pack
        from equipoise.models.logps import policy_logps, unwrapped

        register()
        batch = pack(rows, form, pad_id=self.tokenizer.pad_token_id or 0).to(next(model.parameters()).device)
        with torch.inference_mode(), nullcontext() if form == "padded" else attention_of(unwrapped(model), NAME):
            return (read or policy_logps)(model, batch).double()


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

    def ratios(self, text: Text = "never") -> LogRatios:
        """Load both models."""
        from equipoise.models.load import load_causal, load_tokenizer

        policy, base = (
            load_causal(name, dtype=self.dtype, device=self.device) for name in (self.model_name_or_path, self.base_model_name_or_path)
        )
        return LogRatios(policy, base, load_tokenizer(self.model_name_or_path), self.tokenise, self.batch_tokens, text)
