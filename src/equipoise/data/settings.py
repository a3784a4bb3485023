"""Settings of data: where rows come from, which of them count, and how they become tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from equipoise.core.settings import Settings

Part = Literal["all", "train", "dev", "test"]
RULE = r"^\s*(\S+?)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*$"
"""A rule on a score: its name, a comparison, a number."""


class DataSettings(Settings):
    """One source of rows and what is kept of it."""

    dataset_name: str = Field(
        default="starter", description="hub name, local file (.jsonl, .jsonl.gz, .json, .parquet, .csv), folder of such files, or 'starter'"
    )
    dataset_config_name: str | None = Field(default=None, description="configuration of a hub data set; of 'starter': train or judge")
    dataset_split: str | None = Field(
        default=None,
        description="split of a hub data set, or of a folder whose files or folders are named by split, or all; default: train where there "
        "are several, else the whole folder",
    )
    format: str = Field(default="auto", description="name of a file in data/sources; auto: told from the columns")
    columns: dict[str, str] = Field(
        default={}, description="renames columns before reading: {theirs: ours}; a column already called so gives way"
    )
    part: Part = Field(default="all", description="which part of the split by prompt cluster to keep")
    split_fractions: tuple[float, float, float] = Field(default=(0.8, 0.1, 0.1), description="shares of train, dev and test, summing to 1")
    split_seed: int = Field(default=0, description="another seed, another split")
    max_rows: int | None = Field(default=None, ge=1, description="keep at most so many rows, the first ones; None: all")
    min_confidence: float = Field(
        default=0.0, ge=0.0, le=1.0, description="judged pairs: how sure the judge must be, 0 (a coin) to 1 (certain); ties are never kept"
    )
    preferred_by: Literal["better", "safer"] = Field(
        default="better", description="PKU-SafeRLHF: whether the more helpful or the safer reply is the chosen one"
    )
    verdicts: tuple[str, ...] = Field(
        default=(),
        description="verdicts.jsonl files on this data's replies (`equipoise data replies`): each value is a score, named as signed",
    )
    safe_when: str | None = Field(
        default=None,
        pattern=RULE,
        description="a rule on a score that sets the safety flag of the replies that have the score, such as 'cost < 0'",
    )
    assume_safe: bool | None = Field(
        default=None, description="safety flag of replies that have none, such as true for BFPO's buffer; None: they have none"
    )
    exclude_prompts: tuple[str, ...] = Field(
        default=(), description="sources whose prompts must not occur here, exactly or nearly: data or prompt files, 'starter', .npz prints"
    )
    exclude_near: float = Field(default=0.8, ge=0.5, le=1.0, description="similarity from which an excluded prompt counts as the same")

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        """Shares must be shares."""
        if min(self.split_fractions) < 0 or abs(sum(self.split_fractions) - 1) > 1e-6:
            raise ValueError("split_fractions must be three shares that sum to 1")
        return self

    @model_validator(mode="after")
    def _renames(self) -> Self:
        """Two columns cannot become one."""
        for ours, times in Counter(self.columns.values()).items():
            if times > 1:
                both = " and ".join(theirs for theirs, name in self.columns.items() if name == ours)
                raise ValueError(f"columns: {both} to one {ours}")
        return self


class TokeniseSettings(Settings):
    """How a record becomes tokens. Training, generation and scoring read the same settings."""

    max_length: int = Field(default=1024, ge=2, description="tokens of a prompt and its longest reply together")
    overlong_reply: Literal["drop", "cut"] = Field(
        default="drop", description="a reply that exceeds max_length by itself: drop the row, or cut it (then its end is not learned)"
    )
    transcript: Literal["auto", "chat", "plain", "pair"] = Field(
        default="auto", description="chat: the tokenizer's template; plain: Human/Assistant text; pair: prompt and reply for an encoder"
    )
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="arguments for the chat template, such as enable_thinking")
    system_prompt: str | None = Field(default=None, description="put before every prompt that has no system turn of its own")
    reply_cue: bool = Field(
        default=True, description="plain: end the prompt with 'Assistant:'; off: the model has to write it itself, as in arXiv 2509.09055"
    )
    learn: Literal["reply", "all"] = Field(default="reply", description="learn from the reply's tokens, or from the prompt's too (SFT)")


class PrepareSettings(Settings):
    """One `data prepare` stage: a source, a tokenizer, and the roles the rows shall have."""

    data: DataSettings = Field(default=DataSettings(), description="where the rows come from")
    tokenise: TokeniseSettings = Field(default=TokeniseSettings(), description="how records become tokens")
    model_name_or_path: str = Field(default="smollm2-135m-instruct", description="whose tokenizer: asset name, local folder, or hub name")
    roles: tuple[str, ...] = Field(default=("chosen", "rejected"), min_length=1, description="reply roles of each row, as the method needs")
    facts: tuple[str, ...] = Field(default=(), description="facts every reply must have, such as safe; other rows are dropped, counted")
    dataset_num_proc: int = Field(default=1, ge=1, description="processes that tokenise; the rows are the same for any number")
    output_dir: str = Field(default="runs/prepare", description="stage folder")
