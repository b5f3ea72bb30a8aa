"""Training in containers under fire: whatever dies, the weights end bit for bit as those of an undisturbed run, and
no container, network or volume is left."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.engines.docker import DockerEngine
from tasks.gangs import Containers
from tasks.spec.errors import BadRequest, DrydockError, TryAgain
from tasks.store.files import sha256_file
from tasks.train.fit import fit

pytestmark = pytest.mark.timeout(180)
KEY = "train-of-a-test"
STEP = """
import sys
from pathlib import Path
from tasks.engines.docker import DockerEngine
from tasks.spec.requests import TrainRequest
from tasks.gangs import Containers
from tasks.train.fit import fit
request = TrainRequest.model_validate_json(Path(sys.argv[1]).read_text())
home, key = Path(sys.argv[3]), sys.argv[4]
gang = Containers(DockerEngine(home), key, {"workload": "digits"}, home / "log")
fit(request, Path(sys.argv[2]), None, lambda line: None, gang)
"""


class Bench:
    """A state folder on the daemon, and one training in it."""

    def __init__(self, home: Path) -> None:
        self.home, self.engine, self.folder = home, DockerEngine(home), home / "room"
        self.folder.mkdir(parents=True)
        self.told: list[str] = []
        self.gang = Containers(self.engine, KEY, {"workload": "digits"}, home / "log", self.told.append)
        self.seen: list[int] = []

    def fit(self, request: Any, on_epoch: Callable[[int], None] = lambda epoch: None) -> dict[str, float]:
        def heard(line: dict[str, float]) -> None:
            if "validation_loss" not in line:
                return  # from within an epoch, as a busy machine has them
            self.seen.append(int(line["epoch"]))
            on_epoch(int(line["epoch"]))

        return fit(request, self.folder, None, heard, self.gang)

    def step(self, request: Any) -> subprocess.Popen[bytes]:
        """The same in a process of its own, as a step's job runs it."""
        (self.home / "request.json").write_text(request.model_dump_json())
        paths = [self.home / "request.json", self.folder, self.home]
        return subprocess.Popen([sys.executable, "-P", "-c", STEP, *map(str, paths), KEY], stdout=subprocess.DEVNULL)

    def ids(self) -> list[str]:
        return [one["Id"] for one in self.engine.list(f"drydock.job={KEY}")]

    def ranks(self) -> list[int]:
        """The ranks' process ids on this machine: forks of the launchers, which are children of an init."""
        found = []
        for container in self.ids():
            rows = [line for line in self.engine.api.top(container)["Processes"] if line[-1].startswith("python")]
            pids = {line[1] for line in rows}
            found += [int(line[1]) for line in rows if line[2] in pids]
        return found

    def volume(self) -> Path:
        return Path(self.engine.api.inspect_volume(f"drydock-{self.engine.site}-{KEY}")["Mountpoint"]) / "room"

    def left(self) -> list[str]:
        own = {"label": f"drydock.site={self.engine.site}"}
        api = self.engine.api
        containers = [one["Names"][0] for one in api.containers(all=True, filters=own)]
        networks = [one["Name"] for one in api.networks(filters=own)]
        return containers + networks + [one["Name"] for one in api.volumes(filters=own)["Volumes"] or []]

    def sha256(self) -> str:
        return hashlib.sha256((self.folder / "weights.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def bench(tmp_path, allow_images) -> Iterator[Bench]:
    allow_images(tmp_path, "drydock/trainer")
    found = Bench(tmp_path)
    yield found
    left = found.left()
    found.engine.remove_all()
    assert left == []


@pytest.fixture(scope="module")
def undisturbed(digits_trained) -> str:
    """The weights that two ranks of this machine's own processes end with."""
    return hashlib.sha256((digits_trained.folder / "weights.safetensors").read_bytes()).hexdigest()


def once(at: int, do: Callable[[], None]) -> Callable[[int], None]:
    """Do something when an epoch is over, once."""
    done: list[int] = []

    def on_epoch(epoch: int) -> None:
        if epoch >= at and not done:
            done.append(epoch)
            do()

    on_epoch.done = done  # type: ignore[attr-defined]
    return on_epoch


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.05)


def test_two_nodes_meet_and_end_as_two_ranks_of_one_machine_do(bench, train_request, undisturbed, capfd):
    done = bench.fit(train_request(nodes=2, ranks=1))
    assert done["epochs"] == 10
    assert bench.seen == list(range(1, 11))
    assert bench.sha256() == undisturbed
    out = capfd.readouterr().out
    assert "[node 0] [rank 0] epoch 10: loss" in out
    assert bench.told == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_restarted_by_its_launcher(bench, train_request, undisturbed, number, capfd):
    fault = once(random.randint(2, 5), lambda: os.kill(random.choice(bench.ranks()), number))
    bench.fit(train_request(ranks=2, hang_seconds=5), fault)
    assert fault.done, "the fault did not fire"
    assert "resumed after epoch" in capfd.readouterr().out
    assert bench.seen == list(range(1, 11))
    assert bench.sha256() == undisturbed
    assert bench.told == [], "no container had to be started again"


def test_a_gang_that_lost_a_node_starts_again_together(bench, train_request, undisturbed, capfd):
    first: list[str] = []

    def kill() -> None:
        first.extend(bench.ids())
        bench.engine.api.kill(random.choice(first), "SIGKILL")

    fault = once(3, kill)
    bench.fit(train_request(nodes=2, ranks=1), fault)
    assert fault.done, "the fault did not fire"
    assert "resumed after epoch" in capfd.readouterr().out
    assert bench.sha256() == undisturbed
    assert len(bench.told) == 1
    assert "the gang failed (exit code 137); it starts again from its last whole checkpoint" in bench.told[0]


def test_a_checkpoint_that_rotted_in_the_room_is_set_aside(bench, train_request, undisturbed, capfd):
    def rot() -> None:
        for container in bench.ids():
            bench.engine.api.pause(container)
        state = max((bench.volume() / "checkpoints").glob("epoch-*")) / "state.safetensors"
        content = bytearray(state.read_bytes())
        content[random.randrange(len(content))] ^= 0x10
        state.write_bytes(content)
        for container in bench.ids():
            bench.engine.api.kill(container, "SIGKILL")

    fault = once(4, rot)
    bench.fit(train_request(ranks=2), fault)
    out = capfd.readouterr().out
    assert fault.done, "the fault did not fire"
    assert "set aside: " in out
    assert "state.safetensors has digest" in out
    assert bench.sha256() == undisturbed


HUNGRY = """
import torch
from torch import nn

class Hungry(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.hungry = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), True

    def forward(self, x):
        if self.training and self.hungry:
            torch.ones(len(x) * 7_500_000).sum()  # 30 MB a row, once
            self.hungry = False
        return self.layers(x)

def build(feature, num_classes):
    return Hungry()
"""


def test_out_of_memory_means_smaller_micro_batches_and_the_same_batch(bench, train_request, tmp_path):
    (tmp_path / "model.py").write_text(HUNGRY)
    request = train_request(
        recipe={"kind": "model.py"}, ranks=2, batch_size=32, resources={"memory_bytes": 500 * 2**20},
        optimiser={"learning_rate": 0.01},
    ).model_copy(update={"model_py_sha256": sha256_file(tmp_path / "model.py")})  # fmt: skip
    reference: list[dict[str, float]] = []
    fit(request, tmp_path / "roomy", tmp_path / "model.py", reference.append)
    lines: list[dict[str, float]] = []
    fit(request, bench.folder, tmp_path / "model.py", lines.append, bench.gang)
    assert len(bench.told) == 1
    assert "(out of memory); it starts again with each rank's batch in 2 parts" in bench.told[0]
    assert len(lines) == len(reference) == 10
    worst = max(abs(a["train_loss"] - b["train_loss"]) for a, b in zip(lines, reference, strict=True))
    assert worst < 1e-3, "the same gradients but for the order of sums"


def test_what_can_never_fit_is_one_line(bench, train_request):
    request = train_request(ranks=2, batch_size=2, resources={"memory_bytes": 2**26})
    with pytest.raises(BadRequest, match="training is out of memory with 67108864 bytes a rank"):
        bench.fit(request)


def test_a_killed_step_leaves_the_containers_and_its_successor_finds_them(bench, train_request, undisturbed):
    request = train_request(ranks=2)
    with bench.step(request) as step:
        wait_for(lambda: (bench.folder / "history.jsonl").exists())
        before = bench.ids()
        step.kill()
    wait_for(lambda: step.poll() is not None)
    during: list[str] = []
    bench.fit(request, once(0, lambda: during.extend(bench.ids())))
    assert during == before != [], "the same containers, no second training"
    assert bench.sha256() == undisturbed


def test_a_step_that_is_told_to_end_takes_its_containers_along(bench, train_request):
    with bench.step(train_request(ranks=2)) as step:
        wait_for(lambda: (bench.folder / "history.jsonl").exists())
        step.send_signal(signal.SIGTERM)
        assert step.wait(30) == 128 + signal.SIGTERM
    assert bench.left() == []


def test_an_attempt_that_wakes_up_after_its_successor_began_is_fenced(bench, train_request, undisturbed):
    """A host that slept: its containers are frozen, the successor works in the same room, then they wake up."""
    request = train_request(ranks=2)
    with bench.step(request) as step:
        wait_for(lambda: (bench.folder / "history.jsonl").exists())
        step.kill()
    old = bench.ids()
    for container in old:
        bench.engine.api.pause(container)
    newer = bench.gang._job(request, bench.folder, 99, 1)
    bench.engine._launch(newer)
    wait_for(lambda: (bench.volume() / "attempt").read_text() == "99")
    for container in old:
        bench.engine.api.unpause(container)
    wait_for(lambda: all(bench.engine.api.inspect_container(one)["State"]["Status"] == "exited" for one in old))
    text = b"".join(bench.engine.api.logs(one) for one in old).decode()
    assert "woke up after attempt 99 began: its writes are refused" in text
    for container in old:
        bench.engine.api.remove_container(container)
    bench.fit(request)
    assert bench.sha256() == undisturbed


def test_a_restart_storm_is_bounded(bench, train_request, tmp_path):
    (tmp_path / "model.py").write_text("import os; os._exit(7)")
    request = train_request(recipe={"kind": "model.py"})
    request = request.model_copy(update={"model_py_sha256": sha256_file(tmp_path / "model.py")})
    with pytest.raises(DrydockError, match="the gang failed 4 times, the last time: exit code 7; no checkpoint was"):
        fit(request, bench.folder, tmp_path / "model.py", lambda line: None, bench.gang)
    assert len(bench.told) == 3


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 800 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("not root: no file system can be mounted")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_keeps_the_last_whole_checkpoint(small_disk, bench, train_request):
    labels = {"drydock.site": bench.engine.site, "drydock.job": KEY}
    small = {"type": "none", "device": str(small_disk), "o": "bind"}
    bench.engine.api.create_volume(f"drydock-{bench.engine.site}-{KEY}", driver_opts=small, labels=labels)
    with pytest.raises(TryAgain, match=r"the disk is full: epoch-\d+ needs \d+ bytes, \d+ are free"):
        bench.fit(train_request(ranks=2, recipe={"kind": "mlp", "hidden": [256]}))
    assert [path.name for path in (bench.folder / "checkpoints").iterdir()] != []


def test_a_loss_that_is_no_number_ends_it(bench, train_request):
    with pytest.raises(BadRequest, match=r"loss is (nan|inf) in epoch \d+"):
        bench.fit(train_request(ranks=2, optimiser={"name": "sgd", "learning_rate": 1e30}))
    assert bench.told == []


def test_no_daemon_is_one_line(bench, train_request, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    gang = Containers(DockerEngine(bench.home), KEY, {}, bench.home / "log")
    with pytest.raises(TryAgain, match=r"no Docker daemon answers at unix:///nowhere.sock; start it"):
        fit(train_request(), bench.folder, None, lambda line: None, gang)


def test_gpus_where_there_are_none_and_too_much_memory_are_one_line(bench, train_request):
    with pytest.raises(BadRequest, match="1 GPUs a node, this Docker daemon offers none; set"):
        bench.fit(train_request(resources={"gpus": 1}))
    with pytest.raises(BadRequest, match=r"this machine has \d+; lower train.resources.memory_bytes"):
        bench.fit(train_request(resources={"memory_bytes": 2**50}))


def test_two_submitters_of_one_key_start_one_gang(bench, train_request):
    request = train_request(ranks=2)
    job = bench.gang._job(request, bench.folder, 1, 1).model_copy(update={"command": ("sleep", "60")})
    threads = [threading.Thread(target=bench.engine.submit, args=(job,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bench.ids()) == 1
    bench.engine.cancel(f"job-{KEY}")
