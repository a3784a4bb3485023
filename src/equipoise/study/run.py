"""Run a study: lock what was decided, run every stage once, go on past failed arms, evaluate, report.

Everything is read back from files, so a killed run continues where it stopped, and a finished one does nothing.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.core.errors import EquipoiseError, StageError
from equipoise.core.files import read_json, read_jsonl, write_json, write_jsonl
from equipoise.core.progress import say
from equipoise.core.runs import Run, is_done
from equipoise.evaluation.suites.two_axis import SCORES
from equipoise.generation._stage import COMPLETIONS
from equipoise.scorers._stage import VERDICTS
from equipoise.study._graph import Arm, Graph, Node
from equipoise.study._lock import write_lock
from equipoise.study._prompts import search_prompts
from equipoise.study._search import SEARCH, Found, Tried, chosen_by, divergences
from equipoise.study._stages import PROMPTS, SEARCH_PROMPTS, Stages
from equipoise.study.plan import StudyPlan, check_budget, plan_study
from equipoise.study.settings import StudySettings
from equipoise.training.machine import readable

ARMS = "arms.json"


@dataclass
class _Progress:
    """What is done, what it took, and what is left."""

    plan: StudyPlan
    runs: dict[str, Run] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    spent: float = 0.0
    expected: float = 0.0

    def note(self, node: Node, run: Run) -> None:
        """Count a finished stage; only one that ran now says something about this machine's speed."""
        self.runs[node.key] = run
        estimate = self.plan.seconds(node)
        if not run.skipped and estimate:
            self.spent += run.seconds
            self.expected += estimate

    def left(self) -> float | None:
        """Seconds left: the plan's estimates of what is not done, corrected by how the stages so far compare with theirs."""
        rest = [node for node in self.plan.graph.nodes() if node.key not in self.runs and node.key not in self.errors]
        estimates = [self.plan.seconds(node) for node in rest]
        known = [estimate for estimate in estimates if estimate is not None]
        if len(known) < len(estimates):
            return None
        pace = self.spent / self.expected if self.expected > 0 else 1.0
        return sum(known) * min(max(pace, 0.1), 10.0)


def run_study(settings: StudySettings, folder: str | Path | None = None, overwrite: bool = False, report: bool = True) -> Path:
    """Run a study in `folder` (default `runs/<name>`), continuing what is there. Returns the folder.

    A failed arm is marked in `arms.json` with its error and the others go on; the next call tries it again.

    Raises:
        StageError: an earlier lock decided otherwise (and `overwrite` is off), or every arm failed.
        EquipoiseError: the judge or the prompts could not be made; nothing could be measured without them.
    """
    from equipoise.models.load import resolve_model

    folder = Path(folder or Path("runs") / settings.name)
    for name in (settings.model_name_or_path, settings.judge.model_name_or_path, settings.judge.base_model_name_or_path):
        if name is not None:
            resolve_model(name)  # a path that is not there is told now, not by every arm after the judge was trained
    stages = Stages(settings, folder.resolve(), overwrite)
    prompts = stages.prompts()
    plan = plan_study(settings, prompts)
    check_budget(plan)
    rows = [prompt.as_json() for prompt in prompts]
    write_lock(folder, settings, rows, plan.detectable, overwrite)
    write_jsonl(folder / PROMPTS, rows)
    dev = search_prompts(settings, prompts)
    write_jsonl(folder / SEARCH_PROMPTS, [prompt.as_json() for prompt in dev])
    (folder / SEARCH).unlink(missing_ok=True)  # an earlier decision's; this study's is written anew from its stages
    stages.keep_apart([*prompts, *dev])
    progress = _Progress(plan)
    for node in plan.graph.judge:
        _run_node(stages, progress, node)
    found = _run_searches(stages, progress, settings, folder)
    if found:
        plan = progress.plan = plan_study(settings, prompts, plan.machine, {search.arm: search.chosen for search in found if search.chosen})
    for arm in plan.graph.arms:
        _run_arm(stages, progress, arm)
        _write_arms(folder, plan.graph, progress, found)
    done = [arm for arm in plan.graph.arms if not _error(arm, progress)]
    if not any(arm.kind == "arm" for arm in done):
        raise StageError(f"Every arm failed; see {folder / ARMS}. The first error: {next(iter(progress.errors.values()))}")
    write_json(folder / SCORES, _scores(settings, folder, plan.graph, done))
    say("evaluating")
    stages.evaluate(folder / SCORES)
    if report:
        from equipoise.study.report import build_report

        build_report(folder)
    return folder


def failures(folder: str | Path) -> dict[str, str]:
    """Failed arms of a study folder: `name (seed n)` → error text."""
    arms = read_json(Path(folder) / ARMS)["arms"]
    return {f"{arm['name']} (seed {arm['seed']})": arm["error"] for arm in arms if arm["status"] == "failed"}


def _run_searches(stages: Stages, progress: _Progress, settings: StudySettings, folder: Path) -> list[Found]:
    """Run every candidate of every search, going on past failed ones, and write down what each search found."""
    found: list[Found] = []
    axes = {row["id"]: row["axis"] for row in read_jsonl(folder / SEARCH_PROMPTS)}
    for search in progress.plan.graph.searches:
        assert settings.search is not None
        for _, arm in search.candidates:
            _run_arm(stages, progress, arm)
        done = [(rate, arm) for rate, arm in search.candidates if arm.score.key in progress.runs]
        folders = [arm.score.folder(folder) for _, arm in done]
        scores, far = chosen_by(settings.search.choose, folders, axes), divergences(folders)
        tried = [Tried(rate, arm, score, kl) for (rate, arm), score, kl in zip(done, scores, far, strict=True)]
        found.append(Found(search.arm, settings.search.choose, len(axes), tried, settings.search.max_kl_to_base))
        say(found[-1].in_words())
        write_json(folder / SEARCH, {"schema_version": 1, "searches": [item.as_json(folder) for item in found]})
    return found


def _run_arm(stages: Stages, progress: _Progress, arm: Arm) -> None:
    """Run an arm's stages in order; on an error mark the stage, and with it every arm that needs it."""
    for node in arm.nodes():
        if node.key in progress.errors:
            return
        if node.key in progress.runs:
            continue
        try:
            _run_node(stages, progress, node)
        except Exception as error:  # whatever stops one arm (no memory, bad data, a bug) must not stop the others
            progress.errors[node.key] = _words(error)
            say(f"arm {arm.name} (seed {arm.seed}) failed: {progress.errors[node.key]}")
            if not isinstance(error, EquipoiseError):
                traceback.print_exc(file=sys.stderr)
            return


def _run_node(stages: Stages, progress: _Progress, node: Node) -> None:
    _announce(progress, node, is_done(node.folder(stages.folder)))
    skipped = False
    try:
        run = stages.run(node)
        skipped = run.skipped
        progress.note(node, run)
    finally:
        if not skipped:
            _free()


def _announce(progress: _Progress, node: Node, before: bool) -> None:
    done = len(progress.runs) + len(progress.errors)
    total = len(progress.plan.graph.nodes())
    title = f"{node.kind.replace('_', ' ')} {node.name}" + (f", seed {node.seed}" if len(progress.plan.settings.seeds) > 1 else "")
    time = "already done" if before else f"about {readable(progress.plan.seconds(node))}; {readable(progress.left())} left"
    say(f"[{done + 1}/{total}] {title} ({time})")


def _free() -> None:
    """Give memory back between stages: the next one loads its own model."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, EquipoiseError) else f"{type(error).__name__}: {error}"


def _error(arm: Arm, progress: _Progress) -> str | None:
    return next((progress.errors[node.key] for node in arm.nodes() if node.key in progress.errors), None)


def _write_arms(folder: Path, graph: Graph, progress: _Progress, found: Sequence[Found]) -> None:
    """Write `arms.json` anew: after every arm, so that a killed run leaves a readable state."""
    rows = []
    for arm in graph.arms:
        error = _error(arm, progress)
        if arm.kind == "null" and error is None:
            continue
        nodes = [node for node in arm.nodes() if node.key in progress.runs]
        complete = len(nodes) == len(list(arm.nodes()))
        last = arm.training[-1] if arm.training else None
        rows.append(
            {
                "name": arm.name,
                "seed": arm.seed,
                "status": "failed" if error else "done" if complete else "pending",
                "error": error,
                "stages": [_stage_row(node, progress.runs[node.key], folder) for node in nodes],
                "model": _relative(last.folder(folder) / "model", folder) if last and last.key in progress.runs else None,
                "cost": _cost(arm, folder, progress, found),
            }
        )
    # Stages of earlier decisions may stand beside these; a report must not take them for this study's.
    stages = [node.folder(folder).name for node in graph.nodes()]
    write_json(folder / ARMS, {"schema_version": 1, "arms": rows, "stages": stages})


def _stage_row(node: Node, run: Run, folder: Path) -> dict[str, Any]:
    where = _relative(node.folder(folder), folder)
    return {"name": node.name, "kind": node.kind, "folder": where, "seconds": round(run.seconds, 3), "skipped": run.skipped}


def _cost(arm: Arm, folder: Path, progress: _Progress, found: Sequence[Found]) -> dict[str, float]:
    """What the arm's model cost in all: every training stage behind it, shared ones counted in full, plus its replies' seconds.

    tuning_seconds: of its search, but for the training of the model that was chosen.
    """
    total: dict[str, float] = {}
    for node in arm.training:
        path = node.folder(folder) / "cost.json"
        if node.key in progress.runs and path.is_file():
            for key, value in read_json(path).items():
                if isinstance(value, (int, float)) and key != "schema_version":
                    total[key] = total.get(key, 0) + value
    if arm.generate.key in progress.runs:
        total["sampling_seconds"] = round(progress.runs[arm.generate.key].seconds, 3)
    tried = [one.arm for search in found if search.arm == arm.name for one in search.tried]
    if tried:
        kept = {node.key for node in arm.training}
        extra = {node.key for one in tried for node in one.nodes()} - kept
        total["tuning_seconds"] = round(sum(progress.runs[key].seconds for key in extra), 3)
    return total


def _scores(settings: StudySettings, folder: Path, graph: Graph, done: list[Arm]) -> dict[str, Any]:
    """`scores.json`: what the evaluation suite reads.

    Contrasts of failed arms stay in, without a p: they were named beforehand, so the others are corrected for them as well.
    """
    judge = graph.judge[0] if graph.judge and graph.judge[0].kind == "train" else None
    held_out = next((node for node in graph.judge if node.kind == "held_out"), None)
    given = settings.judge.trained_on
    names = {arm.name for arm in done}
    trained = list(dict.fromkeys(node.folder(folder) / "trained_on.npz" for arm in done for node in arm.training))
    return {
        "schema_version": 1,
        "prompts": PROMPTS,
        "models": [
            {
                "name": arm.name,
                "seed": arm.seed,
                "kind": arm.kind,
                "completions": _relative(arm.generate.folder(folder) / COMPLETIONS, folder),
                "verdicts": [_relative(arm.score.folder(folder) / VERDICTS, folder)],
            }
            for arm in done
        ],
        "judge": {
            "name": settings.judge.name,
            "weights": settings.judge.weights,
            "trained_on": _relative(judge.folder(folder) / "trained_on.npz", folder) if judge else _near(given, folder),
            "held_out": _relative(held_out.folder(folder) / "held_out.json", folder) if held_out else None,
        },
        "policies_trained_on": [_relative(path, folder) for path in trained if path.is_file()],
        "baseline": settings.evaluation.baseline if settings.evaluation.baseline in names else None,
        "primary": [contrast.resolved() for contrast in settings.primary],
    }


def _near(path: str | None, folder: Path) -> str | None:
    """A path given by the user, relative to the study folder."""
    return None if path is None else Path(os.path.relpath(Path(path).expanduser(), folder)).as_posix()


def _relative(path: Path, folder: Path) -> str:
    """A path inside the study folder, relative to it, with forward slashes."""
    return path.relative_to(folder).as_posix()
