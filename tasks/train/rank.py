"""What every rank runs: ``work(FOLDER)``, forked from the node's launcher (``tasks.train.gang``).

FOLDER holds ``train.json`` (feature, label, the train section), ``arrays/`` and, after a
restart, ``checkpoints/``. Rank 0 writes ``history.jsonl`` (a line an epoch), ``progress.jsonl`` (within long ones),
``checkpoints/`` and at the end ``weights.safetensors`` and ``done.json``. Only the newest attempt writes
(``tasks.train.fence``).
"""

from __future__ import annotations

import datetime as dt
import errno
import gc
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tasks.spec.errors import DrydockError, from_os
from tasks.store.files import write_json
from tasks.train.fence import Fence, Fenced, own_attempt
from tasks.train.parent import die_with_parent
from tasks.train.trainer import Trainer
from tasks.train.watch import Watchdog

# Freed to write the error where the disk is full.
RESERVE, RESERVE_BYTES = ".reserve", 8192
EXCHANGE_SECONDS = 1800


def join(folder: Path, nodes: int) -> None:
    """Meet the other ranks of this attempt. On one node by a file of its own: no port, and nothing of a dead attempt.
    Nodes without a common disk meet at the address that the launcher's agents agreed on."""
    meeting = "env://"
    if nodes == 1:
        meeting = f"file://{folder / 'ranks'}-{own_attempt()}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=meeting,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=dt.timedelta(seconds=EXCHANGE_SECONDS),
    )


class Prefixed:
    """A text stream whose lines begin with the rank that wrote them."""

    def __init__(self, stream: Any, prefix: str) -> None:
        self.stream, self.prefix, self.starts = stream, prefix, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self.stream.write(self.prefix + line if self.starts else line)
            self.starts = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def work(folder: str, nodes: int, watchdog: Watchdog | None = None) -> None:
    """Be one rank, to the end. An error that a restart can't help is left in ``error.json``, and the rank ends well:
    a failing exit code would make the agent restart a gang that fails again."""
    die_with_parent()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        sys.stdout, sys.stderr = (Prefixed(stream, f"[rank {rank}] ") for stream in (sys.stdout, sys.stderr))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    path = Path(folder)
    try:
        Fence(path, own_attempt()).check()
        if world > 1:
            join(path, nodes)
        _train(path, rank, watchdog)
    except Fenced as error:
        print(error, flush=True)  # noqa: T201 - the folder is another attempt's, so the log is all there is
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            # What failed leaves cycles that hold the connections; while these are open the other ranks wait.
            gc.collect()


def _train(folder: Path, rank: int, watchdog: Watchdog | None) -> None:
    if (folder / "error.json").exists():
        return  # of another rank, before the agent restarted all of them
    try:
        if rank == 0:
            (folder / RESERVE).write_bytes(bytes(RESERVE_BYTES))
        Trainer(folder, watchdog).run()
    except Fenced:
        raise
    except DrydockError as error:
        _leave(folder, error)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _leave(folder, from_os(error))


def _leave(folder: Path, error: DrydockError) -> None:
    """Leave an error that a restart can't help; the first rank's is kept."""
    traceback.print_exception(error)
    (folder / RESERVE).unlink(missing_ok=True)
    with Fence(folder, own_attempt()).held():
        if not (folder / "error.json").exists():
            write_json(folder / "error.json", {"exit_code": error.exit_code, "message": str(error)})
