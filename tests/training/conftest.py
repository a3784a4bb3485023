"""What several tests of training start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny, tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a tiny random model and its tokenizer."""
    folder = tmp_path / "base"
    tiny(seed=5).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
