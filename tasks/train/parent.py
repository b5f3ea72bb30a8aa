"""A process of a gang ends with the one that started it: no orphan writes into a later attempt."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "DRYDOCK_PARENT_PID"
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies; end now if that has happened already.

    A rank imports for seconds before it comes to ask, and is nobody's child by then if its launcher was killed.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        sys.exit("the process that started this one is gone")


def parent_of_others() -> dict[str, str]:
    """Return the environment by which the processes that this one starts know it."""
    return {PARENT: str(os.getpid())}
