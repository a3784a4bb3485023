"""Token credit for a made-up study: words as pieces, credits by chance."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any


def add_credit(folder: Path, count: int) -> Path:
    """Write `token_credit.jsonl` into the score stages of a made-up study's trained arms, first seed: `count` replies of each axis."""
    draw = random.Random(1)
    replies = [json.loads(line) for line in (folder / "evaluation/replies.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [
        row for axis in dict.fromkeys(row["axis"] for row in replies) for row in [row for row in replies if row["axis"] == axis][:count]
    ]
    arms = json.loads((folder / "arms.json").read_text(encoding="utf-8"))["arms"]
    for arm in (arm for arm in arms if arm["seed"] == 0 and any(stage["kind"] == "train" for stage in arm["stages"]) and not arm["error"]):
        lines = []
        for row in asked:
            texts = [*re.findall(r"\s*\S+|\s+$", row["replies"][arm["name"]]["text"]), ""]
            pieces: list[dict[str, Any]] = []
            for text in texts:
                base = -draw.expovariate(0.6)
                policy = min(-0.01, base + draw.gauss(0.3, 1.6))
                piece = {"text": text, "tokens": draw.choice((1, 1, 2)), "credit": 0.1 * (policy - base), "policy": policy, "base": base}
                pieces.append(piece if text else {**piece, "aside": "</s>"})
            total = sum(piece["credit"] for piece in pieces)
            lines.append(
                {"id": row["id"], "beta": 0.1, "credit": total, "tokens": sum(piece["tokens"] for piece in pieces), "pieces": pieces}
            )
        stage = next(stage for stage in arm["stages"] if stage["kind"] == "score")
        (folder / stage["folder"] / "token_credit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        scorers = [{"scorer": "reward_model"}, {"scorer": "token_credit", "base_model_name_or_path": "smollm2-135m-instruct"}]
        (folder / stage["folder"] / "settings.json").write_text(json.dumps({"scorers": scorers}), encoding="utf-8")
    return folder
