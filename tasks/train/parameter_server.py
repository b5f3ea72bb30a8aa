"""Train against a parameter server (Li et al. 2014), asynchronous with a bound (stale synchronous parallel, Ho et al.
2013): no rank waits for the slowest one until it is ``staleness`` updates ahead of it.

Rank 0 holds the weights that are learnt, beside the copy that it trains on itself. Each rank computes gradients on a
copy of its own, sends them, and goes on with the weights that come back. A thread of rank 0 applies what arrives, in
the order in which it does, so two trainings end in other bits. N ranks make N updates where others make one: each
moves by an N-th of the rate, so an epoch moves as far.

Ranks meet where something is summed over all of them: at the end of an epoch, and to save. There all copies are
alike, and what is saved is what any other strategy goes on with.

    P parameters, of all that is learnt, in one row
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.spec.train import Train
from tasks.train import learn
from tasks.train.strategy import Shared, learnt

# Sent in the place of a rate: the rank makes no more updates until all have met.
MEETS = -1.0


class ParameterServer(Shared):
    name = "parameter-server"

    def __init__(self, network: nn.Module, train: Train, gradients: str = "fp32") -> None:
        super().__init__(network, train)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # Its own connections, of the CPU: the thread's messages are not mixed with the ranks' sums.
        self.group = dist.new_group(backend="gloo")
        self.staleness = train.parameter_server.staleness
        self.call = copy.deepcopy(network) if self.rank == 0 else network
        self.server: Server | None = None
        self.apart = False

    def update(self, optimiser: torch.optim.Optimizer, rate: float) -> None:
        gradients = [_filled(p.grad, p) for p in learnt(self.call)]
        message = flat([*gradients, torch.tensor([rate])])
        if self.rank == 0:
            self.server = self.server or Server(self, optimiser)
            weights = self.server.give(message)
        else:
            weights = self._ask(message)
        self.apart = True
        take(weights, self.call)

    def total(self, value: Tensor) -> Tensor:
        self.meet()
        return super().total(value)

    def meet(self) -> None:
        """Wait until every rank's updates are in the weights, and take them."""
        if not self.apart:
            return
        if self.rank == 0:
            weights, self.server = self.server.end(), None
        else:
            weights = self._ask(flat([torch.zeros(self.num_learnt), torch.tensor([MEETS])]))
        self.apart = False
        take(weights, self.call)
        # Rank 0 trains a copy; what is no weight, as a running mean, only the copy has learnt.
        for own, trained in zip(self.network.buffers(), self.call.buffers(), strict=True):
            own.copy_(trained)

    def norm(self, limit: float | None) -> float:
        return learn.norm_of_gradients(self.call, limit)

    def wire_bytes(self, world: int, steps: int) -> int:
        # Gradients there, weights back.
        return steps * 2 * (world - 1) * self.gradient_bytes

    @property
    def num_learnt(self) -> int:
        return sum(p.numel() for p in learnt(self.network))

    def _ask(self, message: Tensor) -> Tensor:
        dist.send(message, 0, group=self.group)
        weights = torch.empty(len(message) - 1)
        dist.recv(weights, 0, group=self.group)
        return weights


class Server:
    """The weights, from one meeting of the ranks to the next. A thread answers the other ranks; rank 0 asks here."""

    def __init__(self, strategy: ParameterServer, optimiser: torch.optim.Optimizer) -> None:
        self.strategy, self.optimiser = strategy, optimiser
        self.changed = threading.Condition()
        # How many updates each rank has made, and which have ended.
        self.clocks, self.ended = [0] * strategy.world, [False] * strategy.world
        self.waiting: list[int] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, name="parameter-server", daemon=True)
        self.thread.start()

    def give(self, message: Tensor) -> Tensor:
        """Apply an update of rank 0, and return the weights once it is not too far ahead; float32 [P]."""
        with self.changed:
            self._apply(0, message)
        self._answer()
        with self.changed:
            self.changed.wait_for(lambda: self.error or not self._is_ahead(0))
            return self._weights()

    def end(self) -> Tensor:
        """Return the weights with every rank's updates; float32 [P]."""
        with self.changed:
            self.ended[0] = True
            self.changed.notify_all()
        self.thread.join()
        return self._weights()

    def _serve(self) -> None:
        """Take updates as they come, and answer each rank once it may go on; all that ended, when all have."""
        message = torch.empty(self.strategy.num_learnt + 1)
        try:
            while not all(self.ended[1:]):
                rank = dist.recv(message, group=self.strategy.group)
                with self.changed:
                    self._apply(rank, message)
                    self.waiting.append(rank)
                self._answer()
            with self.changed:
                self.changed.wait_for(lambda: self.ended[0])
            self._answer()
        except BaseException as error:  # noqa: BLE001 - rank 0 raises it
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def _answer(self) -> None:
        """Send the weights to those waiting ranks that may go on: whoever made an update may have let them."""
        with self.changed:
            ready = [rank for rank in self.waiting if not self._is_ahead(rank)]
            self.waiting = [rank for rank in self.waiting if rank not in ready]
            weights = self._weights() if ready else None
        for rank in ready:
            dist.send(weights, rank, group=self.strategy.group)

    def _is_ahead(self, rank: int) -> bool:
        if self.ended[rank]:
            return not all(self.ended)
        return self.clocks[rank] - min(self.clocks) > self.strategy.staleness

    def _apply(self, rank: int, message: Tensor) -> None:
        """Make an update of a rank's gradients, or note that it ended."""
        if (rate := float(message[-1])) == MEETS:
            self.ended[rank] = True
        else:
            parameters = learnt(self.strategy.network)
            for parameter, part in zip(parameters, split(message[:-1], parameters), strict=True):
                parameter.grad = part.to(parameter.device)
            learn.set_rate(self.optimiser, rate / self.strategy.world)
            self.optimiser.step()
            self.clocks[rank] += 1
        self.changed.notify_all()

    def _weights(self) -> Tensor:
        if self.error:
            raise RuntimeError("the parameter server ended") from self.error
        return flat(learnt(self.strategy.network))


def flat(tensors: list[Any]) -> Tensor:
    """Return tensors in one row, on the CPU; float32."""
    return torch.cat([tensor.detach().reshape(-1).float().cpu() for tensor in tensors])


def split(row: Tensor, like: list[nn.Parameter]) -> list[Tensor]:
    """Return the parts of a row, of the shapes of ``like``."""
    parts = row.split([parameter.numel() for parameter in like])
    return [part.view_as(parameter) for part, parameter in zip(parts, like, strict=True)]


def take(row: Tensor, network: nn.Module) -> None:
    """Give a network the weights of a row, and no gradients."""
    parameters = learnt(network)
    with torch.no_grad():
        for parameter, part in zip(parameters, split(row, parameters), strict=True):
            parameter.copy_(part)
            parameter.grad = None


def _filled(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    """What a batch did not touch has no gradient; it moves by nothing."""
    return torch.zeros_like(parameter) if gradient is None else gradient
