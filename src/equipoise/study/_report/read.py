"""A study folder as the report sees it: whatever is there, and a note for whatever is not.

Foreign text is made harmless to encode here, once: lone surrogates and control characters become U+FFFD. Escaping for
HTML, SVG and Markdown happens where each is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.core.errors import DataError
from equipoise.core.files import read_json
from equipoise.core.printable import printable

LONGEST = 20_000
"""Characters shown of a reply or of a turn of a prompt."""
SERIES = 8
"""How many colours the palette has; further arms repeat colours with another marker."""


@dataclass(frozen=True)
class Stage:
    """One stage folder: the contents of its files, None where a file is absent or unreadable."""

    folder: str
    kind: str
    log: list[dict[str, Any]] | None
    accounting: Any
    cost: Mapping[str, Any]
    environment: Any
    start_check: Any
    credit: list[dict[str, Any]] | None = None
    settings: Any = None


@dataclass(frozen=True)
class Arm:
    """One arm or null policy: its seeds' entries of `arms.json` and its place in the palette."""

    name: str
    kind: str
    slot: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def colour(self) -> str:
        """The CSS class of its colour."""
        return "null" if self.kind == "null" else f"s{self.slot % SERIES}"

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Its seeds that failed."""
        return [run for run in self.runs if run.get("status") == "failed"]

    @property
    def pending(self) -> list[dict[str, Any]]:
        """Its seeds that did not run to the end and did not fail."""
        return [run for run in self.runs if run.get("status") not in ("failed", "done")]

    def stages(self, run: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The stages of one seed, in order."""
        return [stage for stage in listing(run.get("stages")) if isinstance(stage, dict)]


@dataclass(frozen=True)
class StudyFiles:
    """Everything the report is made from. `notes` say what is missing or could not be read; `coverage` is the intervals'."""

    name: str
    lock: dict[str, Any]
    arms: list[Arm]
    stages: dict[str, Stage]
    evaluation: dict[str, Any]
    replies: list[dict[str, Any]]
    notes: list[str]
    coverage: str = "95\u00a0%"
    search: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Metric id → its description."""
        return {name: mapping(value) for name, value in mapping(self.evaluation.get("metrics")).items()}

    @property
    def withheld(self) -> bool:
        """Whether the judge's independence blocks the headline and nobody overrode that."""
        independence = mapping(self.evaluation.get("independence"))
        return bool(independence.get("blocked")) and not independence.get("overridden")

    def estimate(self, arm: str, metric: str) -> dict[str, Any]:
        """One estimate, empty when missing."""
        model = mapping(mapping(self.evaluation.get("models")).get(arm))
        # Suites that speak a published format put the estimates into the model itself.
        return mapping((mapping(model.get("estimates")) or model).get(metric))

    def stage(self, entry: Mapping[str, Any]) -> Stage | None:
        """The stage folder an entry of `arms.json` names."""
        return self.stages.get(Path(str(entry.get("folder") or "")).name)


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """The value if it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def turns(prompt: Any) -> list[tuple[str, str]]:
    """A prompt as (role, text) pairs, written as text or as messages; a very long turn is cut for display, and says so."""
    messages = [{"content": prompt}] if isinstance(prompt, str) else map(mapping, listing(prompt))
    return [(str(turn.get("role") or "user"), _shown(str(turn.get("content") or ""))) for turn in messages]


def _shown(words: str) -> str:
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} … (cut for display; the whole turn has {len(words):,} characters)"


def flatten(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(label, leaf) pairs of nested JSON: `{"dropped": {"empty": 3}}` gives ("dropped: empty", 3)."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, (*path, str(key).replace("_", " ")))
    elif isinstance(value, list) and value and all(isinstance(item, (dict, list)) for item in value):
        for number, inner in enumerate(value, 1):
            yield from flatten(inner, (*path, str(number)))
    else:
        yield ": ".join(path), value


def read_study(folder: str | Path) -> StudyFiles:
    """Read a study folder. Raises DataError when it is no study folder at all (no lock, no arms, no evaluation)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. Give the folder `equipoise study run` wrote.")
    reader = _Reader(folder)
    known = ("study.lock.json", "arms.json", "evaluation/evaluation.json")
    if not any((folder / name).is_file() for name in known):
        raise DataError(f"{folder} holds none of {', '.join(known)}: it is not a study folder.")
    lock = mapping(reader.json("study.lock.json", "what was decided beforehand cannot be shown"))
    arms_file = mapping(reader.json("arms.json", "what was run, its cost and its failures cannot be shown"))
    evaluation = mapping(reader.json("evaluation/evaluation.json", "there are no scores and no verdicts yet"))
    runs = [mapping(run) for run in listing(arms_file.get("arms"))]
    replies = reader.lines("evaluation/replies.jsonl", "replies cannot be shown") or []
    folders = [path for path in sorted((folder / "stages").glob("*")) if path.is_dir() and path.name[:1] != "."]
    if "stages" in arms_file:  # others are what an earlier decision left behind
        folders = [path for path in folders if path.name in listing(arms_file["stages"])]
    stages = {path.name: _read_stage(reader, path) for path in folders}
    confidence = evaluation.get("confidence", 0.95)
    coverage = f"{100 * confidence:g}\u00a0%" if isinstance(confidence, float) else "95\u00a0%"
    arms = _arms(runs, evaluation, replies, lock)
    return StudyFiles(
        folder.resolve().name, lock, arms, stages, evaluation, replies, reader.notes, coverage, mapping(reader.json("search.json"))
    )


def _read_stage(reader: _Reader, path: Path) -> Stage:
    """One stage folder; files a kind of stage does not write are absent without a note."""
    base = f"stages/{path.name}"
    credit = reader.lines(f"{base}/token_credit.jsonl")
    return Stage(
        folder=path.name,
        kind=path.name.split("-", 1)[0],
        log=reader.lines(f"{base}/log.jsonl"),
        accounting=reader.json(f"{base}/accounting.json"),
        cost=mapping(reader.json(f"{base}/cost.json")),
        environment=reader.json(f"{base}/environment.json"),
        start_check=reader.json(f"{base}/start_check.json"),
        credit=credit,
        settings=reader.json(f"{base}/settings.json") if credit else None,
    )


def _arms(runs: list[dict[str, Any]], evaluation: Mapping[str, Any], replies: list[dict[str, Any]], lock: Mapping[str, Any]) -> list[Arm]:
    """Arms in the order of `arms.json`, then those only the evaluation or the replies know; null policies last."""
    models = mapping(evaluation.get("models"))
    names = [*(str(run.get("name")) for run in runs), *models, *(name for row in replies for name in mapping(row.get("replies")))]
    nulls = {str(name) for name in listing(mapping(mapping(lock.get("study")).get("evaluation")).get("null_policies"))}
    planned = mapping(mapping(lock.get("study")).get("arms"))
    kinds = {name: "null" if name in nulls and name not in planned else "arm" for name in names}
    kinds |= {name: str(mapping(model).get("kind", "arm")) for name, model in models.items()}
    ordered = sorted(kinds, key=lambda name: kinds[name] == "null")
    return [Arm(name, kinds[name], slot, [run for run in runs if str(run.get("name")) == name]) for slot, name in enumerate(ordered)]


class _Reader:
    """Reads files of one folder and keeps notes of what went wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._prefix = str(folder.resolve())

    def json(self, name: str, without: str = "") -> Any:
        """A JSON file's value, or None. `without` says what its absence costs; empty: absence is fine."""
        if not (self.folder / name).is_file():
            if without:
                self.notes.append(f"{name} is not there: {without}.")
            return None
        try:
            return self._clean(read_json(self.folder / name))
        except DataError as error:
            self.notes.append(self._clean(f"Left out, because it could not be read: {error}").replace(str(self.folder) + "/", ""))
            return None

    def lines(self, name: str, without: str = "") -> list[dict[str, Any]] | None:
        """The objects of a JSON-lines file; broken lines (a kill while writing) are counted and left out."""
        path = self.folder / name
        if not path.is_file():
            if without:
                self.notes.append(f"{name} is not there: {without}.")
            return None
        rows, broken = [], 0
        for line in path.read_bytes().decode("utf-8", "replace").split("\n"):
            if line.strip():
                try:
                    rows.append(mapping(self._clean(json.loads(line))))
                except ValueError:
                    broken += 1
        if broken:
            self.notes.append(f"{name}: {broken} broken line{'s' if broken > 1 else ''} left out.")
        return rows

    def _clean(self, value: Any) -> Any:
        """Text that can be encoded and printed, without the place of the study on this machine."""
        if isinstance(value, str):
            return printable(value.replace(self._prefix, "."))
        if isinstance(value, list):
            return [self._clean(item) for item in value]
        if isinstance(value, dict):
            return {self._clean(key): self._clean(item) for key, item in value.items()}
        return value
