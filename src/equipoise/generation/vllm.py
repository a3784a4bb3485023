"""Replies from vLLM on this machine's accelerators. Prompts become tokens here, so all generators see the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from equipoise.core.errors import UsageError
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompts_ids
from equipoise.data.transcripts import style_of
from equipoise.generation._base import Completion, Generator, GeneratorSettings, Prompt, Sampling, check_ids, stream
from equipoise.generation._text import model_inputs, stop_texts, turn_end


class VllmSettings(GeneratorSettings):
    """A model served by vLLM inside this process."""

    generator: Literal["vllm"] = "vllm"
    model_name_or_path: str = Field(description="asset name, local folder or hub name of whole weights (merge an adapter first)")
    tokenise: TokeniseSettings = Field(default=TokeniseSettings(), description="how prompts become tokens")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(default="auto", description="dtype of the weights; auto: the checkpoint's")
    tensor_parallel_size: int = Field(default=1, ge=1, description="accelerators that share the weights")
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1, description="share of the accelerator's memory vLLM may take")
    max_model_len: int | None = Field(default=None, ge=1, description="longest context in tokens; None: the model's own")
    stop: tuple[str, ...] | None = Field(
        default=None, description="texts that end a reply; None: the next human turn for plain transcripts"
    )

    def inputs(self) -> dict[str, str]:
        """The model's files."""
        return model_inputs("model", self.model_name_or_path)

    def build(self) -> Generator:
        """Start the engine. Raises UsageError without the vllm package, or for an adapter."""
        try:
            import vllm
        except ImportError as error:
            raise UsageError("The vllm generator needs the vllm package: pip install vllm.") from error
        from equipoise.models.load import is_adapter, load_tokenizer, resolve_model

        resolved = resolve_model(self.model_name_or_path)
        if is_adapter(resolved):
            raise UsageError(f"{self.model_name_or_path} is a PEFT adapter. Merge it into its base first, or use the local generator.")
        engine = vllm.LLM(
            model=resolved,
            dtype=self.dtype,
            tensor_parallel_size=self.tensor_parallel_size,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_len,
        )
        return VllmGenerator(engine, vllm.SamplingParams, load_tokenizer(self.model_name_or_path), self, self.inputs()["model"])


class VllmGenerator(Generator):
    """Generates with a running engine. `parameters` is vLLM's SamplingParams; `weights` names what was loaded."""

    def __init__(self, engine: Any, parameters: Any, tokenizer: Any, settings: VllmSettings, weights: str) -> None:
        self._engine, self._parameters, self._tokenizer = engine, parameters, tokenizer
        self._settings, self._weights = settings, weights

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order; each has a seed of its own, as with the other generators."""
        check_ids(prompts)
        conversations = [prompt.messages for prompt in prompts]
        names = [prompt.id for prompt in prompts]
        ids = prompts_ids(conversations, self._tokenizer, self._settings.tokenise, room=sampling.max_new_tokens, names=names)
        inputs = [{"prompt_token_ids": item.tolist()} for item in ids]
        outputs = self._engine.generate(inputs, [self._sampling(prompt, sampling) for prompt in prompts])
        return [
            Completion(
                id=prompt.id,
                prompt=prompt.messages,
                text=output.outputs[0].text.strip(),
                token_ids=tuple(output.outputs[0].token_ids),
                finish_reason="length" if output.outputs[0].finish_reason == "length" else "stop",
                seed=sampling.seed,
                weights=self._weights,
            )
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def _sampling(self, prompt: Prompt, sampling: Sampling) -> Any:
        settings = self._settings
        chat = style_of(self._tokenizer, settings.tokenise) == "chat"
        return self._parameters(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seed=int(stream(sampling.seed, prompt.id).integers(2**31)),
            stop=list(stop_texts(settings.stop, self._tokenizer, settings.tokenise)),
            stop_token_ids=list(turn_end(self._tokenizer)) if chat else [],
        )


SETTINGS = VllmSettings
