"""The networks. Each takes the encoded input and gives logits; scaling happens inside, so it is in the graph.

    B batch   N input width   T tokens   D embedding   F channels   K classes
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.spec.errors import BadRequest
from tasks.spec.feature import Feature
from tasks.spec.train import Mlp, OwnModel, Recipe, TextCnn


def build(recipe: Recipe, feature: Feature, num_classes: int, stats: Any, folder: Path) -> nn.Module:
    """Build the module of a recipe: encoded input [B, N] (text: int64 [B, T]) -> logits [B, K].

    Raises:
        BadRequest: the workload's own model.py has no ``build`` or fails in it.
    """
    if isinstance(recipe, TextCnn):
        return TextCnnNet(recipe, feature.vocabulary, num_classes)
    body = mlp(recipe, feature, num_classes) if isinstance(recipe, Mlp) else own(recipe, feature, num_classes, folder)
    if feature.kind == "text":
        return body
    return nn.Sequential(scaling(feature, stats), body)


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


def mlp(recipe: Mlp, feature: Feature, num_classes: int) -> nn.Module:
    widths = [feature.shape[0], *recipe.hidden]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(recipe.dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


class TextCnnNet(nn.Module):
    """Embedding -> Conv1D -> ReLU -> global max pool -> dropout -> dense (Kim 2014, arXiv:1408.5882)."""

    def __init__(self, recipe: TextCnn, vocabulary: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, recipe.embedding, padding_idx=0)
        self.conv = nn.Conv1d(recipe.embedding, recipe.channels, recipe.kernel, padding=recipe.kernel // 2)
        self.dropout = nn.Dropout(recipe.dropout)
        self.head = nn.Linear(recipe.channels, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:  # int64 [B, T] -> [B, K]
        x = self.embedding(tokens).transpose(1, 2)  # [B, D, T]
        x = torch.relu(self.conv(x)).amax(dim=2)  # [B, F]
        return self.head(self.dropout(x))


def own(recipe: OwnModel, feature: Feature, num_classes: int, folder: Path) -> nn.Module:
    path = folder / "model.py"
    spec = importlib.util.spec_from_file_location("workload_model", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise BadRequest("model.py: not in the workload's folder; train.recipe.kind 'model.py' needs it")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "build", None)):
            raise BadRequest("model.py: has no function build(feature, num_classes, **options)")
        found = module.build(feature, num_classes, **recipe.options)
    except BadRequest:
        raise
    except Exception as error:
        raise BadRequest(f"model.py: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise BadRequest(f"model.py: build gave {type(found).__name__}, must be a torch.nn.Module")
    return found
