"""Every way to share a training among ranks, by the name that ``train.parallel`` has for it."""

from __future__ import annotations

from tasks.train.parameter_server import ParameterServer
from tasks.train.stages import Stages
from tasks.train.strategy import Ddp, Fsdp, One
from tasks.train.tensor import Tensors

STRATEGIES: dict[str, type[One]] = {
    way.name: way for way in (One, Ddp, Fsdp, Tensors, Stages, ParameterServer)
}
