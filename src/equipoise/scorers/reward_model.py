"""Reward models: any sequence-classification checkpoint, ours (Bradley–Terry) or a public one.

The text is laid out by the same code as in training: prompt and reply as a text pair for encoders (as arXiv 2509.09055
feeds its reward model), the chat template or a plain transcript for causal backbones. Truncation takes the oldest part
of the prompt and keeps the reply. The score is the first logit, as it is: no sigmoid, no standardising.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from equipoise.core.errors import DataError
from equipoise.core.records import Record, Reply
from equipoise.data._encode import Encoder
from equipoise.data.accounting import Accounting
from equipoise.data.rows import TokenRow
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import tokenise_units
from equipoise.generation._base import Completion
from equipoise.generation._text import model_inputs
from equipoise.scorers._base import Scorer, ScorerSettings, Verdict
from equipoise.scorers._ratios import length_batches


class RewardModel(Scorer):
    """Scores completions with a sequence classifier in memory.

    Args:
        model: in eval mode; its first logit is the score.
        tokenizer: its tokenizer.
        tokenise: layout and limit; the limit is lowered to what the model takes.
        batch_tokens: tokens of a batch, padding included, at most; a single row may exceed it.
        name: what the verdicts are signed with.
    """

    def __init__(
        self, model: Any, tokenizer: Any, tokenise: TokeniseSettings | None = None, batch_tokens: int = 8192, name: str = "reward"
    ) -> None:
        self._model, self._tokenizer, self._batch_tokens, self.name = model, tokenizer, batch_tokens, name
        asked = tokenise or TokeniseSettings()
        limit = min(asked.max_length, longest_input(model, tokenizer))
        self._encoder = Encoder(tokenizer, asked.model_copy(update={"max_length": limit, "learn": "reply"}))

    def __call__(self, completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order; None, with the reason, where a text cannot be laid out within the limit."""
        from equipoise.generation._rows import spare_padding

        records = [
            Record(str(number), completion.prompt, (Reply(completion.text, "sample"),)) for number, completion in enumerate(completions)
        ]
        rows = tokenise_units(records, self._encoder, Accounting())
        values: dict[str, float] = {}
        spare = spare_padding(next(self._model.parameters()).device)
        for batch in length_batches([row.tokens for row in rows], self._batch_tokens, spare):
            members = [rows[index] for index in batch]
            values |= dict(zip([row.id for row in members], self._scores(members), strict=True))
        return [
            Verdict(completion.id, self.name, values[record.id])
            if record.id in values
            else Verdict(completion.id, self.name, None, self._why_not(record))
            for completion, record in zip(completions, records, strict=True)
        ]

    def _scores(self, rows: Sequence[TokenRow]) -> list[float]:
        import torch

        from equipoise.models.batch import pack
        from equipoise.models.logps import scores

        pad = getattr(self._model.config, "pad_token_id", None)
        batch = pack(rows, "padded", pad_id=self._tokenizer.pad_token_id if pad is None else pad)
        with torch.inference_mode():
            values: list[float] = scores(self._model, batch.to(next(self._model.parameters()).device)).tolist()
        return values

    def _why_not(self, record: Record) -> str:
        accounting = Accounting()
        tokenise_units([record], self._encoder, accounting)
        return f"{next(iter(accounting.dropped))} ({self._encoder.settings.max_length} tokens)"


def longest_input(model: Any, tokenizer: Any) -> int:
    """Tokens a model takes at most: the smaller of its positions and its tokenizer's limit."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or int(tokenizer.model_max_length)
    # RoBERTa and its kin count positions from after the padding id, so two of them are never used.
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer"):
        positions -= int(config.pad_token_id) + 1
    return min(int(positions), int(tokenizer.model_max_length))


def pair_accuracy(scorer: Scorer, pairs: Sequence[Record], training_pairs: Sequence[Record]) -> dict[str, Any]:
    """How often a scorer prefers the chosen reply, next to guessing by length. Counts; intervals belong to `evaluation`.

    The length-only baseline says "longer is better" or "shorter is better", whichever is right more often on
    `training_pairs` (a draw there: longer), and is then counted on `pairs`. Length is in characters of the stripped text.

    Args:
        scorer: what is tried.
        pairs: held-out records with a chosen and a rejected reply.
        training_pairs: what the scorer was trained on; only the direction of the length rule is taken from them.

    Returns:
        `pairs` (n), `correct`, `ties`, `missing` (no verdict on either reply); `length_correct`, `length_ties` over the same
        n; `length_rule`; `length_unit`. A tie is not correct. pairs = correct + wrong + ties + missing.

    Raises:
        DataError: no pairs, or a record that lacks one of the two replies.
    """
    if not pairs:
        raise DataError("There are no held-out pairs to try a scorer on.")
    sides = [(_reply(pair, "chosen"), _reply(pair, "rejected")) for pair in pairs]
    better, worse = (
        scorer([Completion(pair.id, pair.prompt, texts[side]) for pair, texts in zip(pairs, sides, strict=True)]) for side in (0, 1)
    )
    known = [(a.value, b.value) for a, b in zip(better, worse, strict=True) if a.value is not None and b.value is not None]
    longer = length_margin(training_pairs) >= 0
    lengths = [(len(chosen) - len(rejected)) * (1 if longer else -1) for chosen, rejected in sides]
    return {
        "pairs": len(pairs),
        "correct": sum(a > b for a, b in known),
        "ties": sum(a == b for a, b in known),
        "missing": len(pairs) - len(known),
        "length_correct": sum(length > 0 for length in lengths),
        "length_ties": sum(length == 0 for length in lengths),
        "length_rule": "longer" if longer else "shorter",
        "length_unit": "characters",
    }


def length_margin(pairs: Sequence[Record]) -> int:
    """Pairs whose chosen reply is the longer one, less those whose rejected reply is."""
    differences = [len(_reply(pair, "chosen")) - len(_reply(pair, "rejected")) for pair in pairs]
    return sum(difference > 0 for difference in differences) - sum(difference < 0 for difference in differences)


def _reply(pair: Record, role: str) -> str:
    reply = pair.reply(role)
    if reply is None:
        raise DataError(f"Row {pair.id}: a pair needs a chosen and a rejected reply; {role} is missing.")
    return reply.text.strip()


class RewardModelSettings(ScorerSettings):
    """A reward model on this machine."""

    scorer: Literal["reward_model"] = "reward_model"
    model_name_or_path: str = Field(description="asset name, local folder or hub name of a sequence-classification model")
    tokenise: TokeniseSettings = Field(default=TokeniseSettings(), description="layout and limit of the text, as in its training")
    num_labels: int = Field(default=1, ge=1, description="logits the model gives a text; the first is the score")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(default="float32", description="dtype of the weights")
    device: str | None = Field(default=None, description="where to run; None: the accelerator where there is one")
    batch_tokens: int = Field(default=8192, ge=1, description="tokens of a batch, padding included")
    name: str = Field(default="reward", min_length=1, description="what the verdicts are signed with")
    trust_remote_code: bool = Field(default=False, description="run code that ships with the model; only if you trust its authors")

    def inputs(self) -> dict[str, str]:
        """The model's files."""
        return model_inputs("model", self.model_name_or_path)

    def build(self) -> Scorer:
        """Load the model."""
        from equipoise.models.load import load_sequence_classifier, load_tokenizer

        model = load_sequence_classifier(
            self.model_name_or_path, self.num_labels, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )
        tokenizer = load_tokenizer(self.model_name_or_path, self.trust_remote_code)
        return RewardModel(model, tokenizer, self.tokenise, self.batch_tokens, self.name)


SETTINGS = RewardModelSettings
