"""`equipoise data`, in process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipoise.cli.main import main
from equipoise.core.files import write_jsonl


def test_inspect_accounts_for_all_1800_rows(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(shared_data / "hh-harmless-base" / "pairs.jsonl.gz"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    accounting = shown["accounting"]
    assert shown["schema_version"] == 1
    assert accounting["rows_in"] == 1800 == accounting["kept"] + sum(entry["count"] for entry in accounting["dropped"].values())
    assert shown["roles"] == {"chosen": 1794, "rejected": 1794}
    assert sum(shown["turns"].values()) == 1794 == sum(shown["parts"].values())


def test_inspect_shows_tables_samples_and_data_that_looks_like_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {
        "prompt": "[bold]q[/bold]",
        "chosen": "a" * 700,
        "rejected": "[/b]",
        "chosen_safe": True,
        "rejected_safe": False,
        "topic": "[/x]",
    }
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"rejected": " "}))
    assert main(["data", "inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    for part in ("1 records in the format starter", "dropped: empty reply", "pairs:2", "[bold]q[/bold]", "[/x]", "(100 more characters)"):
        assert part in shown


def test_settings_are_overridden_and_mistakes_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", "starter", "--json", "--samples", "1", "--set", "data.dataset_config_name=judge"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["records"], len(shown["samples"])) == (80, 1)
    assert main(["data", "inspect", "starter", "--set", "data.max_row=3"]) == 2
    assert "Unknown setting 'data.max_row'. Did you mean 'max_rows'?" in capsys.readouterr().err
    assert main(["data", "inspect", str(tmp_path / "nothing.jsonl")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_prepare_writes_rows_with_a_local_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "you": 3, "a": 4, "to": 5}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path / "model")
    GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=6).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    arguments = ["data", "prepare", "starter", "-m", str(tmp_path / "model"), "--roles", "gold", "-o", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["skipped"], first["results"]["rows"]) == (False, 160)
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] is True
    assert main([*arguments[:-1], "--set", "tokenise.max_length=64"]) == 1
    assert "other settings or inputs (tokenise)" in capsys.readouterr().err
    assert main(["data", "inspect", "starter", "-m", str(tmp_path / "model"), "--samples", "0"]) == 0
    assert "Accounting of tokenising (chosen, rejected" in " ".join(capsys.readouterr().out.split())
    one_prompt = tmp_path / "labelled.jsonl"
    write_jsonl(one_prompt, [{"prompt": "the", "completion": text, "label": text == "you"} for text in ("you", "a")])
    assert main(["data", "inspect", str(one_prompt), "-m", str(tmp_path / "model")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 records in the format labelled" in shown
    assert "Tokenising for sample, mismatched: KTO needs replies to other prompts" in shown
    assert "[sample, label True] you" in shown


def test_text_of_the_data_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"id": "\x1b[31mone", "prompt": "clear \x1b[2J", "chosen": "title \x1b]0;mine\x07 \x9b2J", "rejected": "b"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "\x1b[5mtwo", "rejected": ""}))
    assert main(["data", "inspect", str(path)]) == 0
    told = capsys.readouterr().out
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "\x1b[31m": "c"}))
    assert main(["data", "inspect", str(path)]) == 1
    told += capsys.readouterr().err
    assert not set("\x1b\x07\x9b") & set(told)
    assert all(part in told for part in ("\ufffd[31mone", "\ufffd[5mtwo", "clear \ufffd[2J", "title \ufffd]0;mine\ufffd \ufffd2J"))
