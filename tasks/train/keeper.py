"""What a training keeps: its place, checkpoints, history, the best weights, the result. Rank 0 alone writes, and only
the newest attempt (``tasks.train.fence``).
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.spec.errors import BadRequest
from tasks.spec.train import Checkpoints
from tasks.store.files import sha256_file, write_json, write_whole
from tasks.train import checkpoint, learn
from tasks.train.checkpoint import Saved
from tasks.train.encoder import merged
from tasks.train.exchange import sent_by_first
from tasks.train.failing import Diverged
from tasks.train.fence import Fence
from tasks.train.history import HISTORY, PROGRESS
from tasks.train.strategy import One
from tasks.train.writer import FOLDER, SMALL_BYTES, Writer

# What an epoch's printed line tells beside the losses.
SCORED = {
    "accuracy": "validation_accuracy",
    "entity F1": "validation_entity_f1",
    "RMSE": "validation_rmse",
    "perplexity": "validation_perplexity",
}


class Place(NamedTuple):
    """Where training is: ``epoch`` whole ones, and ``step`` batches of the next, with the sum of their losses. The best
    epoch is the one of the least ``best_cost``: its validation loss, or the negative of a score."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_epoch: int = 0
    best_cost: float = math.inf
    best_loss: float = math.inf

    def steps(self, per_epoch: int) -> int:
        return self.epoch * per_epoch + self.step

    def next_step(self) -> Place:
        return self._replace(step=self.step + 1)

    def next_epoch(self) -> Place:
        return self._replace(epoch=self.epoch + 1, step=0, loss_sum=0.0)

    def better(self, cost: float, loss: float) -> Place:
        return self._replace(best_epoch=self.epoch, best_cost=cost, best_loss=loss)


class Keeper:
    """The files of a training. Methods that take a strategy are called by every rank: a state may be in parts."""

    def __init__(self, folder: Path, policy: Checkpoints, fence: Fence, rank: int, world: int) -> None:
        self.folder, self.policy, self.fence = folder, policy, fence
        self.rank, self.world = rank, world
        self.best: dict[str, Tensor] = {}
        self.writer = Writer(folder, fence.attempt)

    def newest(self, device: torch.device) -> Saved | None:
        """Return the newest whole checkpoint as rank 0 finds it; every rank gets the same."""
        saved: Saved | None = None
        if self.rank == 0:
            saved, refused = checkpoint.load_newest(self.folder / FOLDER, self.fence.held)
            for line in refused:
                say(line)
        return sent_by_first(saved, self.rank, device) if self.world > 1 else saved

    def restore_network(self, network: nn.Module, saved: Saved | None) -> Place:
        """Give a network its saved weights and return where training is.

        Raises:
            BadRequest: the checkpoint is another model's.
        """
        if saved is None:
            return Place()
        found, own = saved.of("model"), network.state_dict()
        wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
        if wrong or set(found) - set(own):
            name = (wrong or sorted(set(found) - set(own)))[0]
            raise BadRequest(f"{self.folder / FOLDER}: holds another model's weights: {name} differs; remove it")
        network.load_state_dict(found)
        self.best = saved.of("best") or {name: value.clone() for name, value in found.items()}
        place = Place(**saved.facts["place"])
        if self.rank == 0:
            say(f"resumed after epoch {place.epoch}" + (f" and {place.step} steps" if place.step else ""))
        return place

    def restore_moments(self, strategy: One, optimiser: torch.optim.Optimizer, saved: Saved | None) -> None:
        if saved is None:
            return
        kept: learn.Named = {}
        for name, value in saved.of("optimiser").items():
            parameter, _, key = name.rpartition("/")
            kept.setdefault(parameter, {})[key] = value
        learn.remember(optimiser, strategy.network, kept, strategy.part)

    def cut(self, step: int) -> None:
        """Drop what an earlier attempt told of steps that are made again."""
        if self.rank == 0:
            with self.fence.held():
                for name in (HISTORY, PROGRESS):
                    cut_lines(self.folder / name, step)

    def remember(
        self, place: Place, line: dict[str, float], strategy: One, optimiser: torch.optim.Optimizer, best: bool
    ) -> None:
        """Keep an epoch: its line, the weights where they are the best, the checkpoint where it is due."""
        if best:
            self.best = {name: value.cpu().clone() for name, value in strategy.state().items()}
        if self.rank == 0:
            self._add(HISTORY, line)
            scores = "".join(f"{name} {line[key]:.4f}, " for name, key in SCORED.items() if key in line)
            say(
                f"epoch {place.epoch}: loss {line['train_loss']:.4f}, validation loss {line['validation_loss']:.4f}, "
                f"{scores}{line['samples_per_second']:.0f} rows/s"
            )
        if place.epoch % self.policy.every_epochs == 0:
            self.save(place, strategy, optimiser)

    def progress(self, line: dict[str, float], per_epoch: int) -> None:
        """Keep a line from within an epoch, and print it."""
        self._add(PROGRESS, line | {"at_ms": int(time.time() * 1000)})
        say(
            f"epoch {line['epoch']}, step {line['step'] % per_epoch} of {per_epoch}: loss {line['loss']:.4f}, "
            f"{line['samples_per_second']:.0f} rows/s, learning rate {line['learning_rate']:.3g}"
        )

    def save(self, place: Place, strategy: One, optimiser: torch.optim.Optimizer) -> None:
        """Save the place and all that training needs to go on from it.

        Raises:
            Diverged: there are weights or moments that are no numbers.
        """
        moments = learn.moments(optimiser, strategy.network, strategy.whole).items()
        own = {f"optimiser/{name}/{key}": value for name, kept in moments for key, value in kept.items()}
        tensors = {f"model/{name}": value for name, value in strategy.state().items()} | strategy.collect(own)
        if self.rank:
            return
        if any(value.isnan().any() for value in tensors.values() if value.is_floating_point()):
            # The loss of the step that did it was a number still; the checkpoint before is better than this one.
            raise Diverged(f"weights are no numbers in epoch {place.epoch + 1}; lower train.optimiser.learning_rate")
        if place.best_epoch != place.epoch or place.step:
            tensors |= {f"best/{name}": value for name, value in self.best.items()}
        saved = Saved({"place": place._asdict()}, tensors)
        name = checkpoint.name_of(place.epoch, place.step)
        if sum(value.numel() * value.element_size() for value in tensors.values()) < SMALL_BYTES:
            checkpoint.save(self.folder / FOLDER, name, saved, self.policy.keep, self.fence.held)
        else:
            self.writer.save(name, saved, self.policy.keep)

    def finish(self, place: Place, strategy: One) -> None:
        """Write the best weights, and ``done.json`` last."""
        if self.rank:
            return
        from safetensors.torch import save_file

        self.writer.close()
        done = {"epochs": place.epoch, "best_epoch": place.best_epoch, "validation_loss": place.best_loss}
        done["best_cost"] = place.best_cost
        with self.fence.held():
            weights = self.folder / "weights.safetensors"
            save_file({name: value.contiguous() for name, value in merged(self.best).items()}, weights)
            done |= {"parameters": strategy.num_parameters, "weights_sha256": sha256_file(weights)}
            write_json(self.folder / "done.json", done)

    def _add(self, name: str, line: dict[str, Any]) -> None:
        with self.fence.held(), (self.folder / name).open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def cut_lines(path: Path, step: int) -> None:
    """Keep the whole lines up to a step."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(line + "\n" for line in kept))


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the rank's log is its standard output


