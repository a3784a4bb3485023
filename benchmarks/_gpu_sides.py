"""The two sides of benchmarks/gpu.py: this package's engine, and a stand-in for TRL's recipe; shapes, rows and FLOP counts.

The stand-in does what TRL 1.16's DPOTrainer does in one step, written out so that it runs where TRL is not installed: pairs in
random order, chosen and rejected stacked and right-padded to the longest, one forward of the backbone, the head on reply
positions only in recomputed tiles, the reference from a second forward or precomputed, one read-back of metrics a micro-batch
(TRL makes fourteen), gradient checkpointing as asked. It has no Trainer around it, so it is not slower than the real one for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import linear, logsigmoid
from torch.utils.checkpoint import checkpoint

from equipoise.data.plan import Planner
from equipoise.data.rows import Branch, TokenRow
from equipoise.models._elementwise import kernels_for
from equipoise.models.attention import NAME, attention_of
from equipoise.models.batch import Form, pack
from equipoise.models.gradients import gradients_in_place
from equipoise.models.layers import lean_layers, watching
from equipoise.models.logps import policy_logps
from equipoise.objectives._load import build as build_objective
from equipoise.reference.build import build as build_store
from equipoise.reference.key import Context
from equipoise.reference.store import ReferenceStore
from equipoise.training._step import StepRunner
from equipoise.training._streams import Forward, Stream
from equipoise.training.meters import Meters

Tensor = torch.Tensor
BETA = 0.1
HEAD_TILE = 4096

# As published with the models (facebook/opt-350m, Qwen/Qwen2.5-0.5B, meta-llama/Llama-3.2-1B); weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "kind": "LlamaConfig", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "kind": "Qwen2Config", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "opt-350m": {
        "kind": "OPTConfig", "vocab_size": 50272, "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False, "max_position_embeddings": 2048,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "tiny-llama": {
        "kind": "LlamaConfig", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "tiny-opt": {
        "kind": "OPTConfig", "vocab_size": 512, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "do_layer_norm_before": False, "max_position_embeddings": 2048,
    },
}  # fmt: skip
# Mean tokens of prompt, chosen and rejected reply, and the spread of their logarithms.
LENGTHS = {"hh": ((120, 40, 50), 0.8), "ultrafeedback": ((180, 300, 280), 0.6), "tiny": ((12, 5, 6), 0.5)}
MAX_PROMPT = MAX_REPLY = 512
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}


def make_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype = torch.float32, layers: int | None = None) -> Any:
    """A random model of a shape, made on its device, in training mode without dropout."""
    values = {name: value for name, value in shape.items() if name != "kind"} | NO_DROPOUT
    if layers is not None:
        values["num_hidden_layers"] = layers
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, shape["kind"])(**values), dtype=dtype).train()


def make_rows(kind: str, count: int, vocabulary: int, seed: int = 0) -> list[TokenRow]:
    """Pairs of random tokens with log-normal lengths of a data set's kind."""
    means, spread = LENGTHS[kind]
    generator = np.random.default_rng(seed)

    def ids(mean: float, most: int) -> np.ndarray:
        length = round(generator.lognormal(np.log(mean) - spread**2 / 2, spread))
        return generator.integers(3, vocabulary, min(max(length, 2), most)).astype(np.int32)

    def branch(role: str, mean: float) -> Branch:
        tokens = ids(mean, MAX_REPLY)
        return Branch(role, tokens, {"learn": np.ones(len(tokens), dtype=bool)})

    return [
        TokenRow(f"{kind}-{number}", ids(means[0], MAX_PROMPT), (branch("chosen", means[1]), branch("rejected", means[2])))
        for number in range(count)
    ]


def step_flops(model: Any, rows: Sequence[TokenRow], shared: bool) -> float:
    """FLOPs of one training step over these rows, padding and recomputation not counted.

    6 a weight of the layers and token, 6·H·V a reply token for the head, and 12·H a (query, key) pair and layer for attention.
    """
    config = model.config
    head = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    tables = config.vocab_size * head + sum(part.numel() for name, part in model.named_parameters() if "embed_positions" in name)
    weights = sum(parameter.numel() for parameter in model.parameters()) - tables  # tied: the table is the head
    tokens = replies = pairs = 0
    for row in rows:
        prompt, lengths = len(row.prompt), [len(branch.ids) for branch in row.branches]
        replies += sum(lengths)
        prompts = 1 if shared else len(lengths)
        tokens += prompts * prompt + sum(lengths)
        pairs += prompts * prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in lengths)
    layers = config.num_hidden_layers * 12 * config.hidden_size * pairs
    return float(6 * weights * tokens + 6 * head * config.vocab_size * replies + layers)


class Ours:
    """This package's engine on shared, packed rows with a filled reference store."""

    def __init__(
        self, model: Any, rows: Sequence[TokenRow], batch: int, budget: int, folder: Path, autocast: Autocast, form: Form = "packed"
    ) -> None:
        self.model, self.device, self.form, self.budget = model, next(model.parameters()).device, form, budget
        self.rows, self.autocast, self.shared = rows, autocast, form == "packed"
        self.store = ReferenceStore(folder, Context("benchmark", "none", "benchmark", form))
        stream = Stream("main", rows, build_objective({"name": "dpo", "beta": BETA}), store=self.store)
        self.planner = Planner((stream.lengths,), batch, budget, shared=form == "packed")
        self.forward = Forward(form, self.device, autocast=autocast, kernels=kernels_for(self.device, None))
        with torch.no_grad(), attention_of(model, NAME), autocast(), watching(model):  # as the start check does
            policy_logps(model, pack(rows[:2], form).to(self.device))
        self.runner = StepRunner([stream], self.forward, Meters(), lambda loss: loss.backward(), sync=lambda last: gradients_in_place())

    def reference(self, model: Any = None) -> None:
        """Fill the store with what it lacks, from the model at hand or another."""
        model = self.model if model is None else model
        with attention_of(model, NAME), lean_layers(model, self.forward.kernels):
            build_store(model, self.rows, self.store, self.form, self.budget, self.device, self.autocast)

    def step(self, number: int) -> Tensor:
        """Forward and backward of one optimizer step. Returns its loss."""
        with attention_of(self.model, NAME):
            return self.runner.run(self.model, self.planner.step(number))

    def step_rows(self, number: int) -> list[TokenRow]:
        """The rows of a step."""
        return [self.rows[row] for row in self.planner.step(number).rows[0]]


class StandIn:
    """TRL's recipe. micro: pairs a micro-batch. reference_model: online reference; None: precomputed by `reference`."""

    shared = False

    def __init__(
        self,
        model: Any,
        rows: Sequence[TokenRow],
        batch: int,
        micro: int,
        autocast: Autocast,
        checkpointing: bool,
        reference_model: Any = None,
    ) -> None:
        self.model, self.device, self.rows, self.batch, self.micro = model, next(model.parameters()).device, rows, batch, micro
        self.autocast, self.checkpointing, self.reference_model = autocast, checkpointing, reference_model
        self.order = np.random.default_rng(0).permutation(len(rows))
        self.stored = torch.zeros(len(rows), 2, device=self.device)

    def reference(self, model: Any = None) -> None:
        """Summed reference log-probs of every reply, in data order, as `precompute_ref_log_probs` does."""
        model = self.model if model is None else model
        if self.reference_model is not None:
            return
        for start in range(0, len(self.rows), self.micro):
            chosen = range(start, min(start + self.micro, len(self.rows)))
            with torch.no_grad(), self.autocast():
                self.stored[start : start + len(chosen)] = self._logps(model, chosen).view(2, -1).T

    def step(self, number: int) -> Tensor:
        """Forward and backward of one optimizer step over `batch` pairs. Returns its loss."""
        rows = self._step_indices(number)
        total = torch.zeros((), device=self.device)
        with _checkpointing(self.model) if self.checkpointing else nullcontext():
            for start in range(0, len(rows), self.micro):
                cut = rows[start : start + self.micro]
                with self.autocast():
                    policy = self._logps(self.model, cut).view(2, -1)
                    if self.reference_model is None:
                        reference = self.stored[torch.tensor(cut, device=self.device)].T
                    else:
                        with torch.no_grad():
                            reference = self._logps(self.reference_model, cut).view(2, -1)
                rewards = BETA * (policy - reference)
                losses = -logsigmoid(rewards[0] - rewards[1])
                (losses.sum() / len(rows)).backward()
                total += losses.detach().sum() / len(rows)
                torch.cat([rewards.detach().mean(1), policy.detach().mean(1)]).tolist()
        return total

    def step_rows(self, number: int) -> list[TokenRow]:
        """The rows of a step."""
        return [self.rows[row] for row in self._step_indices(number)]

    def _step_indices(self, number: int) -> list[int]:
        start = number * self.batch % max(1, len(self.rows) - self.batch + 1)
        return [int(row) for row in self.order[start : start + self.batch]]

    def _logps(self, model: Any, rows: Sequence[int]) -> Tensor:
        """[2 · pairs] summed log-probs: all chosen, then all rejected."""
        texts = [(self.rows[row].prompt, self.rows[row].branches[side].ids) for side in (0, 1) for row in rows]
        width = max(len(prompt) + len(reply) for prompt, reply in texts)
        ids, given, learned = (np.zeros((len(texts), width), dtype=kind) for kind in (np.int64, np.int64, bool))
        for index, (prompt, reply) in enumerate(texts):
            end = len(prompt) + len(reply)
            ids[index, :end] = np.concatenate([prompt, reply])
            given[index, :end], learned[index, len(prompt) : end] = 1, True
        tokens, attention = torch.from_numpy(ids).to(self.device), torch.from_numpy(given).to(self.device)
        # The last hidden state as the head takes it: OPT-350M projects it down inside its decoder.
        hidden = model.base_model(input_ids=tokens, attention_mask=attention, use_cache=False)[0]
        row, column = (torch.from_numpy(index).to(self.device) for index in np.nonzero(learned))
        values = self._head(model, hidden[row, column - 1], tokens[row, column])
        return torch.zeros(len(texts), device=self.device).index_add(0, row, values)

    def _head(self, model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        weight = model.get_output_embeddings().weight

        def tile(part: Tensor, target: Tensor) -> Tensor:
            logits = linear(part, weight).float()
            return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)

        tiles = zip(hidden.split(HEAD_TILE), targets.split(HEAD_TILE), strict=True)
        return torch.cat([checkpoint(tile, part, target, use_reentrant=False) for part, target in tiles])


Autocast = Callable[[], AbstractContextManager[Any]]
Side = Ours | StandIn


@dataclass
class Watch:
    """Seconds of device time and peak device memory of a call."""

    device: torch.device

    def run(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Seconds, and peak GiB (0 on the CPU)."""
        import time

        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    with warnings.catch_warnings():  # transformers is renaming it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()
