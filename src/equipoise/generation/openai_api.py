"""Replies from any OpenAI-compatible chat endpoint (a hosted service, vLLM's or llama.cpp's server).

The key is read from an environment variable when the client is made. It is never a setting, never written and never
part of an error message.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from equipoise.core.errors import EquipoiseError, UsageError
from equipoise.generation._base import Completion, Generator, GeneratorSettings, Prompt, Sampling, check_ids, stream


class ApiSettings(GeneratorSettings):
    """A model behind an endpoint."""

    generator: Literal["openai_api"] = "openai_api"
    model: str = Field(description="the endpoint's name of the model")
    base_url: str | None = Field(default=None, description="the endpoint; None: the client's default")
    api_key_env: str = Field(default="OPENAI_API_KEY", description="environment variable that holds the key; may be unset with a base_url")
    system_prompt: str | None = Field(default=None, description="put before every prompt that has no system turn of its own")
    stop: tuple[str, ...] = Field(default=(), description="texts that end a reply")
    concurrency: int = Field(default=8, ge=1, description="requests at a time")
    max_retries: int = Field(default=5, ge=0, description="tries after a failed request, with growing pauses")
    timeout: float = Field(default=120.0, gt=0, description="seconds to wait for one reply")

    @field_validator("base_url")
    @classmethod
    def _holds_no_secret(cls, value: str | None) -> str | None:
        """Settings are written beside the replies, so that a password in the address would be too."""
        if value is not None and "@" in urlsplit(value).netloc:
            raise UsageError("base_url holds a user or password, and settings are written to disk: give the key by api_key_env instead.")
        return value

    def inputs(self) -> dict[str, str]:
        """The name is all that is known of the weights."""
        return {"model": f"api {self.model}"}

    def build(self) -> Generator:
        """Make the client. Raises UsageError without the openai package or a key."""
        try:
            import openai
        except ImportError as error:
            raise UsageError("The openai_api generator needs the openai package: pip install openai.") from error
        key = os.environ.get(self.api_key_env)
        if not key:
            if self.base_url is None:
                raise UsageError(f"Set the environment variable {self.api_key_env} to your key.")
            key = "none"  # local servers ask for no key, the client insists on one
        client = openai.OpenAI(api_key=key, base_url=self.base_url, max_retries=self.max_retries, timeout=self.timeout)
        return ApiGenerator(client, self)


class ApiGenerator(Generator):
    """Generates through a client with `chat.completions.create`, as the openai package has it."""

    def __init__(self, client: Any, settings: ApiSettings) -> None:
        self._client, self._settings = client, settings

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order. Its token ids are unknown, so empty."""
        check_ids(prompts)
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            return list(pool.map(lambda prompt: self._one(prompt, sampling), prompts))

    def _one(self, prompt: Prompt, sampling: Sampling) -> Completion:
        try:
            answer = self._client.chat.completions.create(**self._request(prompt, sampling))
            choice = answer.choices[0]
        except Exception as error:
            # The library's messages may quote the request or part of the key, so only kind and status are passed on.
            status = getattr(error, "status_code", None)
            raise EquipoiseError(
                f"Prompt {prompt.id!r}: the endpoint gave no reply ({type(error).__name__}{f', status {status}' if status else ''}). "
                "Run the same command again to continue."
            ) from None
        return Completion(
            id=prompt.id,
            prompt=prompt.messages,
            text=(choice.message.content or "").strip(),
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            seed=sampling.seed,
        )

    def _request(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        messages = [message.as_dict() for message in prompt.messages]
        if self._settings.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._settings.system_prompt})
        request: dict[str, Any] = {
            "model": self._settings.model,
            "messages": messages,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": int(stream(sampling.seed, prompt.id).integers(2**31)),
        }
        if self._settings.stop:
            request["stop"] = list(self._settings.stop)
        # Not in OpenAI's own interface; open servers take them, and one that does not refuses rather than ignores them.
        extra = {"top_k": sampling.top_k} if sampling.top_k else {}
        if sampling.repetition_penalty != 1.0:
            extra["repetition_penalty"] = sampling.repetition_penalty  # type: ignore[assignment]
        if extra:
            request["extra_body"] = extra
        return request


SETTINGS = ApiSettings
