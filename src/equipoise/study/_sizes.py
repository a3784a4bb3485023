"""How much a study reads: rows and tokens, counted on the real data where it is at hand, else as the study expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.core.prints import PromptPrints
from equipoise.core.records import Record
from equipoise.data.accounting import Accounting
from equipoise.data.load import load
from equipoise.data.mixture import exclude, prompt_texts
from equipoise.data.settings import DataSettings
from equipoise.data.tokenise import tokenise
from equipoise.generation._base import Prompt
from equipoise.study._cost import local_folder
from equipoise.study._graph import Node
from equipoise.study._prompts import is_at_hand, search_prompts, study_prompts
from equipoise.study.settings import PromptSource, StudySettings
from equipoise.training.machine import Machine
from equipoise.training.settings import TrainSettings

if TYPE_CHECKING:
    from equipoise.training.estimate import Estimate

CHARACTERS_A_TOKEN = 4.2
"""English text under the usual byte-pair vocabularies; used where the tokenizer is not at hand."""


@dataclass(frozen=True)
class Sizes:
    """Rows of a data block and the unique tokens of one pass over them; counted, or expected.

    lengths: (P, (T1..TK)) of every row, where they were counted.
    """

    rows: int
    tokens: float
    counted: bool
    lengths: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class AxisSizes:
    """Prompts of one axis and their tokens."""

    prompts: int
    tokens: float


class Sizer:
    """Counts what a study reads, each combination of data, tokenizer and method once. `notes` says what was assumed."""

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.notes: list[str] = []
        self._records: dict[tuple[str, bool], list[Record] | None] = {}
        self._sizes: dict[tuple[Any, ...], Sizes | None] = {}
        self._estimates: dict[tuple[Any, ...], Estimate] = {}
        self._tokenizers: dict[str, Any] = {}
        self._asked: PromptPrints | None = None
        self._dev: dict[str, AxisSizes] | None = None

    def recipe(self, node: Node) -> TrainSettings:
        """The training settings of a stage, without its data. Raises UsageError naming the stage."""
        model = self.settings.judge.model_name_or_path if node.judge else self.settings.model_name_or_path
        return TrainSettings.make({"model_name_or_path": model, "seed": node.seed, **node.training}, source=f"stage {node.name}")

    def needs_reference(self, objective: Mapping[str, Any]) -> bool:
        """Whether a method reads reference log-probs. Raises UsageError for hyper-parameters that cannot be."""
        from equipoise.objectives._load import build

        return build(objective).needs.reference != "none"

    def block(self, blocks: Sequence[str], node: Node, objective: Mapping[str, Any]) -> Sizes | None:
        """Size of some data blocks together under a stage's tokenizer and method; None where nothing is known of one."""
        parts = [self._one(block, node, objective) for block in blocks]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        counted = all(part.counted for part in known)
        lengths = tuple(row for part in known for row in part.lengths) if counted else ()
        return Sizes(sum(part.rows for part in known), sum(part.tokens for part in known), counted, lengths)

    def estimate(self, node: Node, sizes: Sequence[Sizes], machine: Machine) -> Estimate | None:
        """Memory and time of a training stage, where its model's config and its rows are here; equal recipes are estimated once."""
        from equipoise.objectives._load import build
        from equipoise.training.estimate import Estimator

        recipe = self.recipe(node)
        if local_folder(recipe.model_name_or_path) is None or not all(size.lengths for size in sizes):
            return None
        objectives = [build(stream.objective) for stream in node.streams]
        references = tuple(objective.needs.reference for objective in objectives)
        ignored = {"seed", "output_dir", "learning_rate"}
        key = (recipe.model_dump_json(exclude=ignored), references, tuple(hash(size.lengths) for size in sizes))
        if key not in self._estimates:
            lengths = [size.lengths for size in sizes]
            self._estimates[key] = Estimator(recipe, lengths, machine, objectives[0].needs.readout, references).estimate(quick=True)
        return self._estimates[key]

    def axes(self, prompts: Sequence[Prompt] | None) -> dict[str, AxisSizes]:
        """Prompts and their tokens for each axis; sources that are not at hand count with their limit. To be asked first."""
        sources = self.settings.evaluation.prompts
        if prompts is None and all(is_at_hand(source, self.settings.data) for source in sources):
            prompts = study_prompts(self.settings)
        if prompts:
            dev = self._search_prompts(prompts)
            self._asked = PromptPrints.of([text for prompt in [*prompts, *dev] for text in prompt_texts(prompt.messages)])
            self._dev = self._counted(dev, self.settings.search.prompts if self.settings.search else ())
        return self._counted(prompts, sources)

    def search_axes(self) -> dict[str, AxisSizes]:
        """The same of the search's prompts."""
        if self._dev is None:
            self._dev = self._counted(None, self.settings.search.prompts if self.settings.search else ())
        return self._dev

    def _search_prompts(self, asked: Sequence[Prompt]) -> list[Prompt]:
        search = self.settings.search
        here = search is not None and all(is_at_hand(source, self.settings.data) for source in search.prompts)
        return search_prompts(self.settings, asked) if here else []

    def _counted(self, prompts: Sequence[Prompt] | None, sources: Sequence[PromptSource]) -> dict[str, AxisSizes]:
        found: dict[str, AxisSizes] = {}
        for prompt in prompts or ():
            tokens = sum(len(message.content) for message in prompt.messages) / CHARACTERS_A_TOKEN + 8
            before = found.get(prompt.axis, AxisSizes(0, 0.0))
            found[prompt.axis] = AxisSizes(before.prompts + 1, before.tokens + tokens)
        if prompts is None:
            for source in sources:
                name = source.source or source.data
                self._note(f"The evaluation prompts of {name} are not all here: time and detectable differences count {source.limit or 0}.")
                for axis in source.axes or ((source.axis,) if source.axis else ()):
                    before = found.get(axis, AxisSizes(0, 0.0))
                    found[axis] = AxisSizes(before.prompts + source.limit, before.tokens + 40.0 * source.limit)
        return found

    def _one(self, block: str, node: Node, objective: Mapping[str, Any]) -> Sizes | None:
        recipe = self.recipe(node)
        # Held-out pairs may be asked in the evaluation; what is trained on may not.
        trained = node.kind == "train"
        key = (block, trained, recipe.model_name_or_path, recipe.tokenise.model_dump_json(), str(dict(objective)))
        if key not in self._sizes:
            self._sizes[key] = self._measure(block, trained, recipe, objective)
        return self._sizes[key]

    def _measure(self, block: str, trained: bool, recipe: TrainSettings, objective: Mapping[str, Any]) -> Sizes | None:
        from equipoise.objectives._load import build

        method = build(objective)
        needs = method.needs
        records = self._load(block, trained)
        if records is None:
            expected = self.settings.expected.get(block)
            if expected is None:
                self._note(f"The data block {block!r} is not here, and `expected` says nothing of it: its size is not known.")
                return None
            self._note(f"The data block {block!r} is not here: {expected.rows} rows are assumed, as the study says.")
            return Sizes(expected.rows, expected.rows * expected.tokens_per_row, counted=False)
        if local_folder(recipe.model_name_or_path) is None:
            self._note(f"The tokenizer of {recipe.model_name_or_path} is not here: tokens are estimated from characters.")
            return Sizes(len(records), sum(_characters(record, needs.roles) for record in records) / CHARACTERS_A_TOKEN, counted=False)
        rows, _ = tokenise(records, self._tokenizer(recipe.model_name_or_path), recipe.tokenise, needs.roles, method.facts())
        lengths = tuple((int(prompt), tuple(int(reply) for reply in replies)) for prompt, replies in rows.lengths())
        return Sizes(len(rows), float(sum(prompt + sum(replies) for prompt, replies in lengths)), True, lengths)

    def _load(self, block: str, trained: bool) -> list[Record] | None:
        key = (block, trained)
        if key not in self._records:
            settings = self.settings.data[block]
            self._records[key] = (self._kept(settings) if trained else load(settings).records) if _at_hand(settings) else None
        return self._records[key]

    def _kept(self, settings: DataSettings) -> list[Record]:
        """The records of a block without those that a run keeps apart because their prompts are asked in the evaluation."""
        if not self._asked or not self.settings.keep_apart:
            return load(settings).records
        records = load(settings.model_copy(update={"max_rows": None})).records
        return list(islice(exclude(records, {"the evaluation": self._asked}, settings.exclude_near, Accounting()), settings.max_rows))

    def _tokenizer(self, name: str) -> Any:
        if name not in self._tokenizers:
            from equipoise.models.load import load_tokenizer

            self._tokenizers[name] = load_tokenizer(name)
        return self._tokenizers[name]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _at_hand(block: DataSettings) -> bool:
    names = [block.dataset_name, *block.exclude_prompts]
    return all(name.split(":")[0] == "starter" or Path(name).expanduser().exists() for name in names)


def _characters(record: Record, roles: Sequence[str]) -> int:
    """Characters of a record's prompt and of the replies a method reads (`gold` falls back to `chosen`)."""
    wanted = {role: record.reply(role) or (record.reply("chosen") if role == "gold" else None) for role in roles}
    return sum(len(message.content) for message in record.prompt) + sum(len(reply.text) for reply in wanted.values() if reply)


def detectable_differences(settings: StudySettings, prompts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The smallest difference each primary contrast can see, before anything is run: what the evaluation itself would say.

    prompts: axis → how many are asked. `difference` is None where they are too few for any.
    """
    from equipoise.evaluation.metrics._base import load as load_metric
    from equipoise.evaluation.power import detectable

    rules = settings.evaluate_settings()
    rows: list[dict[str, Any]] = []
    for contrast in settings.primary:
        metric = load_metric(contrast.metric)
        n = sum(prompts.get(axis, 0) for part in metric.parts for axis in part.axes)
        found = detectable(contrast.metric, metric, prompts, rules.alpha, rules.power, family=len(settings.primary))
        shown = found or {"metric": contrast.metric, "title": metric.title, "n": n, "difference": None, "unit": "", "assumes": ""}
        rows.append({"a": contrast.a, "b": contrast.b, **shown})
    return rows
