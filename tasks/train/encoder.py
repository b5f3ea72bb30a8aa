"""A transformer encoder for texts and tagged words: drawn, or a pretrained one (BERT, Devlin et al. 2018) from a
local folder.

Token 0 is the padding; it is looked at by nobody and counts in no mean, so an answer does not depend on the width
that a batch was padded to. Names of parameters are ours; ``_NAMES`` maps those of Hugging Face's files.

    B batch   T tokens   D width   H heads   K classes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.spec.errors import BadRequest
from tasks.spec.feature import Texts
from tasks.spec.recipe import Pretrained, Transformer
from tasks.train.brought import ENCODER

LORA_SCALE = 2.0
# A Hugging Face file's name of a layer's part -> ours.
_NAMES = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "inner",
    "output.dense": "outer",
    "output.LayerNorm": "norm",
}
_EMBEDDINGS = {
    "word_embeddings": "words",
    "position_embeddings": "positions",
    "token_type_embeddings": "kinds",
    "LayerNorm": "norm",
}


class Sizes(NamedTuple):
    """An encoder's sizes."""

    vocabulary: int
    positions: int
    width: int
    heads: int
    layers: int
    inner: int
    epsilon: float = 1e-12


class Encoder(nn.Module):
    """int64 [B, T] -> [B, K]: embeddings, layers, the mean over the tokens, dropout, a dense head."""

    # The exported graph takes any number of tokens.
    any_width = True

    def __init__(self, sizes: Sizes, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.width, padding_idx=0)
        self.positions = nn.Embedding(sizes.positions, sizes.width)
        self.kinds = nn.Embedding(2, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.epsilon)
        self.layers = nn.ModuleList(Layer(sizes, dropout) for _ in range(sizes.layers))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(sizes.width, num_classes)
        self.apply(_draw)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        there = known(tokens, places)
        x = self.embed(tokens, places)
        mask = there[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return self.answer(x, there)

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Return what the layers begin with, [B, T, D]."""
        # A look-up of places is stored as int8 like that of words; a slice of the table would stay float.
        x = self.words(tokens) + self.positions(places) + self.kinds.weight[0]
        return self.dropout(self.norm(x))

    def answer(self, x: Tensor, there: Tensor) -> Tensor:
        """Return logits from what is known of each token, [B, T, D], and which of them are no padding."""
        weight = there[:, :, None].to(x.dtype)
        mean = (x * weight).sum(1) / weight.sum(1)
        return self.head(self.dropout(mean))


class Tagger(Encoder):
    """int64 [B, T] -> [B, K, T]: the head at each token."""

    def answer(self, x: Tensor, there: Tensor) -> Tensor:
        return self.head(self.dropout(x)).transpose(1, 2)


def known(tokens: Tensor, places: Tensor) -> Tensor:
    """Return which tokens are no padding, bool [B, T]."""
    # An empty text has no token: its first padding stands in, so that there is a mean.
    return (tokens != 0) | (places == 0)


class Layer(nn.Module):
    """[B, T, D] -> [B, T, D]: attention and a dense pair, each added to its input and normed."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(sizes.width, sizes.heads, dropout)
        self.attention_norm = nn.LayerNorm(sizes.width, eps=sizes.epsilon)
        self.inner = nn.Linear(sizes.width, sizes.inner)
        self.outer = nn.Linear(sizes.inner, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.norm(x + self.dropout(self.outer(nn.functional.gelu(self.inner(x)))))


class Attention(nn.Module):
    """Scaled dot products of H heads; ``mask`` bool [B, 1, 1, T] names the tokens that may be looked at."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, -1)  # with heads removed they are narrower than D together
        query, key, value = (part(x).reshape(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        found = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.out(found.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Adapted(nn.Linear):
    """A dense layer that is kept, with a learnt change of low rank: x W + s (x A) B; B begins as zeros."""

    def __init__(self, kept: nn.Linear, rank: int) -> None:
        super().__init__(kept.in_features, kept.out_features)
        self.load_state_dict(kept.state_dict())
        self.down = nn.Parameter(torch.randn(rank, kept.in_features) / rank**0.5)
        self.up = nn.Parameter(torch.zeros(kept.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + LORA_SCALE * (x @ self.down.T @ self.up.T)


def adapt(network: Encoder, rank: int) -> None:
    """Freeze an encoder but for its head, and let the queries and values of its attention learn by low rank."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    network.head.requires_grad_(True)
    for layer in network.layers:
        for name in ("query", "value"):
            adapted = Adapted(getattr(layer.attention, name), rank)
            adapted.weight.requires_grad_(False)
            adapted.bias.requires_grad_(False)
            setattr(layer.attention, name, adapted)


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without low-rank parts: each is added to what it changes. Others are as they were, a network's
    own ``down`` and ``up`` without a ``weight`` beside them, too."""
    layers = [name.removesuffix(".down") for name in tensors if name.endswith(".down")]
    layers = [layer for layer in layers if {f"{layer}.up", f"{layer}.weight"} <= set(tensors)]
    parts = {f"{layer}.{part}" for layer in layers for part in ("down", "up")}
    found = {name: value for name, value in tensors.items() if name not in parts}
    for layer in layers:
        weight, up, down = (tensors[f"{layer}.{part}"] for part in ("weight", "up", "down"))
        found[f"{layer}.weight"] = weight + LORA_SCALE * up @ down
    return found


def _draw(module: nn.Module) -> None:
    """Draw as BERT does: normal with deviation 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _encoder(feature: Texts, sizes: Sizes, num_classes: int, dropout: float) -> Encoder:
    return (Tagger if feature.kind == "tokens" else Encoder)(sizes, num_classes, dropout)


def transformer(recipe: Transformer, feature: Texts, num_classes: int) -> nn.Module:
    sizes = Sizes(
        feature.vocabulary, feature.max_tokens, recipe.width, recipe.heads, recipe.layers, recipe.feedforward, 1e-5
    )
    return _encoder(feature, sizes, num_classes, recipe.dropout)


def pretrained(recipe: Pretrained, feature: Texts, num_classes: int, folder: Path, weights: bool) -> nn.Module:
    """Return the encoder of ``folder/encoder`` with a new head, with its own weights where asked.

    Raises:
        BadRequest: its files are not those of a BERT encoder, or it can't take so many tokens.
    """
    sizes = sizes_of(folder / ENCODER, feature)
    network = _encoder(feature, sizes, num_classes, recipe.dropout)
    if weights:
        _load(network, folder / ENCODER / "model.safetensors")
    if weights and recipe.lora_rank:
        adapt(network, recipe.lora_rank)
    return network


def sizes_of(encoder: Path, feature: Texts) -> Sizes:
    """Read an encoder's config.json.

    Raises:
        BadRequest: another kind of network, or fewer positions than the feature's tokens.
    """
    where = f"{encoder}/config.json"
    try:
        config = json.loads((encoder / "config.json").read_text())
        names = ("vocab_size", "max_position_embeddings", "hidden_size", "num_attention_heads", "num_hidden_layers")
        sizes = Sizes(*(int(config[name]) for name in (*names, "intermediate_size")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{where}: is no encoder's config: {type(error).__name__}: {error}") from None
    kind, activation = config.get("model_type", "bert"), config.get("hidden_act", "gelu")
    if kind != "bert" or activation != "gelu" or config.get("position_embedding_type", "absolute") != "absolute":
        raise BadRequest(f"{where}: model_type {kind!r} with {activation!r}, must be bert with gelu and own positions")
    if config.get("pad_token_id", 0) != 0:
        raise BadRequest(f"{where}: pad_token_id = {config['pad_token_id']}, must be 0")
    if feature.max_tokens > sizes.positions:
        raise BadRequest(
            f"data.feature.max_tokens = {feature.max_tokens}, must be at most {sizes.positions}, what the encoder takes"
        )
    return sizes._replace(epsilon=float(config.get("layer_norm_eps", 1e-12)))


def _load(network: Encoder, path: Path) -> None:
    """Load all weights but the head's. Raises BadRequest: tensors are missing or of other shapes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = {ours: tensor for name, tensor in load_file(path).items() if (ours := _our_name(name))}
    except (OSError, SafetensorError) as error:
        raise BadRequest(f"{path}: can't be read: {error}") from None
    own: dict[str, Any] = {name: tensor for name, tensor in network.state_dict().items() if "head" not in name}
    for name, tensor in own.items():
        shape = list(found[name].shape) if name in found else "nothing"
        if shape != list(tensor.shape):
            raise BadRequest(f"{path}: {name} is {shape}, must be {list(tensor.shape)}; it is another model's")
    network.load_state_dict({name: found[name].float() for name in own}, strict=False)


def _our_name(name: str) -> str | None:
    """Return our name of a tensor in a Hugging Face file; None for what we have no use for (pooler, heads)."""
    name = name.removeprefix("bert.")
    parts = name.split(".")
    if parts[0] == "embeddings" and parts[1] in _EMBEDDINGS:
        return ".".join((_EMBEDDINGS[parts[1]], parts[-1]))
    if name.startswith("encoder.layer."):
        inside = ".".join(parts[3:-1])
        if inside in _NAMES:
            return f"layers.{parts[2]}.{_NAMES[inside]}.{parts[-1]}"
    return None
