"""Checkpoints that training does not wait for: a process beside rank 0 writes, syncs and hashes them.

Rank 0 copies the tensors into memory that both share (the one moment that training waits) and says so in a line;
the writer answers with a line when all of it is on the disk. A thread would do the same and take its time from the
steps. ``python -m tasks.train.writer FOLDER DESCRIPTOR ATTEMPT`` is the writer's side.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tasks.spec.errors import BY_EXIT_CODE, DrydockError, from_os
from tasks.train.deposit import Deposit, deposit
from tasks.train.fence import Fence, Fenced
from tasks.train.parent import die_with_parent, parent_of_others

if TYPE_CHECKING:
    from tasks.train.checkpoint import Saved

FOLDER = "checkpoints"
# Below this writing takes no longer than a process takes to be told.
SMALL_BYTES = 8 << 20
PAGE = 2 << 20


class Writer:
    """Rank 0's side. One checkpoint is under way at most; errors come back with the next call."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self.folder, self.attempt = folder, attempt
        self.waited_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._memory: mmap.mmap | None = None
        self._busy = False

    def save(self, name: str, saved: Saved, keep: int) -> None:
        """Take a checkpoint over; it will be whole some time later.

        Raises:
            TryAgain, Fenced: what became of the one before.
        """
        import torch

        from tasks.train.checkpoint import Layout

        self.settle()
        layout = Layout.of(saved.tensors)
        memory = self._room_for(layout.num_bytes)
        memory[: len(layout.header)] = layout.header
        shared = torch.frombuffer(memory, dtype=torch.uint8)
        for begin, content in layout.parts:
            shared[begin : begin + content.numel()].copy_(content)
        del shared  # it holds the mapping, which may have to grow
        self._say(Deposit(name, saved.facts, layout.num_bytes, keep))

    def settle(self) -> None:
        """Wait until nothing is under way. Raises as ``save``."""
        if not self._busy or self._process is None:
            return
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._busy = False
        if not line:
            raise DrydockError(f"{self.folder}: the writer of checkpoints ended with code {self._process.wait()}")
        answer = json.loads(line)
        if answer.get("fenced"):
            raise Fenced(answer["message"])
        if answer:
            raise BY_EXIT_CODE[answer["exit_code"]](answer["message"])

    def close(self) -> None:
        """Finish what is under way and end the writer. Raises as ``save``."""
        try:
            self.settle()
        finally:
            if self._process is not None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._process.wait(10)
                self._process = None

    def _room_for(self, num_bytes: int) -> mmap.mmap:
        """Return the shared memory, grown where it is too small; its pages are there before they are needed."""
        if self._memory is None or len(self._memory) < num_bytes:
            if self._process is None:
                self._start(os.memfd_create("drydock-checkpoint", 0))
            size = -(-num_bytes // PAGE) * PAGE
            os.posix_fallocate(self._descriptor, 0, size)
            self._memory = mmap.mmap(self._descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return self._memory

    def _start(self, descriptor: int) -> None:
        self._descriptor = descriptor
        command = [sys.executable, "-m", "tasks.train.writer", str(self.folder), str(descriptor), str(self.attempt)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | parent_of_others(),
            pass_fds=[descriptor],
        )

    def _say(self, what: Deposit) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what._asdict()).encode() + b"\n")
        self._process.stdin.flush()
        self._busy = True


def main(arguments: list[str]) -> int:
    """Be the writer until rank 0 closes its end, or dies."""
    die_with_parent()
    os.nice(10)
    folder, descriptor, attempt = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    fence = Fence(folder, attempt)
    for line in sys.stdin:
        answer = _write(folder / FOLDER, descriptor, Deposit(**json.loads(line)), fence)
        print(json.dumps(answer), flush=True)  # noqa: T201 - its standard output is the answer to rank 0
    return 0


def _write(folder: Path, descriptor: int, what: Deposit, fence: Fence) -> dict[str, Any]:
    def fill(stream: BinaryIO) -> None:
        offset = 0
        while offset < what.num_bytes:
            offset += os.sendfile(stream.fileno(), descriptor, offset, what.num_bytes - offset)

    try:
        deposit(folder, what, fill, fence.held)
    except Fenced as error:
        return {"fenced": True, "message": str(error)}
    except DrydockError as error:
        return {"exit_code": error.exit_code, "message": str(error)}
    except OSError as error:
        return {"exit_code": from_os(error).exit_code, "message": str(from_os(error))}
    return {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
