"""Which pieces of a reply a trained model makes likelier than its reference does, and which less likely.

The credit of a token is β (log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t)); over a reply it sums to the implicit reward of
arXiv 2305.18290, equation 5 (`scorers/implicit.py`). It says how the two models differ at each place of this text, given all
before it. It does not say which words made a judge like the reply, nor what in the training data caused the difference.

Beside the verdicts, `token_credit.jsonl` holds the tokens of each reply (docs/contracts.md). With `values`, every piece also
has the reward r_t that the policy's logits hold as Q-values (`models/values.py`), which depends on the parametrisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from equipoise.generation._base import Completion
from equipoise.scorers._base import Scorer, Verdict
from equipoise.scorers._pieces import pieces
from equipoise.scorers._ratios import Floats, LogRatios, Ratio, RatioSettings


class TokenCredit(Scorer):
    """`token_credit`: the sum over a reply, β times nats, and each piece's share of it as the verdict's detail."""

    def __init__(self, ratios: LogRatios, beta: float = 0.1, values: bool = False, name: str = "token_credit") -> None:
        self._ratios, self._beta, self._values, self.name = ratios, beta, values, name

    def __call__(self, completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order."""
        ratios = self._ratios(completions)
        rewards: Sequence[Floats | str | None] = self._ratios.rewards(completions, self._beta) if self._values else [None] * len(ratios)
        return [
            Verdict(item.id, self.name, None, ratio)
            if isinstance(ratio, str)
            else Verdict(item.id, self.name, self._beta * ratio.nats, detail=self._detail(item, ratio, reward))
            for item, ratio, reward in zip(completions, ratios, rewards, strict=True)
        ]

    def _detail(self, item: Completion, ratio: Ratio, reward: Any) -> dict[str, Any]:
        """The line of `token_credit.jsonl`, without its id."""
        rows: list[dict[str, Any]] = []
        start = 0
        for piece in pieces(ratio.ids, self._ratios.tokenizer, item.text):
            span = slice(start, start + piece.tokens)
            policy, base = float(ratio.policy[span].sum()), float(ratio.base[span].sum())
            row = {"text": piece.text, "tokens": piece.tokens, "credit": self._beta * (policy - base), "policy": policy, "base": base}
            row |= {"reward": float(reward[span].sum())} if reward is not None else {}
            rows.append(row | ({"aside": piece.aside} if piece.aside else {}))
            start += piece.tokens
        return {"beta": self._beta, "credit": self._beta * ratio.nats, "tokens": ratio.tokens, "pieces": rows}


class TokenCreditSettings(RatioSettings):
    """Policy and reference, and which replies."""

    scorer: Literal["token_credit"] = "token_credit"
    name: str = Field(default="token_credit", pattern=r"^[A-Za-z0-9_-]+$", description="what the verdicts are signed with; names the file")
    beta: float = Field(default=0.1, gt=0, description="β; the same for all models whose credits are compared")
    text: Literal["missing", "always"] = Field(default="missing", description="when a reply's text is read instead of its token ids")
    values: bool = Field(default=False, description="also the reward r_t of each token, from the policy's logits as Q-values")
    ids: tuple[str, ...] = Field(default=(), description="ids of the completions to score; none: all")

    def asked(self, completions: Sequence[Completion]) -> Sequence[Completion]:
        """The completions named by `ids`."""
        return [item for item in completions if item.id in self.ids] if self.ids else completions

    def build(self) -> Scorer:
        """Load both models."""
        return TokenCredit(self.ratios(self.text), self.beta, self.values, self.name)


SETTINGS = TokenCreditSettings
