"""The small networks.

B batch   T tokens   D embedding   F channels or factors   K classes
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from tasks.spec.recipe import Factors, Mlp, TextCnn

FACTORS_DEVIATION = 0.05


def mlp(recipe: Mlp, width: int, num_classes: int) -> nn.Module:
    widths = [width, *recipe.hidden]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(recipe.dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


class TextCnnNet(nn.Module):
    """Embedding -> Conv1D -> ReLU -> global max pool -> dropout -> dense (Kim 2014, arXiv:1408.5882). With
    token dropout some pieces are padding in training (Iyyer et al. 2015)."""

    def __init__(self, recipe: TextCnn, vocabulary: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, recipe.embedding, padding_idx=0)
        self.conv = nn.Conv1d(recipe.embedding, recipe.channels, recipe.kernel, padding=recipe.kernel // 2)
        self.dropout, self.token_dropout = nn.Dropout(recipe.dropout), recipe.token_dropout
        self.head = nn.Linear(recipe.channels, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:  # int64 [B, T] -> [B, K]
        if self.training and self.token_dropout:
            tokens = tokens.masked_fill(torch.rand(tokens.shape, device=tokens.device) < self.token_dropout, 0)
        x = self.embedding(tokens).transpose(1, 2)  # [B, D, T]
        x = torch.relu(self.conv(x)).amax(dim=2)  # [B, F]
        return self.head(self.dropout(x))


class FactorsNet(nn.Module):
    """mean + bias of the user + bias of the item + the product of their factors (Koren et al. 2009). Code 0, an unknown
    id, has neither bias nor factors. ``known``: how many users and items there are."""

    def __init__(self, recipe: Factors, known: list[int], mean: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        # The first column is the bias, and begins at 0 as an unknown id's does.
        self.user, self.item = (nn.Embedding(1 + count, 1 + recipe.width, padding_idx=0) for count in known)
        with torch.no_grad():
            for embedding in (self.user, self.item):
                embedding.weight[1:].normal_(std=FACTORS_DEVIATION)
                embedding.weight[:, 0] = 0

    def forward(self, ids: Tensor) -> Tensor:  # int64 [B, 2] -> [B, 1]
        user, item = self.user(ids[:, 0]), self.item(ids[:, 1])  # [B, 1 + F]
        product = (user[:, 1:] * item[:, 1:]).sum(dim=1, keepdim=True)
        return self.mean + user[:, :1] + item[:, :1] + product
