"""Fit one model: prepare the arrays, run the gang of ranks, follow its history.

The gang lives and dies together. ``torchrun`` restarts it from the last whole checkpoint when a rank dies;
when this process dies, the ranks die with it, and the next attempt resumes in the same folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tasks.spec.errors import BY_EXIT_CODE, BadRequest, DrydockError
from tasks.spec.requests import TrainRequest
from tasks.store.files import sha256_file, write_json
from tasks.store.room import open_room
from tasks.train.parent import parent_of_others
from tasks.train.prepare import prepare

MAX_RESTARTS = 3
POLL_SECONDS = 0.2


def fit(
    request: TrainRequest, folder: Path, model_py: Path | None, on_epoch: Callable[[dict[str, float]], None]
) -> dict[str, float]:
    """Train into ``folder`` and return epochs, best_epoch, validation_loss, parameters, restarts, train_seconds.

    Raises:
        BadRequest: an empty split, or a model.py that can't be used.
        DrydockError: the ranks failed; the message is their last line.
    """
    started = time.monotonic()
    (folder / "error.json").unlink(missing_ok=True)
    if not (folder / "train.json").exists():
        prepare(open_room(request.dataset) / "data.parquet", request.feature, request.label, folder)
        if model_py is not None:
            _copy_model_py(model_py, folder / "model.py", request.model_py_sha256)
        write_json(folder / "train.json", _job(request))
    if not (folder / "done.json").exists():
        _run_gang(request, folder, on_epoch)
    else:
        # Trained before, and then something else failed: its curves may not have arrived.
        History(folder / "history.jsonl", on_epoch).follow()
    done = json.loads((folder / "done.json").read_text())
    _tidy(folder)
    return done | {"train_seconds": time.monotonic() - started}


def _copy_model_py(source: Path, target: Path, sha256: str | None) -> None:
    shutil.copyfile(source, target)
    if sha256_file(target) != sha256:
        target.unlink()
        raise BadRequest(f"{source}: changed since this run was planned; start a new run")


def _job(request: TrainRequest) -> dict[str, object]:
    return {
        "train": request.train.model_dump(mode="json"),
        "feature": request.feature.model_dump(mode="json"),
        "num_classes": len(request.label.names),
    }


def command(request: TrainRequest, folder: Path) -> list[str]:
    """Return the gang's command line. Pure."""
    rank = ["-m", "tasks.train.rank", str(folder)]
    if request.train.world_size == 1:
        return [sys.executable, *rank]
    # A rendezvous by file: torch's TCP store would listen on every address of the machine.
    store = folder / "rendezvous"
    options = [f"--nproc-per-node={request.train.ranks}", f"--max-restarts={MAX_RESTARTS}", "--nnodes=1"]
    options += ["--rdzv-backend=c10d", f"--rdzv-endpoint={store}", "--rdzv-conf=store_type=file", "--rdzv-id=gang"]
    return [sys.executable, "-m", "tasks.train.gang", *options, *rank]


def environment() -> dict[str, str]:
    return os.environ | parent_of_others() | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONSAFEPATH": "1",
        # With Gloo on torch 2.13 restarted ranks read the dead rank's address from the shared store and hang.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def _run_gang(request: TrainRequest, folder: Path, on_epoch: Callable[[dict[str, float]], None]) -> None:
    (folder / "rendezvous").unlink(missing_ok=True)
    for store in folder.glob("ranks-*"):
        store.unlink()
    history = History(folder / "history.jsonl", on_epoch)
    process = subprocess.Popen(command(request, folder), cwd=folder, env=environment())
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            history.follow()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
    history.follow()
    if process.returncode or not (folder / "done.json").exists():
        raise _failure(folder, process.returncode)


def _failure(folder: Path, code: int) -> DrydockError:
    try:
        error = json.loads((folder / "error.json").read_text())
        return BY_EXIT_CODE[error["exit_code"]](error["message"])
    except FileNotFoundError:
        return DrydockError(f"training: the ranks ended with exit code {code}; their log is above")


class History:
    """Reads ``history.jsonl`` as it grows and passes each epoch on once, also after a restart cut the file."""

    def __init__(self, path: Path, on_epoch: Callable[[dict[str, float]], None]) -> None:
        self.path, self.on_epoch, self.seen = path, on_epoch, 0

    def follow(self) -> None:
        if not self.path.exists():
            return
        for text in self.path.read_text().splitlines():
            if not text.endswith("}"):
                return
            line = json.loads(text)
            if line["epoch"] > self.seen:
                self.seen = line["epoch"]
                self.on_epoch(line)


def _tidy(folder: Path) -> None:
    """Keep what the next steps need: weights, history, tokenizer, model.py."""
    for name in ("arrays", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for store in [folder / "rendezvous", *folder.glob("ranks-*")]:
        store.unlink(missing_ok=True)
