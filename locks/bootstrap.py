"""Make the virtual environment that ``./drydock`` runs in, from the lock files. Standard library only.

    check the machine ─► venv, pip ─► packages │ torch (side by side) ─► byte code │ drydock itself ─► stamp

The stamp is written last, so its existence means the environment is whole; what was interrupted before it is
continued. Every package is pinned with its hashes and installed without resolving. One file lock is held by
this process and by the installers it starts, so two calls at once install once, whichever of them is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LOCKS = Path(__file__).resolve().parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GLIBC = (2, 31)  # what the most demanding wheel in the locks asks for
BYTES_NEEDED = {"cpu": 4 << 30, "gpu": 12 << 30}
SECONDS_BETWEEN_LINES = 5.0
# The reason in an installer's log, what it means, and the exit code (tasks/spec/errors.py has the kinds).
REASONS = (
    (r"DO NOT MATCH THE HASHES[^\n]*\n\s*(\S+)", "a package is not the one that was locked", 40),
    (r"(No space left on device)", "the disk is full", 20),
    (r"connection broken by '(.*?)': /", "the package index cannot be reached", 20),
    (r"^ERROR: (No matching distribution found.*)", "the package index lacks a package", 20),
    (r"^E: (.*)", "apt-get failed", 20),
    (r"^ *ERROR: (.*)", "pip failed", 1),
)
# Once, on every core, rather than by each process that imports a module first. The rest is seldom imported.
SELDOM = "/(tests?|testing|_inductor|databricks|fontTools|pygments|pip|setuptools)/"
COMPILE = (
    "import compileall, re, sys; compileall.compile_dir(sys.argv[1], quiet=2, workers=0, rx=re.compile(sys.argv[2]))"
)


class Stop(Exception):
    """The set-up ends here: one line for the user, and the exit code."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


class Stage:
    """One stage as the user sees it: a live line on a terminal, elsewhere a line every few seconds."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def tick(self, detail: Callable[[], str]) -> None:
        if time.monotonic() - self.shown >= (0.2 if self.live else SECONDS_BETWEEN_LINES):
            self.show(detail())

    def show(self, detail: str) -> None:
        self.shown = time.monotonic()
        words = f"{self.text}, {detail}" if detail else self.text
        self.write(f"{words} ({self.shown - self.started:.0f} s)", end="" if self.live else "\n")

    def write(self, line: str, end: str = "\n") -> None:
        sys.stderr.write(("\r\033[K" if self.live else "") + line + end)
        sys.stderr.flush()

    def __enter__(self) -> Stage:
        if self.live:
            self.show("")
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.show("done")
        if self.live:
            sys.stderr.write("\n")


class Bench:
    """The folder that is worked on. Its lock file also says that the folder is ours to clear."""

    def __init__(self, venv: Path) -> None:
        mark = venv / ".lock"
        if venv.exists() and not mark.exists() and any(venv.iterdir()):
            raise Stop(f"{venv}: holds files that drydock did not make; move it, or set DRYDOCK_VENV", 30)
        venv.mkdir(parents=True, exist_ok=True)
        self.venv, self.python = venv, venv / "bin/python"
        self.made, self.ready = venv / ".made", venv / ".ready"
        self.lock = os.open(mark, os.O_RDWR | os.O_CREAT, 0o644)

    def claim(self) -> None:
        """Wait until no other call, and no installer that outlived its call, works here."""
        if not self.locked():
            with Stage("waiting for another ./drydock that installs") as stage:
                while not self.locked():
                    stage.tick(str)
                    time.sleep(0.1)

    def locked(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def is_ready(self, stamp: str) -> bool:
        return self.says(self.ready, stamp + "\n")

    def is_made(self) -> bool:
        """Say whether Python and pip are there, made for this place and not left halfway."""
        return self.says(self.made, str(self.venv))

    def says(self, mark: Path, text: str) -> bool:
        return mark.exists() and mark.read_text() == text and os.access(self.python, os.X_OK)

    def clear(self) -> None:
        for path in self.venv.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()

    def write(self, name: str, text: str) -> Path:
        path, temporary = self.venv / name, self.venv / f"{name}.part"
        temporary.write_text(text)
        temporary.replace(path)
        return path

    def packages(self) -> Path:
        return next(self.venv.glob("lib/python3*/site-packages"))

    def pip(self, *arguments: str | Path) -> list[str]:
        flags = ["--no-deps", "--no-compile", "--progress-bar=off"]
        return [*map(str, (self.python, "-I", "-u", "-m", "pip", "install", *flags, *arguments))]


class Job:
    """Ways to do one thing: (command, note); where one fails, the next is tried and its note shown."""

    def __init__(self, bench: Bench, name: str, *ways: tuple[list[str], str]) -> None:
        self.bench, self.ways = bench, list(ways)
        self.log = bench.venv / f"install-{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        command, note = self.ways.pop(0)
        settings = {"PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        settings["DEBIAN_FRONTEND"] = "noninteractive"
        with self.log.open("wb") as log:
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "pass_fds": (self.bench.lock,)}
            self.process = subprocess.Popen(command, env={**os.environ, **settings}, **files)
        return note

    def step(self, stage: Stage) -> bool:
        """Return whether it is done; start the next way where one failed. Raises Stop after the last."""
        code = self.process.poll() if self.process else 1
        if code and self.process and not self.ways:
            raise self.failure()
        if code and (note := self.start()):
            stage.write(note)
        return code == 0

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def failure(self) -> Stop:
        for pattern, meaning, code in REASONS:
            if found := re.findall(pattern, self.text(), re.MULTILINE):
                reason = re.sub(r"<[^>]*>[:,] *", "", found[-1]).strip()  # no reprs of pip's own objects
                return Stop(f"{meaning}: {reason}; log: {self.log}", code)
        return Stop(f"{self.log.stem} failed; log: {self.log}", 1)

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def run(text: str, jobs: list[Job], detail: Callable[[], str] = str) -> None:
    """Run ``jobs`` side by side under one stage. Where one fails, the others are ended."""
    with Stage(text) as stage:
        try:
            waiting = jobs
            while waiting := [job for job in waiting if not job.step(stage)]:
                stage.tick(detail)
                time.sleep(0.05)
        finally:
            for job in jobs:
                job.end()


def check_machine(venv: Path, build: str) -> None:
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise Stop(f"{system} on {machine} is not supported; use Linux on x86_64 or aarch64", 30)
    if (glibc := glibc_version()) < GLIBC:
        found, needed = (".".join(map(str, version)) for version in (glibc, GLIBC))
        raise Stop(f"glibc {found} is too old, {needed} is needed (Debian 11, Ubuntu 20.04)", 30)
    free = shutil.disk_usage(next(path for path in (venv, *venv.parents) if path.exists())).free
    if not (venv / ".made").exists() and free < BYTES_NEEDED[build]:
        raise Stop(f"{venv}: {free / 2**30:.1f} GB free, {BYTES_NEEDED[build] >> 30} GB are needed", 20)


def glibc_version() -> tuple[int, ...]:
    """Return glibc's version, (0,) for another C library."""
    with contextlib.suppress(ValueError, OSError):
        numbers = re.findall(r"\d+", os.confstr("CS_GNU_LIBC_VERSION") or "")
        return tuple(map(int, numbers)) or (0,)
    return (0,)


def torch_build() -> str:
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi")
    return "gpu" if has_gpu else "cpu"


def need_venv_module(bench: Bench) -> None:
    """Install Debian's python3-venv where that is missing and we may. Raises Stop where we may not."""
    if importlib.util.find_spec("ensurepip"):
        return
    is_default = os.path.realpath("/usr/bin/python3") == os.path.realpath(sys.executable)
    package = "python3-venv" if is_default else f"python3.{sys.version_info.minor}-venv"
    rights = administrator()
    if rights is None or not shutil.which("apt-get"):
        raise Stop(f"this Python has no venv module; install it: sudo apt-get install -y {package}", 30)
    install = f"apt-get -o DPkg::Lock::Timeout=60 install -y --no-install-recommends {package}"
    ways = [([*rights, "sh", "-c", command], "") for command in (install, f"apt-get update && {install}")]
    run(f"installing {package}", [Job(bench, "apt", *ways)])


def administrator() -> list[str] | None:
    """Return what to put before a command that needs root; None where that would ask for a password."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and not subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode:
        return ["sudo", "-n"]
    return None


def make_venv(bench: Bench, text: str) -> None:
    if not bench.is_made():
        need_venv_module(bench)
        bench.clear()
        base = os.path.realpath(sys.executable)  # names its version, so a replaced system Python is noticed
        run(text, [Job(bench, "venv", ([base, "-I", "-m", "venv", str(bench.venv)], ""))])
    bench.made.unlink(missing_ok=True)  # a pip that is replaced only halfway cannot go on
    run(text.replace("making", "updating"), [Job(bench, "pip", locked(bench, LOCKS / "build.lock"))])
    bench.write(".made", str(bench.venv))


def locked(bench: Bench, lock: Path) -> tuple[list[str], str]:
    # No isolation: an isolated build would fetch an unpinned setuptools.
    return bench.pip("--require-hashes", "--no-build-isolation", "--use-pep517", "-r", lock), ""


def requirements(lock: Path) -> list[str]:
    return re.findall(r"^[a-z0-9].*(?:\n[ ].*)*", lock.read_text(), re.MULTILINE)


def install_packages(bench: Bench, build: str, text: str) -> None:
    """Install platform.lock in two halves, torch beside them: one unpacks while another fetches."""
    forget_halves(bench)
    pins = requirements(LOCKS / "platform.lock")
    halves = [bench.write(f"half-{half}.txt", "\n".join(pins[half::2])) for half in (0, 1)]
    jobs = [Job(bench, half.stem, locked(bench, half)) for half in halves]
    jobs.append(Job(bench, "torch", *torch_ways(bench, build)))

    def detail() -> str:
        fetched = sum(len(re.findall("^(?:Collecting|Processing) ", job.text(), re.MULTILINE)) for job in jobs)
        return f"{fetched} fetched, {len(list(bench.packages().glob('*.dist-info')))} installed"

    run(text.format(len(pins) + 1), jobs, detail)


def forget_halves(bench: Bench) -> None:
    """Make pip install again what a kill left halfway: pip writes INSTALLER after a package's own files."""
    for info in bench.packages().glob("*.dist-info"):
        if not (info / "INSTALLER").exists():
            shutil.rmtree(info)


def torch_ways(bench: Bench, build: str) -> list[tuple[list[str], str]]:
    """The CPU build from the indexes that pip is set to, then from PyTorch's; else the default build."""
    lock = LOCKS / "torch.lock"
    if build == "gpu":
        return [locked(bench, lock)]
    version = re.search(r"^torch==(\S+)", lock.read_text(), re.MULTILINE)[1]
    index = ("--index-url", TORCH_CPU_INDEX, "--timeout=10", "--retries=0")
    note = "warning: no CPU build of torch can be reached; installing the default one (3 GB more to download)"
    return [
        (bench.pip(f"torch=={version}+cpu"), ""),
        (bench.pip(f"torch=={version}+cpu", *index), ""),
        (locked(bench, lock)[0], note),
    ]


def finish(bench: Bench, text: str) -> None:
    compile_all = [str(bench.python), "-I", "-c", COMPILE, str(bench.packages()), SELDOM]
    drydock = bench.pip("--no-build-isolation", "--editable", LOCKS.parent)
    run(text, [Job(bench, "compile", (compile_all, "")), Job(bench, "drydock", (drydock, ""))])


def bootstrap(venv: Path, stamp: str) -> None:
    """Make ``venv`` whole; one that bears ``stamp`` already is left alone."""
    build = torch_build()
    check_machine(venv, build)
    bench = Bench(venv)
    bench.claim()
    if bench.is_ready(stamp):
        return
    bench.ready.unlink(missing_ok=True)  # an older stamp must not come true again over a mixture
    make_venv(bench, f"[1/3] making {venv}")
    install_packages(bench, build, "[2/3] installing {} packages")
    finish(bench, "[3/3] compiling them, installing drydock")
    bench.write(".ready", stamp + "\n")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="make the virtual environment that ./drydock runs in")
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--stamp", required=True, help="what the finished environment is marked with")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        bootstrap(arguments.venv, arguments.stamp)
    except KeyboardInterrupt:
        line, code = "interrupted; the same command goes on from here", 130
    except Stop as stop:
        line, code = str(stop), stop.code
    except OSError as error:
        line, code = f"{error.filename or arguments.venv}: {error.strerror}", 20
    else:
        return 0
    sys.stderr.write(f"drydock: {line}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
