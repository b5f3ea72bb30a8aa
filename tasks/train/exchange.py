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


def gathered(tensors: dict[str, Tensor], device: torch.device, ranks: list[int]) -> dict[str, Tensor]:
    """Return on rank 0, which is the first of ``ranks``, the tensors of all of these; on others their own."""
    rank = dist.get_rank()
    if rank:
        kinds = [[name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()]
        paper = torch.tensor(list(json.dumps(kinds).encode()), dtype=torch.uint8, device=device)
        for part in (torch.tensor([len(paper)], device=device), paper, *tensors.values()):
            dist.send(part.to(device).contiguous(), 0)
        return tensors
    found = dict(tensors)
    for source in ranks[1:]:
        length = torch.zeros(1, dtype=torch.int64, device=device)
        dist.recv(length, source)
        paper = torch.empty(int(length), dtype=torch.uint8, device=device)
        dist.recv(paper, source)
        for name, dtype, shape in json.loads(bytes(paper.cpu().tolist())):
            value = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            dist.recv(value, source)
            found[name] = value
    return found


def told_by_first(value: Any, device: torch.device) -> Any:
    """Return rank 0's plain value on every rank."""
    content = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(content)], device=device)
    dist.broadcast(length, 0)
    if dist.get_rank():
        content = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(content, 0)
    return json.loads(bytes(content.cpu().tolist()))
