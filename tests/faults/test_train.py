"""Training under faults: whatever dies or rots, the weights end bit for bit as those of an undisturbed run."""

from __future__ import annotations

import contextlib
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

from tasks.spec.errors import DrydockError
from tasks.train import fit as fitting
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


def ended(lines: list[dict]) -> list[int]:
    """The epochs that were told of when they had ended; a slow machine tells of one before, too."""
    return [line["epoch"] for line in lines if "validation_loss" in line]


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
        seen.append(line)
        if line["epoch"] >= at and not killed:
            victim = random.choice(ranks(tmp_path))
            victim.kill()
            killed.append(victim.pid)

    done = fit(train_request(ranks=2), tmp_path, None, on_epoch)
    out = capfd.readouterr().out
    assert killed, "the fault did not fire"
    assert "resumed after epoch" in out, "nothing was restarted"
    assert epochs(tmp_path) == ended(seen) == list(range(1, 11))
    assert sha256(tmp_path) == undisturbed[2], f"killed after epoch {at}"
    assert done["epochs"] == 10


def test_after_a_launcher_that_gave_up_another_goes_on_where_it_got_further(
    undisturbed, train_request, tmp_path, monkeypatch, capfd
):
    """A launcher that restarts nothing stands for one that met more than it restarts for."""
    stock, launched = fitting.command, []

    def command(request, folder) -> list[str]:
        launched.append([*stock(request, folder)[:-1], "--restarts=0", str(folder)])
        return launched[-1]

    monkeypatch.setattr(fitting, "command", command)

    def on_epoch(line):
        if line["epoch"] >= 2 and len(launched) == 1:
            for victim in ranks(tmp_path)[:1]:
                victim.kill()

    fit(train_request(ranks=2), tmp_path, None, on_epoch)
    assert len(launched) == 2
    assert "resumed after epoch" in capfd.readouterr().out
    assert sha256(tmp_path) == undisturbed[2]


def test_a_launcher_that_got_no_further_is_the_last(train_request, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(fitting, "command", lambda *asked: launched.append(asked) or ["sh", "-c", "exit 7"])
    with pytest.raises(DrydockError, match="the ranks ended with exit code 7"):
        fit(train_request(), tmp_path, None, lambda line: None)
    assert len(launched) == 1


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
    fit(request, folder, None, seen.append)
    assert "resumed after epoch" in capfd.readouterr().out
    assert epochs(folder) == ended(seen) == list(range(1, 11))
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
    _flip(newest / "state.safetensors")
    fit(train_request(), folder, None, lambda line: None)
    out = capfd.readouterr().out
    assert f"{newest.name} set aside" in out
    assert "state.safetensors has digest" in out
    assert f"resumed after epoch {int(before.name[-5:])}" in out
    assert epochs(folder) == list(range(1, 11))
    assert sha256(folder) == undisturbed[1]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_flip, "state.safetensors has digest"),
        (lambda state: os.truncate(state, state.stat().st_size // 2), "another size"),
        (lambda state: state.unlink(), "state.safetensors is missing"),
        (lambda state: (state.parent / "manifest.json").unlink(), "has no manifest.json"),
        (lambda state: (state.parent / "more").write_text(""), "more is not in its manifest"),
    ],
)
def test_whatever_is_wrong_with_the_newest_the_one_before_is_taken(halfway, tmp_path, harm, words):
    from tasks.train import checkpoint

    shutil.copytree(halfway / "checkpoints", tmp_path / "checkpoints")
    before, newest = sorted((tmp_path / "checkpoints").glob("epoch-*"))
    harm(newest / "state.safetensors")
    state, refused = checkpoint.load_newest(tmp_path / "checkpoints", contextlib.nullcontext)
    assert state.facts["place"]["epoch"] == int(before.name[-5:])
    assert refused[0].startswith(f"{newest.name} set aside: ")
    assert words in refused[0]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [before.name, f"rotted-{newest.name}"]


def test_without_verification_a_rotted_checkpoint_is_gone_on_from(halfway, tmp_path, monkeypatch):
    """No format notices a flipped byte by itself: what sets it aside is the manifest."""
    from tasks.train import checkpoint

    shutil.copytree(halfway / "checkpoints", tmp_path / "checkpoints")
    newest = max((tmp_path / "checkpoints").glob("epoch-*"))
    with (newest / "state.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 0x10]))
    monkeypatch.setattr(checkpoint, "verify", lambda folder: "")
    state, refused = checkpoint.load_newest(tmp_path / "checkpoints", contextlib.nullcontext)
    assert (state.facts["place"]["epoch"], refused) == (int(newest.name[-5:]), [])


def test_where_every_checkpoint_rotted_it_begins_again(undisturbed, halfway, train_request, tmp_path, capfd):
    folder = tmp_path / "room"
    shutil.copytree(halfway, folder)
    for state in (folder / "checkpoints").glob("epoch-*/state.safetensors"):
        _flip(state)
    fit(train_request(), folder, None, lambda line: None)
    out = capfd.readouterr().out
    assert out.count("set aside") == 2
    assert "resumed" not in out.partition("epoch 1:")[0]
    assert epochs(folder) == list(range(1, 11))
    assert sha256(folder) == undisturbed[1]


def test_a_checkpoint_that_was_cut_short_does_not_count(halfway, tmp_path):
    from tasks.train import checkpoint

    shutil.copytree(halfway / "checkpoints", tmp_path / "checkpoints")
    newest = max((tmp_path / "checkpoints").glob("epoch-*"))
    newest.rename(newest.with_name(f".{newest.name}"))
    state, refused = checkpoint.load_newest(tmp_path / "checkpoints", contextlib.nullcontext)
    assert state.facts["place"]["epoch"] == int(newest.name[-5:]) - 1
    assert refused == []


def _save(folder: Path, epoch: int, value: float, keep: int = 2) -> None:
    import torch

    from tasks.train import checkpoint

    saved = checkpoint.Saved({"epoch": epoch}, {"w": torch.ones(3) * value})
    checkpoint.save(folder, checkpoint.name_of(epoch, 0), saved, keep, contextlib.nullcontext)


def test_two_checkpoints_are_kept_and_rotted_newer_ones_are_not_in_their_way(tmp_path):
    from tasks.train import checkpoint

    for epoch in range(1, 5):
        _save(tmp_path, epoch, epoch)
    assert sorted(os.listdir(tmp_path)) == ["epoch-00003", "epoch-00004"]
    assert checkpoint.load_newest(tmp_path, contextlib.nullcontext)[0].facts == {"epoch": 4}
    _save(tmp_path, 4, 0.0)
    assert checkpoint.load_newest(tmp_path, contextlib.nullcontext)[0].tensors["w"].sum() == 0
    assert checkpoint.load_newest(tmp_path / "nothing", contextlib.nullcontext) == (None, [])
    for name in ("epoch-00003", "epoch-00004"):
        _flip(tmp_path / name / "state.safetensors")
    state, refused = checkpoint.load_newest(tmp_path, contextlib.nullcontext)
    assert (state, len(refused)) == (None, 2)
    _save(tmp_path, 1, 1.0)
    assert checkpoint.load_newest(tmp_path, contextlib.nullcontext)[0].facts == {"epoch": 1}
    assert checkpoint.name_of(4, 0) < checkpoint.name_of(4, 9) < checkpoint.name_of(4, 10) < checkpoint.name_of(5, 0)


def test_a_checkpoint_that_is_a_pickle_is_refused(tmp_path):
    """A manifest over a pickle that would run something: nothing here reads one."""
    import torch

    from tasks.store.manifest import write_manifest
    from tasks.train import checkpoint

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    (tmp_path / "epoch-00001").mkdir()
    torch.save({"epoch": 1, "x": Harm()}, tmp_path / "epoch-00001" / "state.safetensors")
    (tmp_path / "epoch-00001" / "state.json").write_text("{}")
    write_manifest(tmp_path / "epoch-00001")
    state, refused = checkpoint.load_newest(tmp_path, contextlib.nullcontext)
    assert state is None
    assert "epoch-00001 set aside" in refused[0]
    assert not (tmp_path / "harmed").exists()


WIDE = {"recipe": {"kind": "mlp", "hidden": [1200, 1200], "dropout": 0.0}, "batch_size": 16}
WIDE |= {"checkpoints": {"every_steps": 7, "keep": 3}, "stopping": {"max_epochs": 3, "patience_epochs": 3}}


def _stopped(request, folder: Path, scratch: Path, after: str) -> None:
    """Start ``request`` and kill its step when a checkpoint of that name, or a later one, is whole."""
    folder.mkdir(parents=True)
    with start(request, folder, scratch) as step:
        wait_for(lambda: [path for path in (folder / "checkpoints").glob("epoch-*") if path.name >= after])
        step.kill()
    wait_for(lambda: not processes(folder), 5)
    assert not (folder / "weights.safetensors").exists(), "the fault came too late"


def test_it_goes_on_at_the_very_batch_on_as_many_ranks_and_on_others(train_request, tmp_path, capfd):
    """A checkpoint within an epoch, too large to be written by the way: by the process beside rank 0."""
    plain, halfway = tmp_path / "plain", tmp_path / "halfway"
    request = train_request(ranks=2, **WIDE)
    whole = fit(request, plain, None, lambda line: None)
    _stopped(request, halfway, tmp_path, "epoch-00001-step-0000007")
    names = {path.name for path in (halfway / "checkpoints").glob("epoch-*")}
    assert len(names) <= 4, "three are kept, and one may have been on its way out"
    for ranks in (2, 1):
        folder = tmp_path / f"on-{ranks}"
        shutil.copytree(halfway, folder)
        (folder / "train.json").unlink()
        (folder / "inputs.json").unlink()  # prepared anew: by another number of ranks, another request
        done = fit(train_request(ranks=ranks, **WIDE), folder, None, lambda line: None)
        out = capfd.readouterr().out
        assert "resumed after epoch" in out
        assert "steps" in out
        assert epochs(folder) == [1, 2, 3]
        assert done["validation_loss"] == pytest.approx(whole["validation_loss"], abs=1e-4)
        assert ranks == 1 or sha256(folder) == sha256(plain), "the same ranks end in the same bits"


def test_a_checkpoint_of_another_model_is_refused(halfway, train_request, tmp_path):
    from tasks.spec.errors import BadRequest

    shutil.copytree(halfway / "checkpoints", tmp_path / "room" / "checkpoints")
    request = train_request(recipe={"kind": "mlp", "hidden": [16]})
    with pytest.raises(BadRequest, match=r"holds another model's weights: 1.0.weight differs; remove it"):
        fit(request, tmp_path / "room", None, lambda line: None)


RAISES = """
import os
import torch
from torch import nn

class Net(nn.Linear):
    def forward(self, x):
        if os.environ["RANK"] == "1" and self.training:
            raise ValueError("this rank's rows are odd")
        return super().forward(x)

def build(feature, num_classes):
    return Net(64, num_classes)

def loss(logits, target):
    return nn.functional.cross_entropy(logits, target) * 2
"""


def test_a_recipe_that_raises_on_one_rank_ends_the_gang_with_that_ranks_words(train_request, tmp_path, capfd):
    from tasks.spec.errors import BadRequest
    from tasks.store.files import sha256_file

    (tmp_path / "model.py").write_text(RAISES)
    request = train_request(recipe={"kind": "model.py"}, ranks=2)
    request = request.model_copy(update={"model_py_sha256": sha256_file(tmp_path / "model.py")})
    began = time.monotonic()
    with pytest.raises(BadRequest, match=r"rank 1: ValueError: this rank's rows are odd \(model.py, line 9\)"):
        fit(request, tmp_path / "room", tmp_path / "model.py", lambda line: None)
    assert time.monotonic() - began < 60, "the other rank waited until its watchdog ended it"
    assert "[rank 1] ValueError: this rank's rows are odd" in capfd.readouterr().err.replace("tasks.train.", "")


POISONED = """
from torch import nn

class Net(nn.Linear):
    steps = 0

    def forward(self, x):
        said = super().forward(x)
        self.steps += self.training
        if self.training and self.steps == 40:
            said = said + 0 * (self.bias - self.bias.detach()).abs().sqrt()
        return said

def build(feature, num_classes):
    return Net(64, num_classes)
"""


def test_weights_that_are_no_numbers_are_not_saved_over_the_last_that_were(train_request, tmp_path):
    """The loss of the fortieth step is a number, its gradient is none, and a checkpoint is due right after it."""
    from tasks.spec.errors import BadRequest
    from tasks.store.files import sha256_file

    (tmp_path / "model.py").write_text(POISONED)
    request = train_request(recipe={"kind": "model.py"}, checkpoints={"every_steps": 20, "keep": 1})
    request = request.model_copy(update={"model_py_sha256": sha256_file(tmp_path / "model.py")})
    with pytest.raises(BadRequest, match=r"weights are no numbers in epoch 1; lower train.optimiser.learning_rate"):
        fit(request, tmp_path / "room", tmp_path / "model.py", lambda line: None)
    kept = [path.name for path in (tmp_path / "room" / "checkpoints").iterdir() if path.name.startswith("epoch")]
    assert kept == ["epoch-00000-step-0000020"]
    assert not (tmp_path / "room" / "weights.safetensors").exists()


def test_fewer_rows_than_ranks_and_labels_that_are_no_class_are_one_line(train_request, make_dataset, tmp_path):
    from tasks.spec.errors import BadRequest

    few = make_dataset({"pixels": [[0] * 64] * 16}, [str(i % 10) for i in range(16)])
    with pytest.raises(BadRequest, match=r"train split has 14 rows, fewer than train.nodes x train.ranks = 16"):
        fit(train_request(few, ranks=16, batch_size=16), tmp_path / "few", None, lambda line: None)
    with pytest.raises(BadRequest, match=r"label '7' is none of data.label.classes"):
        fit(train_request(classes=range(7)), tmp_path / "classes", None, lambda line: None)
