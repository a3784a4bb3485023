"""The stages of a study as a graph: what is computed once and shared, and which arm needs which of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from equipoise.core.files import fingerprint
from equipoise.study.settings import JudgeSettings, StageSettings, StreamReference, StudySettings

Kind = Literal["train", "held_out", "generate", "score"]


@dataclass(frozen=True)
class Node:
    """One stage of the study.

    key: 16 hex digits of everything it is computed from (its own settings and those of all stages before it).
    start: the training stage whose model it starts from or asks; None: the base (for the judge: its backbone).
    streams: data blocks and objectives of a training stage; training: its resolved overrides.
    policy: name of a null policy where a `generate` or `score` stage belongs to one.
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
    policy: str | None = None

    def folder(self, study: Path) -> Path:
        """Where the stage writes."""
        return study / "stages" / f"{self.kind}-{self.name}-{self.key}"

    def lineage(self) -> list[Node]:
        """The training stages behind a model, first to last, this one included."""
        return [*(self.start.lineage() if self.start else []), *([self] if self.kind == "train" else [])]


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
class Graph:
    """Everything a study runs: the judge's stages, then the arms (null policies last); shared nodes are the same key."""

    judge: tuple[Node, ...]
    arms: tuple[Arm, ...]

    def nodes(self) -> list[Node]:
        """Every stage once, in the order it runs."""
        found: dict[str, Node] = {}
        for node in [*self.judge, *(node for arm in self.arms for node in arm.nodes())]:
            found.setdefault(node.key, node)
        return list(found.values())

    def users(self, node: Node) -> list[str]:
        """Names of the arms that need a stage; empty for the judge's."""
        return list(dict.fromkeys(arm.name for arm in self.arms if any(item.key == node.key for item in arm.nodes())))


def build_graph(study: StudySettings) -> Graph:
    """The graph of a study. Stages with equal settings, data and start share one node per seed."""
    judge = _judge_nodes(study, study.judge)
    scorer = judge[0].key if judge and judge[0].kind == "train" else fingerprint(study.judge.resolved())
    arms = []
    for name in study.arms:
        stages = study.arm_stages(name)
        # An untrained arm is the same whatever the seed, so it is asked once.
        for seed in study.seeds if stages else study.seeds[:1]:
            arms.append(_arm(study, name, seed, stages, scorer))
    for policy in study.evaluation.null_policies:
        generate = _ask(study, policy, None, study.seeds[0], policy)
        arms.append(Arm(policy, study.seeds[0], "null", (), generate, _score(study, generate, scorer)))
    return Graph(judge, tuple(arms))


def _arm(study: StudySettings, name: str, seed: int, stages: tuple[StageSettings, ...], scorer: str) -> Arm:
    model: Node | None = None
    chain = []
    for stage in stages:
        model = _train(study, stage, seed, model)
        chain.append(model)
    generate = _ask(study, name, model, seed, None)
    return Arm(name, seed, "arm", tuple(chain), generate, _score(study, generate, scorer))


def _train(study: StudySettings, stage: StageSettings, seed: int, start: Node | None) -> Node:
    training = {**study.training, **stage.training}
    streams = stage.references()
    recipe = {
        "start": start.key if start else study.model_name_or_path,
        "streams": [{**stream.resolved(), "data": [study.data[block].resolved() for block in stream.data]} for stream in streams],
        "dev": stage.dev,
        "training": training,
        "seed": seed,
    }
    return Node(fingerprint(recipe), "train", _plain(stage.title), seed, start, streams, training, dev=stage.dev)


def _ask(study: StudySettings, name: str, model: Node | None, seed: int, policy: str | None) -> Node:
    evaluation = study.evaluation
    recipe = {
        "model": model.key if model else study.model_name_or_path,
        "policy": policy,
        "prompts": [source.resolved() for source in evaluation.prompts],
        "data": {source.data: study.data[source.data].resolved() for source in evaluation.prompts if source.data},
        "sampling": evaluation.sampling.resolved(),
        "generation": evaluation.generation,
        # Greedy replies do not depend on the seed; the model's key already does.
        "seed": seed if evaluation.sampling.temperature > 0 else None,
    }
    return Node(fingerprint(recipe), "generate", _plain(name), seed, model, policy=policy)


def shows_credit(study: StudySettings, generate: Node) -> bool:
    """Whether the report shows replies of this stage token by token: a trained arm's, of the first seed."""
    return bool(study.evaluation.token_credit) and generate.start is not None and generate.seed == study.seeds[0]


def _score(study: StudySettings, generate: Node, scorer: str) -> Node:
    recipe: dict[str, Any] = {
        "replies": generate.key,
        "scorer": scorer,
        "scoring": study.evaluation.scoring,
        "kl": study.evaluation.kl_to_base,
    }
    if shows_credit(study, generate):
        recipe["credit"] = study.evaluation.token_credit
    return Node(fingerprint(recipe), "score", generate.name, generate.seed, generate, policy=generate.policy)


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
