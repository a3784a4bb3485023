"""Rendered text to token ids: where a prompt ends, how a reply begins and stops, and what to leave out when it is too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equipoise.core.errors import DataError
from equipoise.core.records import Message
from equipoise.data.settings import TokeniseSettings
from equipoise.data.transcripts import Conversation, Renderer

EOS_ADDED = "the chat template ends replies without a special token; the end-of-sequence token was added"
SPECIAL_INSIDE = "a special token is written out inside a reply"

_ANCHOR = "\ue000"  # a private character: no vocabulary merges it with what follows


class Encoder:
    """Token ids of prompts and replies for one tokenizer and one set of settings.

    ends: ids a reply may end with (all special tokens). start: the id before everything, for all-token learning.
    """

    def __init__(self, tokenizer: Any, settings: TokeniseSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.renderer = Renderer(tokenizer, settings)
        self.style = self.renderer.style
        self.ends = frozenset(int(tokenizer.convert_tokens_to_ids(text)) for text in self.renderer.special_texts)
        self._ids = _Fast(tokenizer)
        self._before: list[int] = []
        self._between: list[int] = []
        self._after: list[int] = []
        if self.style == "pair":
            self._before, self._between, self._after = _frame(tokenizer, ("a", "b"))
        elif self.style == "plain":
            # What a tokenizer appends to a whole text (EOS, for some) has no place at the end of a prompt.
            self._before = _frame(tokenizer, ("a",))[0]
        first = tokenizer.convert_ids_to_tokens(_plain_ids(tokenizer, ["a"])[0][:1])
        # Such tokenizers put a space in front of every text they are given, also where a reply begins in mid-text.
        self._adds_space = self.style != "pair" and bool(first) and str(first[0]).startswith(("▁", "Ġ"))
        self._anchor_ids = _plain_ids(tokenizer, [_ANCHOR])[0] if self._adds_space else []

    @property
    def eos(self) -> int:
        """The end-of-sequence id. Raises DataError where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise DataError("This tokenizer has no end-of-sequence token, so a model could not learn where replies end. Give it one.")
        return int(self.tokenizer.eos_token_id)

    @property
    def start(self) -> int:
        """BOS, or EOS where there is none: the prompt of all-token learning."""
        return self.eos if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    def prompts(self, conversations: Sequence[Conversation]) -> list[tuple[str, list[int]] | None]:
        """(text, ids) of each prompt, reply cue included; None where the chat template refuses it."""
        texts = self.renderer.prompts(conversations)
        encoded = iter(self._ids([text for text in texts if text is not None]))
        return [None if text is None else (text, [*self._before, *next(encoded), *self._between]) for text in texts]

    def replies(self, conversations: Sequence[Conversation], prompts: Sequence[str], replies: Sequence[str]) -> list[list[int]]:
        """Ids of each reply after its rendered prompt, its end included."""
        rendered = self.renderer.replies(conversations, prompts, replies)
        if not rendered:
            return []
        notes, result = self.renderer.notes, []
        for (text, ended), ids in zip(rendered, self._continuations([text for text, _ in rendered]), strict=True):
            if self.style == "pair":
                ids = [*ids, *self._after]
            elif not ended and not (text.endswith(str(self.tokenizer.eos_token)) and ids[-1:] == [self.eos]):
                ids = [*ids, self.eos]
                notes[EOS_ADDED] += self.style == "chat"
            notes[SPECIAL_INSIDE] += not self.ends.isdisjoint(ids[:-1])
            result.append(ids)
        return result

    def shorten(self, conversations: Sequence[Conversation], budgets: Sequence[int]) -> list[list[int] | None]:
        """Each prompt in at most so many tokens, its oldest turns left out, the system turn kept; None where it cannot be.

        Whole turns go first, up to the next user turn; where the last user turn alone is too long, its oldest tokens.
        The number of turns is found by bisection, all conversations of a round in one tokenizer call.
        """
        heads = [tuple(turn for turn in conversation if turn.role == "system") for conversation in conversations]
        bodies = [tuple(turn for turn in conversation if turn.role != "system") for conversation in conversations]
        starts = [[at for at, turn in enumerate(body) if at and turn.role == "user"] for body in bodies]
        low, high = [0] * len(bodies), [len(places) for places in starts]
        fitted: dict[int, list[int]] = {}
        while asked := [index for index in range(len(bodies)) if low[index] < high[index]]:
            middle = {index: (low[index] + high[index]) // 2 for index in asked}
            encoded = self.prompts([(*heads[index], *bodies[index][starts[index][middle[index]] :]) for index in asked])
            for index, prompt in zip(asked, encoded, strict=True):
                if prompt is not None and len(prompt[1]) <= budgets[index]:
                    high[index], fitted[index] = middle[index], prompt[1]
                else:
                    low[index] = middle[index] + 1
        return [
            fitted[index] if index in fitted else self._cut_turn(heads[index], bodies[index][-1:], budgets[index])
            for index in range(len(bodies))
        ]

    def _cut_turn(self, head: Conversation, last: Conversation, budget: int) -> list[int] | None:
        """System turn and last user turn (none, where nobody spoke), the oldest tokens of the latter left out until it fits."""
        text = last[0].content if last else ""
        for _ in range(8):  # one or two rounds in practice: cutting inside a word can change how its rest is tokenised
            prompt = self.prompts([(*head, Message("user", text))])[0]
            if prompt is None:
                return None
            excess = len(prompt[1]) - budget
            if excess <= 0:
                return prompt[1]
            text = self._without_oldest(text, excess)
            if not text.strip():
                return None
        return None

    def _without_oldest(self, text: str, count: int) -> str:
        """The text after its first `count` tokens; empty where it has no more."""
        if not self.tokenizer.is_fast:
            kept = _plain_ids(self.tokenizer, [text])[0][count:]
            return str(self.tokenizer.decode(kept))
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return text[next((start for start, _ in spans[count:] if start), len(text)) :]

    def _continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that continue another text: without the space some tokenizers put in front of every text."""
        if not self._adds_space:
            return self._ids(texts)
        length = len(self._anchor_ids)
        anchored = self._ids([_ANCHOR + text for text in texts])
        alone = [index for index, ids in enumerate(anchored) if ids[:length] != self._anchor_ids]
        result = [ids[length:] for ids in anchored]
        # A first token that swallows the anchor cannot be told apart from it; such a text is tokenised as it stands.
        for index, ids in zip(alone, self._ids([texts[index] for index in alone]), strict=True):
            result[index] = ids
        return result


def _plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of many texts in one call, nothing added and nothing cut."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


class _Fast:
    """`_plain_ids` without the offsets, masks and dictionaries a tokenizer's call makes beside the ids.

    Straight from the Rust tokenizer, where there is one, it gave the same ids for a probe, and it is set as a call would set it.
    """

    PROBE = ("a", " b\n\nc", "naïve 東京 🙂  x\t1234", "")

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._encode = getattr(backend, "encode_batch_fast", None)
        if self._encode is not None:
            probe = [*self.PROBE, *tokenizer.all_special_tokens]
            probe += [f"a{text}b {text} c" for text in tokenizer.all_special_tokens]
            called = _plain_ids(tokenizer, probe)
            if not self._as_called() or [one.ids for one in self._encode(probe, add_special_tokens=False)] != called:
                self._encode = None

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if self._encode is None or not texts or not self._as_called():
            return _plain_ids(self._tokenizer, texts)
        return [one.ids for one in self._encode(list(texts), add_special_tokens=False)]

    def _as_called(self) -> bool:
        """Whether nobody has left truncation, padding or another treatment of special tokens behind; a call puts them right."""
        backend = self._tokenizer.backend_tokenizer
        plain = backend.truncation is None and backend.padding is None
        return plain and backend.encode_special_tokens == bool(getattr(self._tokenizer, "split_special_tokens", False))


def _frame(tokenizer: Any, texts: tuple[str, ...]) -> tuple[list[int], list[int], list[int]]:
    """The special ids a tokenizer puts before, between and after its texts ('between' is 'after' where there is one text)."""
    whole: list[int] = list(tokenizer(*texts)["input_ids"])
    edges, at = [], 0
    for ids in _plain_ids(tokenizer, texts):
        while whole[at : at + len(ids)] != ids:
            at += 1
            if at > len(whole):
                raise DataError("Cannot tell which special tokens this tokenizer adds around a text.")
        edges.append((at, at + len(ids)))
        at += len(ids)
    return whole[: edges[0][0]], whole[edges[0][1] : edges[-1][0]] if len(edges) > 1 else [], whole[edges[-1][1] :]
