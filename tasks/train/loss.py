"""What is made small: the mean over the rows of a classifier's cross entropy, of a tagger's or a language
model's, or of a number's squared error.

A batch that is divided, among ranks or into parts, has the loss of the whole one: each part's mean counts by its rows.

    B rows   T tokens   K classes
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tasks.spec.feature import Feature
from tasks.spec.label import Target
from tasks.spec.train import Train

Loss = Callable[[Tensor, Tensor], Tensor]


def loss_of(train: Train, feature: Feature, label: Target, folder: Path) -> Loss:
    """Return the loss that a train section asks for; ``folder`` holds the prepared arrays."""
    if label.kind == "number":
        return squared_error
    return loss_on(train, feature, label, np.load(folder / "arrays" / "train.y.npy", mmap_mode="r", allow_pickle=False))


def loss_on(train: Train, feature: Feature, label: Target, y: np.ndarray) -> Loss:
    """Return the loss of classes; ``y`` are the training split's: indices [B], of tags or pieces [B, T], or a teacher's
    answers [B, K]."""
    # A student's targets are its teacher's answers, which were adjusted where its own would be.
    is_adjusted = train.class_weights == "adjusted" and y.dtype.kind != "f"
    smoothing = 0.0 if is_adjusted else train.label_smoothing
    weights = class_weights(y, label.num_outputs) if train.class_weights == "balanced" else None
    if feature.kind == "tokens" or label.kind == "next":
        loss = tagging(smoothing, weights, float((y >= 0).sum()) / len(y))
    else:
        loss = cross_entropy(smoothing, weights)
    return adjusted(loss, log_shares(y, label.num_outputs), train.label_smoothing) if is_adjusted else loss


def squared_error(answers: Tensor, target: Tensor) -> Tensor:
    """Return the loss of a network that says a number: answers [B, 1], targets float [B]."""
    return nn.functional.mse_loss(answers[:, 0], target)


def cross_entropy(smoothing: float, weights: Tensor | None = None) -> Loss:
    """Return the loss of a classifier (Szegedy et al. 2015 for the smoothing); ``weights`` [K] of the classes."""
    if weights is None:
        return lambda logits, target: nn.functional.cross_entropy(logits, target, label_smoothing=smoothing)

    def weighted(logits: Tensor, target: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
        of_class = weights.to(logits.device)
        # By the number of rows, not by their weights: a batch in parts has the loss of the whole.
        return (each * (target @ of_class if target.is_floating_point() else of_class[target])).mean()

    return weighted


def tagging(smoothing: float, weights: Tensor | None, tags_a_row: float) -> Loss:
    """Return the loss of a tagger, or of a language model, logits [B, K, T] and targets int64 [B, T]: the sum over a
    row's tags or pieces, by how many a row has in the mean of the training split. So each counts the same in whatever
    batch it stands."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        of_class = None if weights is None else weights.to(logits.device)
        total = nn.functional.cross_entropy(logits, target, of_class, reduction="sum", label_smoothing=smoothing)
        return total / (len(target) * tags_a_row)

    return loss


def adjusted(loss: Loss, log_shares: Tensor, smoothing: float = 0.0) -> Loss:
    """Return a loss of logits [B, K] or [B, K, T] to which the classes' ``log_shares`` [K] are added, so that the
    logits alone need not know them: their greatest is right in the mean over the classes (Menon et al. 2021, "Long-tail
    learning via logit adjustment"). Unlike weights it holds for rows that are learnt by heart too.

    Targets [B] are smoothed towards the shares: towards classes of equal share a rare one would be the answer to every
    row, however well it fits.
    """

    def of_adjusted(logits: Tensor, target: Tensor) -> Tensor:
        added = log_shares.to(logits.device)
        if smoothing:
            hard = nn.functional.one_hot(target, len(added)).to(logits.dtype)
            target = (1 - smoothing) * hard + smoothing * added.exp()
        return loss(logits + added.view(-1, *[1] * (logits.dim() - 2)), target)

    return of_adjusted


def log_shares(y: np.ndarray, num_classes: int) -> Tensor:
    """Return the logarithm of each class's share of the class indices [B] or [B, T], which are below 0 where there is
    none. A class without any counts as one of a single row."""
    counts = np.maximum(np.bincount(y[y >= 0], minlength=num_classes), 1)
    return torch.from_numpy(np.log(counts / counts.sum()).astype("float32"))


def class_weights(y: np.ndarray, num_classes: int) -> Tensor:
    """Return a weight for each class, such that all classes weigh the same and a row, or a tag, 1 in the mean.

    ``y``: class indices [B] or [B, T], below 0 where there is none; or a student's probabilities [B, K].
    """
    counts = y.sum(axis=0) if y.dtype.kind == "f" else np.bincount(y[y >= 0], minlength=num_classes)
    there = counts > 0
    return torch.from_numpy(np.where(there, counts.sum() / (there.sum() * np.maximum(counts, 1)), 0).astype("float32"))
