"""The data folder beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Where real data is; tests that need it are skipped without."""
    folder = Path(os.environ.get("EQUIPOISE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the data folder beside the checkout (../shared/data, or EQUIPOISE_DATA) is absent")
    return folder
