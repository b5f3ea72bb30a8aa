"""A fencing token: of two attempts at one training, only the newer one's writes are accepted.

An attempt whose host slept or whose daemon was cut off may wake up after its successor began. The folder holds the
number of the newest attempt; every write is made under the folder's lock by the attempt of that number alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tasks.spec.errors import DrydockError
from tasks.store.files import exclusive, write_whole

VARIABLE = "DRYDOCK_ATTEMPT"
NAME = "attempt"


class Fenced(DrydockError):
    """A newer attempt works in this folder; this one must write nothing more."""


class Fence:
    """The right of one attempt to write into a folder."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self.folder, self.attempt = folder, attempt

    def claim(self) -> bool:
        """Make this attempt the one that writes; return whether it is new here.

        Raises:
            Fenced: a newer attempt was here.
        """
        with exclusive(self.folder / ".fence"):
            newest = newest_attempt(self.folder)
            if newest > self.attempt:
                raise self._fenced(newest)
            if newest < self.attempt:
                write_whole(self.folder / NAME, str(self.attempt))
            return newest < self.attempt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Write inside. Raises Fenced where a newer attempt has claimed the folder."""
        with exclusive(self.folder / ".fence"):
            self.check()
            yield

    def check(self) -> None:
        """Raise Fenced where another attempt's is the right to write by now."""
        newest = newest_attempt(self.folder)
        if newest != self.attempt:
            raise self._fenced(newest)

    def _fenced(self, newest: int) -> Fenced:
        return Fenced(f"attempt {self.attempt} woke up after attempt {newest} began: its writes are refused")


def newest_attempt(folder: Path) -> int:
    """Return the newest attempt's number; 0 before the first one."""
    try:
        return int((folder / NAME).read_text())
    except FileNotFoundError:
        return 0


def own_attempt() -> int:
    """Return the number of the attempt that this process belongs to."""
    return int(os.environ.get(VARIABLE, "0"))
