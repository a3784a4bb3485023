r"""Conversations as text: the tokenizer's chat template, plain "\n\nHuman: … \n\nAssistant: …" text, or a pair of texts.

A prompt is rendered once, up to where the reply begins. A reply is what the rendering of the whole conversation adds
to that, so that both sides of a pair share their prompt to the last token, and generation continues the very same
prompt. Nothing here imports a tokenizer: one is passed in (transformers' `PreTrainedTokenizerBase`, or alike).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from equipoise.core.errors import DataError
from equipoise.core.records import Message
from equipoise.data.settings import TokeniseSettings

Conversation = tuple[Message, ...]
Style = Literal["chat", "plain", "pair"]

_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_NAMES = {"user": "Human", "assistant": "Assistant"}
CUE = "\n\nAssistant:"
_SENTINEL = "\ue000"  # a private character, which no template writes

NOT_PREFIX_STABLE = "the chat template rewrites the prompt once a reply follows; the reply was put after the generation prompt"
SYSTEM_FOLDED = "the chat template takes no system turn; it was put before the first user turn"


def is_transcript(text: str) -> bool:
    """Whether a text begins with a role marker of plain transcripts."""
    return re.match(r"\s*(Human|Assistant):", text) is not None


def parse(text: str) -> Conversation | None:
    """The turns of a plain transcript, contents stripped; None where it does not begin with a role marker.

    A marker counts at the start of the text or after a blank line, nowhere else; lines may end as on Windows. Empty turns
    are kept (empty).
    """
    pieces = _MARKER.split(text.replace("\r\n", "\n").replace("\r", "\n"))
    if pieces[0].strip() or len(pieces) < 3:
        return None
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return tuple(Message("user" if role == "Human" else "assistant", content.strip()) for role, content in turns)


def parse_prompt(text: str) -> Conversation:
    """A prompt given as text: one user turn, or the turns of a plain transcript (a reply cue at its end is left out)."""
    turns = parse(text)
    if turns is None:
        return (Message("user", text),)
    if turns[-1].role == "assistant" and not turns[-1].content:
        turns = turns[:-1]
    return turns


def plain(conversation: Conversation) -> str:
    """The plain transcript of a conversation, without a reply cue. A system turn stands in front, without a marker."""
    parts = [turn.content.strip() if turn.role == "system" else f"\n\n{_NAMES[turn.role]}: {turn.content.strip()}" for turn in conversation]
    return "".join(parts)


def style_of(tokenizer: Any, settings: TokeniseSettings) -> Style:
    """The style asked for; for 'auto' chat where there is a template, pair for encoders, plain otherwise."""
    if settings.transcript != "auto":
        if settings.transcript == "chat" and not getattr(tokenizer, "chat_template", None):
            raise DataError("transcript=chat, but this tokenizer has no chat template. Use transcript=plain, or another tokenizer.")
        return settings.transcript
    if getattr(tokenizer, "chat_template", None):
        return "chat"
    encoder = all(getattr(tokenizer, name, None) is not None for name in ("cls_token_id", "sep_token_id", "mask_token_id"))
    return "pair" if encoder else "plain"


class Renderer:
    """Renders conversations in one style. `notes` counts what a reader should know (template quirks)."""

    def __init__(self, tokenizer: Any, settings: TokeniseSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.style: Style = style_of(tokenizer, settings)
        self.notes: Counter[str] = Counter()
        self.special_texts = tuple(special_texts(tokenizer))

    def with_system(self, conversation: Conversation) -> Conversation:
        """The conversation with the settings' system prompt, unless it has a system turn of its own."""
        if self.settings.system_prompt is None or any(turn.role == "system" for turn in conversation):
            return conversation
        return (Message("system", self.settings.system_prompt), *conversation)

    def prompts(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """The text of each prompt up to where its reply begins; None where the chat template refuses the conversation."""
        if self.style == "plain":
            cue = CUE if self.settings.reply_cue else ""
            return [plain(conversation) + cue for conversation in conversations]
        if self.style == "pair":
            return [pair_prompt(conversation) for conversation in conversations]
        return self._chat(conversations, add_generation_prompt=True)

    def replies(self, conversations: Sequence[Conversation], prompts: Sequence[str], replies: Sequence[str]) -> list[tuple[str, bool]]:
        """What follows each rendered prompt when its reply is given, and whether that text already ends the turn.

        The end is a special token of the tokenizer (`<|im_end|>`, `</s>`, …); white space a template writes after it
        is left out, since generation stops before it.
        """
        if self.style == "plain":
            cue = "" if self.settings.reply_cue else CUE
            return [(f"{cue} {reply.strip()}", False) for reply in replies]
        if self.style == "pair":
            return [(reply.strip(), False) for reply in replies]
        whole = [(*conversation, Message("assistant", reply)) for conversation, reply in zip(conversations, replies, strict=True)]
        rendered = self._chat(whole, add_generation_prompt=False)
        return [self._suffix(*item) for item in zip(prompts, rendered, replies, strict=True)]

    def _suffix(self, prompt: str, full: str | None, reply: str) -> tuple[str, bool]:
        if full is not None and full.startswith(prompt):
            suffix = full[len(prompt) :]
        else:
            # Some templates rewrite earlier turns, or drop the generation prompt, once a reply follows. The prompt must
            # stay what generation sees, so the reply is put after it, and what the template ends replies with after that.
            self.notes[NOT_PREFIX_STABLE] += 1
            suffix = reply.strip() + self._ending
        trimmed = suffix.rstrip()
        ended = bool(self.special_texts) and trimmed.endswith(self.special_texts)
        return (trimmed if ended else suffix), ended

    @cached_property
    def _ending(self) -> str:
        """What the chat template writes after a reply; empty where it cannot be told. A reply's own text might occur in it."""
        try:
            (full,) = self._apply([_dicts((Message("user", "a"), Message("assistant", _SENTINEL)))], add_generation_prompt=False)
        except Exception:  # a template raises whatever it likes
            return ""
        return full.partition(_SENTINEL)[2]

    def _chat(self, conversations: Sequence[Conversation], add_generation_prompt: bool) -> list[str | None]:
        """Rendered by the chat template, in one call where it takes them all, else one by one."""
        try:
            return list(self._apply([_dicts(conversation) for conversation in conversations], add_generation_prompt))
        except Exception:  # a template raises whatever it likes (jinja2's errors, TypeError, …) for what it does not take
            return [self._chat_one(conversation, add_generation_prompt) for conversation in conversations]

    def _chat_one(self, conversation: Conversation, add_generation_prompt: bool) -> str | None:
        refusal = ""
        for turns in (conversation, _folded(conversation)):
            try:
                text: str = self._apply([_dicts(turns)], add_generation_prompt)[0]
            except Exception as error:  # the next way is tried; a conversation refused both ways is counted by the caller
                refusal = next(iter(str(error).splitlines()), type(error).__name__)[:100]
                continue
            if turns is not conversation and add_generation_prompt:
                self.notes[SYSTEM_FOLDED] += 1
            return text
        self.notes[f"the chat template said: {refusal}"] += 1
        return None

    def _apply(self, conversations: list[list[dict[str, str]]], add_generation_prompt: bool) -> list[str]:
        rendered: list[str] = self.tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt, **self.settings.chat_template_kwargs
        )
        return rendered


def pair_prompt(conversation: Conversation) -> str:
    """The first text of a pair: the user's turn alone where there is only one, else the plain transcript."""
    if len(conversation) == 1:
        return conversation[0].content.strip()
    return plain(conversation).strip()


def special_texts(tokenizer: Any) -> list[str]:
    """The texts of all special tokens of a tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {}) or {}
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added.values() if token.special)} - {""})


def _dicts(conversation: Conversation) -> list[dict[str, str]]:
    return [turn.as_dict() for turn in conversation]


def _folded(conversation: Conversation) -> Conversation:
    """The system turn's text put before the first user turn."""
    system = [turn.content for turn in conversation if turn.role == "system"]
    rest = [turn for turn in conversation if turn.role != "system"]
    if not system or not rest or rest[0].role != "user":
        return conversation
    return (Message("user", "\n\n".join([*system, rest[0].content])), *rest[1:])
