"""Training under faults: whatever dies or rots, the weights end bit for bit as those of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tasks.train.fit import fit

pytestmark = pytest.mark.timeout(180)
GANG = "tasks.train.gang"
FIT = """
import sys
from pathlib import Path
from tasks.spec.requests import TrainRequest
from tasks.train.fit import fit
fit(TrainRequest.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), None, lambda line: None)
"""


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def epochs(folder: Path) -> list[int]:
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["epoch"] for line in lines if line.endswith("}")]


def processes(folder: Path) -> list[psutil.Process]:
    """The launchers and ranks that work in a folder; a rank is a fork of its launcher."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if str(folder) in line and GANG in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def ranks(folder: Path) -> list[psutil.Process]:
    launchers = {process.pid for process in processes(folder)}
    return [process for process in processes(folder) if process.ppid() in launchers]


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


def start(request, folder: Path, scratch: Path) -> subprocess.Popen:
    """Start ``fit`` in a process of its own, as a step's job runs it."""
    (scratch / "request.json").write_text(request.model_dump_json())
    command = [sys.executable, "-P", "-c", FIT, str(scratch / "request.json"), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def undisturbed(digits_trained, train_request, tmp_path_factory) -> dict[int, str]:
    """The weights of an undisturbed run, by number of ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(train_request(), folder, None, lambda line: None)
    return {1: sha256(folder), 2: sha256(digits_trained.folder)}


def test_a_killed_rank_is_restarted_from_the_last_whole_checkpoint(undisturbed, train_request, tmp_path, capfd):
    at, killed, seen = random.randint(2, 6), [], []

    def on_epoch(line):
        seen.append(line["epoch"])
        if line["epoch"] >= at and not killed:
            victim = random.choice(ranks(tmp_path))
            victim.kill()
            killed.append(victim.pid)

    done = fit(train_request(ranks=2), tmp_path, None, on_epoch)
    out = capfd.readouterr().out
    assert killed, "the fault did not fire"
    assert "resumed after epoch" in out, "nothing was restarted"
    assert epochs(tmp_path) == seen == list(range(1, 11))
    assert sha256(tmp_path) == undisturbed[2], f"killed after epoch {at}"
    assert done["epochs"] == 10


def test_a_killed_step_leaves_no_rank_and_the_next_attempt_goes_on(undisturbed, train_request, tmp_path, capfd):
    request, folder = train_request(ranks=2), tmp_path / "room"
    folder.mkdir()
    with start(request, folder, tmp_path) as step:
        wait_for(lambda: len(epochs(folder)) >= 3)
        assert len(processes(folder)) == 3, "a launcher and two ranks"
        step.kill()
    wait_for(lambda: not processes(folder), 5)
    assert not (folder / "weights.safetensors").exists(), "the fault came too late"
    seen = []
    fit(request, folder, None, lambda line: seen.append(line["epoch"]))
    assert "resumed after epoch" in capfd.readouterr().out
    assert epochs(folder) == seen == list(range(1, 11))
    assert sha256(folder) == undisturbed[2]


def test_a_step_that_is_stopped_while_its_ranks_start_takes_them_along(train_request, tmp_path):
    request, folder = train_request(ranks=2), tmp_path / "room"
    folder.mkdir()
    with start(request, folder, tmp_path) as step:
        wait_for(lambda: len(processes(folder)) == 3)
        # The ranks import for seconds yet, and can't know of anything.
        step.send_signal(signal.SIGTERM)
        step.wait(30)
    wait_for(lambda: not processes(folder), 20)
    assert not epochs(folder)


@pytest.fixture(scope="module")
def halfway(train_request, tmp_path_factory) -> Path:
    """A folder of one rank that was killed after a few epochs, with two whole checkpoints."""
    scratch = tmp_path_factory.mktemp("halfway")
    (scratch / "room").mkdir()
    with start(train_request(), scratch / "room", scratch) as step:
        wait_for(lambda: len(epochs(scratch / "room")) >= 4)
        step.kill()
    wait_for(lambda: not processes(scratch / "room"), 5)
    assert not (scratch / "room" / "weights.safetensors").exists()
    # The kill may have come between a new checkpoint and the end of an old one.
    for old in sorted((scratch / "room" / "checkpoints").glob("epoch-*"))[:-2]:
        shutil.rmtree(old)
    return scratch / "room"


def _flip(state: Path) -> None:
    content = bytearray(state.read_bytes())
    content[random.randrange(len(content))] ^= 0x10
    state.write_bytes(content)


def test_a_checkpoint_that_rotted_is_set_aside_and_the_one_before_is_taken(
    undisturbed, halfway, train_request, tmp_path, capfd
):
    folder = tmp_path / "room"
    shutil.copytree(halfway, folder)
    before, newest = sorted((folder / "checkpoints").glob("epoch-*"))
    _flip(newest / "state.pt")
    fit(train_request(), folder, None, lambda line: None)
    out = capfd.readouterr().out
    assert f"{newest.name} set aside" in out
    assert "state.pt has digest" in out
    assert f"resumed after epoch {int(before.name[-5:])}" in out
    assert epochs(folder) == list(range(1, 11))
    assert sha256(folder) == undisturbed[1]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_flip, "state.pt has digest"),
        (lambda state: os.truncate(state, state.stat().st_size // 2), "another size"),
        (lambda state: state.unlink(), "state.pt is missing"),
        (lambda state: (state.parent / "manifest.json").unlink(), "has no manifest.json"),
        (lambda state: (state.parent / "more").write_text(""), "more is not in its manifest"),
    ],
)
def test_whatever_is_wrong_with_the_newest_the_one_before_is_taken(halfway, tmp_path, harm, words):
    from tasks.train import checkpoint

    shutil.copytree(halfway / "checkpoints", tmp_path / "checkpoints")
    before, newest = sorted((tmp_path / "checkpoints").glob("epoch-*"))
    harm(newest / "state.pt")
    state, refused = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state["epoch"] == int(before.name[-5:])
    assert refused[0].startswith(f"{newest.name} set aside: ")
    assert words in refused[0]


def test_where_every_checkpoint_rotted_it_begins_again(undisturbed, halfway, train_request, tmp_path, capfd):
    folder = tmp_path / "room"
    shutil.copytree(halfway, folder)
    for state in (folder / "checkpoints").glob("epoch-*/state.pt"):
        _flip(state)
    fit(train_request(), folder, None, lambda line: None)
    out = capfd.readouterr().out
    assert out.count("set aside") == 2
    assert "resumed" not in out
    assert epochs(folder) == list(range(1, 11))
    assert sha256(folder) == undisturbed[1]


def test_a_checkpoint_that_was_cut_short_does_not_count(halfway, tmp_path):
    from tasks.train import checkpoint

    shutil.copytree(halfway / "checkpoints", tmp_path / "checkpoints")
    newest = max((tmp_path / "checkpoints").glob("epoch-*"))
    newest.rename(newest.with_name(f".{newest.name}"))
    state, refused = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state["epoch"] == int(newest.name[-5:]) - 1
    assert refused == []


def test_two_checkpoints_are_kept_and_a_rotted_older_one_is_not_in_their_way(tmp_path):
    import torch

    from tasks.train import checkpoint

    for epoch in range(1, 5):
        checkpoint.save(tmp_path, epoch, {"epoch": epoch, "w": torch.ones(3) * epoch})
    assert sorted(os.listdir(tmp_path)) == ["epoch-00003", "epoch-00004"]
    assert checkpoint.load_newest(tmp_path)[0]["epoch"] == 4
    checkpoint.save(tmp_path, 4, {"epoch": 4, "w": torch.zeros(3)})
    assert checkpoint.load_newest(tmp_path)[0]["w"].sum() == 0
    assert checkpoint.load_newest(tmp_path / "nothing") == (None, [])


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    """A manifest over a pickle that would run something: the restricted load refuses it all the same."""
    import torch

    from tasks.store.manifest import write_manifest
    from tasks.train import checkpoint

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    (tmp_path / "epoch-00001").mkdir()
    torch.save({"epoch": 1, "x": Harm()}, tmp_path / "epoch-00001" / "state.pt")
    write_manifest(tmp_path / "epoch-00001")
    state, refused = checkpoint.load_newest(tmp_path)
    assert state is None
    assert "epoch-00001 set aside" in refused[0]
    assert not (tmp_path / "harmed").exists()
