"""Replies without a model: the null policies that every metric must beat, and scripted ones for tests.

A metric that `always_refuse`, `echo`, `empty` or `random_reply` wins measures something else than it says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from equipoise.core.errors import DataError
from equipoise.core.files import file_fingerprint, read_jsonl
from equipoise.generation._base import Completion, Generator, GeneratorSettings, Prompt, Sampling, check_ids, last_user_turn, stream

NULL_POLICIES = ("always_refuse", "echo", "empty", "random_reply")
REFUSAL = "I'm sorry, but I can't help with that."


class Scripted(Generator):
    """Answers from a mapping (prompt id → text) or a callable (prompt, seed) → text. Its completions carry no token ids."""

    def __init__(self, replies: Mapping[str, str] | Callable[[Prompt, int], str]) -> None:
        self._replies = replies

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order. Raises DataError for a prompt the mapping does not know."""
        check_ids(prompts)
        return [Completion(prompt.id, prompt.messages, self._reply(prompt, sampling.seed), seed=sampling.seed) for prompt in prompts]

    def _reply(self, prompt: Prompt, seed: int) -> str:
        if callable(self._replies):
            return self._replies(prompt, seed)
        if prompt.id not in self._replies:
            raise DataError(f"No scripted reply for prompt {prompt.id!r}.")
        return self._replies[prompt.id]


def always_refuse() -> Scripted:
    """Refuses everything, in one fixed sentence."""
    return Scripted(lambda prompt, seed: REFUSAL)


def echo() -> Scripted:
    """Repeats the last user turn."""
    return Scripted(lambda prompt, seed: last_user_turn(prompt.messages))


def empty() -> Scripted:
    """Says nothing."""
    return Scripted(lambda prompt, seed: "")


def random_reply(texts: Sequence[str]) -> Scripted:
    """A reply drawn from these texts (replies of the training data), by the prompt's own stream of the sampling seed."""
    pool = tuple(texts)
    if not pool:
        raise DataError("random_reply needs at least one text to draw from.")
    return Scripted(lambda prompt, seed: pool[int(stream(seed, prompt.id).integers(len(pool)))])


class ScriptedSettings(GeneratorSettings):
    """A null policy, or replies from a file."""

    generator: Literal["scripted"] = "scripted"
    policy: Literal["always_refuse", "echo", "empty", "random_reply", "file"] = Field(
        description="what to answer; file: the reply with the prompt's id"
    )
    replies_file: str | None = Field(
        default=None, description="JSON lines: texts, or objects with `text` (random_reply), or with `id` and `text` (file)"
    )

    @model_validator(mode="after")
    def _file_where_needed(self) -> Self:
        """Two policies read a file, the others do not."""
        if (self.policy in ("random_reply", "file")) != (self.replies_file is not None):
            raise ValueError(f"{self.policy} {'takes no' if self.replies_file else 'needs a'} replies_file")
        return self

    def inputs(self) -> dict[str, str]:
        """The file of replies."""
        if self.replies_file is None:
            return {}
        if not Path(self.replies_file).is_file():
            raise DataError(f"{self.replies_file} does not exist.")
        return {"replies": file_fingerprint(self.replies_file)}

    def build(self) -> Generator:
        """The policy."""
        if self.policy == "random_reply":
            return random_reply([row if isinstance(row, str) else _field(row, "text") for row in self._rows()])
        if self.policy == "file":
            return Scripted({_field(row, "id"): _field(row, "text") for row in self._rows()})
        return {"always_refuse": always_refuse, "echo": echo, "empty": empty}[self.policy]()

    def _rows(self) -> list[Any]:
        return read_jsonl(str(self.replies_file))


def _field(row: Any, name: str) -> str:
    if not isinstance(row, Mapping) or not isinstance(row.get(name), (str, int)):
        raise DataError(f"A scripted reply needs `{name}`, found {json.dumps(row)[:120]}.")
    return str(row[name])


SETTINGS = ScriptedSettings
