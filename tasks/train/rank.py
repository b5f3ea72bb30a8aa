"""What every rank runs: ``work(FOLDER)``, forked from the node's launcher (``tasks.train.gang``).

FOLDER holds ``train.json`` (feature, number of classes, the train section), ``arrays/`` and, after a
restart, ``checkpoints/``. Rank 0 writes ``history.jsonl`` (a line an epoch), ``checkpoints/`` and at the
end ``weights.safetensors`` and ``done.json``.

Only the newest attempt writes (``tasks.train.fence``). Every rank seeds itself by (seed, epoch, rank) and takes
its share of each global batch by position, so a resumed run at the same world size ends in the same weights bit for
bit.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.spec.errors import BadRequest, DrydockError, from_os
from tasks.spec.train import Train
from tasks.store.files import sha256_file, write_json, write_whole
from tasks.train import checkpoint
from tasks.train.fence import Fence, Fenced, own_attempt
from tasks.train.gang import ACCUMULATE
from tasks.train.parent import die_with_parent
from tasks.train.prepare import load_stats
from tasks.train.recipes import build
from tasks.train.watch import Watch, Watchdog

# Freed to write the error where the disk is full.
RESERVE, RESERVE_BYTES = ".reserve", 8192
EXCHANGE_SECONDS = 1800


class Diverged(BadRequest):
    """The loss is not finite; the same request diverges again."""


class Trainer:
    """One rank's training loop over whole epochs."""

    def __init__(self, folder: Path, watchdog: Watchdog | None) -> None:
        from pydantic import TypeAdapter

        from tasks.spec.feature import Feature

        job = json.loads((folder / "train.json").read_text())
        self.folder, self.fence = folder, Fence(folder, own_attempt())
        self.train = Train.parse(job["train"], "train.json")
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        feature = TypeAdapter(Feature).validate_python(job["feature"])
        torch.manual_seed(self.train.seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.model = build(self.train.recipe, feature, job["num_classes"], load_stats(folder), folder).to(self.device)
        self.data = {name: _load(folder / "arrays", name) for name in ("train", "validation")}
        self.optimiser = optimiser(self.train, self.model)
        self.epoch, self.best, self.best_loss, self.best_epoch = 0, None, math.inf, 0
        self.accumulate = int(os.environ.get(ACCUMULATE, "1"))
        self.watch = Watch(watchdog, self.local_rank, self.train.hang_seconds)

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    def run(self) -> None:
        """Train to the end or to the stop, from the last whole checkpoint where there is one."""
        self.resume()
        model = self.parallel()
        while self.epoch < self.train.stopping.max_epochs and not self.stalled:
            started = time.monotonic()
            self.epoch += 1
            torch.manual_seed(seed_of(self.train.seed, self.epoch, self.rank))
            train_loss = self.train_epoch(model)
            line = self.validate() | {"epoch": self.epoch, "train_loss": train_loss}
            line["seconds"] = time.monotonic() - started
            line["at_ms"] = int(time.time() * 1000)
            line["samples_per_second"] = len(self.data["train"][0]) / line["seconds"]
            self.remember(line)
        self.watch.stop()
        self.finish()

    @property
    def stalled(self) -> bool:
        return self.epoch - self.best_epoch >= self.train.stopping.patience_epochs

    def parallel(self) -> nn.Module:
        if self.world == 1:
            return self.model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(self.model)

    def train_epoch(self, model: nn.Module) -> float:
        """One pass over the training split; returns the mean loss over all ranks."""
        model.train()
        x, y = self.data["train"]
        total, batches = torch.zeros((), device=self.device), 0
        for rows in shares(len(x), self.train.batch_size, self.train.seed, self.epoch, self.rank, self.world):
            self.optimiser.zero_grad(set_to_none=True)
            total += self.backward(model, self.put(x, rows), self.put(y, rows))
            self.optimiser.step()
            self.watch.beat()
            batches += 1
        return self.finite("training", self.reduce(total / max(batches, 1)).item() / self.world)

    def backward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Add a batch's gradients, in as many parts as memory needs; returns its mean loss."""
        if self.accumulate == 1:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()
        total = torch.zeros((), device=self.device)
        parts = list(zip(x.chunk(self.accumulate), y.chunk(self.accumulate), strict=True))
        for number, (part, target) in enumerate(parts, start=1):
            # The ranks exchange gradients once, with the last part.
            quiet = self.world > 1 and number < len(parts)
            with model.no_sync() if quiet else contextlib.nullcontext():
                loss = nn.functional.cross_entropy(model(part), target) * (len(target) / len(y))
                loss.backward()
            total += loss.detach()
        return total

    def finite(self, what: str, loss: float) -> float:
        """Return a loss, the same on every rank, if it is a number."""
        if not math.isfinite(loss):
            raise Diverged(f"{what} loss is {loss} in epoch {self.epoch}; lower train.optimiser.learning_rate")
        return loss

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and accuracy on the validation split, each rank on its share."""
        self.model.eval()
        x, y = self.data["validation"]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        mine = np.arange(self.rank, len(x), self.world)
        for start in range(0, len(mine), 1024):
            rows = mine[start : start + 1024]
            logits, target = self.model(self.put(x, rows)), self.put(y, rows)
            sums[0] += nn.functional.cross_entropy(logits, target, reduction="sum")
            sums[1] += (logits.argmax(1) == target).sum()
            sums[2] += len(rows)
            self.watch.beat()
        loss, correct, count = self.reduce(sums).tolist()
        return {"validation_loss": self.finite("validation", loss / count), "validation_accuracy": correct / count}

    def put(self, array: Any, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[rows])).to(self.device)

    def reduce(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def remember(self, line: dict[str, float]) -> None:
        """Keep the best weights, and on rank 0 the history line and the checkpoint."""
        if line["validation_loss"] < self.best_loss - 1e-6:
            self.best_loss, self.best_epoch = line["validation_loss"], self.epoch
            self.best = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        if self.rank:
            return
        with self.fence.held(), (self.folder / "history.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(  # noqa: T201 - the rank's log is its standard output
            f"epoch {self.epoch}: loss {line['train_loss']:.4f}, validation loss {line['validation_loss']:.4f}, "
            f"accuracy {line['validation_accuracy']:.4f}, {line['samples_per_second']:.0f} rows/s",
            flush=True,
        )
        if self.epoch % self.train.checkpoint_every_epochs == 0:
            with self.fence.held():
                checkpoint.save(self.folder / "checkpoints", self.epoch, self.state())
            self.watch.beat()

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def resume(self) -> None:
        """Load the newest whole checkpoint; every rank reads the same one. History beyond it is cut."""
        state, refused = checkpoint.load_newest(self.folder / "checkpoints")
        for line in refused:
            print(line, flush=True)  # noqa: T201
        if state is not None:
            self.epoch, self.best_epoch, self.best_loss = state["epoch"], state["best_epoch"], state["best_loss"]
            self.best = state["best"]
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            print(f"resumed after epoch {self.epoch}", flush=True)  # noqa: T201
        if self.world > 1:
            dist.barrier()
        if self.rank == 0:
            with self.fence.held():
                cut_history(self.folder / "history.jsonl", self.epoch)

    def finish(self) -> None:
        if self.rank:
            return
        from safetensors.torch import save_file

        parameters = sum(p.numel() for p in self.model.parameters())
        done = {"epochs": self.epoch, "best_epoch": self.best_epoch, "validation_loss": self.best_loss}
        with self.fence.held():
            weights = self.folder / "weights.safetensors"
            save_file({k: v.contiguous() for k, v in self.best.items()}, weights)
            done |= {"parameters": parameters, "weights_sha256": sha256_file(weights)}
            write_json(self.folder / "done.json", done)


def shares(n: int, batch: int, seed: int, epoch: int, rank: int, world: int) -> Any:
    """Yield this rank's row numbers of each global batch; rows that fill no batch wait for another epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    batch = min(batch, n - n % world)
    for start in range(0, n - batch + 1, batch):
        yield order[start + rank : start + batch : world]


def seed_of(*parts: int) -> int:
    """One seed from several numbers (NumPy's SeedSequence mixes them; the same everywhere)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def optimiser(train: Train, model: nn.Module) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    chosen = train.optimiser
    return kinds[chosen.name](model.parameters(), lr=chosen.learning_rate, weight_decay=chosen.weight_decay)


def cut_history(path: Path, epoch: int) -> None:
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["epoch"] <= epoch]
    write_whole(path, "".join(line + "\n" for line in kept))


def _load(arrays: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.load(arrays / f"{split}.x.npy", mmap_mode="r", allow_pickle=False),
        np.load(arrays / f"{split}.y.npy", allow_pickle=False),
    )


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
