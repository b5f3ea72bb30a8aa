"""Leases of devices: chosen from what is free, held by containers, withdrawn from by the younger of two. Pure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.engines.leases import choose, confirm, found_devices, leased
from tasks.engines.protocol import Job, Limits
from tasks.spec.errors import BadRequest, TryAgain

LABEL = "drydock.devices"
FOUR = ("a", "b", "c", "d")


def job(gpus: int, nodes: int = 1) -> Job:
    limits = Limits(gpus=gpus)
    return Job(key="k", command=("true",), folder="/x", nodes=nodes, image="drydock/trainer", limits=limits)


def container(name: str, created: int, devices: str = "") -> dict:
    return {"Id": name, "Created": created, "Labels": {LABEL: devices} if devices else {}}


def test_the_driver_tells_its_devices(tmp_path):
    assert found_devices(tmp_path) == ()
    for number, text in (("0000:01", "Model: X\nGPU UUID: \t GPU-one\n"), ("0000:02", "GPU UUID: GPU-two\n")):
        (tmp_path / number).mkdir()
        (tmp_path / number / "information").write_text(text)
    assert found_devices(tmp_path) == ("GPU-one", "GPU-two")


def test_a_job_gets_what_is_free_or_waits_or_is_refused():
    assert choose(job(1), FOUR, {"a"}) == ("b",)
    assert choose(job(2, nodes=2), FOUR, set()) == FOUR
    assert choose(job(0), FOUR, set()) == ()
    with pytest.raises(TryAgain, match="2 GPUs, 1 of 4 are free now"):
        choose(job(2), FOUR, {"a", "b", "c"})
    with pytest.raises(BadRequest, match=r"6 GPUs, this machine has 4; lower train.resources.gpus"):
        choose(job(3, nodes=2), FOUR, set())


@given(st.lists(st.tuples(st.integers(1, 2), st.booleans()), max_size=20))
def test_no_device_is_ever_held_twice(steps):
    """Jobs come and go in any order."""
    held: list[dict] = []
    for number, (gpus, leaves) in enumerate(steps):
        if leaves and held:
            held.pop(0)
        try:
            devices = choose(job(gpus), FOUR, leased(held, LABEL))
        except TryAgain:
            assert 4 - len(leased(held, LABEL)) < gpus
            continue
        held.append(container(str(number), number, ",".join(devices)))
        assert len(leased(held, LABEL)) == sum(len(one["Labels"][LABEL].split(",")) for one in held)


def test_of_two_at_once_the_younger_withdraws():
    both = [container("one", 7, "a"), container("two", 7, "a"), container("other", 1, "b"), container("none", 0)]
    confirm(job(1), {"one"}, ("a",), both, LABEL)
    with pytest.raises(TryAgain, match="another job was given a at the same time"):
        confirm(job(1), {"two"}, ("a",), both, LABEL)
