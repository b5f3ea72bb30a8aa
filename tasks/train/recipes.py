"""From a recipe to what the ranks train: a network, its loss, and how it wants its input.

A network takes the encoded input and gives logits; scaling happens inside, so it is in the exported graph.

    B batch   N input width   T tokens   K classes
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.spec.feature import Feature
from tasks.spec.recipe import Cnn, Mlp, OwnModel, Pretrained, Recipe, Resnet18, TextCnn, Transformer
from tasks.spec.train import Train
from tasks.train.encoder import pretrained, transformer
from tasks.train.images import cnn, resnet18
from tasks.train.own import own, own_loss
from tasks.train.plain import TextCnnNet, mlp

Loss = Callable[[Tensor, Tensor], Tensor]


class Task(NamedTuple):
    """What is learnt: ``network`` gives logits [B, K], ``loss(logits, target)`` their mean loss over the rows."""

    network: nn.Module
    loss: Loss


def task_of(train: Train, feature: Feature, num_classes: int, stats: Any, folder: Path) -> Task:
    """Return a recipe's network and loss.

    Raises:
        BadRequest: the workload's own model.py can't be used, or the encoder's folder does not hold what it must.
    """
    network = build(train.recipe, feature, num_classes, stats, folder, weights=True)
    found = own_loss(folder) if isinstance(train.recipe, OwnModel) else None
    weights = class_weights(folder, num_classes) if train.class_weights == "balanced" else None
    return Task(network, found or cross_entropy(train.label_smoothing, weights))


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


def class_weights(folder: Path, num_classes: int) -> Tensor:
    """Return a weight for each class, such that all classes weigh the same and a row 1 in the mean."""
    import numpy as np

    y = np.load(folder / "arrays" / "train.y.npy", mmap_mode="r", allow_pickle=False)
    # A student's targets are probabilities [B, K].
    counts = y.sum(axis=0) if y.ndim > 1 else np.bincount(y, minlength=num_classes)
    there = counts > 0
    return torch.from_numpy(np.where(there, counts.sum() / (there.sum() * np.maximum(counts, 1)), 0).astype("float32"))


def build(
    recipe: Recipe, feature: Feature, num_classes: int, stats: Any, folder: Path, weights: bool = False
) -> nn.Module:
    """Build the module of a recipe: encoded input [B, N] (text: int64 [B, T]) -> logits [B, K].

    ``weights``: a pretrained encoder begins with its own; without, they are drawn, for weights that are loaded next.

    Raises:
        BadRequest: the workload's own model.py has no ``build`` or fails in it.
    """
    body = _body(recipe, feature, num_classes, folder, weights)
    return body if feature.kind == "text" else nn.Sequential(scaling(feature, stats), body)


def _body(recipe: Recipe, feature: Any, num_classes: int, folder: Path, weights: bool) -> nn.Module:
    match recipe:
        case Mlp():
            return mlp(recipe, feature.shape[0], num_classes)
        case Cnn():
            return cnn(recipe, feature, num_classes)
        case Resnet18():
            return resnet18(recipe, feature, num_classes)
        case TextCnn():
            return TextCnnNet(recipe, feature.vocabulary, num_classes)
        case Transformer():
            return transformer(recipe, feature, num_classes)
        case Pretrained():
            return pretrained(recipe, feature, num_classes, folder, weights)
        case OwnModel():
            return own(recipe, feature, num_classes, folder)


def scaling(feature: Feature, stats: Any) -> nn.Module:
    if feature.kind == "image":
        return Standardise([0.0], [float(feature.max_value)])
    return Standardise(stats["mean"], stats["deviation"])


class Standardise(nn.Module):
    """(x - mean) / deviation, with missing values (NaN) at the mean."""

    def __init__(self, mean: list[float], deviation: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.isnan(x), torch.zeros_like(x), (x - self.mean) / self.deviation)
