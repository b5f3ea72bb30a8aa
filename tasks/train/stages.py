"""Ranks that have some of the layers each: a batch passes through them in micro-batches, so that all have work
(GPipe, Huang et al. 2018; one forwards, one backwards, Narayanan et al. 2019; by torch.distributed.pipelining).

A rank keeps its layers of the network, under their names, and drops the others. Shapes between stages are known from
the batch: no stage has to ask another.

    B rows   T tokens   D width   K classes
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.spec.errors import BadRequest
from tasks.spec.train import Train
from tasks.train.encoder import Encoder, Tagger, known
from tasks.train.exchange import gathered
from tasks.train.strategy import FLOAT_BYTES, Divided, LossOf

# Schedules of so many shapes of batch are kept: each holds what it receives.
MOST_SHAPES = 8


class Stages(Divided):
    """Needs a network of ``tasks.spec.parallel.DIVIDED``.

    Raises:
        BadRequest: an encoder from a folder has fewer layers than there are ranks.
    """

    name = "pipeline"

    def __init__(self, network: nn.Module, train: Train, gradients: str = "fp32") -> None:
        super().__init__(network, train)
        # Of a group's ranks; messages are sent by the number among all.
        self.rank, self.world = self.parts.get_local_rank(), self.parts.size()
        self.ranks = dist.get_process_group_ranks(self.group)
        self.pipeline = train.pipeline
        kind = EncoderStage if isinstance(network, Encoder) else DenseStage
        self.call = self.stage = kind(network, self.rank, self.world, train.precision == "bf16")
        self.schedules: dict[Any, Any] = {}
        self.num_bytes = 0

    def both_ways(self, x: Tensor, y: Tensor, loss_of: LossOf) -> Tensor:
        # Rows that do not divide go in fewer parts.
        parts = math.gcd(len(x), self.pipeline.micro_batches)
        self.loss_of = loss_of
        schedule, losses = self.schedule(x, parts), []
        args = (x,) if self.stage.first else ()
        schedule.step(*args, target=y if self.stage.last else None, losses=losses, return_outputs=False, rows=x)
        loss = torch.stack(losses).detach().sum() if self.stage.last else torch.zeros((), device=self.device)
        dist.broadcast(loss, self.ranks[-1], group=self.group)
        self.num_bytes += 2 * FLOAT_BYTES * self.stage.between(x)
        return loss

    def answer(self, x: Tensor) -> Tensor:
        hidden = None
        if not self.stage.first:
            hidden = torch.empty(self.stage.takes(x), device=x.device)
            dist.recv(hidden, self.ranks[self.rank - 1])
        found = self.stage(x if hidden is None else hidden, rows=x).contiguous()
        if not self.stage.last:
            dist.send(found, self.ranks[self.rank + 1])
            found = torch.empty(self.stage.logits(x), device=x.device)
        dist.broadcast(found, self.ranks[-1], group=self.group)
        return found

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # Copies have the same.
        return tensors if self.reader else gathered(tensors, self.device, self.ranks)

    def held(self) -> tuple[list[Tensor], list[Tensor]]:
        return [p.grad for p in self.network.parameters() if p.grad is not None], []

    def wire_bytes(self, world: int, steps: int) -> int:
        found, self.num_bytes = self.num_bytes, 0
        return self.readers * found + self.copied_bytes(steps)

    def schedule(self, x: Tensor, parts: int) -> Any:
        """Return the schedule for batches of this shape."""
        key = (tuple(x.shape), parts)
        if key not in self.schedules:
            if len(self.schedules) == MOST_SHAPES:
                self.schedules.clear()
            self.schedules[key] = self.new_schedule(x, parts)
        return self.schedules[key]

    def new_schedule(self, x: Tensor, parts: int) -> Any:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        part = x[: len(x) // parts]
        # Shapes that both sides know: nothing is asked, and nothing pickled.
        takes = part if self.stage.first else torch.empty(self.stage.takes(part), device=x.device, requires_grad=True)
        gives = torch.empty(self.stage.gives(part), device=x.device, requires_grad=True)
        stage = PipelineStage(
            self.stage,
            self.rank,
            self.world,
            self.device,
            input_args=takes,
            output_args=gives,
            group=self.group,
        )

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return self.loss_of(lambda _: logits, logits, target) / parts

        # 1F1B has no fewer parts than stages; in so small a batch the order makes no difference.
        turns = self.pipeline.schedule == "1f1b" and parts >= self.world
        return (Schedule1F1B if turns else ScheduleGPipe)(stage, parts, loss_fn=loss, scale_grads=False)


class Stage(nn.Module):
    """One rank's layers: what the stage before it answers, or the rows -> what the next one takes, or logits."""

    def __init__(self, network: nn.Module, rank: int, world: int, half: bool) -> None:
        super().__init__()
        self.network: Any = network
        self.world, self.half = world, half
        self.first, self.last = rank == 0, rank == world - 1

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            return self.through(x, rows).float()

    def through(self, x: Tensor, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def takes(self, rows: Tensor) -> tuple[int, ...]:
        """Return the shape of what a stage after the first takes."""
        raise NotImplementedError

    def gives(self, rows: Tensor) -> tuple[int, ...]:
        """Return the shape of its answer."""
        raise NotImplementedError

    def logits(self, rows: Tensor) -> tuple[int, ...]:
        """Return the shape of the last stage's answer."""
        raise NotImplementedError

    def between(self, rows: Tensor) -> int:
        """Return how many numbers all stages together give on to the next."""
        raise NotImplementedError


class EncoderStage(Stage):
    """[B, T, D] -> [B, T, D]; the first stage embeds, the last one answers."""

    def __init__(self, network: Encoder, rank: int, world: int, half: bool) -> None:
        super().__init__(network, rank, world, half)
        if len(network.layers) < world:
            raise BadRequest(
                f"train.recipe: the encoder has {len(network.layers)} layers, must have at least nodes x ranks / "
                f"copies = {world} where train.parallel is 'pipeline'"
            )
        self.width, self.num_classes = network.head.in_features, network.head.out_features
        self.mine = share_of(len(network.layers), rank, world)
        for number in set(range(len(network.layers))) - set(self.mine):
            network.layers[number] = nn.Identity()
        unused = [] if self.first else ["words", "positions", "kinds", "norm"]
        for name in (*unused, *([] if self.last else ["head"])):
            delattr(network, name)

    def through(self, x: Tensor, rows: Tensor) -> Tensor:
        places = torch.arange(rows.shape[1], device=rows.device)
        there = known(rows, places)
        x = self.network.embed(rows, places) if self.first else x
        for number in self.mine:
            x = self.network.layers[number](x, there[:, None, None, :])
        return self.network.answer(x, there) if self.last else x

    def takes(self, rows: Tensor) -> tuple[int, ...]:
        return (*rows.shape, self.width)

    def gives(self, rows: Tensor) -> tuple[int, ...]:
        return self.logits(rows) if self.last else self.takes(rows)

    def logits(self, rows: Tensor) -> tuple[int, ...]:
        tags = rows.shape[1:] if isinstance(self.network, Tagger) else ()
        return (len(rows), self.num_classes, *tags)

    def between(self, rows: Tensor) -> int:
        return (self.world - 1) * math.prod(self.takes(rows))


class DenseStage(Stage):
    """Some dense layers of a multi-layer perceptron with what follows each; the first stage scales the rows, the last
    one a number that is learnt."""

    def __init__(self, network: nn.Module, rank: int, world: int, half: bool) -> None:
        super().__init__(network, rank, world, half)
        body = self.dense()
        starts = [number for number, module in enumerate(body) if isinstance(module, nn.Linear)]
        shares = [share_of(len(starts), other, world) for other in range(world)]
        # What each stage gives: the last one logits.
        self.widths = [body[starts[share[-1]]].out_features for share in shares]
        self.rank = rank
        begin = starts[shares[rank][0]]
        end = len(body) if self.last else starts[shares[rank + 1][0]]
        for number in set(range(len(body))) - set(range(begin, end)):
            body[number] = nn.Identity()

    def dense(self) -> Any:
        """Return the dense layers and what lies between them."""
        body = self.network[1]
        return body[0] if isinstance(body[0], nn.Sequential) else body

    def through(self, x: Tensor, rows: Tensor) -> Tensor:
        x = self.dense()(self.network[0](x) if self.first else x)
        return self.network[1][1](x) if self.last and self.dense() is not self.network[1] else x

    def takes(self, rows: Tensor) -> tuple[int, ...]:
        return (len(rows), self.widths[self.rank - 1])

    def gives(self, rows: Tensor) -> tuple[int, ...]:
        return (len(rows), self.widths[self.rank])

    def logits(self, rows: Tensor) -> tuple[int, ...]:
        return (len(rows), self.widths[-1])

    def between(self, rows: Tensor) -> int:
        return len(rows) * sum(self.widths[:-1])


def share_of(count: int, rank: int, world: int) -> range:
    """Return a rank's numbers of 0, ..., count - 1; shares differ by one at most."""
    return range(count * rank // world, count * (rank + 1) // world)
