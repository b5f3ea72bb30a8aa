"""The small networks.

B batch   T tokens   D embedding   F channels   K classes
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from tasks.spec.recipe import Mlp, TextCnn


def mlp(recipe: Mlp, width: int, num_classes: int) -> nn.Module:
    widths = [width, *recipe.hidden]
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
