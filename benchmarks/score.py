"""Rows a second: the scorers against the loops a user would write with transformers.

    python benchmarks/score.py --pairs 32 --json

Scored are both replies of preference pairs. Parts, each with its sides in turn on the same loaded models:
  encoder    a reward model on MiniLM-L6 with a head drawn from a seed
  causal     a reward model on a small Llama with random weights (8 layers of 512)
  log_ratio  log π − log π_base of SmolLM2-135M and a copy of it with noise: what `implicit` and `kl_to_base` read

Sides: one_by_one; batches_of_8, right-padded, in data order, with log_softmax over every position; ours.
Values must agree: the largest difference to the first side is reported.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import Run, in_turn, log, preference_records, report, summary

from equipoise.data._encode import Encoder
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompts_ids
from equipoise.generation._base import Completion
from equipoise.models.load import load_causal, load_sequence_classifier, load_tokenizer
from equipoise.scorers._ratios import LogRatios, Ratio
from equipoise.scorers.reward_model import RewardModel

BATCH = 8
PARTS = ("encoder", "causal", "log_ratio")
Sides = dict[str, Callable[[], list[float]]]


def main() -> None:
    """Run every part and print the result."""
    options = _options()
    name, records = preference_records(options.pairs)
    tokenizer: Any = load_tokenizer("smollm2-135m-instruct")
    completions = [
        Completion(f"{record.id}/{reply.role}", record.prompt, reply.text, token_ids=tuple(reply_ids(tokenizer, reply.text)))
        for record in records
        for reply in record.replies
    ]
    results: dict[str, Any] = {}
    for part in options.parts:
        log(f"{part}: {len(completions)} replies of {name}")
        sides = {"encoder": encoder, "causal": causal, "log_ratio": log_ratio}[part](completions, tokenizer, options)
        runs = in_turn(sides, options.repeats)
        results[part] = {"sides": {side: _side(found) for side, found in runs.items()}, **_compared(runs)}
    settings = vars(options) | {"data": name, "rows": len(completions), "batch": BATCH}
    settings.pop("json")
    report("score", settings, results, options.json)


def encoder(completions: Sequence[Completion], _: Any, options: argparse.Namespace) -> Sides:
    """A sequence classifier that reads prompt and reply as a text pair."""
    model: Any = load_sequence_classifier("minilm-l6", from_backbone=True, device=options.device)
    tokenizer: Any = load_tokenizer("minilm-l6")
    scorer = RewardModel(model, tokenizer)
    prompts = Encoder(tokenizer, TokeniseSettings()).prompts([item.prompt for item in completions])
    texts = [(prompt[0], item.text) for prompt, item in zip(prompts, completions, strict=True) if prompt is not None]

    def plain(size: int) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(texts), size):
            first, second = zip(*texts[start : start + size], strict=True)
            inputs = tokenizer(list(first), list(second), padding=True, truncation="only_first", max_length=512, return_tensors="pt")
            with torch.inference_mode():
                scores += model(**inputs.to(model.device)).logits[:, 0].tolist()
        return scores

    return _sides(plain, lambda: [verdict.value for verdict in scorer(completions)])


def causal(completions: Sequence[Completion], tokenizer: Any, options: argparse.Namespace) -> Sides:
    """A sequence classifier on a causal backbone. transformers reads its score at the last token that is not `pad_token_id`.

    With this tokenizer padding and end of turn are one token, so on every side that is the last token before the end.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **shape)
    model: Any = LlamaForSequenceClassification(config).eval().to(options.device or "cpu")
    scorer = RewardModel(model, tokenizer)
    prompts = prompts_ids([item.prompt for item in completions], tokenizer, TokeniseSettings())
    rows = [[*prompt.tolist(), *item.token_ids] for prompt, item in zip(prompts, completions, strict=True)]

    def plain(size: int) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(rows), size):
            ids, mask = padded(rows[start : start + size], tokenizer.pad_token_id, model.device)
            with torch.inference_mode():
                scores += model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
        return scores

    return _sides(plain, lambda: [verdict.value for verdict in scorer(completions)])


def log_ratio(completions: Sequence[Completion], tokenizer: Any, options: argparse.Namespace) -> Sides:
    """Summed log-probs of each reply's tokens under two models."""
    policy: Any = load_causal("smollm2-135m-instruct", dtype=options.dtype, device=options.device)
    base: Any = copy.deepcopy(policy)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    ratios = LogRatios(policy, base, tokenizer)
    prompts = [prompt.tolist() for prompt in prompts_ids([item.prompt for item in completions], tokenizer, TokeniseSettings())]

    def plain(size: int) -> list[float]:
        values: list[float] = []
        for start in range(0, len(completions), size):
            pieces = list(zip(prompts[start : start + size], completions[start : start + size], strict=True))
            ids, mask = padded([[*prompt, *item.token_ids] for prompt, item in pieces], tokenizer.pad_token_id, policy.device)
            sums = []
            for model in (policy, base):
                with torch.inference_mode():
                    logps = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1].float(), dim=-1)
                    tokens = logps.gather(2, ids[:, 1:, None]).squeeze(2).double()
                sums.append(
                    [
                        float(row[len(prompt) - 1 : len(prompt) - 1 + len(item.token_ids)].sum())
                        for row, (prompt, item) in zip(tokens, pieces, strict=True)
                    ]
                )
            values += [ours - theirs for ours, theirs in zip(*sums, strict=True)]
        return values

    return _sides(plain, lambda: [ratio.nats for ratio in ratios(completions) if isinstance(ratio, Ratio)])


def reply_ids(tokenizer: Any, text: str) -> list[int]:
    """A reply as a chat model writes it: its tokens, the end of the turn."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def padded(rows: Sequence[list[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask [N, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _sides(plain: Callable[[int], list[float]], ours: Callable[[], list[Any]]) -> Sides:
    return {"one_by_one": lambda: plain(1), f"batches_of_{BATCH}": lambda: plain(BATCH), "ours": ours}


def _side(runs: Sequence[Run[list[float]]]) -> dict[str, Any]:
    return {
        "rows_per_second": summary([len(run.value) / run.seconds for run in runs], 2),
        "rows_per_cpu_second": summary([len(run.value) / run.cpu_seconds for run in runs], 2),
        "peak_rss_mb": max(run.peak_rss_mb for run in runs),
    }


def _compared(runs: dict[str, list[Run[list[float]]]]) -> dict[str, Any]:
    """Our rows a second over each other side's, round by round, and how far the values are from the first side's."""
    ratios = {
        f"ours_over_{side}": {
            clock: summary([getattr(other, clock) / getattr(ours, clock) for ours, other in zip(runs["ours"], found, strict=True)], 2)
            for clock in ("seconds", "cpu_seconds")
        }
        for side, found in runs.items()
        if side != "ours"
    }
    first = runs["one_by_one"][0].value
    apart = {
        side: max(abs(a - b) for a, b in zip(first, found[0].value, strict=True)) for side, found in runs.items() if side != "one_by_one"
    }
    spread = torch.tensor(first, dtype=torch.float64).std().item()
    return {"ratios": ratios, "largest_difference": apart, "spread_of_values": spread}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rows a second of the scorers against plain loops.")
    parser.add_argument("--pairs", type=int, default=32, help="preference pairs, the first ones of the data; both replies are scored")
    parser.add_argument("--repeats", type=int, default=3, help="times each side runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the log-ratio models")
    parser.add_argument("--device", default=None, help="where to run; default: the accelerator where there is one")
    parser.add_argument("--json", action="store_true", help="the result on one line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
