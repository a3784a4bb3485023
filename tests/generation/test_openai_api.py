"""The endpoint generator, through an injected client and, where the package is there, against a local server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from equipoise.core.errors import EquipoiseError, UsageError
from equipoise.core.records import Message
from equipoise.generation._base import Prompt, Sampling
from equipoise.generation.openai_api import ApiGenerator, ApiSettings

PROMPTS = [Prompt(f"p{number}", (Message("user", f"say {number}"),)) for number in range(6)]
KEY = "sk-very-secret-key"


class Client:
    """Answers like the openai package's client; fails for prompts named in `broken`."""

    def __init__(self, broken=()):
        self.requests, self.broken = [], broken
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **request):
        self.requests.append(request)
        asked = request["messages"][-1]["content"]
        if asked in self.broken:
            error = RuntimeError(f"Incorrect API key provided: {KEY}")
            error.status_code = 401
            raise error
        reason = "length" if asked == "say 1" else "stop"
        text = None if asked == "say 2" else f"  heard: {asked}\n"
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text), finish_reason=reason)])


def test_requests_carry_the_sampling_and_replies_come_in_order():
    client = Client()
    settings = ApiSettings(model="m", system_prompt="Be brief.", stop=("END",))
    sampling = Sampling(max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.1, seed=3)
    completions = ApiGenerator(client, settings)(PROMPTS, sampling)
    assert [completion.id for completion in completions] == [prompt.id for prompt in PROMPTS]
    assert [completion.text for completion in completions[:4]] == ["heard: say 0", "heard: say 1", "", "heard: say 3"]
    assert [completion.finish_reason for completion in completions[:3]] == ["stop", "length", "stop"]
    request = next(item for item in client.requests if item["messages"][-1]["content"] == "say 0")
    seeds = {item["seed"] for item in client.requests}
    assert len(seeds) == len(PROMPTS)
    assert request | {"seed": 0} == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say 0"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 0,
        "stop": ["END"],
        "extra_body": {"top_k": 7, "repetition_penalty": 1.1},
    }


def test_what_the_interface_does_not_know_is_not_sent_unasked():
    client = Client()
    ApiGenerator(client, ApiSettings(model="m"))(PROMPTS[:1], Sampling())
    assert set(client.requests[0]) == {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}


def test_an_error_names_the_prompt_and_never_the_key():
    with pytest.raises(EquipoiseError, match=r"'p4'.*RuntimeError, status 401") as caught:
        ApiGenerator(Client(broken={"say 4"}), ApiSettings(model="m"))(PROMPTS, Sampling())
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_missing_key_is_said(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UsageError, match="SOME_KEY"):
        ApiSettings(model="m", api_key_env="SOME_KEY").build()


class Endpoint(BaseHTTPRequestHandler):
    """A chat endpoint that fails its first request."""

    asked: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.asked.append((self.path, self.headers["Authorization"], body))
        if len(Endpoint.asked) == 1:
            self.send_response(503)
            self.end_headers()
            return
        message = {"role": "assistant", "content": "heard: " + body["messages"][-1]["content"]}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        payload = json.dumps({**answer, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        """Silent."""


def test_a_real_client_against_a_local_server(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("SOME_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        settings = ApiSettings(model="m", base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key_env="SOME_KEY")
        completions = settings.build()(PROMPTS, Sampling(max_new_tokens=5))
    finally:
        server.shutdown()
        server.server_close()
    assert [completion.text for completion in completions] == [f"heard: say {number}" for number in range(6)]
    assert len(Endpoint.asked) == 7  # the failed request was tried again
    assert {(path, key) for path, key, _ in Endpoint.asked} == {("/v1/chat/completions", f"Bearer {KEY}")}
    assert KEY not in json.dumps(settings.resolved())


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="api_key_env") as caught:
        ApiSettings.make({"model": "m", "base_url": "http://me:hunter2@example.org/v1"})
    assert "hunter2" not in str(caught.value)
