"""Training on hosts that share no disk, daemons of the tests' own in network namespaces: a Swarm of two, one of which
dies, and a daemon that is restarted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.engines.docker import DockerEngine
from tasks.engines.protocol import Job, JobState, Limits
from tasks.engines.swarm import SwarmEngine
from tasks.gangs import Containers
from tasks.spec.errors import BadRequest, TryAgain
from tasks.store.files import sha256_file
from tasks.train.fit import fit

pytestmark = pytest.mark.timeout(300)
KEY = "train-of-a-test"


@pytest.fixture(scope="module")
def hosts(swarm_of) -> Iterator[Any]:
    with swarm_of("drydock/trainer") as made:
        yield made


class Training:
    """One training on an engine: what was told, which epochs were heard of, what is left."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.folder = engine, engine.home / "room"
        self.told: list[str] = []
        self.epochs: list[int] = []

    def fit(self, request: Any, at: int, do: Callable[[], None]) -> None:
        """Train, and do something when epoch ``at`` is over, once."""

        def heard(line: dict[str, float]) -> None:
            if "validation_loss" not in line:
                return  # from within an epoch
            self.epochs.append(int(line["epoch"]))
            if line["epoch"] == at:
                do()

        gang = Containers(self.engine, KEY, {"workload": "digits"}, self.engine.home / "log", self.told.append)
        fit(request, self.folder, None, heard, gang)

    def sha256(self) -> str:
        return sha256_file(self.folder / "weights.safetensors")

    def left(self) -> list[str]:
        own = {"label": f"drydock.site={self.engine.site}"}
        api = self.engine.api
        left = [one["Name"] for one in api.networks(filters=own)] + [one["Names"][0] for one in self.engine.list()]
        left += [one["Name"] for one in api.volumes(filters=own)["Volumes"] or []]
        services = api.services(filters=own) if isinstance(self.engine, SwarmEngine) else []
        return left + [one["Spec"]["Name"] for one in services]


@pytest.fixture
def on_swarm(hosts, allow_images, tmp_path, monkeypatch) -> Iterator[Training]:
    allow_images(tmp_path, "drydock/trainer")
    monkeypatch.setenv("DOCKER_HOST", hosts[0].address)
    training = Training(SwarmEngine(tmp_path))
    yield training
    # A Swarm removes a network, and a host what its tasks had, in its own time.
    wait_for(lambda: not training.left(), 20)
    training.engine.remove_all()
    wait_for(lambda: not any(host.docker("ps", "--all", "--quiet") for host in hosts))
    assert not any(host.docker("volume", "ls", "--quiet") for host in hosts)


@pytest.fixture(scope="module")
def undisturbed(digits_trained) -> str:
    return sha256_file(digits_trained.folder / "weights.safetensors")


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.1)


def probe(folder: Path, key: str, **more: Any) -> Job:
    """A job that prints what it may and has."""
    script = "echo $NVIDIA_VISIBLE_DEVICES; grep -E 'CapEff|NoNewPrivs' /proc/self/status; touch /x; sleep 2"
    limits = Limits(memory_bytes=2**26, gpus=more.pop("gpus", 0))
    facts = {"folder": str(folder), "image": "drydock/trainer", "limits": limits}
    return Job(key=key, command=("sh", "-c", script), **facts, **more)


def test_nodes_get_the_gpus_of_different_hosts_and_no_right(on_swarm, tmp_path):
    engine = on_swarm.engine
    with pytest.raises(BadRequest, match="and 1 GPUs for node 2 of 3, none of the Swarm's 2 hosts has"):
        engine.submit(probe(tmp_path, "three", nodes=3, gpus=1))
    handle = engine.submit(probe(tmp_path, "two", nodes=2, gpus=1))
    with pytest.raises(TryAgain, match=r"and 1 GPUs for node 0 of 1, no host has free now \(0 of 2 are down\)"):
        engine.submit(probe(tmp_path, "one-more", gpus=1))
    wait_for(lambda: engine.poll(handle).state is not JobState.RUNNING)
    text, _ = engine.logs(handle)
    assert sorted(line for line in text.splitlines() if "GPU-" in line) in (
        [f"[node 0] GPU-{one}", f"[node 1] GPU-{two}"] for one, two in ("ab", "ba")
    )
    assert text.count("CapEff:\t0000000000000000") == text.count("NoNewPrivs:\t1") == 2
    assert text.count("Read-only file system") == 2
    engine.forget(handle)


def test_two_hosts_train_as_two_ranks_of_one_machine_do(on_swarm, train_request, undisturbed, capfd):
    """Each host runs one node; the room goes there and the weights come back, and no path is common."""
    where: list[set[str]] = []

    def look() -> None:
        where.append({task["NodeID"] for task in on_swarm.engine.api.tasks({"desired-state": "running"})})

    on_swarm.fit(train_request(nodes=2, ranks=1), 3, look)
    assert len(where[0]) == 2, "both nodes on one host"
    assert on_swarm.epochs == list(range(1, 11))
    assert on_swarm.sha256() == undisturbed
    assert on_swarm.told == []
    assert "[rank 0] epoch 10: loss" in capfd.readouterr().out


def test_a_host_that_dies_takes_its_node_along_and_the_gang_goes_on(
    on_swarm, hosts, train_request, undisturbed, capfd
):
    on_swarm.fit(train_request(nodes=2, ranks=1, hang_seconds=5), 4, hosts[1].lose_power)
    assert on_swarm.told, "nobody was told"
    assert all("it starts again from its last whole checkpoint" in line for line in on_swarm.told)
    assert "resumed after epoch" in capfd.readouterr().out
    assert on_swarm.epochs == list(range(1, 11))
    assert on_swarm.sha256() == undisturbed
    hosts[1].start()


def test_a_daemon_restarts_while_a_gang_runs(
    hosts, allow_images, train_request, undisturbed, tmp_path, monkeypatch, capfd
):
    """Its containers die with it; who follows them waits until it is back, and starts the gang again."""
    allow_images(tmp_path, "drydock/trainer")
    monkeypatch.setenv("DOCKER_HOST", hosts[1].address)
    training = Training(DockerEngine(tmp_path))

    def restart() -> None:
        hosts[1].stop()
        threading.Timer(3, hosts[1].start).start()

    training.fit(train_request(ranks=2), 4, restart)
    out = capfd.readouterr().out
    assert "waiting: " in out
    assert "resumed after epoch" in out
    assert len(training.told) == 1
    assert training.epochs == list(range(1, 11))
    assert training.sha256() == undisturbed
    assert training.left() == []
