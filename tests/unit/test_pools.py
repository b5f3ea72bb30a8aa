"""The queues for devices: which pool, how many slots, and who is refused at once."""

from __future__ import annotations

import pytest

from tasks.orchestrate.pools import fits_pool, pool_of, pool_of_students, sizes
from tasks.spec.compress import Distilled
from tasks.spec.errors import BadRequest
from tasks.spec.load import load_workload
from tasks.spec.settings import resolve


def digits(**train):
    workload = load_workload(resolve({}).home_path.parent / "workloads", "digits")
    return workload.model_copy(update={"train": workload.train.model_copy(update=train)})


def with_gpus(workload, gpus: int):
    resources = workload.train.resources.model_copy(update={"gpus": gpus})
    return workload.model_copy(update={"train": workload.train.model_copy(update={"resources": resources})})


def test_a_rank_takes_a_slot_and_a_gpu_one_of_its_own_pool():
    assert pool_of(digits(nodes=2, ranks=3).train) == ("training", 6)
    assert pool_of(with_gpus(digits(nodes=2, ranks=3), 2).train) == ("gpus", 12)


def test_a_compression_that_trains_students_waits_as_a_training_does():
    gpus = with_gpus(digits(nodes=1, ranks=2), 1)
    assert pool_of_students(gpus) == {}, "it trains none"
    student = Distilled(kind="distilled", student={"kind": "mlp", "hidden": (8,)})
    teaching = gpus.model_copy(update={"compress": gpus.compress.model_copy(update={"variants": (student,)})})
    assert pool_of_students(teaching) == {"pool": "gpus", "pool_slots": 2}


def test_pools_have_the_size_of_the_machine():
    settings = resolve({"DRYDOCK_TRAINING_SLOTS": "5", "DRYDOCK_GPUS": "4"})
    assert sizes(settings) == {"training": 5, "gpus": 4}


def test_a_gang_larger_than_its_pool_is_refused_at_once():
    settings = resolve({"DRYDOCK_TRAINING_SLOTS": "4", "DRYDOCK_GPUS": "2"})
    fits_pool(digits(nodes=2, ranks=2), settings)
    fits_pool(with_gpus(digits(nodes=1, ranks=2), 1), settings)
    with pytest.raises(BadRequest, match=r"train.nodes x train.ranks = 6, must be at most 4, .*DRYDOCK_TRAINING_SLOTS"):
        fits_pool(digits(nodes=3, ranks=2), settings)
    with pytest.raises(BadRequest, match=r"resources.gpus = 4, must be at most 2, the slots of the pool 'gpus'"):
        fits_pool(with_gpus(digits(nodes=2, ranks=2), 1), settings)
