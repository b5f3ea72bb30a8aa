"""Which job holds which GPU of this machine. A lease is a label of its container, so it ends with it, whoever dies.

    free ──choose──► create the containers, which bear the ids ──confirm──► start them
                                                   └── an older container bears one too: withdraw

Two state folders on one daemon need no common lock: each sees the other's containers before it starts its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.engines.protocol import Job
from tasks.spec.errors import BadRequest, TryAgain
from tasks.spec.settings import GPUS

DEVICES = "devices"
# By it NVIDIA's runtime decides which GPUs a container gets.
VISIBLE = "NVIDIA_VISIBLE_DEVICES"


def found_devices(driver: Path = GPUS) -> tuple[str, ...]:
    """Return the ids of this machine's GPUs, as its NVIDIA driver tells them; none where it has none."""
    pages = [path.read_text() for path in sorted(driver.glob("*/information"))]
    return tuple(found[1] for page in pages if (found := re.search(r"^GPU UUID:\s+(\S+)", page, re.MULTILINE)))


def choose(job: Job, devices: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    """Return the free devices that a job gets, those of node 0 first. Pure.

    Raises:
        BadRequest: it wants more than there are. TryAgain: it wants more than are free now.
    """
    wanted = job.nodes * job.limits.gpus
    if not wanted or not devices:
        return ()
    if wanted > len(devices):
        raise BadRequest(f"job {job.key}: {wanted} GPUs, this machine has {len(devices)}; lower train.resources.gpus")
    free = [device for device in devices if device not in taken]
    if wanted > len(free):
        raise TryAgain(f"job {job.key}: {wanted} GPUs, {len(free)} of {len(devices)} are free now; it waits its turn")
    return tuple(free[:wanted])


def leased(containers: Iterable[dict[str, Any]], label: str) -> set[str]:
    """Return the devices that containers bear, as the daemon lists them. Pure."""
    return {device for one in containers for device in one["Labels"].get(label, "").split(",") if device}


def confirm(job: Job, mine: set[str], devices: tuple[str, ...], containers: list[dict[str, Any]], label: str) -> None:
    """Withdraw where a container that is none of ``mine`` bears one of our devices and was there before. Pure.

    Raises:
        TryAgain: another job was faster.
    """
    ours = min(((one["Created"], one["Id"]) for one in containers if one["Id"] in mine), default=(0, ""))
    for one in containers:
        if one["Id"] in mine or (one["Created"], one["Id"]) > ours:
            continue
        if both := leased([one], label) & set(devices):
            raise TryAgain(f"job {job.key}: another job was given {min(both)} at the same time; it waits its turn")
