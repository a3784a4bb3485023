"""What a row of data is, before any tokenizer: messages, replies, records.

One record serves every method: `sft` reads its `gold` or `chosen` reply, `dpo` and `bfpo` read `chosen` and
`rejected`, `kto` reads a `sample` with a `label`, lists read many `sample` replies with `scores`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MessageRole = Literal["system", "user", "assistant"]
ReplyRole = Literal["chosen", "rejected", "gold", "sample", "mismatched"]
MESSAGE_ROLES: tuple[MessageRole, ...] = ("system", "user", "assistant")
REPLY_ROLES: tuple[ReplyRole, ...] = ("chosen", "rejected", "gold", "sample", "mismatched")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: MessageRole
    content: str

    def as_dict(self) -> dict[str, str]:
        """The `{"role", "content"}` mapping chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Reply:
    """One candidate answer to a prompt.

    `scores` hold whatever the source rated it on; `safe` is the source's safety flag (None: not said);
    `label` is a thumbs-up or thumbs-down (None: not said). Missing is never zero or False.
    """

    text: str
    role: ReplyRole
    source: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    safe: bool | None = None
    label: bool | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A prompt (its turns, oldest first, ending before the reply) and the replies to it.

    `facts` are free key-value notes of the source (`axis`, `topic`, …), never used by an objective.
    """

    id: str
    prompt: tuple[Message, ...]
    replies: tuple[Reply, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def reply(self, role: str) -> Reply | None:
        """The first reply with this role, or None."""
        return next((reply for reply in self.replies if reply.role == role), None)

    @property
    def first_turn(self) -> str:
        """The first user turn: records that share it belong to one cluster and never straddle a split."""
        return next((message.content for message in self.prompt if message.role == "user"), "")


def messages_from(rows: list[dict[str, str]]) -> tuple[Message, ...]:
    """Messages from `[{"role", "content"}, …]`, as read back from our own files."""
    return tuple(Message(row["role"], row["content"]) for row in rows)  # type: ignore[arg-type]
