"""How weights move: the optimiser, the learning rate of each step, and the norm that gradients are held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tasks.spec.train import Optimiser, Schedule

Named = dict[str, dict[str, torch.Tensor]]


def optimiser(chosen: Optimiser, model: nn.Module) -> torch.optim.Optimizer:
    kinds = {
        "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad,
    }  # fmt: skip
    more = {"momentum": chosen.momentum} if chosen.name == "sgd" else {}
    rate, decay = chosen.learning_rate, chosen.weight_decay
    return kinds[chosen.name](model.parameters(), lr=rate, weight_decay=decay, **more)


def schedule(chosen: Schedule, num_steps: int) -> Callable[[int], float]:
    """Return what the learning rate of a step (0, 1, ...) is multiplied by."""
    warmup = round(chosen.warmup_ratio * num_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if chosen.kind == "constant":
            return 1.0
        done = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if chosen.kind == "cosine" else 1 - done
        return chosen.final_ratio + (1 - chosen.final_ratio) * left

    return factor


def set_rate(found: torch.optim.Optimizer, rate: float) -> None:
    for group in found.param_groups:
        group["lr"] = rate


def norm_of_gradients(model: nn.Module, limit: float | None) -> float:
    """Return the gradients' norm over all parameters; those beyond ``limit`` are scaled down to it.

    Where parameters are divided among ranks, every rank must call it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def moments(found: torch.optim.Optimizer, model: nn.Module, whole: Callable[[Any], torch.Tensor]) -> Named:
    """Return what an optimiser remembers, by the parameter's name: the same whatever the ranks. ``whole`` puts a
    tensor together that is divided among them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: whole(value) for key, value in sorted(kept.items()) if isinstance(value, torch.Tensor)}
        for parameter, kept in found.state.items()
    }


def remember(
    found: torch.optim.Optimizer, model: nn.Module, kept: Named, part: Callable[[Any, torch.Tensor], Any]
) -> None:
    """Give back to an optimiser what ``moments`` returned; ``part`` is this rank's of a tensor."""
    for name, parameter in model.named_parameters():
        if name in kept:
            found.state[parameter] = {
                key: part(parameter, value) if value.shape == parameter.shape else value.clone()
                for key, value in kept[name].items()
            }
