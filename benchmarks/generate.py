"""Tokens a second: LocalGenerator against the loops a user would write with `model.generate`.

    python benchmarks/generate.py --prompts 32 --max-new-tokens 64 --json

Sides, in turn on one loaded model:
  one_by_one   `model.generate` on each prompt
  batches_of_8 `model.generate` on left-padded batches in data order
  ours         `LocalGenerator`

Greedy replies must be the same tokens; the share that is, and by how little the logits of the others differ, is reported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import Run, in_turn, log, preference_records, report, summary

from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompts_ids
from equipoise.generation._base import Prompt, Sampling
from equipoise.generation.local import LocalGenerator
from equipoise.models.load import load_causal, load_tokenizer

BATCH = 8
Replies = list[list[int]]


def main() -> None:
    """Run both modes and print the result."""
    options = _options()
    model: Any = load_causal(options.model, dtype=options.dtype, device=options.device)
    tokenizer: Any = load_tokenizer(options.model)
    name, records = preference_records(options.prompts)
    prompts = [Prompt(record.id, record.prompt) for record in records]
    ids = [item.tolist() for item in prompts_ids([prompt.messages for prompt in prompts], tokenizer, TokeniseSettings())]
    generator = LocalGenerator(model, tokenizer)
    ends = sorted(generator.ends)

    def sides(mode: str) -> dict[str, Any]:
        theirs = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id, "max_new_tokens": options.max_new_tokens}
        drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95} if mode == "sampling" else {}
        theirs |= {"do_sample": True, "top_k": 0, **drawn} if drawn else {"do_sample": False}
        sampling = Sampling(max_new_tokens=options.max_new_tokens, **drawn)
        return {
            "one_by_one": lambda: plain(model, ids, 1, theirs),
            f"batches_of_{BATCH}": lambda: plain(model, ids, BATCH, theirs),
            "ours": lambda: [list(completion.token_ids) for completion in generator(prompts, sampling)],
        }

    results: dict[str, Any] = {}
    for mode in options.modes:
        log(f"{mode}: {len(prompts)} prompts of {name}, {sum(map(len, ids))} prompt tokens")
        chosen = {side: call for side, call in sides(mode).items() if side in options.sides}
        runs = in_turn(chosen, options.repeats)
        results[mode] = {"sides": {side: _side(found) for side, found in runs.items()}, "ratios": _ratios(runs)}
        if mode == "greedy":
            results[mode]["agreement"] = agreement(model, ids, {side: found[0].value for side, found in runs.items()})
    settings = vars(options) | {"data": name, "prompt_tokens": summary([len(item) for item in ids], 0), "batch": BATCH}
    settings.pop("json")
    report("generate", settings, results, options.json)


def plain(model: Any, ids: Sequence[list[int]], size: int, options: dict[str, Any]) -> Replies:
    """What a user writes: `generate` on batches in data order, left-padded; each reply up to and with its end token."""
    torch.manual_seed(0)
    pad, ends = options["pad_token_id"], set(options["eos_token_id"])
    replies: Replies = []
    for start in range(0, len(ids), size):
        batch = ids[start : start + size]
        width = max(map(len, batch))
        tokens = torch.tensor([[pad] * (width - len(item)) + item for item in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(item)) + [1] * len(item) for item in batch], device=model.device)
        with torch.inference_mode():
            whole = model.generate(tokens, attention_mask=mask, **options)
        for row in whole[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            replies.append(row[: end + 1])
    return replies


def agreement(model: Any, ids: Sequence[list[int]], replies: dict[str, Replies]) -> dict[str, Any]:
    """How many greedy replies are those of the first side, and where not, how far apart the two tokens' logits are."""
    first, *others = replies
    found: dict[str, Any] = {"with": first}
    for side in others:
        gaps = []
        for prompt, one, two in zip(ids, replies[first], replies[side], strict=True):
            if one != two:
                same = next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt + one[:same]], device=model.device), logits_to_keep=1).logits[0, -1].float()
                gaps.append(abs(float(logits[one[same]] - logits[two[same]])))
        found[side] = {"equal": len(ids) - len(gaps), "of": len(ids), "largest_logit_gap_where_not": max(gaps, default=0.0)}
    return found


def _side(runs: Sequence[Run[Replies]]) -> dict[str, Any]:
    tokens = [sum(map(len, run.value)) for run in runs]
    return {
        "new_tokens": tokens[0],
        "tokens_per_second": summary([count / run.seconds for count, run in zip(tokens, runs, strict=True)], 2),
        "tokens_per_cpu_second": summary([count / run.cpu_seconds for count, run in zip(tokens, runs, strict=True)], 2),
        "peak_rss_mb": max(run.peak_rss_mb for run in runs),
    }


def _ratios(runs: dict[str, list[Run[Replies]]]) -> dict[str, Any]:
    """Our tokens a second over each other side's, round by round: wall time, then CPU time of the process."""

    def rate(run: Run[Replies], clock: str) -> float:
        return sum(map(len, run.value)) / getattr(run, clock)

    return {
        f"ours_over_{side}": {
            clock: summary([rate(ours, clock) / rate(other, clock) for ours, other in zip(runs["ours"], found, strict=True)], 2)
            for clock in ("seconds", "cpu_seconds")
        }
        for side, found in runs.items()
        if side != "ours" and "ours" in runs
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens a second of LocalGenerator against plain loops over model.generate.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="asset name, folder or hub name")
    parser.add_argument("--prompts", type=int, default=32, help="prompts, the first ones of the data")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens at most in a reply")
    parser.add_argument("--repeats", type=int, default=3, help="times each side runs")
    parser.add_argument("--modes", nargs="+", choices=("greedy", "sampling"), default=["greedy", "sampling"])
    parser.add_argument(
        "--sides", nargs="+", choices=("one_by_one", f"batches_of_{BATCH}", "ours"), default=["one_by_one", f"batches_of_{BATCH}", "ours"]
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the weights")
    parser.add_argument("--device", default=None, help="where to run; default: the accelerator where there is one")
    parser.add_argument("--json", action="store_true", help="the result on one line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
