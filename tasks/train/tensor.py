"""Ranks that share each layer: every rank reads all rows and has a part of each dense pair and of the attention heads
(Shoeybi et al. 2019, by torch's DTensor).

Of a pair of dense layers the first is divided by its outputs and the second by its inputs, so that one sum over the
ranks a pair is all they exchange; query, key and value are such a first, the layer after the attention its second.
All else (embeddings, norms, the head) every rank has whole, and computes alike.

    B rows   T tokens   D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tasks.spec.errors import BadRequest
from tasks.spec.train import Train
from tasks.train.encoder import Encoder
from tasks.train.strategy import Divided, digest_of


class Tensors(Divided):
    """Needs a network of ``tasks.spec.parallel.DIVIDED``, without dropout.

    Raises:
        BadRequest: an encoder from a folder has a number of heads or units that the ranks can't divide.
    """

    name = "tensor"

    def __init__(self, network: nn.Module, train: Train, gradients: str = "fp32") -> None:
        from torch.distributed.tensor.parallel import parallelize_module

        super().__init__(network, train)
        self.summed = Summed()
        if isinstance(network, Encoder):
            divide_heads(network, self.parts.size())
        plan = plan_of_encoder(network) if isinstance(network, Encoder) else plan_of_dense(network)
        parallelize_module(network, self.parts, plan)
        self.summed.watch(network, plan)

    def whole(self, value: Any) -> Tensor:
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()

    def part(self, parameter: Any, value: Tensor) -> Any:
        from torch.distributed.tensor import distribute_tensor

        if not hasattr(parameter, "placements"):
            return value.to(parameter.device, copy=True)
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    def held(self) -> tuple[list[Tensor], list[Tensor]]:
        parts, copies = [], []
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                where = parts if divided(parameter) else copies
                where.append(parameter.grad.to_local() if hasattr(parameter, "to_local") else parameter.grad)
        return parts, copies

    def wire_bytes(self, world: int, steps: int) -> int:
        summed = 2 * (self.parts.size() - 1) * self.summed.take()
        return self.readers * summed + self.copied_bytes(steps)

    def fingerprint(self) -> int:
        copies = (p for p in self.network.parameters() if not divided(p))
        return digest_of(p.to_local() if hasattr(p, "to_local") else p for p in copies)


class Summed:
    """Counts the bytes of what ranks sum up in training: the answer of each second layer, and where something before it
    learns, the gradient of each first one's input."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def take(self) -> int:
        """Return what was counted since the last call."""
        found, self.num_bytes = self.num_bytes, 0
        return found

    def watch(self, network: nn.Module, plan: dict[str, Any]) -> None:
        from torch.distributed.tensor.parallel import RowwiseParallel

        for name, style in plan.items():
            module = network.get_submodule(name)
            if isinstance(style, RowwiseParallel):
                module.register_forward_hook(lambda _, x, answer: self.add(answer))
            elif name.rpartition(".")[0] not in plan:
                module.register_forward_pre_hook(lambda _, x: self.add(x[0]) if x[0].requires_grad else None)

    def add(self, tensor: Tensor) -> None:
        if torch.is_grad_enabled():
            self.num_bytes += tensor.numel() * tensor.element_size()


def divided(parameter: Any) -> bool:
    """Whether a rank holds only a part of a parameter."""
    return any(placement.is_shard() for placement in getattr(parameter, "placements", ()))


def plan_of_encoder(network: Encoder) -> dict[str, Any]:
    """Return who is divided how, by the module's name: query, key, value and the inner layer by their outputs."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

    plan: dict[str, Any] = {}
    for number in range(len(network.layers)):
        attention = f"layers.{number}.attention"
        # Said once for all three, so that their gradients are added before they are summed over the ranks.
        whole = (Replicate(), None)
        plan[attention] = PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole)
        plan |= {f"{attention}.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        plan |= {f"{attention}.out": RowwiseParallel()}
        plan |= {f"layers.{number}.inner": ColwiseParallel(), f"layers.{number}.outer": RowwiseParallel()}
    return plan


def plan_of_dense(network: nn.Module) -> dict[str, Any]:
    """Return who is divided how: dense layers by pairs; a last one without a partner stays whole."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    dense = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    pairs = zip(dense[::2], dense[1::2], strict=False)
    return {name: style for one, two in pairs for name, style in ((one, ColwiseParallel()), (two, RowwiseParallel()))}


def divide_heads(network: Encoder, world: int) -> None:
    """Let each rank have its part of the heads.

    Raises:
        BadRequest: they, or a layer's inner units, are no multiple of the ranks.
    """
    layers: Any = network.layers
    for layer in layers:
        for what, size in {"attention heads": layer.attention.heads, "inner units": layer.inner.out_features}.items():
            if size % world:
                raise BadRequest(
                    f"train.recipe: the encoder has {size} {what}, must be a multiple of nodes x ranks / copies = "
                    f"{world} where train.parallel is 'tensor'"
                )
        layer.attention.heads //= world
