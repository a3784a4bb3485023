"""The command line itself: what Ctrl-C does, and a narrow terminal."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from equipoise.cli.main import main

SLEEPER = """
import signal
import sys
import time
from equipoise.cli import main, methods

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def run() -> None:
    print("working", flush=True)
    time.sleep(60)

methods.run = run
sys.exit(main.main(["methods"]))
"""


def test_ctrl_c_says_how_to_go_on():
    started = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "working\n"
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=30)
    assert said == "stopped; run the same command again to continue\n"
    assert started.returncode == 130


def test_a_narrow_terminal_shows_names_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["metrics"]) == 0
    shown = capsys.readouterr().out
    first = "".join(line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│"))
    assert "reward_harmful" in first
    assert "…" not in shown
