"""A study's stages as calls of the rooms below: the one place that knows their settings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from equipoise.core.errors import UsageError
from equipoise.core.files import read_jsonl, write_jsonl
from equipoise.core.prints import PromptPrints
from equipoise.core.records import Record
from equipoise.core.runs import Run
from equipoise.data.load import load
from equipoise.data.mixture import prompt_texts
from equipoise.data.settings import DataSettings
from equipoise.generation._base import Prompt, Sampling
from equipoise.generation._stage import COMPLETIONS
from equipoise.study._graph import Node, asks_kl, build_graph, shows_credit
from equipoise.study._prompts import study_prompts
from equipoise.study.settings import StudySettings

PROMPTS = "prompts.jsonl"
SEARCH_PROMPTS = "search_prompts.jsonl"
RANDOM_REPLIES = "random_replies.jsonl"
APART_POLICIES, APART_JUDGE = "kept_apart/policies.npz", "kept_apart/judge.npz"


class Stages:
    """Runs the stages of one study in its folder (an absolute path, so that a stage's settings do not depend on where it is started)."""

    def __init__(self, settings: StudySettings, folder: Path, overwrite: bool = False) -> None:
        self.settings, self.folder, self.overwrite = settings, folder, overwrite

    def prompts(self) -> list[Prompt]:
        """The evaluation prompts."""
        return study_prompts(self.settings)

    def keep_apart(self, prompts: Sequence[Prompt]) -> None:
        """Write down which prompts training data must not hold, before anything is trained."""
        if not self.settings.keep_apart:
            return
        asked = PromptPrints.of([text for prompt in prompts for text in prompt_texts(prompt.messages)])
        asked.save(self.folder / APART_POLICIES)
        if self.settings.judge.data:
            others = dict.fromkeys([*self.settings.policy_blocks(), *self.settings.judge.held_out])
            seen = [text for name in others for record in self._records(name) for text in prompt_texts(record.prompt)]
            PromptPrints.merge([asked, PromptPrints.of(seen)]).save(self.folder / APART_JUDGE)

    def run(self, node: Node) -> Run:
        """Run one stage, or find it done."""
        work = {"train": self._train, "held_out": self._held_out, "generate": self._generate, "score": self._score}
        return work[node.kind](node)

    def evaluate(self, scores: Path) -> Run:
        """Evaluate `scores.json` into `evaluation/`; what stands there of an earlier state is replaced."""
        from equipoise.evaluation.evaluate import evaluate

        return evaluate(self.settings.evaluate_settings(str(scores.resolve()), str(self.folder / "evaluation")), overwrite=True)

    def _train(self, node: Node) -> Run:
        from equipoise.training.fit import fit
        from equipoise.training.settings import TrainSettings

        values = {
            "model_name_or_path": self._start(node),
            "output_dir": str(node.folder(self.folder)),
            "seed": node.seed,
            # Dev prompts a stage looks at count as seen, and here they may be the judge's: so only where the stage asks.
            "eval_on_dev": node.dev,
            "streams": [
                {
                    "name": "main" if len(node.streams) == 1 else "+".join(stream.data),
                    "data": tuple(self._block(block, node) for block in stream.data),
                    "objective": dict(stream.objective),
                    "weight": stream.weight,
                }
                for stream in node.streams
            ],
            **({} if node.reference == "start" else {"reference_model": self._reference(node)}),
            **node.training,
        }
        return fit(TrainSettings.make(values, source=f"stage {node.name}"), overwrite=self.overwrite)

    def _held_out(self, node: Node) -> Run:
        """Pair accuracy of the judge on pairs it never saw, beside guessing by length: `held_out.json`."""
        from equipoise.evaluation.held_out import held_out
        from equipoise.scorers._base import chosen_scorer

        tried, trained = (
            {name: self.settings.data[name] for name in names} for names in (self.settings.judge.held_out, self.settings.judge.data)
        )
        return held_out(chosen_scorer(self._judge()), tried, node.folder(self.folder), trained, self.overwrite)

    def _generate(self, node: Node) -> Run:
        from equipoise.generation._stage import GenerateSettings, generate

        asked = self.settings.evaluation
        if node.policy is None:
            generator = {"generator": "local", "model_name_or_path": self._model(node), "tokenise": self._tokenise, **asked.generation}
        else:
            generator = {"generator": "scripted", "policy": node.policy}
            if node.policy == "random_reply":
                generator["replies_file"] = str(self._replies())
        # Greedy replies do not depend on the sampling seed; others are drawn anew for every seed of the study.
        seed = asked.sampling.seed + node.seed if asked.sampling.temperature > 0 else asked.sampling.seed
        values = {
            "generator": generator,
            "prompts": str(self.folder / (SEARCH_PROMPTS if node.search else PROMPTS)),
            "sampling": Sampling(**{**asked.sampling.resolved(), "seed": seed}).resolved(),
            "output_dir": str(node.folder(self.folder)),
        }
        return generate(GenerateSettings.make(values, source="evaluation.generation"), overwrite=self.overwrite)

    def _score(self, node: Node) -> Run:
        from equipoise.scorers._stage import ScoreSettings, score

        asked = self.settings.evaluation
        assert node.start is not None
        rules = ("invalid", "refusal", "length")
        scorers: list[dict[str, Any]] = [{"scorer": "rules", "rule": rule, **asked.scoring.get(rule, {})} for rule in rules]
        scorers.append(self._judge())
        pair = {
            "model_name_or_path": self._model(node.start),
            "base_model_name_or_path": self.settings.model_name_or_path,
            "tokenise": asked.generation.get("tokenise", self._tokenise),
        }
        if asks_kl(self.settings, node) and node.policy is None and node.start.start is not None:
            scorers.append({"scorer": "kl_to_base", **pair, **asked.scoring.get("kl_to_base", {})})
        if shows_credit(self.settings, node.start):
            scorers.append({"scorer": "token_credit", **pair, "ids": self._credited(), **asked.scoring.get("token_credit", {})})
        values = {
            "completions": str(node.start.folder(self.folder) / COMPLETIONS),
            "scorers": scorers,
            "output_dir": str(node.folder(self.folder)),
        }
        return score(ScoreSettings.make(values, source="evaluation.scoring"), overwrite=self.overwrite)

    def _start(self, node: Node) -> str:
        """What a training stage starts from."""
        if node.judge:
            return self.settings.judge.model_name_or_path
        return self._model(node)

    def _reference(self, node: Node) -> str:
        """The model a training stage is compared with, where that is not its start."""
        other = node.reference
        return str(other.folder(self.folder) / "model") if isinstance(other, Node) else self.settings.model_name_or_path

    def _model(self, node: Node) -> str:
        """The model behind a stage: the one trained by the stage before it, or the base."""
        return str(node.start.folder(self.folder) / "model") if node.start else self.settings.model_name_or_path

    def _judge(self) -> dict[str, Any]:
        """The judge as a scorer, signing `reward`: texts are laid out as in its training."""
        judge = self.settings.judge
        trained = next((node for node in build_graph(self.settings).judge if node.kind == "train"), None)
        model = str(trained.folder(self.folder) / "model") if trained else judge.model_name_or_path
        values = {"scorer": judge.scorer, "model_name_or_path": model, "tokenise": judge.training.get("tokenise", {})}
        if judge.scorer == "implicit":
            # The arms' token ids may be another tokenizer's.
            values |= {"base_model_name_or_path": judge.base_model_name_or_path, "name": "reward", "text": "always"}
        return {**values, **self.settings.evaluation.scoring.get(judge.scorer, {})}

    def _credited(self) -> list[str]:
        """Ids of the prompts whose replies are shown token by token: the first ones of each axis."""
        axes: dict[str, list[str]] = {}
        for row in read_jsonl(self.folder / PROMPTS):
            axes.setdefault(row["axis"], []).append(row["id"])
        return [name for names in axes.values() for name in names[: self.settings.evaluation.token_credit]]

    @cached_property
    def _tokenise(self) -> dict[str, Any]:
        """How prompts become tokens when asked: as in training, unless the evaluation says otherwise."""
        return dict(self.settings.training.get("tokenise", {}))

    def _block(self, name: str, node: Node) -> DataSettings:
        """A data block as a training stage reads it: without the prompts it has to be kept apart from."""
        block = self.settings.data[name]
        if not self.settings.keep_apart:
            return block
        apart = str(self.folder / (APART_JUDGE if node.judge else APART_POLICIES))
        return block.model_copy(update={"exclude_prompts": (*block.exclude_prompts, apart)})

    def _replies(self) -> Path:
        """Replies of the training data, for the null policy that answers with a random one."""
        names = self.settings.policy_blocks() or self.settings.judge.data
        if not names:
            raise UsageError("evaluation.null_policies: random_reply needs training data, and this study has none; leave it out.")
        texts = [reply.text for name in names for record in self._records(name) for reply in record.replies]
        path = self.folder / RANDOM_REPLIES
        write_jsonl(path, list(dict.fromkeys(texts)))
        return path

    def _records(self, block: str) -> list[Record]:
        return load(self.settings.data[block]).records
