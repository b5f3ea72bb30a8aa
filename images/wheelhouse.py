"""What the images are made of, fetched by this machine: Python packages by pip, Debian packages by apt in a container.

    wheelhouse/*.whl             held to the hashes of the locks
    wheelhouse/debian/NAME/      the closure of images/NAME/debian.packages, held by apt to the archive's signature
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

IMAGES = Path(__file__).resolve().parent
ROOT = IMAGES.parent
sys.path.append(str(ROOT / "locks"))
from bootstrap import REASONS, TORCH_CPU_INDEX, Stage, Stop, requirements  # noqa: E402

HOME = Path(os.environ.get("DRYDOCK_HOME") or ROOT / ".drydock").absolute()
OURS = ("base", "trainer", "server", "airflow")
# Debian 12 on the machine's own architecture, whatever Python runs this file.
TARGET = ["--implementation=cp", "--python-version=3.11", "--abi=cp311", "--abi=abi3", "--abi=none"]
TARGET += [f"--platform=manylinux_2_{minor}_{os.uname().machine}" for minor in range(36, 4, -1)]
TARGET += [f"--platform={tag}_{os.uname().machine}" for tag in ("manylinux2014", "manylinux2010", "manylinux1")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Pin:
    """One line of a lock: a package, its version, the hashes that are accepted."""

    def __init__(self, block: str) -> None:
        self.block = block
        self.name, self.version = re.match(r"([a-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", block).groups()
        self.hashes = set(re.findall(r"sha256:([0-9a-f]{64})", block))

    def file(self, wheelhouse: Path) -> Path | None:
        """Return its file in the wheelhouse, or None. The file's digest is held to the lock."""
        for path in wheelhouse.iterdir():
            found = re.match(r"(.+?)-([^-]+?)(?:-[^/]+\.whl|\.tar\.gz|\.zip)$", path.name)
            if found and (canonical(found[1]), found[2]) == (canonical(self.name), self.version) and self.holds(path):
                return path
        return None

    def holds(self, path: Path) -> bool:
        with path.open("rb") as stream:
            return not self.hashes or hashlib.file_digest(stream, "sha256").hexdigest() in self.hashes


def pins(name: str, torch: str) -> list[Pin]:
    """Return what an image's wheelhouse holds, pip and setuptools included; nothing where there is no lock."""
    lock = IMAGES / name / "requirements.lock"
    if not lock.exists():
        return []
    # The wheel of a public service is only unpacked, which takes no pip.
    locks = (ROOT / "locks/build.lock", lock) if name in OURS else (lock,)
    found = [Pin(block) for path in locks for block in requirements(path)]
    if name != "trainer":
        return found
    of_torch = [Pin(block) for block in requirements(ROOT / "locks/torch.lock")]
    if torch == "cuda":
        return found + of_torch
    version = next(pin.version for pin in of_torch if pin.name == "torch")
    return [*found, Pin(f"torch=={version}+cpu")]


def pip() -> list[str]:
    own = ROOT / ".venv/bin/python"
    return [str(own if own.exists() else sys.executable), "-I", "-m", "pip"]


def fetch(name: str, wanted: list[Pin], wheelhouse: Path, may_fetch: bool) -> list[Path]:
    """Return the files of ``wanted``; what the wheelhouse lacks is fetched, each held to its hashes."""
    wheelhouse.mkdir(parents=True, exist_ok=True)
    lacking = [pin for pin in wanted if not pin.file(wheelhouse)]
    if lacking and not may_fetch:
        found = f"{len(lacking)} packages of {name} are not there as locked ({lacking[0].name} {lacking[0].version})"
        way = f"images/build {name} --fetch-only --wheelhouse {wheelhouse}"
        raise Stop(f"{wheelhouse}: {found}; fill it where there is an index: {way}", 30)
    for hashed in (True, False):
        if part := [pin for pin in lacking if bool(pin.hashes) is hashed]:
            download(name, part, wheelhouse)
    return [pin.file(wheelhouse) or missing(pin, wheelhouse) for pin in wanted]


def missing(pin: Pin, wheelhouse: Path) -> Path:
    raise Stop(f"{wheelhouse}: {pin.name} {pin.version} is not there after fetching; is the folder writable?", 1)


def download(name: str, wanted: list[Pin], wheelhouse: Path) -> None:
    lock = wheelhouse / f".{name}.txt"
    lock.write_text("\n".join(pin.block for pin in wanted) + "\n")
    base = [*pip(), "download", "--no-deps", "--progress-bar=off", *TARGET, "--dest", str(wheelhouse), "-r", str(lock)]
    ways = [base] if wanted[0].hashes else [base, [*base, f"--index-url={TORCH_CPU_INDEX}"]]
    words = f"[{name}] fetching {len(wanted)} packages"
    for index, command in enumerate(ways):
        try:
            log = log_of(f"{name}-fetch")
            run(command, words, log, lambda log=log: f"{log.read_text(errors='replace').count('Saved')} saved")
            break
        except Stop:
            if index == len(ways) - 1:
                raise
    lock.unlink()


def log_of(name: str) -> Path:
    path = HOME / "logs" / f"images-{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run(command: list[str], words: str, log: Path, detail: Callable[[], str], stdin: Path | None = None) -> None:
    """Run a command under a stage that shows its progress; a failure is the last line of its log."""
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    with Stage(words) as stage, log.open("wb") as output, (stdin or Path(os.devnull)).open("rb") as given:
        child = subprocess.Popen(command, stdin=given, stdout=output, stderr=output, env=environment)
        try:
            while child.poll() is None:
                stage.tick(detail)
                time.sleep(0.1)
        finally:
            child.poll() is None and child.terminate()
    if child.returncode:
        raise failure(words, log)


def failure(words: str, log: Path) -> Stop:
    text = log.read_text(errors="replace")
    for pattern, meaning, code in REASONS:
        if found := re.findall(pattern, text, re.MULTILINE):
            return Stop(f"{words}: {meaning}: {found[-1].strip()}; log: {log}", code)
    lines = [line for line in text.splitlines() if line.strip()] or ["no word"]
    return Stop(f"{words} failed: {lines[-1][:200]}; log: {log}", 1)


def docker(*arguments: str) -> str | None:
    """Return what the command prints, None where it fails."""
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Stop("docker: not found; install it: apt-get install docker.io", 30) from None
    return done.stdout.strip() if done.returncode == 0 else None


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def debian_packages(name: str, wheelhouse: Path, may_fetch: bool) -> list[Path]:
    """Return the .deb files of an image: what images/NAME/debian.packages names and what those need above base."""
    wanted = IMAGES / name / "debian.packages"
    if not wanted.exists():
        return []
    folder = wheelhouse / "debian" / name
    mark = folder / "packages"
    if not (mark.exists() and mark.read_text() == wanted.read_text()):
        if not may_fetch:
            way = f"images/build {name} --fetch-only --wheelhouse {wheelhouse}"
            raise Stop(f"{folder}: not there or not whole; fill it where there is a Debian mirror: {way}", 30)
        fetch_debian(name, wanted.read_text().split(), folder)
        mark.write_text(wanted.read_text())
    return sorted(folder.glob("*.deb"))


def fetch_debian(name: str, packages: list[str], folder: Path) -> None:
    """Let apt, in a container of base, fetch the packages; the mirror is this machine's, mounted, never copied."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "partial").mkdir(parents=True)
    (folder / "apt.conf").write_text(apt_settings())
    script = "cp /debs/apt.conf /etc/apt/apt.conf.d/99drydock && apt-get update -q && "
    script += f"apt-get install -yq --download-only --no-install-recommends {' '.join(packages)} && chmod -R a+rX /debs"
    mounts = [f"--volume={folder}:/debs", *(f"--volume={path}:{path}:ro" for path in apt_sources())]
    command = ["docker", "run", "--rm", "--network=host", "--user=0", *mounts, f"drydock/base:{version()}", "sh", "-ec"]
    log = log_of(f"{name}-fetch")
    words = f"[{name}] fetching {' '.join(packages)} from Debian"
    run([*command, script], words, log, lambda: f"{len(list(folder.glob('*.deb')))} packages")


def apt_sources() -> list[str]:
    """Return this machine's own apt sources, where it is a Debian 12 too; else the image's public ones hold."""
    if "VERSION_CODENAME=bookworm" not in Path("/etc/os-release").read_text():
        return []
    return [path for path in ("/etc/apt/sources.list", "/etc/apt/sources.list.d") if os.path.exists(path)]


def apt_settings() -> str:
    """Return apt's settings for one download, with this machine's proxy and time-outs."""
    own = 'APT::Sandbox::User "root";\nDir::Cache::archives "/debs";\n'
    if not shutil.which("apt-config"):
        return own
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
    return own + "".join(f"{line}\n" for line in dump.splitlines() if line.startswith("Acquire::"))
