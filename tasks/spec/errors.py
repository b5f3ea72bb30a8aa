"""The one error tree. Each kind is an outcome that a caller acts on, and an exit code of the command.

    DrydockError             1   a fault of ours
    ├── Refused             10   a gate or a person said no
    ├── Inconclusive        11   the evidence does not suffice
    ├── TryAgain            20   may pass later: a service is down, another run holds the lock
    ├── BadRequest          30   the input is wrong and stays wrong
    └── IntegrityLost       40   bytes are not what their digest says

A back end's own errors are translated once, at the seam that calls it. The message is one line: what
happened, to which thing, what was found, what to do.
"""

from __future__ import annotations

import errno


class DrydockError(Exception):
    """A fault of ours; the base of every error that Drydock raises on purpose."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Refused(DrydockError):
    """A gate or a person said no; asking again changes nothing."""

    exit_code = 10


class Inconclusive(DrydockError):
    """The evidence does not suffice; an inconclusive answer never promotes."""

    exit_code = 11


class TryAgain(DrydockError):
    """The cause may pass: a retry with back-off is right."""

    exit_code = 20


class BadRequest(DrydockError):
    """The input is wrong; a retry is not right."""

    exit_code = 30


class IntegrityLost(DrydockError):
    """Bytes differ from their digest, or a signature does not verify."""

    exit_code = 40


BY_EXIT_CODE: dict[int, type[DrydockError]] = {
    kind.exit_code: kind for kind in (DrydockError, Refused, Inconclusive, TryAgain, BadRequest, IntegrityLost)
}


def from_os(error: OSError) -> DrydockError:
    """Translate an error of the operating system: a full disk may pass, anything else is ours to explain."""
    where = error.filename or "the state folder"
    if error.errno == errno.ENOSPC:
        return TryAgain(full_disk(where))
    return DrydockError(f"{where}: {error.strerror or error}")


def full_disk(where: object) -> str:
    """Return what a person is told where a write found no room."""
    return f"the disk is full at {where}: free some space and ask again; nothing is lost"


def told(error: DrydockError) -> str:
    """Return an error as a log shows it: ``BadRequest: data.csv: is not there``."""
    return f"{type(error).__name__}: {error}"


def heard(line: str) -> DrydockError | None:
    """Return the error in a line of a log (see ``told``), or None where there is none."""
    for kind in BY_EXIT_CODE.values():
        before, mark, message = line.partition(f"{kind.__name__}: ")
        if mark and not before[-1:].isalnum():
            return kind(message)
    return None


def retryable(exit_code: int) -> bool:
    """Whether a retry can help: yes for TryAgain, for a fault of ours, and for a process that was killed."""
    return exit_code not in {
        Refused.exit_code,
        Inconclusive.exit_code,
        BadRequest.exit_code,
        IntegrityLost.exit_code,
    }
