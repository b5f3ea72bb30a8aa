"""Make a network sparser in place and train it on: whole units go, or single weights (which is smaller only).

Which weights matter least is torch's judgement (``torch.nn.utils.prune``). Whole units are then really removed: the
graph of calls (``torch.fx``) shows where a layer's outputs feed one other layer alone, and both shrink together. Units
that something else reads too (a residual sum, say) stay. Heads and layers of an encoder: ``tasks.compress.heads``.

    F a layer's outputs   G the next layer's outputs
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune as torch_prune

from tasks.compress.heads import remove_parts
from tasks.compress.network import Source
from tasks.compress.shrink import num_going, shrink
from tasks.spec.compress import Pruned, Sparse
from tasks.spec.errors import BadRequest
from tasks.spec.feature import encode
from tasks.spec.tokens import encode_tags
from tasks.train.loss import Loss, loss_on
from tasks.train.prepare import read_split

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# What treats each unit by itself, so that one may go without changing the others.
UNITWISE = (
    nn.Identity, nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
)  # fmt: skip
UNITWISE_CALLS = {torch.relu, nn.functional.relu, nn.functional.gelu, torch.tanh, nn.functional.dropout}
UNITWISE_METHODS = {"relu", "amax", "max", "contiguous"}
# Encoded rows and their classes.
Rows = tuple[Tensor, Tensor]
FINE_TUNING_RATE, SPARSE_EPOCHS = 1e-3, 2


def prune(source: Source, variant: Pruned | Sparse, data: Path) -> None:
    """Prune the body of ``source`` in place and train it on; the best epoch by validation loss is kept.

    Raises:
        BadRequest: no layer of the network can lose units, or it has no heads and layers.
    """
    torch.manual_seed(source.request.train.seed)
    train, held = (_tensors(source, data, split) for split in ("train", "validation"))
    if isinstance(variant, Pruned):
        if variant.of == "units":
            _remove_units(source.body, variant)
        else:
            remove_parts(source.body, variant, *train)
        _train_on(source, train, held, variant.epochs)
        return
    layers = [module for module in source.body.modules() if isinstance(module, LAYERS)]
    for layer in layers:
        if variant.pattern == "2:4":
            torch_prune.custom_from_mask(layer, "weight", two_of_four(layer.weight.detach()))
        else:
            torch_prune.l1_unstructured(layer, "weight", variant.ratio)
    _train_on(source, train, held, SPARSE_EPOCHS)
    for layer in layers:
        torch_prune.remove(layer, "weight")


def two_of_four(weight: Tensor) -> Tensor:
    """Return the mask that keeps the two largest of each four neighbours of a row (Mishra 2021, arXiv:2104.08378)."""
    flat = weight.reshape(len(weight), -1).abs()
    width = flat.shape[1] // 4 * 4
    groups = flat[:, :width].reshape(-1, 4)
    kept = torch.zeros_like(groups).scatter_(1, groups.topk(2, dim=1).indices, 1.0)
    mask = torch.ones_like(flat)  # what is left of a row that four doesn't divide stays
    mask[:, :width] = kept.reshape(len(flat), width)
    return mask.reshape(weight.shape)


def _remove_units(body: nn.Module, variant: Pruned) -> None:
    try:
        graph = fx.symbolic_trace(copy.deepcopy(body)).graph
    except Exception as error:  # tracing runs the network's own code
        raise BadRequest(f"{variant.label}: the network can't be traced: {error}; use sparse or distilled") from error
    found = [chain for node in graph.nodes if (chain := _chain(body, node))]
    if not found:
        raise BadRequest(
            f"{variant.label}: no layer of the network feeds one other layer alone, so none can lose units; "
            "use sparse or distilled"
        )
    for layer, between, following in found:
        kept = _kept(layer, variant.ratio)
        for norm in between:
            _shrink_norm(norm, kept)
        shrink(layer, kept, side=0)
        shrink(following, kept, side=1)


def _chain(body: nn.Module, node: fx.Node) -> tuple[nn.Module, list[nn.Module], nn.Module] | None:
    """The layer of a call, the norms behind it and the one layer that reads it; None where others read it too."""
    layer, between = _module(body, node), []
    if not isinstance(layer, LAYERS) or getattr(layer, "groups", 1) != 1:
        return None
    while len(node.users) == 1:
        (node,) = node.users
        module = _module(body, node)
        if isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1:
            return (layer, between, module) if module.weight.shape[1] == len(layer.weight) else None
        if isinstance(module, NORMS):
            between.append(module)
        elif not _unitwise(node, module):
            return None
    return None


def _module(body: nn.Module, node: fx.Node) -> nn.Module | None:
    return body.get_submodule(str(node.target)) if node.op == "call_module" else None


def _unitwise(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op == "call_method":
        return node.target in UNITWISE_METHODS
    return isinstance(module, UNITWISE) or (node.op == "call_function" and node.target in UNITWISE_CALLS)


def _kept(layer: nn.Module, ratio: float) -> Tensor:
    """The numbers of the units that stay, by the L2 norm of their weights."""
    going = num_going(ratio, len(layer.weight))
    marked = torch_prune.ln_structured(copy.deepcopy(layer), "weight", amount=going, n=2, dim=0)
    return marked.weight_mask.flatten(1).any(dim=1).nonzero().flatten()


def _shrink_norm(norm: nn.Module, kept: Tensor) -> None:
    """Keep these units of a norm in place; one that doesn't scale, or keeps no statistics, has less to lose."""
    if norm.affine:
        norm.weight, norm.bias = (nn.Parameter(own.detach()[kept]) for own in (norm.weight, norm.bias))
    if norm.track_running_stats:
        norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]
    norm.num_features = len(kept)


def _train_on(source: Source, train: Rows, held: Rows, epochs: int) -> None:
    """Train the body on, by the workload's own loss, in this process: a few epochs from weights that are nearly right
    need no gang."""
    request, body = source.request, source.body
    (x, y), (x_held, y_held) = train, held
    optimiser = torch.optim.Adam(body.parameters(), lr=min(FINE_TUNING_RATE, request.train.optimiser.learning_rate))
    loss_of = loss_on(request.train, request.feature, request.label, y.numpy())
    best, best_loss = copy.deepcopy(body.state_dict()), _loss(body, loss_of, x_held, y_held)
    for _ in range(epochs):
        body.train()
        for rows in torch.randperm(len(x)).split(request.train.batch_size):
            optimiser.zero_grad(set_to_none=True)
            loss_of(body(x[rows]), y[rows]).backward()
            optimiser.step()
        if (loss := _loss(body, loss_of, x_held, y_held)) < best_loss:
            best, best_loss = copy.deepcopy(body.state_dict()), loss
    body.load_state_dict(best)
    body.eval()


@torch.no_grad()
def _loss(body: nn.Module, loss_of: Loss, x: Tensor, y: Tensor) -> float:
    body.eval()
    parts = zip(x.split(1024), y.split(1024), strict=True)
    return sum(len(b) * float(loss_of(body(a), b)) for a, b in parts) / len(y)


def _tensors(source: Source, data: Path, split: str) -> Rows:
    request = source.request
    rows, y = read_split(data, request.feature, request.label, split)
    x: Any = encode(request.feature, rows, source.tokenizer)
    if request.feature.kind == "tokens":
        y = encode_tags(request.feature, rows, y, source.tokenizer)
    return torch.from_numpy(x), torch.from_numpy(y)
