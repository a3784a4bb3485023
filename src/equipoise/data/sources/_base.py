"""What a source is: one file of this folder that turns rows of one format into records.

A source module has `COLUMNS` (the sets of columns it can read, any one of which will do),
`matches(columns, sample) -> bool`, and `record(row, settings) -> Record`, which raises `Excluded` with a reason
for a row that cannot become one: such rows are counted, never skipped.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from equipoise.core import catalog
from equipoise.core.errors import DataError, UsageError, nearest
from equipoise.core.records import Message, MessageRole, Record
from equipoise.data._read import Row, kind_of
from equipoise.data.accounting import Accounting
from equipoise.data.settings import DataSettings

ROLES: Mapping[str, MessageRole] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Role names in the wild, lower case, and ours."""

EMPTY_REPLY = "empty reply"
EQUAL_REPLIES = "chosen equals rejected"
PROMPTS_DIFFER = "prompts of chosen and rejected differ"
ENDS_WITH_HUMAN = "ends with the human's turn"
NOT_A_USER_TURN = "the prompt does not end with the user's turn"


class Excluded(Exception):  # noqa: N818 (not an error: a row that is counted and left out)
    """This row cannot become a record; the text is the reason it is counted under."""


class Source(Protocol):
    """A module of this folder."""

    __name__: str
    COLUMNS: tuple[frozenset[str], ...]

    def matches(self, columns: set[str], sample: Mapping[str, Any]) -> bool:
        """Whether rows with these columns, one of which is `sample`, are in this format."""
        ...

    def record(self, row: Row, settings: DataSettings) -> Record:
        """The record of a row. Raises Excluded for one that cannot be read."""
        ...


def source(name: str, rows: Sequence[Row]) -> Source:
    """The source of this name, or for 'auto' the one that fits the first rows.

    Raises:
        UsageError: no such format, or several fit.
        DataError: columns are missing; says what was found and the nearest match.
    """
    columns = {str(column) for row in rows for column in row.values}
    sample = max((row.values for row in rows), key=lambda values: sum(value is not None for value in values.values()))
    if name != "auto":
        module = cast(Source, catalog.module("data.sources", name))
        if not any(wanted <= columns for wanted in module.COLUMNS):
            raise DataError(f"{rows[0].where}: format {name!r} {_missing(module, columns)}")
        return module
    modules = {known: cast(Source, catalog.module("data.sources", known)) for known in catalog.names("data.sources")}
    fitting = [known for known, module in modules.items() if module.matches(columns, sample)]
    if len(fitting) == 1:
        return modules[fitting[0]]
    if fitting:
        raise UsageError(f"{rows[0].where}: the rows fit several formats. Say which with format={' or format='.join(fitting)}.")
    found = ", ".join(sorted(columns)) or "none"
    if hint := _without_prompt(columns):
        raise DataError(f"{rows[0].where}: no known format has these columns ({found}). {hint}")
    closest = min(modules, key=lambda known: _distance(_lacking(modules[known], columns), columns))
    raise DataError(
        f"{rows[0].where}: no known format has these columns ({found}). The closest, {closest!r}, {_missing(modules[closest], columns)} "
        f"Rename columns with columns={{theirs: ours}}, or name one of the formats: {', '.join(modules)}."
    )


def records(module: Source, rows: Iterable[Row], settings: DataSettings, accounting: Accounting) -> Iterator[Record]:
    """What a source makes of rows; what raises Excluded, or is no usable record, is counted."""
    for row in rows:
        accounting.rows_in += 1
        try:
            made = _checked(module.record(row, settings))
        except Excluded as reason:
            accounting.drop(str(reason), row_id(row))
        else:
            yield made


def row_id(row: Row) -> str:
    """The row's own id where it has one, else `<file stem>:<row number>`."""
    own = row.values.get("id")
    return str(own) if isinstance(own, (str, int)) and not isinstance(own, bool) and str(own).strip() else row.id


def text(values: Mapping[str, Any], name: str) -> str:
    """A text column. Raises Excluded where it is missing, not text, or no text a tokenizer can take."""
    value = values.get(name)
    if value is None:
        raise Excluded(f"no {name!r}")
    if not isinstance(value, str):
        raise Excluded(f"{name!r} is {kind_of(value)}, not text")
    if "\0" in value:
        raise Excluded("NUL character in the text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Excluded("half a surrogate pair in the text") from error
    return value


def optional_text(values: Mapping[str, Any], name: str) -> str:
    """A text column that may be missing: then empty."""
    return "" if values.get(name) is None else text(values, name)


def number(values: Mapping[str, Any], name: str) -> float | None:
    """A number, or None where it is missing or not finite. Raises Excluded where it is something else."""
    value = values.get(name)
    if value is None or value == "":
        return None
    try:
        result = float(value)
    except OverflowError:
        return None  # a whole number past what a float holds, as 1e999 is
    except (TypeError, ValueError) as error:
        raise Excluded(f"{name!r} is {kind_of(value)}, not a number") from error
    return result if math.isfinite(result) else None


def scores(values: Mapping[str, Any], name: str) -> dict[str, float]:
    """A column of scores: a number is the score `score`, a mapping holds several by name; what is missing is left out."""
    value = values.get(name)
    several = value if isinstance(value, Mapping) else {"score": value}
    read = {str(key): number({name: one}, name) for key, one in several.items()}
    return {key: one for key, one in read.items() if one is not None}


def flag(values: Mapping[str, Any], name: str) -> bool | None:
    """True or false (also as 1 and 0, and as words in CSV files), or None where missing (NaN too, as pandas writes it)."""
    value = values.get(name)
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": None, "nan": None}
    said = "" if value is None else str(value).strip().lower()
    if said not in known:
        raise Excluded(f"{name!r} is {value!r}, not true or false"[:100])
    return known[said]


def messages(value: Any, name: str, role_key: str = "role", content_key: str = "content") -> tuple[Message, ...]:
    """Messages of a column that holds a list of turns. Raises Excluded where a turn cannot be read."""
    if not isinstance(value, (list, tuple)):
        raise Excluded(f"{name!r} is {kind_of(value)}, not a list of messages")
    return tuple(_message(turn, name, role_key, content_key) for turn in value)


def _message(turn: Any, name: str, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, Mapping):
        raise Excluded(f"a turn of {name!r} is {kind_of(turn)}, not a message")
    role = str(turn.get(role_key, "")).strip().lower()
    if role not in ROLES:
        raise Excluded(f"a turn of {name!r} has the role {role!r}"[:100])
    content = turn.get(content_key)
    if isinstance(content, (list, tuple)):  # parts, as multimodal data sets write them
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise Excluded(f"a turn of {name!r} holds something other than text")
        content = "".join(text(part, "text") for part in content)
    return Message(ROLES[role], text({content_key: content}, content_key))


def merged(turns: Iterable[Message]) -> tuple[Message, ...]:
    """Turns with neighbours of the same role joined by a blank line: chat templates want them to alternate."""
    result: list[Message] = []
    for turn in turns:
        if result and result[-1].role == turn.role:
            result[-1] = replace(turn, content=f"{result[-1].content}\n\n{turn.content}")
        else:
            result.append(turn)
    return tuple(result)


def split_reply(turns: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """A conversation as (prompt, last reply). Raises Excluded where it does not end with the assistant."""
    if not turns:
        raise Excluded("no turns")
    if turns[-1].role != "assistant":
        raise Excluded(ENDS_WITH_HUMAN if turns[-1].role == "user" else "ends with a system turn")
    return turns[:-1], turns[-1].content


def shared_prompt(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[tuple[Message, ...], str, str]:
    """(prompt, chosen reply, rejected reply) of two whole conversations. Raises Excluded where their prompts differ."""
    first, chosen_text = split_reply(chosen)
    second, rejected_text = split_reply(rejected)
    if first != second:
        raise Excluded(PROMPTS_DIFFER)
    return merged(first), chosen_text, rejected_text


def _checked(record: Record) -> Record:
    """The rules every record keeps, whatever its source. A system turn that says nothing is left out: many sets have the column empty."""
    if any(message.role == "system" and not message.content.strip() for message in record.prompt):
        spoken = (message for message in record.prompt if message.role != "system" or message.content.strip())
        record = replace(record, prompt=tuple(spoken))
    if not record.prompt or record.prompt[-1].role != "user":
        raise Excluded(NOT_A_USER_TURN if record.prompt else "empty prompt")
    if not record.prompt[-1].content.strip():
        raise Excluded("empty prompt")
    if not all(message.content.strip() for message in record.prompt):
        raise Excluded("empty turn in the prompt")
    if not record.replies:
        raise Excluded("no reply")
    if not all(reply.text.strip() for reply in record.replies):
        raise Excluded(EMPTY_REPLY)
    chosen, rejected = record.reply("chosen"), record.reply("rejected")
    if chosen is not None and rejected is not None and chosen.text.strip() == rejected.text.strip():
        raise Excluded(EQUAL_REPLIES)
    return record


def _without_prompt(columns: set[str]) -> str:
    """What to do with TRL's two formats that have no prompt, unless it is there misspelt."""
    if difflib.get_close_matches("prompt", columns, n=1, cutoff=0.7):
        return ""
    if {"chosen", "rejected"} <= columns:
        return (
            "Where the prompt ends in `chosen` and `rejected` cannot be told from their characters: give it as a column `prompt` "
            "(rename one with columns={theirs: prompt}), or both sides as lists of messages."
        )
    if "text" in columns:
        return (
            "A whole `text` does not say what is asked and what is replied: give `prompt` and `completion`, or `messages` "
            "(tokenise.learn=all learns from the prompt too), or rename columns with columns={theirs: ours}."
        )
    return ""


def _lacking(module: Source, columns: set[str]) -> list[str]:
    """The columns missing for the alternative most likely meant."""
    return min((sorted(wanted - columns) for wanted in module.COLUMNS), key=lambda lacking: _distance(lacking, columns))


def _distance(lacking: list[str], columns: set[str]) -> tuple[bool, int]:
    """How far columns are from a format: a missing one that looks misspelt is nearest, then the fewest missing."""
    misspelt = bool(lacking) and bool(difflib.get_close_matches(lacking[0], columns, n=1, cutoff=0.7))
    return not misspelt, len(lacking)


def _missing(module: Source, columns: set[str]) -> str:
    """'needs columns …; missing …; found …', with the nearest match of the first one missing."""
    lacking = _lacking(module, columns)
    wanted = " or ".join(" + ".join(sorted(alternative)) for alternative in module.COLUMNS)
    if not lacking:
        return f"needs columns {wanted} in another shape than these have."
    hint = nearest(lacking[0], columns) if columns else ""
    return f"needs columns {wanted}; {', '.join(map(repr, lacking))} is missing (found: {', '.join(sorted(columns)) or 'none'}).{hint}"
