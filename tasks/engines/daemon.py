"""Bringing up a supervisord: its configuration, its address, its launch."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.engines.program import INSTANCE, escape
from tasks.spec.errors import BadRequest, DrydockError, TryAgain
from tasks.store.files import write_whole

if TYPE_CHECKING:
    import psutil

LAUNCH_SECONDS = 20.0
# The kernel takes 107 bytes; supervisord first binds a name that is longer by its process id.
MAX_SOCKET_BYTES = 96

_CONFIG = """\
[supervisord]
logfile={folder}/supervisord.log
logfile_maxbytes=10MB
logfile_backups=3
pidfile={folder}/supervisord.pid
directory={folder}
childlogdir={folder}
nocleanup=true
umask=022
minprocs=1
identifier=drydock

[unix_http_server]
file={socket}
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[include]
files={programs}
"""


def render_config(folder: Path, address: Path) -> str:
    """Return supervisord's configuration. Pure."""
    # supervisord globs the pattern, and parts the list of patterns at white space.
    pattern = re.sub(r"\s", "?", glob.escape(str(folder / "programs"))) + "/*.ini"
    texts = {"folder": str(folder), "socket": str(address), "programs": pattern}
    return _CONFIG.format(**{key: escape(text) for key, text in texts.items()})


def configure(folder: Path) -> Path:
    """Write the configuration and the chosen address; return the configuration's path."""
    address = _choose_address(folder)
    write_whole(folder / "socket", str(address))
    write_whole(folder / "supervisord.conf", render_config(folder, address), 0o600)
    return folder / "supervisord.conf"


def address_of(folder: Path) -> Path:
    """Return the socket that was chosen at the last start; it depended on that process's TMPDIR."""
    try:
        return Path((folder / "socket").read_text())
    except FileNotFoundError:
        return folder / "supervisor.sock"


def launch(config: Path) -> None:
    """Start supervisord as a daemon; its socket listens on return.

    Raises:
        DrydockError: it refuses; the message is its last line.
        TryAgain: it does not come up in time.
    """
    command = [sys.executable, "-P", "-X", "utf8", "-m", "supervisor.supervisord", "-c", str(config)]
    # Where one instance starts another, the daemon must not look like a process of the first.
    clean = {k: v for k, v in os.environ.items() if k != INSTANCE and not k.startswith("SUPERVISOR_")}
    try:
        done = subprocess.run(
            command,
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LAUNCH_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise TryAgain(f"supervisord did not start in {LAUNCH_SECONDS:.0f} s; see {config.parent}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"see {config.parent}"]
        raise DrydockError(f"supervisord did not start: {lines[-1]}")


def daemons(config: Path) -> list[psutil.Process]:
    """Return the supervisords that run with this configuration."""
    import psutil

    return [found for found in psutil.process_iter() if is_daemon(found.pid, config)]


def is_daemon(pid: int, config: Path) -> bool:
    """Whether a process is that supervisord, or its fork that has yet to become a program."""
    import psutil

    try:
        return {"supervisor.supervisord", str(config)} <= set(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _choose_address(folder: Path) -> Path:
    short = folder / "supervisor.sock"
    if len(os.fsencode(short)) <= MAX_SOCKET_BYTES:
        return short
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    for base in (tempfile.gettempdir(), "/tmp"):
        private = Path(base, f"drydock-{os.getuid()}-{digest}")
        if len(os.fsencode(private)) + len("/supervisor.sock") <= MAX_SOCKET_BYTES:
            return _private(private) / "supervisor.sock"
    raise BadRequest(f"TMPDIR = {tempfile.gettempdir()}, is too long for a unix socket; set a shorter one")


def _private(folder: Path) -> Path:
    """Make a folder that only we can enter; refuse one that someone else put there first."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BadRequest(f"{folder}: is not a folder of ours alone; remove it, or set another TMPDIR")
    return folder
