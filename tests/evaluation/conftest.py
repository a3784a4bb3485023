"""A small evaluation on disk: prompts, replies and verdicts as a study writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise.core.files import write_json, write_jsonl
from equipoise.core.prints import PromptPrints

Rows = dict[str, dict[str, Any]]


def prompt_rows(harmful: int = 12, helpful: int = 12, benign: int = 12) -> list[dict[str, Any]]:
    """Prompts of three axes, each of a few words of its own."""
    counts = {"harmful": harmful, "helpful": helpful, "benign": benign}
    return [
        {"id": f"{axis}-{n}", "prompt": [{"role": "user", "content": f"{axis} question number {n}{n}"}], "axis": axis, "topic": "t"}
        for axis, count in counts.items()
        for n in range(count)
    ]


def verdict_rows(prompts: list[dict[str, Any]], say: Callable[[str, int], dict[str, Any]]) -> Rows:
    """`say(axis, number)` for every prompt: text and verdicts of the reply."""
    return {row["id"]: say(row["axis"], int(row["id"].rsplit("-", 1)[1])) for row in prompts}


@pytest.fixture
def write_scores(tmp_path: Path) -> Callable[..., Path]:
    """Write `scores.json` and all it names; models: name or (name, seed) → prompt id → text and verdicts; nulls start with `null_`."""

    def write(
        models: dict[Any, Rows], prompts: list[dict[str, Any]] | None = None, trained: dict[str, list[str]] | None = None, **scores: Any
    ) -> Path:
        prompts = prompt_rows() if prompts is None else prompts
        write_jsonl(tmp_path / "prompts.jsonl", prompts)
        turns = {row["id"]: row["prompt"] for row in prompts}
        entries = []
        for key, replies in models.items():
            name, seed = key if isinstance(key, tuple) else (key, 0)
            where = f"{name}-{seed}"
            write_jsonl(
                tmp_path / where / "completions.jsonl",
                [
                    {
                        "id": i,
                        "prompt": turns.get(i, []),
                        "text": reply.get("text", "a reply"),
                        "token_ids": [],
                        "finish_reason": reply.get("finish_reason", "stop"),
                        "seed": seed,
                        "weights": None,
                    }
                    for i, reply in replies.items()
                ],
            )
            verdicts = [
                {"id": i, "by": by, "value": value, "reason": ""}
                for i, reply in replies.items()
                for by, value in reply.items()
                if by not in ("text", "finish_reason")
            ]
            write_jsonl(tmp_path / where / "verdicts.jsonl", verdicts)
            kind = "null" if name.startswith("null_") else "arm"
            paths = {"completions": f"{where}/completions.jsonl", "verdicts": [f"{where}/verdicts.jsonl"]}
            entries.append({"name": name, "seed": seed, "kind": kind, **paths})
        judge = {"name": "judge", "weights": "w", "trained_on": None, "held_out": None} | scores.pop("judge", {})
        policies = []
        for who, texts in (trained or {}).items():
            PromptPrints.of(texts).save(tmp_path / f"{who}.npz")
            if who == "judge":
                judge["trained_on"] = "judge.npz"
            else:
                policies.append(f"{who}.npz")
        value = {"schema_version": 1, "prompts": "prompts.jsonl", "models": entries, "judge": judge, "policies_trained_on": policies}
        write_json(tmp_path / "scores.json", value | {"baseline": None, "primary": []} | scores)
        return tmp_path / "scores.json"

    return write
