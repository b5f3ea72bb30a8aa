"""Taking units out of a layer: what every way of pruning ends in."""

from __future__ import annotations

from torch import Tensor, nn


def num_going(ratio: float, count: int) -> int:
    """Return how many of ``count`` parts go; one stays."""
    return min(round(ratio * count), count - 1)


def shrink(layer: nn.Module, kept: Tensor, side: int) -> None:
    """Keep these outputs (``side`` 0) or inputs (1) of a dense layer or a convolution, in place; int64 [kept]."""
    layer.weight = nn.Parameter(layer.weight.detach().index_select(side, kept))
    if side == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[kept])
    linear = isinstance(layer, nn.Linear)
    names = ("out_features", "in_features") if linear else ("out_channels", "in_channels")
    setattr(layer, names[side], len(kept))
