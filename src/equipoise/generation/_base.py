"""What a generator is: `(prompts, sampling) → completions`, in order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from equipoise.core.catalog import module
from equipoise.core.errors import DataError, UsageError
from equipoise.core.records import Message, messages_from
from equipoise.core.settings import Settings

CHUNK = 32


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer: its turns, ending with the user's, and where it belongs."""

    id: str
    messages: tuple[Message, ...]
    axis: str = ""
    topic: str = ""

    def as_json(self) -> dict[str, Any]:
        """One line of `prompts.jsonl`."""
        return {"id": self.id, "prompt": [message.as_dict() for message in self.messages], "axis": self.axis, "topic": self.topic}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Prompt:
        """Read back one line of `prompts.jsonl`. Raises DataError naming the row."""
        try:
            return cls(str(row["id"]), messages_from(row["prompt"]), row.get("axis", ""), row.get("topic", ""))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"Not a prompt: {str(row)[:120]!r}. Each line needs `id` and `prompt`, a list of {{role, content}}.") from error


class Sampling(Settings):
    """How replies are drawn. Temperature 0 is greedy."""

    max_new_tokens: int = Field(default=128, ge=1, description="tokens at most in a reply")
    temperature: float = Field(default=0.0, ge=0.0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="nucleus mass kept")
    top_k: int = Field(default=0, ge=0, description="tokens kept; 0 keeps all")
    repetition_penalty: float = Field(default=1.0, gt=0.0, description="1 is none")
    seed: int = Field(default=0, description="each prompt draws from its own stream of this seed and its id")


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply. finish_reason is `stop` (the model ended it) or `length` (cut off)."""

    id: str
    prompt: tuple[Message, ...]
    text: str
    token_ids: tuple[int, ...] = field(default=())
    finish_reason: str = "stop"
    seed: int = 0
    weights: str | None = None

    def as_json(self) -> dict[str, Any]:
        """One line of `completions.jsonl`."""
        row = asdict(self)
        row["prompt"] = [message.as_dict() for message in self.prompt]
        row["token_ids"] = list(self.token_ids)
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Completion:
        """Read back one line of `completions.jsonl`; an id may be a number. Raises DataError naming the row."""
        try:
            if not isinstance(row["text"], str):
                raise TypeError("`text` is no text")
            read = {"id": str(row["id"]), "prompt": messages_from(row["prompt"]), "token_ids": tuple(row.get("token_ids", ()))}
            return cls(**{**row, **read})
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"Not a completion: {str(row)[:120]!r} ({error}).") from error


class Generator(ABC):
    """Answers prompts."""

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order."""

    def batches(self, prompts: Sequence[Prompt], sampling: Sampling) -> Sequence[Sequence[int]]:
        """Numbers of the prompts a stage asks for in one call, and keeps before the next: here in order, some at a time."""
        numbers = range(len(prompts))
        return [numbers[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]

    @property
    def counts(self) -> dict[str, int]:
        """What the stage's results say besides."""
        return {}


class GeneratorSettings(Settings, ABC):
    """Base of each generator's settings. `generator` is the name of its module in this folder."""

    generator: str = Field(description="local, scripted, openai_api or vllm")

    def inputs(self) -> dict[str, str]:
        """What the generator reads: name → fingerprint."""
        return {}

    @abstractmethod
    def build(self) -> Generator:
        """The generator, ready to answer."""


def chosen(room: str, key: str) -> Callable[[Any], Any]:
    """A pydantic before-validator that turns `{key: NAME, …}` into the settings class of `room/NAME.py`.

    Each module of the room names its settings class `SETTINGS`. Settings that are already built pass through.
    """

    def choose(value: Any) -> Any:
        if isinstance(value, Settings):
            return value
        if not isinstance(value, Mapping) or not isinstance(value.get(key), str):
            raise UsageError(f"A {key} is a mapping with its name under `{key}`, found {value!r}.")
        return module(room, value[key]).SETTINGS.make(value, source=f"{key} {value[key]}")

    return choose


def check_ids(prompts: Sequence[Prompt]) -> None:
    """Raise DataError where two prompts share an id: it names their random stream and their line in the output."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"Prompt id {prompt.id!r} stands twice.")
        seen.add(prompt.id)


def stream(seed: int, prompt_id: str) -> np.random.Generator:
    """The random stream of one prompt, whatever batch it is in: PCG64 seeded with the SHA-256 of seed and id."""
    digest = hashlib.sha256(f"{seed}\n{prompt_id}".encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def last_user_turn(messages: Sequence[Message]) -> str:
    """What the user said last; empty where there is no user turn."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")
