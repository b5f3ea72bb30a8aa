"""How ranks share one training. Each strategy gives what the loop needs, and a state that is the same for all: what
one saved, another goes on with.

- ``one``: a rank alone.
- ``ddp``: a whole network a rank; gradients are averaged while they are computed (PyTorch DDP, Li et al. 2020).
- ``fsdp``: each rank holds a part of every tensor and gathers a layer when it is its turn (FSDP2, Zhao et al. 2023).

``whole`` and the forward pass of ``fsdp`` are exchanges: every rank calls them, in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

# So many hexadecimal digits are a whole number that a double holds.
FINGERPRINT_DIGITS = 12


class One:
    """A rank alone; the base of the others."""

    name = "one"

    def __init__(self, network: nn.Module, gradients: str = "fp32") -> None:
        # ``network`` has the parameters under their names; ``call`` is what a training step calls.
        self.network: nn.Module = network
        self.call: nn.Module = network

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Whether a backward pass inside ends with an exchange of gradients, or leaves it to a later one."""
        return contextlib.nullcontext()

    def whole(self, value: Any) -> Tensor:
        """Return a tensor of which this rank may hold a part."""
        return value.detach()

    def part(self, parameter: Any, value: Tensor) -> Any:
        """Return this rank's part of a whole tensor, divided as ``parameter`` is."""
        return value.clone()

    def state(self) -> dict[str, Tensor]:
        """Return the network's tensors, whole."""
        return {name: self.whole(value) for name, value in self.network.state_dict().items()}

    def wire_bytes(self, world: int) -> int:
        """Return what all ranks send for one step: of N ranks and gradients of G bytes, by the ring's formula."""
        return 0

    def fingerprint(self) -> int:
        """Return a number that is the same on every rank as long as their weights are; 0 where they are no copies."""
        return 0

    @property
    def gradient_bytes(self) -> int:
        found = (p for p in self.network.parameters() if p.requires_grad)
        return sum(p.numel() * p.element_size() for p in found)


class Ddp(One):
    name = "ddp"

    def __init__(self, network: nn.Module, gradients: str = "fp32") -> None:
        from torch.nn.parallel import DistributedDataParallel

        from tasks.train.wire import bucket_mb, send_as

        super().__init__(network)
        self.gradients = gradients
        size = bucket_mb(gradients)
        self.call = DistributedDataParallel(network, gradient_as_bucket_view=True, bucket_cap_mb=size)
        send_as(self.call, gradients)

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if now else self.call.no_sync()

    def wire_bytes(self, world: int) -> int:
        from tasks.train.wire import bytes_of

        return 2 * (world - 1) * bytes_of([p for p in self.network.parameters() if p.requires_grad], self.gradients)

    def fingerprint(self) -> int:
        digest = hashlib.sha256()
        for parameter in self.network.parameters():
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return int(digest.hexdigest()[:FINGERPRINT_DIGITS], 16)


class Fsdp(One):
    name = "fsdp"

    def __init__(self, network: nn.Module, gradients: str = "fp32") -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = next(network.parameters()).device.type
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        for module in list(network.modules()):
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    fully_shard(layer, mesh=mesh)
        super().__init__(network)
        self.call = self.network = fully_shard(network, mesh=mesh)

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        self.call.set_requires_gradient_sync(now)
        return contextlib.nullcontext()

    def whole(self, value: Any) -> Tensor:
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()

    def part(self, parameter: Any, value: Tensor) -> Any:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    def wire_bytes(self, world: int) -> int:
        # Gathered for the forward and for the backward pass, and scattered once.
        return 3 * (world - 1) * self.gradient_bytes


STRATEGIES: dict[str, type[One]] = {"one": One, "ddp": Ddp, "fsdp": Fsdp}
