"""A study's stages as calls of the rooms below: the one place that knows their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from equipoise.core.errors import UsageError
from equipoise.core.files import write_json, write_jsonl
from equipoise.core.prints import PromptPrints
from equipoise.core.records import Record
from equipoise.core.runs import Run, run_stage
from equipoise.data.load import load, source_fingerprint
from equipoise.data.mixture import prompt_texts
from equipoise.data.settings import DataSettings
from equipoise.generation._base import Prompt, Sampling
from equipoise.study._graph import Node, build_graph
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
        from equipoise.evaluation.settings import EvaluateSettings

        asked = self.settings.evaluation
        values = {
            "suite": asked.suite,
            "source": str(scores.resolve()),
            "output_dir": str(self.folder / "evaluation"),
            "margins": asked.margins,
            "allow_overlap": self.settings.override_independence,
            **asked.settings,
        }
        return evaluate(EvaluateSettings.make(values, source="evaluation.settings"), overwrite=True)

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
        from equipoise.scorers.reward_model import RewardModelSettings, pair_accuracy

        judge = self.settings.judge
        scorer = RewardModelSettings.make(self._reward_model(), source="evaluation.scoring.reward_model")
        names = {"pairs": judge.held_out, "training pairs": judge.data}
        inputs = {f"{use} {name} {part}": mark for use in names for name in names[use] for part, mark in self._prints(name).items()}

        def work(folder: Path) -> Mapping[str, Any]:
            held_out, trained = ([record for name in names[use] for record in self._records(name)] for use in names)
            found = pair_accuracy(scorer.build(), held_out, trained)
            write_json(folder / "held_out.json", {**_rates(found), "counts": found})
            return found

        settings = {"judge": scorer.resolved(), **{use: [self.settings.data[name].resolved() for name in names[use]] for use in names}}
        return run_stage(node.folder(self.folder), "held_out", settings, {**inputs, **scorer.inputs()}, work, self.overwrite)

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
        scorers.append(self._reward_model())
        if asked.kl_to_base and not node.search and node.policy is None and node.start.start is not None:
            pair = {"model_name_or_path": self._model(node.start), "base_model_name_or_path": self.settings.model_name_or_path}
            tokenise = asked.generation.get("tokenise", self._tokenise)
            scorers.append({"scorer": "kl_to_base", **pair, "tokenise": tokenise, **asked.scoring.get("kl_to_base", {})})
        values = {
            "completions": str(node.start.folder(self.folder) / "completions.jsonl"),
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

    def _reward_model(self) -> dict[str, Any]:
        """The judge as a scorer: texts are laid out as in its training."""
        judge = self.settings.judge
        trained = next((node for node in build_graph(self.settings).judge if node.kind == "train"), None)
        model = str(trained.folder(self.folder) / "model") if trained else judge.model_name_or_path
        further = self.settings.evaluation.scoring.get("reward_model", {})
        return {"scorer": "reward_model", "model_name_or_path": model, "tokenise": judge.training.get("tokenise", {}), **further}

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

    def _prints(self, block: str) -> dict[str, str]:
        return source_fingerprint(self.settings.data[block])


def _rates(found: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of `pair_accuracy` as rates with Wilson's interval; ties count as wrong, pairs without a verdict as missing."""
    from equipoise.evaluation.intervals import rate

    known = found["pairs"] - found["missing"]
    accuracy = [1.0] * found["correct"] + [0.0] * (known - found["correct"]) + [float("nan")] * found["missing"]
    by_length = [1.0] * found["length_correct"] + [0.0] * (found["pairs"] - found["length_correct"])
    return {"pair_accuracy": rate(accuracy).as_json(), "length_baseline": rate(by_length).as_json()}
