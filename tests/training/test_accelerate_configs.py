"""The shipped accelerate configs load, and say what their comments say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from equipoise.core.errors import UsageError
from equipoise.training.sharding import check_accelerate

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"), [("ddp", "MULTI_GPU", 1, 8), ("fsdp2", "FSDP", 1, 8), ("two_nodes", "MULTI_GPU", 2, 16)]
)
def test_accelerate_loads_it(name: str, kind: str, machines: int, processes: int) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert getattr(config, "fsdp_config", {}).get("fsdp_version", 2) == 2


def test_every_config_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"ddp", "fsdp2", "two_nodes"}


def test_accelerates_fsdp_on_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train with DDP and say nothing."""
    assert not check_accelerate(torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert check_accelerate(torch.device("cuda"))
    with pytest.raises(UsageError, match="fsdp=true"):
        check_accelerate(torch.device("cpu"))
