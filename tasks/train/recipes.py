"""From a recipe to what the ranks train: a network, its loss, and how it wants its input.

A network takes the encoded input and gives logits; scaling happens inside, so it is in the exported graph.

    B batch   N input width   T tokens   K classes, or 1 where a number is learnt
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.spec.feature import Feature
from tasks.spec.label import Target
from tasks.spec.recipe import Cnn, Factors, Gpt, Mlp, OwnModel, Pretrained, Recipe, Resnet18, TextCnn, Transformer
from tasks.spec.train import Train
from tasks.train.encoder import pretrained, transformer
from tasks.train.gpt import GptNet
from tasks.train.images import cnn, resnet18
from tasks.train.loss import Loss, loss_of
from tasks.train.own import own, own_loss
from tasks.train.plain import FactorsNet, TextCnnNet, mlp
from tasks.train.score import Score, score_of


class Task(NamedTuple):
    """What is learnt: ``network`` gives logits [B, K], of words or pieces [B, K, T]; ``loss(logits, target)`` is their
    mean loss over the rows, ``score`` what else they are worth; ``outputs`` is K where the network is not ours."""

    network: nn.Module
    loss: Loss
    score: Score
    outputs: int | None = None


def task_of(train: Train, feature: Feature, label: Target, stats: Any, folder: Path) -> Task:
    """Return a recipe's network, loss and score.

    Raises:
        BadRequest: the workload's own model.py can't be used, or the encoder's folder does not hold what it must.
    """
    network = build(train.recipe, feature, label.num_outputs, stats, folder, weights=True)
    is_own = isinstance(train.recipe, OwnModel)
    loss = (own_loss(folder) if is_own else None) or loss_of(train, feature, label, folder)
    return Task(network, loss, score_of(feature, label), label.num_outputs if is_own else None)


def build(
    recipe: Recipe, feature: Feature, num_outputs: int, stats: Any, folder: Path, weights: bool = False
) -> nn.Module:
    """Build the module of a recipe: encoded input [B, N] (text: int64 [B, T]) -> logits [B, K], of tokens [B, K, T], of
    texts whose next piece is told [B, V, T].
    Where a number is learnt, which ``stats`` tell, it is the number itself, [B, 1].

    ``weights``: a pretrained encoder begins with its own; without, they are drawn, for weights that are loaded next.

    Raises:
        BadRequest: the workload's own model.py has no ``build`` or fails in it.
    """
    if isinstance(recipe, Factors):
        return FactorsNet(recipe, stats["known"], stats["target"]["mean"])
    body = _body(recipe, feature, num_outputs, folder, weights)
    if stats and "target" in stats:
        body = nn.Sequential(body, Rescale(**stats["target"]))
    return body if feature.holds == "texts" else nn.Sequential(scaling(feature, stats), body)


def _body(recipe: Recipe, feature: Any, num_outputs: int, folder: Path, weights: bool) -> nn.Module:
    match recipe:
        case Mlp():
            return mlp(recipe, feature.shape[0], num_outputs)
        case Cnn():
            return cnn(recipe, feature, num_outputs)
        case Resnet18():
            return resnet18(recipe, feature, num_outputs)
        case TextCnn():
            return TextCnnNet(recipe, feature.vocabulary, num_outputs)
        case Transformer():
            return transformer(recipe, feature, num_outputs)
        case Gpt():
            return GptNet(recipe, feature)
        case Pretrained():
            return pretrained(recipe, feature, num_outputs, folder, weights)
        case OwnModel():
            return own(recipe, feature, num_outputs, folder)


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


class Rescale(nn.Module):
    """mean + deviation * x: so a network learns a number around 0, whatever its unit."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.mean + self.deviation * x
