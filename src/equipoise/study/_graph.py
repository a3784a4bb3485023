"""The stages of a study as a graph: what is computed once and shared, and which arm needs which of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from equipoise.core.files import file_fingerprint, fingerprint
from equipoise.study.settings import JudgeSettings, PromptSource, StageSettings, StreamReference, StudySettings

Kind = Literal["train", "held_out", "generate", "score"]


@dataclass(frozen=True)
class Node:
    """One stage of the study.

    key: 16 hex digits of everything it is computed from (its own settings and those of all stages before it).
    start: the training stage whose model it starts from or asks; None: the base (for the judge: its backbone).
    reference: what a training stage is compared with: what it starts from, the base, or another training stage's model.
    streams: data blocks and objectives of a training stage; training: its resolved overrides.
    policy: name of a null policy where a `generate` or `score` stage belongs to one.
    search: whether a `generate` or `score` stage asks the prompts of the search, not those of the evaluation.
    """

    key: str
    kind: Kind
    name: str
    seed: int = 0
    start: Node | None = None
    streams: tuple[StreamReference, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    dev: bool = False
    judge: bool = False
    reference: Literal["start", "base"] | Node = "start"
    policy: str | None = None
    search: bool = False

    def folder(self, study: Path) -> Path:
        """Where the stage writes."""
        return study / "stages" / f"{self.kind}-{self.name}-{self.key}"


@dataclass(frozen=True)
class Arm:
    """One arm with one seed: the training stages behind its model, and what is done with the model."""

    name: str
    seed: int
    kind: Literal["arm", "null"]
    training: tuple[Node, ...]
    generate: Node
    score: Node

    def nodes(self) -> Iterator[Node]:
        """Its stages in the order they run."""
        yield from self.training
        yield self.generate
        yield self.score


@dataclass(frozen=True)
class Search:
    """What an arm tries before it is evaluated: a learning rate each, and the arm it makes."""

    arm: str
    candidates: tuple[tuple[float, Arm], ...]


@dataclass(frozen=True)
class Graph:
    """Everything a study runs: the judge's stages, the searches, the arms (null policies last); shared nodes are the same key."""

    judge: tuple[Node, ...]
    arms: tuple[Arm, ...]
    searches: tuple[Search, ...] = ()

    def nodes(self) -> list[Node]:
        """Every stage once, in the order it runs."""
        found: dict[str, Node] = {}
        tried = [arm for search in self.searches for _, arm in search.candidates]
        for node in [*self.judge, *(node for arm in [*tried, *self.arms] for node in arm.nodes())]:
            found.setdefault(node.key, node)
        return list(found.values())

    def users(self, node: Node) -> list[str]:
        """Names of the arms that need a stage; empty for the judge's."""
        arms = [(search.arm, arm) for search in self.searches for _, arm in search.candidates] + [(arm.name, arm) for arm in self.arms]
        return list(dict.fromkeys(name for name, arm in arms if any(item.key == node.key for item in arm.nodes())))


def build_graph(study: StudySettings, chosen: Mapping[str, float] | None = None) -> Graph:
    """The graph of a study. Stages with equal settings, data and start share one node per seed.

    chosen: arm → the learning rate its search has found; until then the first one tried stands for it.
    """
    judge = _judge_nodes(study, study.judge)
    scorer = judge[0].key if judge and judge[0].kind == "train" else fingerprint(study.judge.resolved())
    arms, searches = [], []
    for name in study.arms:
        stages = study.arm_stages(name)
        if study.search is not None and name in study.searched():
            rates = study.search.learning_rates
            searches.append(Search(name, tuple((rate, _candidate(study, name, at_rate(stages, rate), scorer)) for rate in rates)))
            stages = at_rate(stages, (chosen or {}).get(name, rates[0]))
        # An untrained arm is the same whatever the seed, so it is asked once.
        for seed in study.seeds if stages else study.seeds[:1]:
            arms.append(_arm(study, name, seed, stages, scorer))
    for policy in study.evaluation.null_policies:
        generate = _ask(study, policy, None, study.seeds[0], policy)
        arms.append(Arm(policy, study.seeds[0], "null", (), generate, _score(study, generate, scorer)))
    return Graph(judge, tuple(arms), tuple(searches))


def at_rate(stages: tuple[StageSettings, ...], rate: float) -> tuple[StageSettings, ...]:
    """The stages of an arm with another learning rate in the last one."""
    last = stages[-1]
    return (*stages[:-1], last.model_copy(update={"training": {**last.training, "learning_rate": rate}}))


def _arm(study: StudySettings, name: str, seed: int, stages: tuple[StageSettings, ...], scorer: str) -> Arm:
    chain = _chain(study, seed, stages)
    generate = _ask(study, name, chain[-1] if chain else None, seed, None)
    return Arm(name, seed, "arm", chain, generate, _score(study, generate, scorer))


def _candidate(study: StudySettings, name: str, stages: tuple[StageSettings, ...], scorer: str) -> Arm:
    """An arm with the first seed, asked the prompts of the search."""
    assert study.search is not None
    seed = study.seeds[0]
    chain = _chain(study, seed, stages)
    generate = _ask(study, f"{name}-search", chain[-1], seed, None, study.search.prompts)
    return Arm(name, seed, "arm", chain, generate, _score(study, generate, scorer))


def _chain(study: StudySettings, seed: int, stages: tuple[StageSettings, ...]) -> tuple[Node, ...]:
    chain: list[Node] = []
    for stage in stages:
        chain.append(_train(study, stage, seed, chain[-1] if chain else None))
    return tuple(chain)


def _train(study: StudySettings, stage: StageSettings, seed: int, previous: Node | None) -> Node:
    start = previous if stage.start == "previous" else None
    reference: Literal["start", "base"] | Node = "base" if stage.reference == "base" and start is not None else "start"
    if stage.reference == "previous" and previous is not None and previous is not start:
        reference = previous
    training = {**study.training, **stage.training}
    streams = stage.references()
    recipe = {
        "start": start.key if start else study.model_name_or_path,
        "streams": [
            {**stream.resolved(), "data": [study.data[block].resolved() for block in stream.data], **_code(stream)} for stream in streams
        ],
        "dev": stage.dev,
        "training": training,
        "seed": seed,
    }
    if reference != "start":
        recipe["reference"] = reference.key if isinstance(reference, Node) else reference
    return Node(fingerprint(recipe), "train", _plain(stage.title), seed, start, streams, training, dev=stage.dev, reference=reference)


def _code(stream: StreamReference) -> dict[str, str]:
    """What is in the file of an objective of the user's own, where it has one: an edited loss is another stage."""
    file = stream.objective.get("file")
    return {"code": file_fingerprint(str(file))} if file and Path(str(file)).is_file() else {}


def objective_files(study: StudySettings) -> dict[str, str]:
    """Every file with an objective that an arm is trained with, and the fingerprint of what is in it."""
    streams = [stream for arm in study.arms for stage in study.arm_stages(arm) for stream in stage.references()]
    return {str(stream.objective["file"]): code["code"] for stream in streams if (code := _code(stream))}


def _ask(study: StudySettings, name: str, model: Node | None, seed: int, policy: str | None, search: Sequence[PromptSource] = ()) -> Node:
    evaluation = study.evaluation
    prompts = search or evaluation.prompts
    recipe = {
        "model": model.key if model else study.model_name_or_path,
        "policy": policy,
        "prompts": [source.resolved() for source in prompts],
        "data": {source.data: study.data[source.data].resolved() for source in prompts if source.data},
        "sampling": evaluation.sampling.resolved(),
        "generation": evaluation.generation,
        # Greedy replies do not depend on the seed; the model's key already does.
        "seed": seed if evaluation.sampling.temperature > 0 else None,
    }
    return Node(fingerprint(recipe), "generate", _plain(name), seed, model, policy=policy, search=bool(search))


def asks_kl(study: StudySettings, stage: Node) -> bool:
    """Whether replies of this stage are scored by their divergence from the base: where the evaluation, or the search, asks for it."""
    if stage.search:
        return study.search is not None and study.search.max_kl_to_base is not None
    return study.evaluation.kl_to_base


def shows_credit(study: StudySettings, generate: Node) -> bool:
    """Whether the report shows replies of this stage token by token: a trained arm's, of the first seed."""
    asked = bool(study.evaluation.token_credit) and not generate.search
    return asked and generate.start is not None and generate.seed == study.seeds[0]


def _score(study: StudySettings, generate: Node, scorer: str) -> Node:
    recipe: dict[str, Any] = {
        "replies": generate.key,
        "scorer": scorer,
        "scoring": study.evaluation.scoring,
        "kl": asks_kl(study, generate),
    }
    if shows_credit(study, generate):
        recipe["credit"] = study.evaluation.token_credit
    return Node(fingerprint(recipe), "score", generate.name, generate.seed, generate, policy=generate.policy, search=generate.search)


def _judge_nodes(study: StudySettings, judge: JudgeSettings) -> tuple[Node, ...]:
    nodes: list[Node] = []

    def add(kind: Kind, blocks: tuple[str, ...]) -> None:
        start = nodes[0] if nodes else None
        behind = start.key if start else judge.model_name_or_path if judge.scorer == "reward_model" else fingerprint(judge.resolved())
        recipe = {"kind": kind, "judge": behind, "data": [study.data[block].resolved() for block in blocks], "training": judge.training}
        streams = (StreamReference(data=blocks, objective={"name": "bradley_terry"}),)
        nodes.append(Node(fingerprint(recipe), kind, _plain(judge.name), 0, start, streams, judge.training, judge=True))

    if judge.data:
        add("train", judge.data)
    if judge.held_out:
        add("held_out", judge.held_out)
    return tuple(nodes)


def _plain(name: str) -> str:
    """A name that is safe in a folder's name."""
    return "".join(letter if letter.isalnum() or letter in "_." else "-" for letter in name) or "stage"
