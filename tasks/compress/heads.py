"""Remove whole attention heads or whole layers of an encoder in place: those that matter least for what it answers.

A head matters by how much the loss would change without it, to the first order (Michel 2019, arXiv:1905.10650); a
layer by how far it turns what passes through it (block influence: Men 2024, arXiv:2403.03853).

    B batch   T tokens   D width   H heads   L layers
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tasks.compress.shrink import num_going, shrink
from tasks.spec.compress import Pruned
from tasks.spec.errors import BadRequest
from tasks.train.encoder import Attention, Encoder

JUDGED_ROWS = 256


def remove_parts(encoder: nn.Module, variant: Pruned, tokens: Tensor, target: Tensor) -> None:
    """Remove the declared share of each layer's heads, or of the layers; ``tokens`` int64 [B, T] and their classes
    show which matter.

    Raises:
        BadRequest: the network is no encoder of ours, or the share is less than one part.
    """
    if not isinstance(encoder, Encoder):
        raise BadRequest(f"{variant.label}: the network has no {variant.of}; use of: units")
    tokens, target = tokens[:JUDGED_ROWS], target[:JUDGED_ROWS]
    if variant.of == "layers":
        kept = _kept(variant, layer_influence(encoder, tokens))
        encoder.layers = nn.ModuleList(encoder.layers[number] for number in kept)
        return
    for layer, matters in zip(encoder.layers, head_importance(encoder, tokens, target), strict=True):
        _keep_heads(layer.attention, _kept(variant, matters))


def head_importance(encoder: Encoder, tokens: Tensor, target: Tensor) -> list[Tensor]:
    """Return for each layer [H]: the mean over the rows of |a head's output times the loss's gradient by it|."""
    seen: list[Tensor] = []

    def keep(_module: Any, inputs: tuple[Tensor]) -> None:
        inputs[0].retain_grad()
        seen.append(inputs[0])

    with ExitStack() as hooks:
        for layer in encoder.layers:
            hooks.callback(layer.attention.out.register_forward_pre_hook(keep).remove)
        nn.functional.cross_entropy(encoder(tokens), target).backward()
    encoder.zero_grad(set_to_none=True)
    found = []
    for layer, output in zip(encoder.layers, seen, strict=True):
        change = (output * output.grad).detach().unflatten(2, (layer.attention.heads, -1))  # [B, T, H, D / H]
        found.append(change.sum(dim=(1, 3)).abs().mean(dim=0))
    return found


@torch.no_grad()
def layer_influence(encoder: Encoder, tokens: Tensor) -> Tensor:
    """Return [L]: one less the mean cosine between what goes into a layer and what comes out, over all tokens."""
    found: list[Tensor] = []
    there = tokens != 0

    def compare(_module: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        cosine = nn.functional.cosine_similarity(inputs[0], output, dim=2)
        found.append(1 - cosine[there].mean())

    with ExitStack() as hooks:
        for layer in encoder.layers:
            hooks.callback(layer.register_forward_hook(compare).remove)
        encoder(tokens)
    return torch.stack(found)


def _kept(variant: Pruned, matters: Tensor) -> list[int]:
    """The numbers of the parts that stay, in order."""
    going = num_going(variant.ratio, len(matters))
    if going < 1:
        raise BadRequest(
            f"{variant.label}: ratio = {variant.ratio} of {len(matters)} {variant.of} removes none; declare more"
        )
    return sorted(matters.argsort(descending=True)[: len(matters) - going].tolist())


def _keep_heads(attention: Attention, kept: list[int]) -> None:
    size = attention.query.out_features // attention.heads
    places = (torch.tensor(kept)[:, None] * size + torch.arange(size)).flatten()
    for part in (attention.query, attention.key, attention.value):
        shrink(part, places, side=0)
    shrink(attention.out, places, side=1)
    attention.heads = len(kept)
