"""What an epoch is worth beside its loss: counts on each rank's share of the validation split, which are summed.

    B rows   T tokens   K classes
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from tasks.spec.entities import f1, kinds_of, matched
from tasks.spec.feature import Feature
from tasks.spec.label import Target

# Whose exponential is a number still.
MOST_NATS = 700.0


class Score(Protocol):
    def counts(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return what a batch adds, float64 [so many as it wants]."""

    def metrics(self, counts: list[float]) -> dict[str, float]:
        """Return the metrics of all counts together."""


def score_of(feature: Feature, label: Target) -> Score:
    if label.kind == "number":
        return Numbers()
    if label.kind == "next":
        return Pieces()
    return Tags(label.names) if feature.kind == "tokens" else Rows()


class Rows:
    """Accuracy of a classifier: logits [B, K], targets int64 [B]."""

    def counts(self, logits: Tensor, target: Tensor) -> Tensor:
        right = (logits.argmax(1) == target).sum()
        return torch.stack([right.double(), torch.full_like(right, len(target)).double()])

    def metrics(self, counts: list[float]) -> dict[str, float]:
        right, rows = counts
        return {"accuracy": right / rows}


class Numbers:
    """Root of the mean squared error, and mean absolute error, of numbers: answers [B, 1], targets float [B]."""

    def counts(self, logits: Tensor, target: Tensor) -> Tensor:
        error = (logits[:, 0] - target).double()
        return torch.stack([error.square().sum(), error.abs().sum(), torch.full_like(error[0], len(target))])

    def metrics(self, counts: list[float]) -> dict[str, float]:
        squares, absolute, rows = counts
        return {"rmse": (squares / rows) ** 0.5, "mae": absolute / rows}


class Pieces:
    """Perplexity, and accuracy, of the next piece of texts: logits [B, V, T], targets [B, T]."""

    def counts(self, logits: Tensor, target: Tensor) -> Tensor:
        nats = torch.nn.functional.cross_entropy(logits, target, reduction="sum").double()
        right = (logits.argmax(1) == target).sum()
        return torch.stack([nats, right.double(), (target >= 0).sum().double()])

    def metrics(self, counts: list[float]) -> dict[str, float]:
        nats, right, pieces = counts
        return {"perplexity": math.exp(min(nats / pieces, MOST_NATS)), "accuracy": right / pieces}


class Tags:
    """Accuracy of tags, and F1 of entities (exact type and span), of a tagger: logits [B, K, T], targets [B, T]."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes, self.kinds = classes, kinds_of(classes)

    def counts(self, logits: Tensor, target: Tensor) -> Tensor:
        said, there = logits.argmax(1).cpu(), target.cpu()
        totals = torch.tensor([int((said == there).sum()), int((there >= 0).sum()), 0, 0, 0], dtype=torch.float64)
        for mine, theirs in zip(said, there, strict=True):
            tagged = theirs >= 0
            names = [[self.classes[k] for k in side[tagged].tolist()] for side in (theirs, mine)]
            totals[2:] += torch.tensor(matched(*names, self.kinds), dtype=torch.float64).reshape(-1, 3).sum(0)
        return totals.to(logits.device)

    def metrics(self, counts: list[float]) -> dict[str, float]:
        right, tags, *found = counts
        return {"accuracy": right / max(tags, 1), "entity_f1": f1(*found)}
