"""The training loop of one rank. It knows no recipe (``tasks.train.recipes``) and no strategy
(``tasks.train.strategy``), only steps: a batch, its gradients, new weights; and what has to be told and kept.

Every rank seeds itself by (seed, epoch, rank) and takes its share of each global batch by position, so a resumed run
at the same world size ends in the same weights bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.spec.errors import BadRequest
from tasks.spec.train import Train
from tasks.train import learn
from tasks.train.batches import Loader, lengths_of, open_split, seed_of, shares, steps_of_epoch
from tasks.train.failing import Diverged, recipe_at_fault
from tasks.train.fence import Fence, own_attempt
from tasks.train.gang import ACCUMULATE
from tasks.train.keeper import Keeper, Place
from tasks.train.meter import Meter
from tasks.train.prepare import load_stats
from tasks.train.recipes import Task, task_of
from tasks.train.strategies import STRATEGIES
from tasks.train.strategy import One
from tasks.train.topology import Topology, chosen
from tasks.train.watch import Watch, Watchdog

VALIDATION_ROWS = 1024
# A loss so many times that of the first batch is no training any more.
EXPLODED = 1000.0
# The gradients' norm is looked at so often where nothing is clipped.
NORM_STEPS = 50
PROGRESS_SECONDS = 10.0


class Trainer:
    """One rank's training, from the last whole checkpoint to the end or to the stop."""

    def __init__(self, folder: Path, watchdog: Watchdog | None) -> None:
        from pydantic import TypeAdapter

        from tasks.spec.feature import Feature
        from tasks.spec.label import Target

        job = json.loads((folder / "train.json").read_text())
        self.folder, self.fence = folder, Fence(folder, own_attempt())
        self.train = Train.parse(job["train"], "train.json")
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.watch = Watch(watchdog, self.local_rank, self.train.hang_seconds)
        torch.manual_seed(self.train.seed)
        torch.use_deterministic_algorithms(self.train.deterministic, warn_only=True)
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # what names no device, as memory's counters, is of this one
        feature = TypeAdapter(Feature).validate_python(job["feature"])
        label = TypeAdapter(Target).validate_python(job["label"])
        task = task_of(self.train, feature, label, load_stats(folder), folder)
        self.task: Task = task._replace(network=task.network.to(self.device))
        self.data = {name: open_split(folder / "arrays", name) for name in ("train", "validation")}
        self.loader = Loader(self.device, trim=getattr(task.network, "any_width", False))
        self.accumulate = max(self.train.accumulate, int(os.environ.get(ACCUMULATE, "1")))
        self.place = Place()
        self.first_loss: float | None = None
        self.norm, self.progress_at = 0.0, time.monotonic() + PROGRESS_SECONDS

    def run(self) -> None:
        """Train to the end or to the stop."""
        keeper = self.keeper = Keeper(self.folder, self.train.checkpoints, self.fence, self.rank, self.world)
        saved = keeper.newest(self.device)
        self.place = keeper.restore_network(self.task.network, saved)
        with recipe_at_fault(self.rank):
            self.meter = Meter(self)
        topology = chosen(self)
        if not topology.takes(self.rank):
            self.watch.stop()
            return
        self.begin(topology)
        self.meter.find_peak()
        keeper.restore_moments(self.strategy, self.optimiser, saved)
        del saved
        while self.place.epoch < self.train.stopping.max_epochs and not self.stalled:
            self.epoch()
        self.watch.stop()
        keeper.finish(self.place, self.strategy)

    def begin(self, topology: Topology) -> None:
        """Take the topology, which may leave other ranks out; from here on it is the training's world."""
        self.world = self.keeper.world = self.world if topology.all_ranks else 1
        torch.set_num_threads(topology.threads)
        self.strategy: One = STRATEGIES[topology.strategy](self.task.network, self.train, topology.gradients)
        self.reader, self.readers = self.strategy.reader, self.strategy.readers
        self.optimiser = learn.optimiser(self.train.optimiser, self.strategy.network)
        self.per_epoch = steps_of_epoch(len(self.data["train"]), self.train.batch_size, self.readers)
        steps = self.per_epoch * self.train.stopping.max_epochs
        self.factor = learn.schedule(self.train.optimiser.schedule, steps)
        if self.train.compile:
            self.strategy.call = compiled(self.strategy.call)
        self.keeper.cut(self.place.steps(self.per_epoch))

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """How many tokens each training row has, where a batch is as wide as its longest row."""
        return lengths_of(self.data["train"]) if self.loader.trim else None

    @property
    def stalled(self) -> bool:
        return self.place.epoch - self.place.best_epoch >= self.train.stopping.patience_epochs

    def epoch(self) -> None:
        """One pass over the training split, or the rest of it; then what it is worth."""
        self.meter.begin()
        train_loss = self.pass_over()
        self.meter.passed()
        self.place = self.place.next_epoch()
        line = {"epoch": self.place.epoch, "train_loss": train_loss, "step": self.place.epoch * self.per_epoch}
        line |= self.validate() | {"learning_rate": self.rate, "gradient_norm": self.norm}
        line |= self.meter.end(self.per_epoch)
        metric, loss = self.train.stopping.metric, line["validation_loss"]
        cost = loss if metric == "loss" else -line[f"validation_{metric}"]
        best = cost < self.place.best_cost - 1e-6
        self.place = self.place.better(cost, loss) if best else self.place
        self.keeper.remember(self.place, line, self.strategy, self.optimiser, best)
        self.watch.beat()

    def pass_over(self) -> float:
        """Train on what is left of the epoch; return the mean loss of all its batches, over all ranks."""
        self.seed(self.place.epoch + 1, self.place.step)
        self.strategy.call.train()
        data, place = self.data["train"], self.place
        asked = (len(data), self.train.batch_size, self.train.seed, place.epoch + 1, self.reader, self.readers)
        lengths = self.lengths if self.train.similar_lengths else None
        total = torch.tensor(place.loss_sum / self.readers, device=self.device)
        before: Tensor | None = None
        for x, y in self.loader.stream(data, shares(*asked, done=place.step, lengths=lengths)):
            loss = self.step(x, y)
            # One step late, so that nothing waits for a GPU.
            self.check("training", before)
            total, before = total + loss, loss
            self.place = self.place.next_step()
            self.watch.beat()
            self.between_steps(total, loss)
        self.check("training", before)
        return self.strategy.total(total / max(self.per_epoch, 1)).item() / self.readers

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on a batch; return its mean loss on this rank."""
        number = self.place.steps(self.per_epoch)
        self.rate = self.train.optimiser.learning_rate * self.factor(number)
        self.strategy.call.zero_grad(set_to_none=True)
        loss = self.backward(x, y)
        limit = self.train.optimiser.clip_norm
        if limit is not None or (number + 1) % min(NORM_STEPS, self.per_epoch) == 0:
            self.norm = self.strategy.norm(limit)
        self.strategy.update(self.optimiser, self.rate)
        return loss

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add a batch's gradients, in as many parts as were asked for; return its mean loss."""
        total = torch.zeros((), device=self.device)
        parts = list(zip(x.chunk(self.accumulate), y.chunk(self.accumulate), strict=True))
        for number, (part, target) in enumerate(parts, start=1):
            # The ranks exchange gradients once, with the last part.
            loss_of = partial(self.loss_of, len(target) / len(y))
            with self.strategy.exchange(number == len(parts)):
                total = total + self.strategy.both_ways(part, target, loss_of)
        return total

    def loss_of(self, share: float, call: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of what ``call`` answers to a part of a batch, by its share of the batch."""
        with recipe_at_fault(self.rank), self.narrow():
            loss = self.task.loss(call(x), y)
            return loss if share == 1 else loss * share

    def narrow(self) -> contextlib.AbstractContextManager[Any]:
        """Products in bfloat16 inside, where asked; weights and sums stay in float32."""
        if self.train.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def between_steps(self, total: Tensor, loss: Tensor) -> None:
        """Save and tell what is due within an epoch."""
        every, step = self.train.checkpoints.every_steps, self.place.step
        if step >= self.per_epoch:
            return
        if every and step % every == 0:
            self.check("training", loss)
            place = self.place._replace(loss_sum=float(self.strategy.total(total.clone())))
            self.keeper.save(place, self.strategy, self.optimiser)
            self.seed(self.place.epoch + 1, step)
            self.watch.beat()
        if self.rank == 0 and time.monotonic() > self.progress_at:
            self.progress_at = time.monotonic() + PROGRESS_SECONDS
            line = {"epoch": self.place.epoch + 1, "step": self.place.steps(self.per_epoch), "loss": float(loss)}
            line |= {"learning_rate": self.rate, "gradient_norm": self.norm}
            self.keeper.progress(line | self.meter.now(step), self.per_epoch)

    def seed(self, epoch: int, step: int) -> None:
        """Make what is drawn from here on a function of the place and the rank, so that it is the same again."""
        torch.manual_seed(seed_of(self.train.seed, epoch, self.rank, *([step] if step else [])))

    def check(self, what: str, loss: Tensor | None) -> None:
        """Stop where a loss is no number, or grew beyond all bounds."""
        if loss is None:
            return
        found = float(loss)
        self.first_loss = found if self.first_loss is None else self.first_loss
        if not abs(found) <= EXPLODED * (1 + abs(self.first_loss)):
            raise Diverged(
                f"{what} loss is {found:.4g} in epoch {self.place.epoch + 1}; lower train.optimiser.learning_rate"
            )

    @property
    def validation_rows(self) -> int:
        """How many rows a pass of the validation takes: where each token has an answer no more than a training step
        holds, as they are large."""
        if self.data["validation"].y.ndim == 1:
            return VALIDATION_ROWS
        return max(1, self.train.batch_size // self.readers // self.accumulate)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and scores on the validation split, each rank on its share; every rank in as many passes."""
        self.strategy.network.eval()
        data = self.data["validation"]
        sums: Tensor | float = 0.0
        share = np.arange(self.reader, len(data), self.readers)
        size = self.validation_rows
        for start in range(0, -(-len(data) // self.readers), size):
            rows = share[start : start + size]
            # A rank without rows of its own takes part where the pass is an exchange.
            x, y = self.loader.load(data, rows if len(rows) else np.zeros(1, dtype=np.int64))
            with recipe_at_fault(self.rank), self.narrow():
                logits = self.strategy.answer(x)
                loss = self.task.loss(logits, y)
                counts = self.task.score.counts(logits, y)
            mine = torch.stack([loss.double() * len(rows), torch.full_like(loss, len(rows)).double()])
            sums = sums + torch.cat([mine, counts if len(rows) else torch.zeros_like(counts)])
            self.watch.beat()
        loss, count, *counts = self.strategy.total(sums).tolist()
        if not math.isfinite(loss):
            self.check("validation", torch.tensor(loss))
        scores = self.task.score.metrics(counts)
        return {"validation_loss": loss / count} | {f"validation_{name}": value for name, value in scores.items()}


def compiled(module: nn.Module) -> nn.Module:
    """Return a module that torch.compile makes faster at its first call.

    Raises:
        BadRequest: there is no C++ compiler, which the CPU needs.
    """
    import shutil

    if not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "g++")):
        raise BadRequest("train.compile = true, must be false on this machine: it has no C++ compiler (g++, or CXX)")
    return torch.compile(module, dynamic=True)
