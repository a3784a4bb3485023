"""The `generate` stage: files, resuming after a kill, settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from equipoise.core.errors import DataError, StageError, UsageError
from equipoise.core.files import read_json, read_jsonl, write_jsonl
from equipoise.generation import GenerateSettings, generate
from equipoise.generation._base import Sampling
from equipoise.generation._stage import read_completions
from equipoise.generation.local import LocalGenerator
from equipoise.models.load import load_causal


def settings_of(model_folder, prompts_file, output_dir, **sampling):
    return GenerateSettings.make(
        {
            "generator": {"generator": "local", "model_name_or_path": str(model_folder), "batch_tokens": 256, "device": "cpu"},
            "prompts": str(prompts_file),
            "sampling": {"max_new_tokens": 48, "temperature": 1.0, **sampling},
            "output_dir": str(output_dir),
        }
    )


def test_a_stage_writes_completions_in_prompt_order_and_is_done_once(model_folder, prompts_file, tmp_path, prompts):
    settings = settings_of(model_folder, prompts_file, tmp_path / "run")
    run = generate(settings)
    rows = read_jsonl(run.folder / "completions.jsonl")
    assert [row["id"] for row in rows] == [prompt.id for prompt in prompts]
    assert set(rows[0]) == {"id", "prompt", "text", "token_ids", "finish_reason", "seed", "weights"}
    assert run.results["completions"] == len(prompts)
    assert run.results["tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert run.results["weights"] == rows[0]["weights"]
    assert run.results["prompts_cut"] == 0
    assert not (run.folder / "completions.partial.jsonl").exists()
    assert read_json(run.folder / "settings.json")["generator"]["model_name_or_path"] == str(model_folder)
    assert [completion.as_json() for completion in read_completions(run.folder / "completions.jsonl")] == rows
    assert generate(settings).skipped
    with pytest.raises(StageError, match="sampling"):
        generate(settings_of(model_folder, prompts_file, tmp_path / "run", seed=9))


class TornError(Exception):
    """Stands for a kill between two batches."""


def test_an_interrupted_run_ends_with_the_same_bytes(model_folder, prompts_file, tmp_path, monkeypatch):
    monkeypatch.setattr("equipoise.generation.local._TURNS", 1)  # several batches, of few prompts
    whole = generate(settings_of(model_folder, prompts_file, tmp_path / "whole")).folder / "completions.jsonl"
    settings = settings_of(model_folder, prompts_file, tmp_path / "torn")
    real, calls = LocalGenerator.__call__, []

    def answer(self, prompts, sampling):
        calls.append([prompt.id for prompt in prompts])
        if len(calls) == 3:
            raise TornError
        return real(self, prompts, sampling)

    monkeypatch.setattr(LocalGenerator, "__call__", answer)
    with pytest.raises(TornError):
        generate(settings)
    partial = tmp_path / "torn" / "completions.partial.jsonl"
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(calls[0]) + len(calls[1])
    # The last batch is torn: one of its lines is half written, so the whole batch is made again.
    partial.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    before = len(calls)
    resumed = generate(settings)
    assert calls[before] == calls[1]
    assert calls[0] not in calls[1:]
    assert (resumed.folder / "completions.jsonl").read_bytes() == whole.read_bytes()


def test_a_killed_process_is_continued_to_the_same_bytes(model_folder, tmp_path):
    prompts = tmp_path / "many.jsonl"
    rows = [{"id": f"q{n}", "prompt": [{"role": "user", "content": f"Say {n} " * (n % 7 + 1)}], "axis": "helpful"} for n in range(120)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of(model_folder, prompts, tmp_path / "killed", max_new_tokens=24)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings.resolved()))
    partial = tmp_path / "killed" / "completions.partial.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-m", "equipoise", "generate", "--config", str(config)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size > 2_000):
            assert process.poll() is None, "the process ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "done.json").exists()
    kept = len(partial.read_bytes().splitlines())
    assert 0 < kept < 120
    resumed = generate(settings)
    whole = generate(settings_of(model_folder, prompts, tmp_path / "whole", max_new_tokens=24))
    assert (resumed.folder / "completions.jsonl").read_bytes() == (whole.folder / "completions.jsonl").read_bytes()


def test_settings_name_their_generator():
    made = GenerateSettings.make({"generator": {"generator": "scripted", "policy": "echo"}})
    assert made.resolved()["generator"] == {"generator": "scripted", "policy": "echo", "replies_file": None}
    assert GenerateSettings.make(made.resolved()) == made
    with pytest.raises(UsageError, match="Did you mean 'local'"):
        GenerateSettings.make({"generator": {"generator": "locl"}})
    with pytest.raises(UsageError, match="Did you mean 'batch_tokens'"):
        GenerateSettings.make({"generator": {"generator": "local", "model_name_or_path": "m", "batch_token": 3}})
    with pytest.raises(UsageError, match="name under `generator`"):
        GenerateSettings.make({"generator": "local"})


def test_a_null_policy_is_a_stage_too(prompts_file, tmp_path, prompts):
    run = generate(
        GenerateSettings.make(
            {"generator": {"generator": "scripted", "policy": "echo"}, "prompts": str(prompts_file), "output_dir": str(tmp_path / "echo")}
        )
    )
    rows = read_jsonl(run.folder / "completions.jsonl")
    assert [row["text"] for row in rows] == [prompt.messages[0].content for prompt in prompts]
    assert run.results["weights"] is None


def test_an_adapter_generates_as_it_was_trained(model_folder, prompts_file, tmp_path, prompts, chat_tokenizer):
    base = load_causal(model_folder, device="cpu")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    sampling = Sampling(max_new_tokens=12)
    expected = LocalGenerator(adapted.eval(), chat_tokenizer)(prompts, sampling)
    settings = settings_of(tmp_path / "adapter", prompts_file, tmp_path / "adapted", max_new_tokens=12, temperature=0)
    made = read_completions(generate(settings).folder / "completions.jsonl")
    assert [completion.token_ids for completion in made] == [completion.token_ids for completion in expected]
    plain = settings_of(model_folder, prompts_file, tmp_path / "plain", max_new_tokens=12, temperature=0)
    others = read_completions(generate(plain).folder / "completions.jsonl")
    assert others[0].weights != made[0].weights
    assert [completion.token_ids for completion in others] != [completion.token_ids for completion in made]
    assert set(settings.generator.inputs()) == {"model", "model base"}


@pytest.mark.parametrize("change", [{"text": None}, {"text": 3}, {"prompt": "a question"}, {"token_ids": None}, {"unknown": 1}])
def test_a_line_that_is_no_completion_is_named(tmp_path, change):
    good = {"id": 7, "prompt": [{"role": "user", "content": "q"}], "text": "a"}
    write_jsonl(tmp_path / "replies.jsonl", [good])
    assert [item.id for item in read_completions(tmp_path / "replies.jsonl")] == ["7"]
    write_jsonl(tmp_path / "replies.jsonl", [good, good | change])
    with pytest.raises(DataError, match=r"replies\.jsonl, line 2: Not a completion"):
        read_completions(tmp_path / "replies.jsonl")
