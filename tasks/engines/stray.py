"""Processes that outlived their supervisor or their leader: found by what they inherited, and ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.engines.program import INSTANCE
from tasks.spec.errors import DrydockError

if TYPE_CHECKING:
    import psutil

KILL_SECONDS = 10.0
_POLL_SECONDS = 0.05


def stray(home: Path, session: int | None = None, name: str | None = None) -> list[psutil.Process]:
    """Return the processes of an instance, or of one of its programs, by the environment they started with.

    A process that set its own title has overwritten that environment (Airflow's do): it is found by the
    session of its supervisor, ``session``. The calling process is never among them.
    """
    import psutil

    mine = str(Path(home).resolve())
    found = []
    for process in psutil.process_iter():
        if process.pid in (os.getpid(), session):
            continue
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        program = environment.get("SUPERVISOR_PROCESS_NAME")
        inherited = environment.get(INSTANCE) == mine and name in (None, program)
        if inherited or (session and "PATH" not in environment and _session(process.pid) == session):
            found.append(process)
    return [process for process in found if not has_ended(process)]


def members(group: int) -> list[psutil.Process]:
    """Return the live processes of a process group."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.pid != os.getpid() and not has_ended(process):
                found.append(process)
        except OSError:
            continue
    return found


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or waits only for whoever started it to look."""
    import psutil

    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end(find: Callable[[], list[psutil.Process]], grace_seconds: float) -> None:
    """End what ``find`` returns, until it returns nothing: SIGTERM, a bounded wait, SIGKILL.

    Raises:
        DrydockError: a process survives SIGKILL (it waits for a device).
    """
    if not (found := find()):
        return
    _signal(found, signal.SIGTERM)
    _wait_until_none(find, grace_seconds)
    deadline = time.monotonic() + KILL_SECONDS
    # Again and again: what is about to fork may add a process after each look.
    while left := find():
        if time.monotonic() > deadline:
            pids = sorted(process.pid for process in left)
            raise DrydockError(f"processes {pids} survive SIGKILL: they wait for a device; free it")
        _signal(left, signal.SIGKILL)
        _wait_until_none(find, 1.0)


def _wait_until_none(find: Callable[[], list[psutil.Process]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while find() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    import psutil

    for process in processes:
        try:
            # psutil holds the start time against a pid that was given away meanwhile.
            process.send_signal(number)
        except psutil.Error:
            continue


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0
