"""Ranks that train against a parameter server: as good as one process, never further apart than asked, and no rank's
end leaves the others waiting."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tasks.spec.errors import BadRequest
from tasks.spec.train import Train
from tasks.store.files import sha256_file
from tasks.train.fit import fit

pytestmark = pytest.mark.timeout(180)
ASKED = {"recipe": {"kind": "mlp", "hidden": [32], "dropout": 0.1}, "batch_size": 32, "ranks": 2}
ASKED |= {"stopping": {"max_epochs": 6, "patience_epochs": 6}, "optimiser": {"name": "adam", "learning_rate": 0.005}}
SERVER = {"parallel": "parameter-server"}

# Each rank tells when it begins a step; one is slow.
SLOW = """
import os, time
from torch import nn

class Slow(nn.Module):
    def __init__(self, told, slow):
        super().__init__()
        self.layer, self.told, self.slow = nn.Linear(64, 10), told, slow

    def forward(self, x):
        if self.training:
            rank = os.environ["RANK"]
            time.sleep(0.03 if rank == self.slow else 0.001)
            with open(self.told, "a") as stream:
                stream.write(rank)
        return self.layer(x)

def build(feature, num_classes, told, slow):
    return Slow(told, slow)
"""


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_ranks_learn_what_one_process_learns_also_after_a_death(train_request, tmp_path, capfd):
    request, killed = train_request(**ASKED, **SERVER, checkpoints={"every_steps": 5, "keep": 100}), []

    def on_epoch(line):
        if not killed:
            launcher = next(c for c in psutil.Process().children() if str(tmp_path / "served") in c.cmdline())
            max(launcher.children(), key=lambda rank: rank.create_time()).kill()
            killed.append(line["epoch"])

    fit(train_request(**ASKED | {"ranks": 1}), tmp_path / "one", None, lambda line: None)
    fit(request, tmp_path / "served", None, on_epoch)
    assert "resumed after epoch" in capfd.readouterr().out
    ends = {name: history(tmp_path / name) for name in ("one", "served")}
    assert len(ends["served"]) == 6
    accuracy = {name: max(line["validation_accuracy"] for line in lines) for name, lines in ends.items()}
    assert accuracy["served"] > accuracy["one"] - 0.02
    assert accuracy["one"] > 0.9
    parameters = 64 * 32 + 32 + 32 * 10 + 10
    assert ends["served"][-1]["wire_bytes"] == 26 * 2 * 4 * parameters


@pytest.mark.parametrize("slow", ["0", "1"])
def test_no_rank_is_further_ahead_than_asked(train_request, tmp_path, slow):
    model = tmp_path / "model.py"
    model.write_text(SLOW)
    for staleness in (0, 3):
        told = tmp_path / f"told-{staleness}"
        recipe = {"kind": "model.py", "options": {"told": str(told), "slow": slow}}
        asked = ASKED | SERVER | {"recipe": recipe, "stopping": {"max_epochs": 1, "patience_epochs": 1}}
        request = train_request(**asked, parameter_server={"staleness": staleness})
        request = request.model_copy(update={"model_py_sha256": sha256_file(model)})
        fit(request, tmp_path / f"run-{staleness}", model, lambda line: None)
        begun = np.array([-1 if rank == slow else 1 for rank in told.read_text()])
        # The step that a rank is in counts as begun.
        assert np.cumsum(begun).max() in (staleness + 1, staleness + 2), staleness


def test_a_loss_that_is_no_number_ends_all_at_once(train_request, tmp_path):
    began = time.monotonic()
    wild = {"name": "sgd", "learning_rate": 1e30}
    with pytest.raises(BadRequest, match=r"loss is \S+ in epoch \d+; lower train.optimiser.learning_rate"):
        fit(train_request(**ASKED | SERVER | {"optimiser": wild}), tmp_path, None, lambda line: None)
    assert time.monotonic() - began < 30


def test_how_far_apart_is_said_of_a_parameter_server_alone():
    asked = {"recipe": {"kind": "mlp"}, "parameter_server": {"staleness": 1}}
    with pytest.raises(BadRequest, match="parameter_server is given, must be left out where parallel is 'ddp'"):
        Train.parse(asked, "the test's workload")
