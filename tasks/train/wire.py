"""Gradients as they go over the wire between DDP's ranks: whole, in half precision, or as a product of two thin
matrices (PowerSGD, Vogels et al. 2019). On a fast link what is saved is less than what it costs; measure (``auto``).
"""

# No postponed annotations here: DDP checks those of a hook as they are.
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# PowerSGD's rank, and how many steps go by whole, until gradients are steady.
RANK, WHOLE_STEPS = 4, 2
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# One bucket: with several, PowerSGD's chained exchanges meet in another order on each rank under Gloo, and abort.
ONE_BUCKET_MB = 1 << 20


def bucket_mb(gradients: str) -> int | None:
    """Return the bucket size that a way of sending needs; None: DDP's own."""
    return ONE_BUCKET_MB if gradients == "powersgd" else None


def send_as(model: DistributedDataParallel, gradients: str) -> None:
    """Let a DDP model send its gradients so."""
    if gradients == "powersgd":
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power

        state = power.PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=WHOLE_STEPS)
        model.register_comm_hook(state, power.powerSGD_hook)
    elif gradients in HALF:
        model.register_comm_hook(HALF[gradients], _halved)


def bytes_of(parameters: list[torch.Tensor], gradients: str) -> int:
    """Return the bytes of one rank's gradients on their way: of a matrix n x m by PowerSGD those of n + m columns."""
    if gradients in HALF:
        return 2 * sum(p.numel() for p in parameters)
    if gradients != "powersgd":
        return sum(p.numel() * p.element_size() for p in parameters)
    thin = [RANK * (len(p) + p.numel() // len(p)) if p.ndim > 1 else p.numel() for p in parameters]
    return 4 * sum(min(few, p.numel()) for few, p in zip(thin, parameters, strict=True))


def _halved(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket in half precision. torch's own hook for bfloat16 refuses Gloo; this is both."""
    whole = bucket.buffer()
    # Divided first: a sum of what float16 can hold may be beyond it.
    half = (whole / dist.get_world_size()).to(dtype)
    sent = dist.all_reduce(half, async_op=True).get_future()

    def back(done: Any) -> torch.Tensor:
        return whole.copy_(done.value()[0])

    return sent.then(back)
