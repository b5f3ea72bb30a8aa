"""``python -I -S successor.py FILE COMMAND…``: ends what the program's last start left, then becomes the command.

A launcher that is killed leaves its children behind, which hold its port: a restarted MLflow would never come up.
supervisord makes each start the leader of a process group; FILE keeps the number of the last one. The standard
library alone, as every start of a program waits for this.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

WAIT_SECONDS = 10.0


def members(group: int, session: int) -> list[int]:
    """Return the live processes of a group, if they are of this session: elsewhere the number is another's by now."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()
                if stat[0] != b"Z" and (int(stat[2]), int(stat[3])) == (group, session):
                    found.append(int(entry.name))
    return found


def end_group(group: int, session: int) -> None:
    """Kill a group's processes, again while they fork, for a bounded time."""
    until = time.monotonic() + WAIT_SECONDS
    while (left := members(group, session)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def main(file: Path, command: list[str]) -> None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        end_group(int(file.read_text()), os.getsid(0))
    file.parent.mkdir(exist_ok=True)
    file.write_text(str(os.getpid()))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
