"""Replies from a transformers causal language model on this machine: batched, seeded, the same whatever the batches.

Prompts are sorted by length and written so many at a time as a token budget allows; one takes the place of another that
has ended. Each draws from its own random stream of (seed, prompt id); what is written beside it changes a reply only
where it changes the rounding of its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from equipoise.core.errors import UsageError
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompts_ids
from equipoise.generation._base import Completion, Generator, GeneratorSettings, Prompt, Sampling, check_ids, stream
from equipoise.generation._text import cut_at_stop, end_ids, model_inputs, stop_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_LIMIT = 2**31
_TURNS = 4
"""How many times over a batch may fill the rows written at a time: prompts take the places of replies that have ended."""


class LocalSettings(GeneratorSettings):
    """A model on this machine."""

    generator: Literal["local"] = "local"
    model_name_or_path: str = Field(description="asset name, local folder (also a PEFT adapter's), or hub name")
    tokenise: TokeniseSettings = Field(default=TokeniseSettings(), description="how prompts become tokens")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(default="float32", description="dtype of the weights; auto: the checkpoint's")
    device: str | None = Field(default=None, description="where to run; None: the accelerator where there is one")
    batch_tokens: int = Field(default=8192, ge=1, description="rows × (longest row + max_new_tokens) written at a time, at most")
    stop: tuple[str, ...] | None = Field(
        default=None, description="texts that end a reply and are cut from it; None: the next human turn for plain transcripts"
    )
    trust_remote_code: bool = Field(default=False, description="run code that ships with the model; only if you trust its authors")

    def inputs(self) -> dict[str, str]:
        """The model's files."""
        return model_inputs("model", self.model_name_or_path)

    def build(self) -> Generator:
        """Load the model. An adapter is merged into its base, which then generates faster (and, in bfloat16, rounds once more)."""
        from equipoise.models.identity import weights_fingerprint
        from equipoise.models.load import load_causal, load_tokenizer

        model: Any = load_causal(self.model_name_or_path, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        weights = weights_fingerprint(model, skip_adapters=False)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        tokenizer = load_tokenizer(self.model_name_or_path, self.trust_remote_code)
        return LocalGenerator(model, tokenizer, self.tokenise, self.batch_tokens, self.stop, weights)


class LocalGenerator(Generator):
    """Generates with a model and tokenizer in memory.

    Args:
        model: causal language model in eval mode.
        tokenizer: its tokenizer.
        tokenise: how prompts become tokens.
        batch_tokens: rows × (longest row + max_new_tokens) written at a time, at most; a single row may exceed it.
        stop: texts that end a reply; None: the next human turn for plain transcripts, nothing with a chat template.
        weights: fingerprint written into each completion; None: computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokenise: TokeniseSettings | None = None,
        batch_tokens: int = 8192,
        stop: Sequence[str] | None = None,
        weights: str | None = None,
    ) -> None:
        from equipoise.models.identity import weights_fingerprint

        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self._tokenise = tokenise or TokeniseSettings()
        self._batch_tokens = batch_tokens
        self.ends = end_ids(model, tokenizer, self._tokenise)
        self._stop = stop_texts(stop, tokenizer, self._tokenise)
        self._weights = weights or weights_fingerprint(model, skip_adapters=False)
        self._cut: set[str] = set()

    @property
    def counts(self) -> dict[str, int]:
        """What the stage reports besides: prompts that lost their oldest turns or tokens to the limit."""
        return {"prompts_cut": len(self._cut)}

    def batches(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
        """Numbers of the prompts of each batch, longest first (what does not fit fails at once, not at the end)."""
        return self._plan([len(ids) for ids in self._ids(prompts, sampling)], sampling)

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order."""
        check_ids(prompts)
        ids = self._ids(prompts, sampling)
        completions: dict[int, Completion] = {}
        for batch in self._plan([len(item) for item in ids], sampling):
            replies = self._batch([prompts[index] for index in batch], [ids[index] for index in batch], sampling)
            completions |= dict(zip(batch, replies, strict=True))
        return [completions[index] for index in range(len(prompts))]

    def _plan(self, lengths: Sequence[int], sampling: Sampling) -> list[list[int]]:
        batches: list[list[int]] = []
        size = 0
        for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
            if not batches or len(batches[-1]) == size:
                at_a_time = max(1, self._batch_tokens // (lengths[index] + sampling.max_new_tokens))
                size = _TURNS * at_a_time
                batches.append([])
            batches[-1].append(index)
        return batches

    def _batch(self, prompts: Sequence[Prompt], ids: Sequence[NDArray[np.int32]], sampling: Sampling) -> list[Completion]:
        from equipoise.generation._decode import decode

        steps = sampling.max_new_tokens if sampling.temperature > 0 else 1
        draws = np.stack([stream(sampling.seed, prompt.id).random(steps) for prompt in prompts])
        replies = decode(self._model, ids, sampling, draws, self.ends, self._stopped if self._stop else None, self._batch_tokens)
        return [
            Completion(
                id=prompt.id,
                prompt=prompt.messages,
                text=self._text(reply.ids),
                token_ids=tuple(reply.ids),
                finish_reason="stop" if reply.ended else "length",
                seed=sampling.seed,
                weights=self._weights,
            )
            for prompt, reply in zip(prompts, replies, strict=True)
        ]

    def _ids(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[NDArray[np.int32]]:
        """Each prompt's tokens, its oldest turns left out where it and the reply exceed max_length or the model's context."""
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or self._tokenise.max_length
        limit = min(self._tokenise.max_length, context)
        if sampling.max_new_tokens >= limit:
            raise UsageError(f"max_new_tokens is {sampling.max_new_tokens}, but prompt and reply together have {limit} tokens.")
        conversations = [prompt.messages for prompt in prompts]
        names = [prompt.id for prompt in prompts]
        whole = prompts_ids(conversations, self._tokenizer, self._tokenise.model_copy(update={"max_length": _NO_LIMIT}), names=names)
        long = [index for index, ids in enumerate(whole) if len(ids) + sampling.max_new_tokens > limit]
        settings = self._tokenise.model_copy(update={"max_length": limit})
        asked, names = [conversations[index] for index in long], [names[index] for index in long]
        cut = prompts_ids(asked, self._tokenizer, settings, room=sampling.max_new_tokens, names=names)
        self._cut.update(prompts[index].id for index in long)
        for index, ids in zip(long, cut, strict=True):
            whole[index] = ids
        return whole

    def _text(self, ids: Sequence[int]) -> str:
        """The reply as text: without special tokens, up to a stop text, without white space around it."""
        return cut_at_stop(self._tokenizer.decode(ids, skip_special_tokens=True), self._stop).strip()

    def _stopped(self, ids: list[int]) -> bool:
        # A stop text spans no more tokens than it has bytes; a few more make sure that its start decodes whole.
        tail = ids[-(max(len(text.encode()) for text in self._stop) + 4) :]
        text = self._tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in self._stop)


SETTINGS = LocalSettings
