"""Failures that a restart can't help, told apart from those that it can."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException

from tasks.spec.errors import BadRequest, DrydockError

# What a lost exchange says, inside a forward pass too: the other ranks' affair, and a restart helps.
LOST = ("gloo", "nccl", "connection", "cuda error", "out of memory", "can't allocate memory")


class Diverged(BadRequest):
    """The loss is no number, or grew beyond bounds; the same request diverges again."""


class RecipeFailed(BadRequest):
    """The network or its loss raised; it would again."""


@contextlib.contextmanager
def recipe_at_fault(rank: int) -> Iterator[None]:
    """Call a recipe's code inside.

    Raises:
        RecipeFailed: it raised; the message has the rank, the error and the line.
    """
    try:
        yield
    except (DrydockError, torch.OutOfMemoryError, MemoryError, SignalException):
        raise  # the last: the launcher ends this rank because another one died
    except Exception as error:
        if any(word in str(error).lower() for word in LOST):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/')[2]}, line {last.lineno}"
        raise RecipeFailed(
            f"train.recipe: rank {rank}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} "
            f"({where})"
        ) from error
