"""The seam to supervisord: one daemon for each state folder, driven by XML-RPC over a private unix socket.

    <home>/supervisor/supervisord.conf    rendered anew at each start; never a TCP port
    <home>/supervisor/programs/NAME.ini   the programs that come back with the supervisor
    <home>/supervisor/supervisord.log     who started, ended and was restarted, and how

Every process inherits ``DRYDOCK_INSTANCE=<home>``, so that what outlives a killed supervisord can be found.
"""

from __future__ import annotations

import contextlib
import re
import signal as signals
import time
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tasks.engines.daemon import address_of, configure, daemons, is_daemon, launch
from tasks.engines.program import Program, parse_ini, render_ini
from tasks.engines.rpc import (
    ALREADY_ADDED,
    ALREADY_STARTED,
    BAD_NAME,
    CALL_SECONDS,
    CANT_REREAD,
    NOT_RUNNING,
    ProgramInfo,
    ProgramState,
    call,
    program_info,
)
from tasks.engines.stray import end, members, stray
from tasks.spec.errors import BadRequest, TryAgain
from tasks.store.files import exclusive, write_whole

__all__ = ["Program", "ProgramInfo", "ProgramState", "Supervisor", "stray"]

# Above the longest stop_seconds of a program, after which supervisord itself sends SIGKILL.
STOP_SECONDS = 75.0
GRACE_SECONDS = 2.0
# For a daemon that runs and does not answer.
DAEMON_SECONDS = 10.0
_LOCKS = 64


class Supervisor:
    """The process supervisor of one state folder. Any number of processes and threads may use it at once."""

    def __init__(self, home: Path) -> None:
        self.home = Path(home).resolve()
        self.folder = self.home / "supervisor"
        self.programs = self.folder / "programs"
        self.config = self.folder / "supervisord.conf"
        self.log = self.folder / "supervisord.log"

    def start(self) -> None:
        """Start the daemon and the programs that stay; one that runs is left alone. What a dead daemon left
        behind is ended first.

        Raises:
            DrydockError: supervisord refuses to start; the message is its last line.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # the programs' environments may hold secrets
        with self._starting():
            if self.running():
                return
            self._end_remains(self._last_session(), DAEMON_SECONDS)
            self._prepare_programs()
            launch(configure(self.folder))

    def stop(self, wait_seconds: float = STOP_SECONDS) -> None:
        """End all programs, those of the highest priority number first, then the daemon. Whatever is left
        after the bounded wait is killed. Programs that stay are started again by the next ``start``."""
        if not self.folder.is_dir():
            return
        with self._starting():
            session = self._last_session()  # a daemon that ends well takes its pidfile along
            with contextlib.suppress(TryAgain):
                self._stop_by_priority(time.monotonic() + wait_seconds)
                self._call("shutdown")
            self._end_remains(session, wait_seconds)

    def running(self) -> bool:
        """Whether the daemon answers and is not shutting down."""
        try:
            return self._call("getState")["statename"] == "RUNNING"
        except TryAgain:
            return False

    def add(self, program: Program) -> bool:
        """Have a program run; return whether this call started it.

        One that runs unchanged is left alone; so is one that runs once and still runs or has succeeded. Any
        other of its name is ended and replaced.

        Raises:
            TryAgain: the supervisor is not running.
        """
        with self._lock(program.name):
            if self._stands(program):
                return False
            self._take_away(program.name)
            self._put(program)
            return True

    def dismiss(self, *names: str) -> None:
        """Tell programs to end, and don't wait for it; ``add`` or ``remove`` of the same name does."""
        for name in names:
            with self._lock(name):
                # First of all, so that a restarted supervisor does not bring it back.
                self._ini(name).unlink(missing_ok=True)
        for name in names:
            self._ask_to_stop(self.info(name))

    def remove(self, *names: str) -> None:
        """End programs with all their children (together, so the waits don't add up) and forget them."""
        self.dismiss(*names)
        for name in names:
            with self._lock(name):
                self._take_away(name)

    def restart(self, name: str) -> None:
        """Stop a program and start it again.

        Raises:
            BadRequest: no such program; the message lists those that exist.
        """
        with self._lock(name):
            if self.info(name) is None:
                raise self._unknown(name)
            self._settle(name)
            self._call("startProcess", name, False, tolerate=(ALREADY_STARTED,))

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a program's first process; one that doesn't run gets none."""
        if self.info(name) is None:
            raise self._unknown(name)
        self._call("signalProcess", name, str(int(number)), tolerate=(NOT_RUNNING, BAD_NAME))

    def info(self, name: str) -> ProgramInfo | None:
        """Return a program's state, or None where supervisord doesn't know it."""
        found = self._call("getProcessInfo", name, tolerate=(BAD_NAME,))
        return None if found is None else program_info(found)

    def infos(self) -> dict[str, ProgramInfo]:
        """Return the state of every program by name."""
        return {info.name: info for info in map(program_info, self._call("getAllProcessInfo"))}

    def kept(self) -> dict[str, Program]:
        """Return the programs that stay, by name, as they were added; works without the daemon too."""
        found = {}
        for path in sorted(self.programs.glob("[!.]*.ini")):
            with contextlib.suppress(FileNotFoundError):
                found[path.stem] = parse_ini(path.read_text(), str(path))
        return {name: program for name, program in found.items() if program.autorestart}

    def killed_by(self, name: str) -> int | None:
        """Return the signal that last ended a program. XML-RPC doesn't tell it; supervisord's log does."""
        line = re.compile(rf"exited: {re.escape(name)} \(terminated by (SIG\w+)")
        for log in (self.log, self.log.with_name(f"{self.log.name}.1")):
            if found := line.findall(_tail(log)):
                number = signals.Signals.__members__.get(found[-1])
                return None if number is None else int(number)
        return None

    def _starting(self) -> contextlib.AbstractContextManager[None]:
        return exclusive(self.folder / "start.lock")

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """One writer for each name. A lock's file can't be deleted safely, so names share a few."""
        with exclusive(self.folder / "locks" / f"{zlib.crc32(name.encode()) % _LOCKS}.lock"):
            yield

    def _ini(self, name: str) -> Path:
        return self.programs / f"{name}.ini"

    def _stands(self, program: Program) -> bool:
        info = self.info(program.name)
        if info is None:
            return False
        if not program.autorestart:
            return info.alive or (info.state is ProgramState.EXITED and info.exit_status == 0)
        return info.alive and self.kept().get(program.name) == program

    def _put(self, program: Program) -> None:
        Path(program.log).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._ini(program.name), render_ini(program, self.home), 0o600)
        try:
            self._reload()
            self._call("addProcessGroup", program.name, tolerate=(ALREADY_ADDED,))
        finally:
            if not program.autorestart:
                # The daemon has read it; a new daemon must not run it a second time.
                self._ini(program.name).unlink(missing_ok=True)
        deadline = time.monotonic() + CALL_SECONDS
        # A program taken away before its first start would be started after that, out of supervisord's sight.
        while (info := self.info(program.name)) and (not info.started or self._is_fork(info)):
            _pause(deadline, f"{program.name}: the process supervisor does not start it")

    def _reload(self) -> None:
        """Have supervisord read its files. One program whose log folder is gone makes it refuse all."""
        if self._call("reloadConfig", tolerate=(CANT_REREAD,)) is None:
            self._make_log_folders()
            self._call("reloadConfig")

    def _make_log_folders(self) -> None:
        for program in self.kept().values():
            Path(program.log).parent.mkdir(parents=True, exist_ok=True)

    def _take_away(self, name: str) -> None:
        self._ini(name).unlink(missing_ok=True)
        info = self.info(name)
        if info is not None:
            self._settle(name)
            self._call("removeProcessGroup", name, tolerate=(BAD_NAME,))
        group = info.pid if info else 0
        # supervisord forgets the group once its leader is gone; a child that ignores SIGTERM is still there.
        end(lambda: [*stray(self.home, name=name), *(members(group) if group else ())], GRACE_SECONDS)

    def _settle(self, name: str) -> None:
        """Stop a program and wait until it has ended for good: seen twice, since between two calls
        supervisord restarts what it means to restart."""
        deadline = time.monotonic() + STOP_SECONDS
        before = None
        while (info := self.info(name)) and not (info.ended and info == before):
            self._ask_to_stop(info)
            before = info
            _pause(deadline, f"{name}: still {info.state.lower()} after {STOP_SECONDS:.0f} s")

    def _ask_to_stop(self, info: ProgramInfo | None) -> None:
        """Have supervisord send a live program's group SIGTERM, and SIGKILL after its ``stop_seconds``."""
        if info is None or not info.alive:
            return
        deadline = time.monotonic() + GRACE_SECONDS
        # Between fork and exec supervisord's own handler would swallow the signal, and nobody repeats it.
        while self._is_fork(info) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._call("stopProcess", info.name, False, tolerate=(BAD_NAME, NOT_RUNNING))

    def _is_fork(self, info: ProgramInfo) -> bool:
        """Whether a started program is still supervisord's own fork, with its handlers and environment."""
        return info.pid > 0 and is_daemon(info.pid, self.config)

    def _stop_by_priority(self, deadline: float) -> None:
        """supervisord itself would stop one program after the other."""
        kept = self.kept()
        priority = {name: kept[name].priority if name in kept else 10_000 for name in self.infos()}
        for _, level in groupby(sorted(priority, key=lambda name: -priority[name]), key=priority.__getitem__):
            names = set(level)
            while left := [info for name, info in self.infos().items() if name in names and not info.ended]:
                for info in left:
                    self._ask_to_stop(info)
                _pause(deadline, "the programs are still stopping")

    def _end_remains(self, session: int | None, wait_seconds: float) -> None:
        end(lambda: daemons(self.config), wait_seconds)
        end(lambda: stray(self.home, session), GRACE_SECONDS)
        address = address_of(self.folder)
        for left in (self.folder / "supervisord.pid", address):
            left.unlink(missing_ok=True)
        if address.parent != self.folder:
            with contextlib.suppress(OSError):
                address.parent.rmdir()

    def _last_session(self) -> int | None:
        """The daemon leads a session of its own number; the kernel keeps the number while a member lives."""
        try:
            return int((self.folder / "supervisord.pid").read_text())
        except (OSError, ValueError):
            return None

    def _prepare_programs(self) -> None:
        self.programs.mkdir(mode=0o700, exist_ok=True)
        kept = self.kept()
        for path in self.programs.glob("[!.]*.ini"):
            if path.stem not in kept:
                path.unlink(missing_ok=True)  # runs once, and its submitter died halfway
        self._make_log_folders()

    def _call(self, method: str, *arguments: Any, tolerate: tuple[int, ...] = ()) -> Any:
        return call(address_of(self.folder), method, *arguments, tolerate=tolerate)

    def _unknown(self, name: str) -> BadRequest:
        return BadRequest(f"no program {name!r}; known: {', '.join(sorted(self.infos())) or 'none'}")


def _pause(deadline: float, message: str) -> None:
    if time.monotonic() > deadline:
        raise TryAgain(message)
    time.sleep(0.03)


def _tail(path: Path, num_bytes: int = 1 << 20) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - num_bytes))
            return stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
