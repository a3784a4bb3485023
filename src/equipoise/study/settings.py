"""Settings of a study: arms of training stages, data blocks, a judge, an evaluation, and what was decided beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from equipoise.core.catalog import names
from equipoise.core.errors import UsageError, nearest
from equipoise.core.settings import Settings
from equipoise.data.settings import DataSettings
from equipoise.evaluation.settings import Contrast, EvaluateSettings
from equipoise.generation._base import Sampling
from equipoise.training.settings import TrainSettings

Axis = Literal["helpful", "harmful", "benign"]
_SET_BY_THE_STUDY = ("model_name_or_path", "output_dir", "streams", "seed")


def _several(value: Any) -> Any:
    """One name stands for a list of one."""
    return (value,) if isinstance(value, str) else () if value is None else value


Blocks = Annotated[tuple[str, ...], BeforeValidator(_several)]


class StreamReference(Settings):
    """One stream of a stage: data blocks of the study, mixed, and the objective that reads them."""

    data: Blocks = Field(min_length=1, description="names of data blocks of the study")
    objective: dict[str, Any] = Field(description="name of the method and its hyper-parameters")
    weight: float = Field(default=1.0, ge=0.0, description="weight of this stream's mean loss in the step's loss")

    @field_validator("objective", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class StageSettings(Settings):
    """One training stage of an arm. It starts from the model of the stage before it (the base for the first), which is its reference.

    Pre-DPO (arXiv 2504.15843), where a model trained first guides a second run from the beginning, is `start: base` with
    `reference: previous`. SACPO (arXiv 2404.11049), helpfulness first and then safety from there, is two stages as they are.
    """

    name: str = Field(default="", description="shown in folders and tables; empty: the objective's name")
    objective: dict[str, Any] = Field(default={"name": "dpo"}, description="name of the method and its hyper-parameters")
    data: Blocks = Field(default=(), description="names of data blocks of the study, mixed; none: the streams say")
    streams: tuple[StreamReference, ...] = Field(default=(), description="several objectives in every step, each with its data")
    start: Literal["previous", "base"] = Field(default="previous", description="what it trains: the stage before it, or the study's base")
    reference: Literal["start", "previous", "base"] = Field(
        default="start", description="reference of a preference loss: what the stage starts from, the stage before it, or the base"
    )
    dev: bool = Field(default=False, description="look at the dev part of `train` data while training; its prompts then count as seen")
    training: dict[str, Any] = Field(default={}, description="training settings that differ from the study's")

    @field_validator("objective", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.data) == bool(self.streams):
            raise UsageError(f"Stage {self.title!r}: give either `data` (with `objective`) or `streams`.")
        return self

    @property
    def title(self) -> str:
        """The stage's name, or its objective's where it has none."""
        return self.name or "+".join(str(stream.objective.get("name", "?")) for stream in self.references())

    def references(self) -> tuple[StreamReference, ...]:
        """The streams, whichever way they were written."""
        return self.streams or (StreamReference(data=self.data, objective=self.objective),)


class JudgeSettings(Settings):
    """What scores replies: a reward model, trained here on a data block or an existing one, or a policy's implicit reward."""

    name: str = Field(default="judge", description="shown in tables")
    scorer: Literal["reward_model", "implicit"] = Field(
        default="reward_model", description="implicit: β log π/π_ref of two causal models; it compares replies to one prompt only"
    )
    model_name_or_path: str = Field(
        description="backbone to train where `data` is given; otherwise a finished reward model, or the policy of an implicit reward"
    )
    base_model_name_or_path: str | None = Field(default=None, description="the reference of an implicit reward")
    data: Blocks = Field(default=(), description="data blocks the judge is trained on; none: the model is used as it is")
    held_out: Blocks = Field(default=(), description="data blocks with pairs the judge never saw; its accuracy on them is reported")
    training: dict[str, Any] = Field(default={}, description="training settings of the judge")
    trained_on: str | None = Field(default=None, description="trained_on.npz of a finished judge, where known")

    @model_validator(mode="after")
    def _two_models(self) -> Self:
        if self.scorer == "implicit" and (self.base_model_name_or_path is None or self.data):
            raise UsageError("judge: an implicit reward reads finished models; give `base_model_name_or_path`, and no `data` to train on.")
        if self.scorer != "implicit" and self.base_model_name_or_path is not None:
            raise UsageError("judge.base_model_name_or_path belongs to `scorer: implicit`.")
        return self

    @property
    def weights(self) -> str:
        """What the judge's weights are, in words."""
        against = f", implicit reward against {self.base_model_name_or_path}" if self.scorer == "implicit" else ""
        return self.model_name_or_path + against


class PromptSource(Settings):
    """Where a part of the evaluation prompts comes from: the starter set, a file, or the prompts of a data block."""

    source: str | None = Field(default=None, description="'starter', 'starter:dev', a prompts.jsonl, or an XSTest prompts.csv")
    data: str | None = Field(default=None, description="data block whose prompts are asked")
    axis: Axis | None = Field(default=None, description="what the prompts test; needed where the source does not say")
    axes: tuple[Axis, ...] = Field(default=(), description="keep only these axes of the source; empty: all")
    containing: tuple[str, ...] = Field(default=(), description="keep rows whose prompt or chosen reply holds one of these strings")
    limit: int = Field(default=0, ge=0, description="prompts kept per axis, drawn by `seed`; 0: all")
    seed: int = Field(default=0, description="draws the prompts where `limit` leaves some out")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.source is None) == (self.data is None):
            raise UsageError("An evaluation prompt source needs either `source` or `data`.")
        if self.data is not None and self.axis is None:
            raise UsageError(f"Evaluation prompts from the data block {self.data!r} need an `axis`: helpful, harmful or benign.")
        return self


class EvaluationSettings(Settings):
    """What is asked of every arm, how replies are drawn, and what counts as equivalent."""

    suite: str = Field(default="two_axis", description="evaluation suite")
    prompts: tuple[PromptSource, ...] = Field(default=(PromptSource(source="starter"),), min_length=1, description="prompt sources")
    sampling: Sampling = Field(default=Sampling(), description="how replies are drawn")
    generation: dict[str, Any] = Field(default={}, description="further settings of `equipoise generate` (batch size, dtype, …)")
    scoring: dict[str, dict[str, Any]] = Field(default={}, description="scorer → further settings of it (batch size, dtype, …)")
    settings: dict[str, Any] = Field(default={}, description="further settings of `equipoise evaluate` (thresholds, resamples, …)")
    baseline: str = Field(default="base", description="arm the others are compared with")
    margins: dict[str, float] = Field(default={}, description="metric → margin inside which two arms count as equivalent")
    null_policies: tuple[Literal["always_refuse", "echo", "empty", "random_reply"], ...] = Field(
        default=("always_refuse", "echo", "empty", "random_reply"), description="policies that do nothing useful, to test the metrics"
    )
    kl_to_base: bool = Field(default=True, description="score every reply's divergence from the base model, nats a token")
    token_credit: int = Field(
        default=2,
        ge=0,
        description="prompts of each axis, the first ones, whose replies are shown token by token against the base; 0: none",
    )


class SearchSettings(Settings):
    """A search over learning rates that every arm makes alike before it is evaluated, on prompts the evaluation never asks."""

    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=2, description="tried in the last stage of every arm")
    prompts: tuple[PromptSource, ...] = Field(min_length=1, description="dev prompts; they are kept apart from all training data")
    choose: Literal["reward", "right_refusals"] = Field(
        default="reward",
        description="what the best has most of. reward: the judge's mean reward, an invalid reply counting as the worst any candidate "
        "gave; right_refusals: the share of harmful prompts refused and of others answered, validly, axes weighing the same",
    )
    max_kl_to_base: float | None = Field(
        default=None,
        gt=0,
        description="nats a token a candidate's replies may be from the base to be chosen; None: any. A judge is easily fooled",
    )
    arms: tuple[str, ...] = Field(default=(), description="arms that search; empty: all that train")


class BudgetSettings(Settings):
    """What must be equal over the arms that train. The report shows all of them in any case."""

    equal: Literal["none", "pairs", "tokens", "flops"] = Field(default="none", description="what every training arm spends alike")
    tolerance: float = Field(default=0.05, ge=0, description="largest difference allowed, as a share of the largest arm")
    strict: bool = Field(default=False, description="an unequal budget is an error instead of a warning")


class Expected(Settings):
    """What `plan` assumes of a data block that is not at hand."""

    rows: int = Field(ge=1, description="rows")
    tokens_per_row: float = Field(gt=0, description="unique tokens of a row: its prompt and all replies")


class StudySettings(Settings):
    """A study: what is compared, on what, how, and what was decided before any result was seen."""

    HINTS: ClassVar[Mapping[str, str]] = {
        key: f"Did you mean 'training.{key}'?" for key in TrainSettings.model_fields if key not in _SET_BY_THE_STUDY
    }

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the study's name; names its folder")
    description: str = Field(default="", description="one paragraph shown in the report")
    model_name_or_path: str = Field(description="the base model: asset name, local folder or hub name")
    data: dict[str, DataSettings] = Field(default={}, description="named data blocks that stages, judge and evaluation refer to")
    training: dict[str, Any] = Field(default={}, description="training settings common to all stages")
    stages: dict[str, StageSettings] = Field(default={}, description="named stages that several arms may use")
    arms: dict[str, tuple[str | StageSettings, ...]] = Field(min_length=1, description="arm → its stages; none: the base itself")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="every arm is trained once per seed")
    judge: JudgeSettings = Field(description="the reward model")
    search: SearchSettings | None = Field(default=None, description="a learning-rate search of every arm, with the first seed")
    evaluation: EvaluationSettings = Field(default=EvaluationSettings(), description="how arms are evaluated")
    primary: tuple[Contrast, ...] = Field(default=(), description="contrasts named beforehand; all others are exploratory")
    budget: BudgetSettings = Field(default=BudgetSettings(), description="what must be equal over arms")
    expected: dict[str, Expected] = Field(default={}, description="sizes of data blocks, for planning where they are not at hand")
    expected_parameters: dict[str, float] = Field(default={}, description="model → its parameters, for planning where it is not at hand")
    keep_apart: bool = Field(
        default=True,
        description="leave out (and count) training rows whose prompt is asked in the evaluation; from the judge's data also the "
        "prompts that policies or held-out pairs have",
    )
    override_independence: bool = Field(default=False, description="show the headline though the judge shares prompts; stamps the report")

    @model_validator(mode="after")
    def _refers_to_known_things(self) -> Self:
        for stage_name, stage in self.stages.items():
            self._check_stage(stage_name, stage)
        for arm in self.arms:
            for stage in self.arm_stages(arm):
                self._check_stage(f"{arm}.{stage.title}", stage)
        blocks: list[tuple[str, str | None]] = [("judge.data", block) for block in self.judge.data]
        blocks += [("judge.held_out", block) for block in self.judge.held_out]
        blocks += [(f"evaluation.prompts.{number}", source.data) for number, source in enumerate(self.evaluation.prompts)]
        if self.search is not None:
            blocks += [(f"search.prompts.{number}", source.data) for number, source in enumerate(self.search.prompts)]
            for arm in self.search.arms:
                self._check_arm("search.arms", arm)
        blocks += [(f"expected.{name}", name) for name in self.expected]
        for where, block in blocks:
            self._check_block(where, block)
        self._check_training("judge.training", self.judge.training)
        self._check_training("training", self.training)
        for name in self.evaluate_settings().margins:
            if name not in names("evaluation.metrics"):
                raise UsageError(f"evaluation.margins: no metric named {name!r}.{nearest(name, names('evaluation.metrics'))}")
        for contrast in self.primary:
            if contrast.metric not in names("evaluation.metrics"):
                raise UsageError(f"primary: no metric named {contrast.metric!r}.{nearest(contrast.metric, names('evaluation.metrics'))}")
            for arm in (contrast.a, contrast.b):
                self._check_arm("primary", arm)
        self._check_arm("evaluation.baseline", self.evaluation.baseline)
        for policy in self.evaluation.null_policies:
            if policy in self.arms:
                raise UsageError(f"arms.{policy}: a null policy has that name (evaluation.null_policies); call the arm something else.")
        if len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"seeds: {list(self.seeds)} names a seed twice.")
        return self

    def arm_stages(self, arm: str) -> tuple[StageSettings, ...]:
        """The stages of an arm in order, names looked up. Raises UsageError for an unknown name."""
        found = []
        for stage in self.arms[arm]:
            if isinstance(stage, str):
                if stage not in self.stages:
                    raise UsageError(f"arms.{arm}: no stage named {stage!r}.{nearest(stage, self.stages)}")
                found.append(self.stages[stage].model_copy(update={"name": self.stages[stage].name or stage}))
            else:
                found.append(stage)
        return tuple(found)

    def evaluate_settings(self, source: str = "", output_dir: str | None = None) -> EvaluateSettings:
        """The settings of the evaluation that ends the study."""
        asked = self.evaluation
        values = {"suite": asked.suite, "source": source, "output_dir": output_dir, "margins": asked.margins}
        return EvaluateSettings.make(values | {"allow_overlap": self.override_independence} | asked.settings, source="evaluation.settings")

    def searched(self) -> tuple[str, ...]:
        """Arms that search for a learning rate."""
        if self.search is None:
            return ()
        return tuple(arm for arm in self.arms if self.arms[arm] and (not self.search.arms or arm in self.search.arms))

    def policy_blocks(self) -> tuple[str, ...]:
        """Data blocks that any arm is trained on, each once."""
        stages = [stage for arm in self.arms for stage in self.arm_stages(arm)]
        return tuple(dict.fromkeys(block for stage in stages for stream in stage.references() for block in stream.data))

    def _check_stage(self, where: str, stage: StageSettings) -> None:
        for stream in stage.references():
            for block in stream.data:
                self._check_block(where, block)
            method = str(stream.objective.get("name", ""))
            if "file" not in stream.objective and method not in names("objectives"):
                raise UsageError(f"{where}: there is no method named {method!r}.{nearest(method, names('objectives'))}")
        self._check_training(f"{where}.training", stage.training)

    def _check_block(self, where: str, block: str | None) -> None:
        if block is not None and block not in self.data:
            raise UsageError(f"{where}: no data block named {block!r}.{nearest(block, self.data)}")

    def _check_arm(self, where: str, arm: str) -> None:
        if arm not in self.arms:
            raise UsageError(f"{where}: no arm named {arm!r}.{nearest(arm, self.arms)}")

    def _check_training(self, where: str, values: dict[str, Any]) -> None:
        for key in _SET_BY_THE_STUDY:
            if key in values:
                raise UsageError(f"{where}.{key} is set by the study itself; leave it out.")
        TrainSettings.make({"model_name_or_path": self.model_name_or_path, **values}, source=where)


def bundled() -> list[str]:
    """Names of the studies that come with the package."""
    folder = resources.files("equipoise.study.studies")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_study(name: str, overrides: Iterable[str] = ()) -> StudySettings:
    """A bundled study by name (`hh-smollm2` and `hh_smollm2` are the same), or one from a YAML file, with overrides.

    Raises UsageError where there is no such study, or a setting is wrong.
    """
    shipped = next((known for known in bundled() if known.replace("_", "-") == name.replace("_", "-")), None)
    if shipped is not None:
        with resources.as_file(resources.files("equipoise.study.studies") / f"{shipped}.yaml") as path:
            return StudySettings.from_yaml(path, overrides)
    if not Path(name).is_file():
        raise UsageError(f"There is no study named {name!r}, and no such file.{nearest(name, bundled())}")
    return StudySettings.from_yaml(name, overrides)
