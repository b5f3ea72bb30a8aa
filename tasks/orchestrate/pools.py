"""Airflow's pools as queues for devices: a gang takes all its slots or none, and keeps them while it is deferred."""

from __future__ import annotations

from typing import Any

from tasks.spec.compress import Distilled
from tasks.spec.errors import BadRequest
from tasks.spec.settings import Settings
from tasks.spec.workload import Train, Workload

TRAINING, GPUS = "training", "gpus"
SLOT = {TRAINING: "one slot for each rank that may train at once", GPUS: "one slot for each GPU"}
# What a gang too large for its pool may change, and the setting of the pool's size.
WANTED = {
    TRAINING: ("train.nodes x train.ranks", "DRYDOCK_TRAINING_SLOTS"),
    GPUS: ("train.nodes x train.ranks x train.resources.gpus", "DRYDOCK_GPUS"),
}


def pool_of(train: Train) -> tuple[str, int]:
    """Return the pool that a training waits in, and how many of its slots it takes. Pure."""
    if train.resources.gpus:
        return GPUS, train.world_size * train.resources.gpus
    return TRAINING, train.world_size


def pool_of_students(workload: Workload) -> dict[str, Any]:
    """Return where a compression waits that trains students as the workload trains, as an operator takes it; empty
    where none is trained. Pure."""
    if not any(isinstance(variant, Distilled) for variant in workload.compress.variants):
        return {}
    return dict(zip(("pool", "pool_slots"), pool_of(workload.train), strict=True))


def sizes(settings: Settings) -> dict[str, int]:
    """Return each pool's slots. Pure."""
    return {TRAINING: settings.training_slots, GPUS: settings.gpus}


def fits_pool(workload: Workload, settings: Settings) -> None:
    """Refuse a gang that its pool could never hold: Airflow itself would let it wait for ever.

    Raises:
        BadRequest: it takes more slots than the pool has.
    """
    pool, wanted = pool_of(workload.train)
    if wanted > (slots := sizes(settings)[pool]):
        what, variable = WANTED[pool]
        raise BadRequest(
            f"{workload.name}: {what} = {wanted}, must be at most {slots}, the slots of the pool '{pool}' ({variable})"
        )
