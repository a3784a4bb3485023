"""Records to token rows: the prompt once, each reply after it, its end included, nothing cut silently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from equipoise.core.errors import DataError
from equipoise.core.records import Message, Record, Reply
from equipoise.data._encode import Encoder
from equipoise.data.accounting import Accounting
from equipoise.data.rows import Branch, Ids, TokenRow, TokenRows
from equipoise.data.settings import TokeniseSettings
from equipoise.data.units import facts_of, units

BATCH = 1000
"""Units tokenised in one go: fast tokenizers work on many texts at once."""

OVER_LIMIT = "a reply is too long for max_length"
REFUSED = "the chat template refuses this conversation"
IDENTICAL = "the replies are the same tokens"
MISMATCHED_CUT = "mismatched replies cut at max_length"


def tokenise(
    records: Iterable[Record], tokenizer: Any, settings: TokeniseSettings, roles: tuple[str, ...], facts: tuple[str, ...] = ()
) -> tuple[TokenRows, Accounting]:
    """Token rows with one branch per role (see `data/units.py` for what each role takes), and what happened to each.

    Args:
        records: what `load` gives.
        tokenizer: a transformers tokenizer.
        settings: limit, transcript style, what is learned.
        roles: ('chosen', 'rejected'), ('gold',), ('sample', 'mismatched') for KTO, ('sample',) for lists (for BCO with the fact label), ….
        facts: facts every reply must have; units without are dropped and counted.

    Returns:
        The rows (none where every unit was dropped: the accounting says why) and the accounting.

    Raises:
        DataError: no record has these roles, or the tokenizer cannot serve.
        UsageError: an unknown role.
    """
    accounting = Accounting()
    encoder = Encoder(tokenizer, settings)
    made = units(records, roles, facts, accounting)
    rows = [row for some in batches(made, BATCH) for row in tokenise_units(some, encoder, accounting)]
    return TokenRows.of(rows), accounting.check()


def batches(made: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Units, some at a time."""
    made = iter(made)
    while some := list(islice(made, size)):
        yield some


def prompt_ids(messages: Sequence[Message], tokenizer: Any, settings: TokeniseSettings, room: int = 0) -> Ids:
    """int32 [P]: the prompt exactly as training sees it, ending where the reply begins; shortened to max_length − room."""
    return prompts_ids([messages], tokenizer, settings, room)[0]


def prompts_ids(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Any,
    settings: TokeniseSettings,
    room: int = 0,
    names: Sequence[str] | None = None,
) -> list[Ids]:
    """`prompt_ids` of many prompts at once. Raises DataError for one the template refuses, or that cannot be shortened enough.

    names: what the error calls each prompt; None: its number, from 1.
    """
    result: list[Ids] = []
    for number, ids in enumerate(fitted_prompts(conversations, tokenizer, settings, [room] * len(conversations))):
        if isinstance(ids, str):
            reason = f"it does not fit into {settings.max_length - room} tokens" if ids == OVER_LIMIT else ids
            called = number + 1 if names is None else repr(names[number])
            raise DataError(f"Prompt {called} ({conversations[number][-1].content[:60]!r}) cannot be used: {reason}.")
        result.append(ids)
    return result


def fitted_prompts(
    conversations: Sequence[Sequence[Message]], tokenizer: Any, settings: TokeniseSettings, rooms: Sequence[int]
) -> list[Ids | str]:
    """`prompt_ids` of many prompts, each with room for a reply of its own; the reason (REFUSED, OVER_LIMIT) where there are none."""
    encoder = Encoder(tokenizer, settings)
    asked = [encoder.renderer.with_system(tuple(messages)) for messages in conversations]
    budgets = [settings.max_length - room for room in rooms]
    found = [None if prompt is None else prompt[1] for prompt in encoder.prompts(asked)]
    result: list[Ids | str] = [REFUSED if ids is None else np.asarray(ids, dtype=np.int32) for ids in found]
    long = [at for at, ids in enumerate(found) if ids is not None and len(ids) > budgets[at]]
    for at, short in zip(long, encoder.shorten([asked[at] for at in long], [budgets[at] for at in long]), strict=True):
        result[at] = OVER_LIMIT if short is None else np.asarray(short, dtype=np.int32)
    return result


def tokenise_units(made: Sequence[Record], encoder: Encoder, accounting: Accounting) -> list[TokenRow]:
    """Token rows of some units; every unit is counted in `accounting`."""
    accounting.rows_in += len(made)
    rows = []
    for unit, prompt, replies in _fitted(list(_encoded(made, encoder, accounting)), encoder, accounting):
        row = _row(unit, prompt, replies, encoder, accounting)
        if row is not None:
            rows.append(row)
    accounting.kept += len(rows)
    for what, count in encoder.renderer.notes.items():
        accounting.note(what, count)
    encoder.renderer.notes.clear()
    return rows


def _encoded(
    made: Sequence[Record], encoder: Encoder, accounting: Accounting
) -> Iterator[tuple[Record, tuple[Message, ...], list[int], list[list[int]]]]:
    """(unit, conversation, prompt ids, reply ids) of each unit, in one batch; what the template refuses is counted."""
    kept, conversations, texts, prompts = [], [], [], []
    asked = [encoder.renderer.with_system(unit.prompt) for unit in made]
    for unit, conversation, prompt in zip(made, asked, encoder.prompts(asked), strict=True):
        if prompt is None:
            accounting.drop(REFUSED, unit.id)
            continue
        kept.append(unit)
        conversations.append(conversation)
        texts.append(prompt[0])
        prompts.append(prompt[1])
    flat = [(index, reply.text) for index, unit in enumerate(kept) for reply in unit.replies]
    ids = iter(encoder.replies([conversations[i] for i, _ in flat], [texts[i] for i, _ in flat], [text for _, text in flat]))
    for unit, conversation, prompt_tokens in zip(kept, conversations, prompts, strict=True):
        yield unit, conversation, prompt_tokens, [next(ids) for _ in unit.replies]


def _fitted(
    encoded: list[tuple[Record, tuple[Message, ...], list[int], list[list[int]]]], encoder: Encoder, accounting: Accounting
) -> Iterator[tuple[Record, list[int], list[list[int]]]]:
    """Every unit within max_length: oldest turns left out, overlong replies dropped or cut, all of it counted."""
    settings = encoder.settings
    limits = [settings.max_length - _added(prompt, encoder) for _, _, prompt, _ in encoded]
    longest = [_longest(unit, replies) for unit, _, _, replies in encoded]
    over = [at for at, (_, _, prompt, _) in enumerate(encoded) if len(prompt) + longest[at] > limits[at]]
    shortened = dict(zip(over, encoder.shorten([encoded[at][1] for at in over], [limits[at] - longest[at] for at in over]), strict=True))
    for at, (unit, conversation, prompt, replies) in enumerate(encoded):
        short = shortened.get(at, prompt)
        if short is None and settings.overlong_reply == "cut":
            # The prompt gets up to half of the room, the reply what is left.
            half = limits[at] // 2
            short = prompt if len(prompt) <= half else encoder.shorten([conversation], [half])[0]
        if short is None:
            accounting.drop(OVER_LIMIT, unit.id)
            continue
        accounting.truncated_prompts += short != prompt
        yield unit, short, _cut(unit, replies, limits[at] - len(short), accounting)


def _longest(unit: Record, replies: list[list[int]]) -> int:
    """Tokens of the longest reply of its own; a mismatched one never costs a row its prompt."""
    return max(len(ids) for reply, ids in zip(unit.replies, replies, strict=True) if reply.role != "mismatched")


def _cut(unit: Record, replies: list[list[int]], room: int, accounting: Accounting) -> list[list[int]]:
    result = []
    for reply, ids in zip(unit.replies, replies, strict=True):
        if len(ids) > room:
            ids = ids[:room]
            if reply.role == "mismatched":
                accounting.note(MISMATCHED_CUT)
            else:
                accounting.replies_cut += 1
        result.append(ids)
    return result


def _added(prompt: list[int], encoder: Encoder) -> int:
    """Tokens all-token learning adds in front: one where the prompt does not begin with the start token itself."""
    return int(encoder.settings.learn == "all" and prompt[0] != encoder.start)


def _row(unit: Record, prompt: list[int], replies: list[list[int]], encoder: Encoder, accounting: Accounting) -> TokenRow | None:
    """The token row of one unit, or None (counted) where chosen and rejected became the same tokens."""
    by_role = {reply.role: ids for reply, ids in zip(unit.replies, replies, strict=True)}
    if "chosen" in by_role and by_role["chosen"] == by_role.get("rejected"):
        accounting.made_identical += 1
        accounting.drop(IDENTICAL, unit.id)
        return None
    if encoder.settings.learn == "all":
        front = prompt[1:] if prompt[0] == encoder.start else prompt
        prompt, replies = [encoder.start], [front + ids for ids in replies]
    branches = []
    for reply, ids in zip(unit.replies, replies, strict=True):
        if reply.role != "mismatched" and encoder.style != "pair":
            accounting.eos_lost += ids[-1] not in encoder.ends
        # The label belongs to the unit, so the mismatched branch carries it too; nothing else is known of that pairing.
        facts = facts_of(reply) if reply.role != "mismatched" else facts_of(Reply("", "mismatched", label=unit.replies[0].label))
        array = np.asarray(ids, dtype=np.int32)
        branches.append(Branch(reply.role, array, {"learn": np.ones(len(array), dtype=bool)}, facts))
    return TokenRow(unit.id, np.asarray(prompt, dtype=np.int32), tuple(branches))
