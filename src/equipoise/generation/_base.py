"""What a generator is: `(prompts, sampling) → completions`, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pydantic import Field

from equipoise.core.records import Message, messages_from
from equipoise.core.settings import Settings


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
        """Read back one line of `prompts.jsonl`."""
        return cls(str(row["id"]), messages_from(row["prompt"]), row.get("axis", ""), row.get("topic", ""))


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
        """Read back one line of `completions.jsonl`."""
        known = {**row, "prompt": messages_from(row["prompt"]), "token_ids": tuple(row.get("token_ids", ()))}
        return cls(**known)


class Generator(Protocol):
    """Answers prompts."""

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order."""
        ...
