"""The `generate` stage: prompts in, `completions.jsonl` out, batch by batch and resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from equipoise.core.files import JsonlAppender, fingerprint, read_jsonl, write_jsonl
from equipoise.core.progress import bar
from equipoise.core.runs import Run, run_stage
from equipoise.core.settings import Settings
from equipoise.data.prompts import load_prompts
from equipoise.generation._base import Completion, Generator, GeneratorSettings, Prompt, Sampling, chosen

COMPLETIONS = "completions.jsonl"
_PARTIAL = "completions.partial.jsonl"


class GenerateSettings(Settings):
    """One generation stage: who answers, which prompts, how."""

    generator: Annotated[SerializeAsAny[GeneratorSettings], BeforeValidator(chosen("generation", "generator"))] = Field(
        description="who answers: {generator: local, model_name_or_path: …}, or scripted, openai_api, vllm"
    )
    prompts: str = Field(default="starter", description="'starter' for the bundled ones, or a data file with `prompt` and `axis`")
    max_prompts: int | None = Field(default=None, ge=1, description="at most so many of each axis, the first ones; None: all")
    sampling: Sampling = Field(default=Sampling(), description="how replies are drawn")
    output_dir: str = Field(default="runs/generate", description="stage folder")


def generate(settings: GenerateSettings, overwrite: bool = False) -> Run:
    """Answer every prompt and write `completions.jsonl`, one line per prompt, in their order.

    A call that was interrupted goes on after its last whole batch. Batches are always cut from the full list, so the
    local generator's output then has the same bytes as an uninterrupted run's (CPU, float32, same number of threads).
    """
    prompts = [Prompt.from_json(row) for row in load_prompts(settings.prompts, settings.max_prompts)]
    inputs = {"prompts": fingerprint([prompt.as_json() for prompt in prompts]), **settings.generator.inputs()}

    def work(folder: Path) -> Mapping[str, Any]:
        return _answer(folder, settings.generator.build(), prompts, settings.sampling)

    return run_stage(settings.output_dir, "generate", settings.resolved(), inputs, work, overwrite)


def read_completions(path: str | Path) -> list[Completion]:
    """The completions of a `completions.jsonl` file, in order. Raises DataError with file and line."""
    return read_jsonl(path, Completion.from_json)


def _answer(folder: Path, generator: Generator, prompts: Sequence[Prompt], sampling: Sampling) -> Mapping[str, Any]:
    """Generate what is missing, then put everything in order. Returns the counts of the run."""
    with JsonlAppender(folder / _PARTIAL) as partial:
        done = {row["id"]: row for row in partial.rows}
        with bar("generating", len(prompts)) as progress:
            for batch in generator.batches(prompts, sampling):
                members = [prompts[index] for index in batch]
                if any(prompt.id not in done for prompt in members):
                    # A batch torn by a kill is made again whole: its composition must not depend on where the kill fell.
                    rows = [completion.as_json() for completion in generator(members, sampling)]
                    partial.add(rows)
                    done |= {row["id"]: row for row in rows}
                progress.advance(len(members))
    rows = [done[prompt.id] for prompt in prompts]
    write_jsonl(folder / COMPLETIONS, rows)
    (folder / _PARTIAL).unlink()
    return {
        "completions": len(rows),
        "tokens": sum(len(row["token_ids"]) for row in rows),
        "cut_off": sum(row["finish_reason"] == "length" for row in rows),
        "empty": sum(not row["text"].strip() for row in rows),
        "weights": rows[0]["weights"],
        **generator.counts,
    }
