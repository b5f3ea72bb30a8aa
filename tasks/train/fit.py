"""Fit one model: prepare the arrays, run the gang of ranks, follow its history.

The gang lives and dies together: when a rank dies, all go on from the last whole checkpoint. Where it runs is the
``gang``'s affair: children of this process (here; they die with it, and the next attempt goes on in the same folder),
or containers (``tasks.gangs``).
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
from typing import Protocol

from tasks.spec.errors import BY_EXIT_CODE, DrydockError
from tasks.spec.requests import TrainRequest
from tasks.store.files import write_json
from tasks.store.room import open_room
from tasks.train.brought import ENCODER, copy_encoder, copy_model_py
from tasks.train.fence import VARIABLE, newest_attempt
from tasks.train.history import History
from tasks.train.inputs import list_inputs
from tasks.train.parent import parent_of_others
from tasks.train.prepare import prepare

POLL_SECONDS = 0.2
LEFT = ("attempt", "inputs.json", "topology.json", ".fence", ".reserve")
RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONSAFEPATH": "1"}


OnEpoch = Callable[[dict[str, float]], None]
Amend = Callable[[Path], None]


class Gang(Protocol):
    def run(self, request: TrainRequest, folder: Path, on_epoch: OnEpoch) -> None:
        """Train in ``folder`` until it holds done.json and weights.safetensors, or error.json."""


def fit(
    request: TrainRequest,
    folder: Path,
    model_py: Path | None,
    on_epoch: OnEpoch,
    gang: Gang | None = None,
    encoder: Path | None = None,
    amend: Amend | None = None,
) -> dict[str, float]:
    """Train into ``folder`` and return epochs, best_epoch, validation_loss, parameters, train_seconds.

    ``model_py`` and ``encoder`` lie where the workload has them; ``on_epoch`` gets each line of the history.
    ``amend`` may change what was prepared before it counts: a student's targets, say, which may be class indices
    [B] or probabilities [B, K].

    Raises:
        BadRequest: an empty split, a model.py or an encoder that can't be used.
        DrydockError: the ranks failed; the message is their last line.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.json").unlink(missing_ok=True)
    if not (folder / "inputs.json").exists():
        if model_py is not None:
            copy_model_py(model_py, folder / "model.py", request.model_py_sha256)
        if encoder is not None:
            copy_encoder(encoder, folder / ENCODER, request.encoder_sha256)
        prepare(open_room(request.dataset) / "data.parquet", request, folder)
        if amend is not None:
            amend(folder)
        write_json(folder / "train.json", _job(request))
        list_inputs(folder)
    if not (folder / "done.json").exists():
        (gang or Children()).run(request, folder, on_epoch)
    else:
        # Trained before, and then something else failed: its curves may not have arrived.
        History(folder / "history.jsonl", on_epoch).follow()
    if not (folder / "done.json").exists():
        raise _failure(folder, 0)
    done = json.loads((folder / "done.json").read_text())
    del done["weights_sha256"]
    _tidy(folder)
    return done | {"train_seconds": time.monotonic() - started}


def _job(request: TrainRequest) -> dict[str, object]:
    return {
        "train": request.train.model_dump(mode="json"),
        "feature": request.feature.model_dump(mode="json"),
        "label": request.label.model_dump(mode="json"),
    }


def command(request: TrainRequest, folder: Path) -> list[str]:
    """Return the gang's command line. Pure."""
    # A rendezvous by file: torch's TCP store would listen on every address of the machine.
    options = [f"--ranks={request.train.ranks}", f"--rendezvous={folder / 'rendezvous'}"]
    return [sys.executable, "-m", "tasks.train.gang", *options, str(folder)]


def environment(folder: Path) -> dict[str, str]:
    """Return the gang's environment: a new attempt at this folder, on this machine alone."""
    return os.environ | parent_of_others() | RANK_ENVIRONMENT | {
        "GLOO_SOCKET_IFNAME": "lo",
        VARIABLE: str(newest_attempt(folder) + 1),
    }


class Children:
    """The gang as children of this process."""

    def run(self, request: TrainRequest, folder: Path, on_epoch: OnEpoch) -> None:
        """Train in ``folder``. Launchers give up after a few restarts; another follows where one got an epoch further.

        Raises:
            DrydockError: the ranks ended without a result, or with an error of theirs.
        """
        history = History(folder / "history.jsonl", on_epoch)
        seen = history.seen
        while code := self._launch(request, folder, history):
            if (folder / "error.json").exists() or history.seen == seen:
                raise _failure(folder, code)
            seen = history.seen

    def _launch(self, request: TrainRequest, folder: Path, history: History) -> int:
        """Follow one launcher to its end; return its exit code."""
        process = subprocess.Popen(command(request, folder), cwd=folder, env=environment(folder))
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                history.follow()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)
        history.follow()
        return process.returncode


def _failure(folder: Path, code: int) -> DrydockError:
    try:
        error = json.loads((folder / "error.json").read_text())
        return BY_EXIT_CODE[error["exit_code"]](error["message"])
    except FileNotFoundError:
        return DrydockError(f"training: the ranks ended with exit code {code}; their log is above")


def _tidy(folder: Path) -> None:
    """Keep what the next steps need: weights, history, tokenizer, model.py, an encoder's sizes."""
    for name in ("arrays", "checkpoints", "incoming"):
        shutil.rmtree(folder / name, ignore_errors=True)
    meetings = (*folder.glob("rendezvous-*"), *folder.glob("ranks-*"))
    left_over = (*meetings, folder / ENCODER / "model.safetensors", folder / ENCODER / "tokenizer.json")
    for left in (*left_over, *(folder / name for name in LEFT)):
        left.unlink(missing_ok=True)
