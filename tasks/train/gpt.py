"""A causal language model (GPT-2's form, Radford et al. 2019): each place of a text is asked for its piece, and has
seen those before it.

Token 0, the padding, is the beginning and the end of each text too. A place sees no later one, so what is said of a
text does not depend on the width that a batch was padded to.

    B batch   T places   D width   H heads   V pieces that there are
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tasks.spec.feature import TextFeature
from tasks.spec.recipe import Gpt
from tasks.train.encoder import Attention

DEVIATION = 0.02


class GptNet(nn.Module):
    """int64 [B, T] -> logits [B, V, T], of each place's own piece: layers, a last norm, the table of pieces."""

    any_width = True

    def __init__(self, recipe: Gpt, feature: TextFeature) -> None:
        super().__init__()
        self.max_tokens = feature.max_tokens
        self.words = nn.Embedding(feature.vocabulary, recipe.width)
        # One more than is learnt: of a text of full width the place behind it is computed, and does not count.
        self.positions = nn.Embedding(feature.max_tokens + 1, recipe.width)
        self.dropout = nn.Dropout(recipe.dropout)
        self.layers = nn.ModuleList(Block(recipe) for _ in range(recipe.layers))
        self.norm = nn.LayerNorm(recipe.width)
        self.apply(_draw)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens).transpose(1, 2)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return int64 [B, T] -> [B, T, V]."""
        before = nn.functional.pad(tokens[:, :-1], (1, 0))
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.words(before) + self.positions(places))
        mask = (places[:, None] >= places[None, :])[None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return nn.functional.linear(self.norm(x), self.words.weight)


class Block(nn.Module):
    """[B, T, D] -> [B, T, D]: attention and a dense pair, each normed before and added to its input."""

    def __init__(self, recipe: Gpt) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(recipe.width), nn.LayerNorm(recipe.width)
        self.attention = Attention(recipe.width, recipe.heads, recipe.dropout)
        self.inner = nn.Linear(recipe.width, recipe.feedforward)
        self.outer = nn.Linear(recipe.feedforward, recipe.width)
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        return x + self.dropout(self.outer(nn.functional.gelu(self.inner(self.norm(x)))))


class LogProbability(nn.Module):
    """int64 [B, T] -> [B, 1]: the mean log-probability, in nats, of a text's pieces and of its end; of a text that
    fills all ``max_tokens`` places, which may go on, without the end."""

    any_width = True

    def __init__(self, network: GptNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return self.told(tokens)[0]

    def told(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean [B, 1], and the piece that is the likeliest behind the last, int64 [B, 1]; 0: the end."""
        tokens = nn.functional.pad(tokens, (0, 1))
        places = torch.arange(tokens.shape[1], device=tokens.device)
        # As ``tasks.spec.pieces.lengths`` counts them.
        length = ((tokens != 0) * (places + 1)).amax(dim=1, keepdim=True)
        counted = (places <= length) & (places < self.network.max_tokens)
        logits = self.network.logits(tokens)
        said = logits.log_softmax(dim=2).gather(2, tokens[:, :, None])[:, :, 0]
        weight = counted.to(said.dtype)
        mean = (said * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
        return mean, logits.argmax(dim=2).gather(1, length)


class Told(nn.Module):
    """What is exported of a language model: int64 [B, T] -> the mean within its range, and the next piece."""

    any_width = True

    def __init__(self, network: LogProbability, least: float, most: float) -> None:
        super().__init__()
        self.network, self.range = network, (least, most)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mean, piece = self.network.told(tokens)
        return mean.clamp(*self.range), piece


def _draw(module: nn.Module) -> None:
    """Draw as GPT-2 does: normal with deviation 0.02, norms as they are."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=DEVIATION)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
