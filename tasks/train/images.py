"""Networks for images. Norms are by group or layer and never by batch: a batch that is divided among ranks, or among
the parts of an accumulation, gives the gradients of the whole one.

B batch   C channels   H height   W width   K classes
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from tasks.spec.errors import BadRequest
from tasks.spec.feature import ImageFeature
from tasks.spec.recipe import Cnn, Resnet18


class Picture(nn.Module):
    """[B, H*W] -> [B, 1, H, W]."""

    def __init__(self, feature: ImageFeature) -> None:
        super().__init__()
        self.shape = (1, feature.height, feature.width)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape)


def cnn(recipe: Cnn, feature: ImageFeature, num_classes: int) -> nn.Module:
    """Two convolutions of 3 x 3 and a pooling for each of ``channels``, then a dense head (after VGG, Simonyan 2014).

    Raises:
        BadRequest: the image has no pixel left after so many poolings.
    """
    shrunk = [side >> len(recipe.channels) for side in (feature.height, feature.width)]
    if not all(shrunk):
        size, most = f"{feature.height} x {feature.width}", min(feature.height, feature.width).bit_length() - 1
        raise BadRequest(f"train.recipe.channels = {list(recipe.channels)}, at most {most} of them for {size} pixels")
    layers: list[nn.Module] = [Picture(feature)]
    for before, after in itertools.pairwise((1, *recipe.channels)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(recipe.channels[-1] * shrunk[0] * shrunk[1], recipe.hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(recipe.dropout), nn.Linear(recipe.hidden, num_classes))


def resnet18(recipe: Resnet18, feature: ImageFeature, num_classes: int) -> nn.Module:
    widths = [recipe.width << stage for stage in range(4)]
    layers: list[nn.Module] = [Picture(feature), *_convolution(1, widths[0], 3, 1), nn.ReLU()]
    before = widths[0]
    for stage, width in enumerate(widths):
        layers += [Block(before, width, stride=1 if stage == 0 else 2), Block(width, width, stride=1)]
        before = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(recipe.dropout), nn.Linear(before, num_classes)]
    return nn.Sequential(*layers, *head)


class Block(nn.Module):
    """ReLU(x + two convolutions of x), [B, C, H, W] -> [B, C', H / stride, W / stride]."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(before, width, 3, stride), nn.ReLU(), *_convolution(width, width, 3, 1)
        )
        same = before == width and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(*_convolution(before, width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.short(x) + self.body(x))


def _convolution(before: int, width: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [convolution, nn.GroupNorm(8, width)]
