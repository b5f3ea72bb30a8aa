"""What ranks send each other beside gradients. No pickle: tensors as they are, plain values as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tasks.train.checkpoint import Saved


def sent_by_first(saved: Saved | None, rank: int, device: torch.device) -> Saved | None:
    """Return rank 0's on every rank."""
    paper: dict[str, Any] | None = None
    if saved is not None:
        kinds = ((name, str(value.dtype), list(value.shape)) for name, value in saved.tensors.items())
        listed = [[name, kind.removeprefix("torch."), shape] for name, kind, shape in kinds]
        paper = {"facts": saved.facts, "tensors": listed}
    paper = told_by_first(paper, device)
    if paper is None:
        return None
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape in paper["tensors"]:
        mine = saved.tensors[name] if saved is not None else torch.empty(shape, dtype=getattr(torch, dtype))
        mine = mine.to(device)
        dist.broadcast(mine, 0)
        tensors[name] = mine.cpu()
    return Saved(paper["facts"], tensors)


def told_by_first(value: Any, device: torch.device) -> Any:
    """Return rank 0's plain value on every rank."""
    content = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(content)], device=device)
    dist.broadcast(length, 0)
    if dist.get_rank():
        content = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(content, 0)
    return json.loads(bytes(content.cpu().tolist()))
