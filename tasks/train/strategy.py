"""How ranks share one training. Each strategy gives what the loop needs, and a state that is the same for all: what
one saved, another goes on with.

- ``one``: a rank alone.
- ``ddp``: a whole network a rank; gradients are averaged while they are computed (PyTorch DDP, Li et al. 2020).
- ``fsdp``: each rank holds a part of every tensor and gathers a layer when it is its turn (FSDP2, Zhao et al. 2023).
- ``tensor`` and ``pipeline`` divide the network itself, see ``tasks.train.tensor`` and ``tasks.train.stages``.
- ``parameter-server``: one holds the weights and takes updates as they come, see ``tasks.train.parameter_server``.

``whole``, ``total``, ``norm`` and a forward pass may be exchanges: every rank calls them, in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.spec.train import Train
from tasks.train import learn

LossOf = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
# So many hexadecimal digits are a whole number that a double holds.
FINGERPRINT_DIGITS = 12
FLOAT_BYTES = 4


class One:
    """A rank alone; the base of the others."""

    name = "one"

    def __init__(self, network: nn.Module, train: Train, gradients: str = "fp32") -> None:
        # Of so many ranks, or groups of them, that read rows of their own, this is which.
        self.reader, self.readers = 0, 1
        # ``network`` has the parameters under their names; ``call`` is what a training step calls.
        self.network: nn.Module = network
        self.call: nn.Module = network
        self.num_parameters = sum(parameter.numel() for parameter in network.parameters())

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Whether a backward pass inside ends with an exchange of gradients, or leaves it to a later one."""
        return contextlib.nullcontext()

    def both_ways(self, x: Tensor, y: Tensor, loss_of: LossOf) -> Tensor:
        """Pass rows forwards and their loss backwards; return that loss, of the rows that this rank read.

        ``loss_of(call, x, y)``: the loss of what ``call`` answers.
        """
        loss = loss_of(self.call, x, y)
        loss.backward()
        return loss.detach()

    def answer(self, x: Tensor) -> Tensor:
        """Return the logits of rows that this rank read."""
        return self.network(x)

    def whole(self, value: Any) -> Tensor:
        """Return a tensor of which this rank may hold a part."""
        return value.detach()

    def part(self, parameter: Any, value: Tensor) -> Any:
        """Return this rank's part of a whole tensor, divided as ``parameter`` is and where it is."""
        return value.to(parameter.device, copy=True)

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return on rank 0 the tensors of all ranks, by name; other ranks get no more than they had."""
        return tensors

    def state(self) -> dict[str, Tensor]:
        """Return the network's tensors, whole; all of them on rank 0."""
        return self.collect({name: self.whole(value) for name, value in self.network.state_dict().items()})

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over all rows, of what this rank counted on those that it read; ``value`` is overwritten."""
        return value

    def norm(self, limit: float | None) -> float:
        """Return the norm of all gradients, and scale those beyond ``limit`` down to it."""
        return learn.norm_of_gradients(self.network, limit)

    def update(self, optimiser: torch.optim.Optimizer, rate: float) -> None:
        """Move the weights by the gradients that this rank has."""
        learn.set_rate(optimiser, rate)
        optimiser.step()

    def wire_bytes(self, world: int, steps: int) -> int:
        """Return what all ranks sent for the last ``steps``: of N ranks and G bytes to sum up, by the ring's formula.
        Called once for each stretch of steps."""
        return 0

    def fingerprint(self) -> int:
        """Return a number that is the same on every rank as long as their weights are; 0 where they are no copies."""
        return 0

    @property
    def gradient_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in learnt(self.network))


class Shared(One):
    """The base of ways in which each rank reads rows of its own."""

    def __init__(self, network: nn.Module, train: Train, gradients: str = "fp32") -> None:
        super().__init__(network, train)
        self.reader, self.readers = dist.get_rank(), dist.get_world_size()

    def total(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value


class Ddp(Shared):
    name = "ddp"

    def __init__(self, network: nn.Module, train: Train, gradients: str = "fp32") -> None:
        from torch.nn.parallel import DistributedDataParallel

        from tasks.train.wire import bucket_mb, send_as

        super().__init__(network, train)
        self.gradients = gradients
        size = bucket_mb(gradients)
        self.call = DistributedDataParallel(network, gradient_as_bucket_view=True, bucket_cap_mb=size)
        send_as(self.call, gradients)

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if now else self.call.no_sync()

    def wire_bytes(self, world: int, steps: int) -> int:
        from tasks.train.wire import bytes_of

        return steps * 2 * (world - 1) * bytes_of(learnt(self.network), self.gradients)

    def fingerprint(self) -> int:
        return digest_of(self.network.parameters())


class Fsdp(Shared):
    name = "fsdp"

    def __init__(self, network: nn.Module, train: Train, gradients: str = "fp32") -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = next(network.parameters()).device.type
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        for module in list(network.modules()):
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    fully_shard(layer, mesh=mesh)
        super().__init__(network, train)
        self.call = self.network = fully_shard(network, mesh=mesh)

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        self.call.set_requires_gradient_sync(now)
        return contextlib.nullcontext()

    def whole(self, value: Any) -> Tensor:
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()

    def part(self, parameter: Any, value: Tensor) -> Any:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    def wire_bytes(self, world: int, steps: int) -> int:
        # Gathered for the forward and for the backward pass, and scattered once.
        return steps * 3 * (world - 1) * self.gradient_bytes


class Divided(One):
    """The base of ways that divide the network: a group of ranks reads the same rows, and each has a part of what is
    learnt. There may be several such groups, each with a copy of the network and rows of its own: a mesh of ranks,
    whose gradients are averaged over the copies when a batch has passed."""

    def __init__(self, network: nn.Module, train: Train, gradients: str = "fp32") -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(network, train)
        shape = (dist.get_world_size() // train.divided_among, train.divided_among)
        mesh = init_device_mesh(next(network.parameters()).device.type, shape, mesh_dim_names=("copies", "parts"))
        self.parts, self.group = mesh["parts"], mesh["parts"].get_group()
        self.copies = mesh["copies"].get_group()
        self.reader, self.readers = mesh["copies"].get_local_rank(), shape[0]

    @contextlib.contextmanager
    def exchange(self, now: bool) -> Iterator[None]:
        yield
        if now and self.readers > 1:
            for gradient in self.gradients():
                dist.all_reduce(gradient, group=self.copies)
                gradient /= self.readers

    def gradients(self) -> list[Tensor]:
        """Return the gradients that this rank has, or its parts of them."""
        own, common = self.held()
        return [*own, *common]

    def held(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients that this rank alone has (a whole one, or a part), and those that every rank has."""
        raise NotImplementedError

    def total(self, value: Tensor) -> Tensor:
        if self.readers > 1:
            dist.all_reduce(value, group=self.copies)
        # All of a group counted the same rows. Rank 0's word, so that no rounding lets one stop before another.
        dist.broadcast(value, 0)
        return value

    def norm(self, limit: float | None) -> float:
        own, common = self.held()
        squares = sum((part.square().sum() for part in own), torch.zeros((), device=self.device))
        dist.all_reduce(squares, group=self.group)
        norm = (squares + sum(copy.square().sum() for copy in common)).sqrt()
        if limit is not None:
            scale = (limit / (norm + 1e-6)).clamp(max=1.0)
            for gradient in (*own, *common):
                gradient.mul_(scale)
        return float(norm)

    def copied_bytes(self, steps: int) -> int:
        """Return what all ranks sent to average the gradients of the copies."""
        if self.readers == 1:
            return 0
        numbers = torch.tensor(sum(gradient.numel() for gradient in self.gradients()), device=self.device)
        dist.all_reduce(numbers, group=self.group)
        return steps * 2 * (self.readers - 1) * FLOAT_BYTES * int(numbers)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def learnt(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def digest_of(tensors: Iterable[Tensor]) -> int:
    """Return a number that tells tensors from others by their bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return int(digest.hexdigest()[:FINGERPRINT_DIGITS], 16)
