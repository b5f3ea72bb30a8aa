"""Training with the real ranks: it learns, it is the same bit for bit, and it fails in one line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tasks.spec.errors import BadRequest, DrydockError
from tasks.store.files import sha256_file
from tasks.train.fit import command, fit
from tasks.train.history import History

pytestmark = pytest.mark.timeout(180)
TABLE = {"kind": "table", "columns": ["a", "b", "empty", "constant"]}
TEXT = {"kind": "text", "max_tokens": 16, "vocabulary": 400}


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_two_ranks_learn_the_digits(digits_trained):
    lines = history(digits_trained.folder)
    assert [line["epoch"] for line in lines] == list(range(1, 11))
    assert max(line["validation_accuracy"] for line in lines) > 0.9
    best = min(lines, key=lambda line: line["validation_loss"])
    assert (digits_trained.done["best_epoch"], digits_trained.done["epochs"]) == (best["epoch"], 10)
    assert digits_trained.done["parameters"] == 64 * 32 + 32 + 32 * 10 + 10
    assert all(line["samples_per_second"] > 0 and line["seconds"] > 0 for line in lines)


def test_what_the_next_steps_do_not_need_is_gone(digits_trained):
    kept = set(os.listdir(digits_trained.folder))
    assert {"weights.safetensors", "history.jsonl", "train.json"} <= kept
    assert not kept & {"arrays", "checkpoints", "error.json"}


def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_does_not(digits_trained, train_request, tmp_path):
    lines = []
    again = fit(digits_trained.request, tmp_path / "again", None, lines.append)
    assert sha256(tmp_path / "again") == sha256(digits_trained.folder)
    assert again["validation_loss"] == digits_trained.done["validation_loss"]
    # A slow machine tells of an epoch before it is over, too.
    assert [line["epoch"] for line in lines if "validation_loss" in line] == list(range(1, 11))


def test_one_rank_learns_too_and_a_finished_folder_is_not_trained_again(train_request, tmp_path):
    request = train_request(stopping={"max_epochs": 4, "patience_epochs": 4})
    first = fit(request, tmp_path, None, lambda line: None)
    before = (tmp_path / "weights.safetensors").stat().st_mtime_ns
    second = fit(request, tmp_path, None, lambda line: None)
    assert (tmp_path / "weights.safetensors").stat().st_mtime_ns == before
    assert first | {"train_seconds": 0} == second | {"train_seconds": 0}
    assert history(tmp_path)[-1]["validation_accuracy"] > 0.8


def test_it_stops_early_where_nothing_gets_better(train_request, tmp_path):
    slow = {"optimiser": {"learning_rate": 1e-12}, "stopping": {"max_epochs": 50, "patience_epochs": 2}}
    done = fit(train_request(**slow), tmp_path, None, lambda line: None)
    assert done["epochs"] <= 10
    assert done["epochs"] == done["best_epoch"] + 2


def test_a_loss_that_is_no_number_is_one_line_and_no_weights(train_request, tmp_path, capfd):
    request = train_request(ranks=2, optimiser={"name": "sgd", "learning_rate": 1e30})
    with pytest.raises(BadRequest, match=r"loss is (nan|inf) in epoch \d+; lower train.optimiser.learning_rate"):
        fit(request, tmp_path, None, lambda line: None)
    assert not (tmp_path / "weights.safetensors").exists()
    assert not (tmp_path / "done.json").exists()
    assert "restart" not in capfd.readouterr().err.lower(), "a restart can't help"


MODEL = """
from torch import nn

def build(feature, num_classes, hidden=8):
    return nn.Sequential(nn.Linear(feature.height * feature.width, hidden), nn.Tanh(), nn.Linear(hidden, num_classes))
"""


def planned(request, model_py):
    """The request as it was planned with this model.py."""
    return request.model_copy(update={"model_py_sha256": sha256_file(model_py)})


def test_a_network_that_changes_in_mid_run_is_refused(train_request, tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    request = planned(train_request(recipe={"kind": "model.py"}), tmp_path / "model.py")
    (tmp_path / "model.py").write_text(MODEL + "\n")
    with pytest.raises(BadRequest, match="changed since this run was planned"):
        fit(request, tmp_path / "room", tmp_path / "model.py", lambda line: None)
    assert not (tmp_path / "room" / "model.py").exists()


def test_the_workloads_own_network(train_request, tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    own = {"kind": "model.py", "options": {"hidden": 24}}
    request = train_request(recipe=own, stopping={"max_epochs": 3, "patience_epochs": 3})
    request = planned(request, tmp_path / "model.py")
    done = fit(request, tmp_path / "room", tmp_path / "model.py", lambda line: None)
    assert done["parameters"] == 64 * 24 + 24 + 24 * 10 + 10
    assert (tmp_path / "room" / "model.py").read_text() == MODEL


def test_an_own_network_with_another_number_of_outputs_is_refused_before_it_learns(train_request, tmp_path):
    (tmp_path / "model.py").write_text(MODEL.replace("hidden, num_classes)", "hidden, num_classes + 1)"))
    request = planned(train_request(recipe={"kind": "model.py"}), tmp_path / "model.py")
    with pytest.raises(BadRequest, match=r"model.py: answers \[16, 11\] to 16 rows, must be \[16, 10\]"):
        fit(request, tmp_path / "room", tmp_path / "model.py", lambda line: None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "model.py: has no function build"),
        ("def build(", "model.py: SyntaxError"),
        ("import nowhere", "model.py: ModuleNotFoundError: No module named 'nowhere'"),
        ("def build(feature, num_classes): return 1 / 0", "model.py: ZeroDivisionError"),
        ("def build(feature, num_classes): return None", "model.py: build gave NoneType, must be a torch.nn.Module"),
    ],
)
def test_an_own_network_that_is_wrong_is_one_line(train_request, text, words, tmp_path):
    from tasks.train.recipes import build

    request = train_request(recipe={"kind": "model.py"})
    (tmp_path / "model.py").write_text(text)
    with pytest.raises(BadRequest) as caught:
        build(request.train.recipe, request.feature, 10, None, tmp_path)
    assert words in str(caught.value)


def test_an_own_network_that_is_wrong_fails_the_training_in_that_line(train_request, tmp_path):
    (tmp_path / "model.py").write_text("import nowhere")
    request = planned(train_request(recipe={"kind": "model.py"}), tmp_path / "model.py")
    with pytest.raises(BadRequest, match="No module named 'nowhere'"):
        fit(request, tmp_path / "room", tmp_path / "model.py", lambda line: None)


def test_a_table_with_missing_values_and_empty_and_constant_columns(train_request, make_dataset, tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(50, 9, 400), rng.normal(size=400)
    label = ["yes" if value > 50 else "no" for value in a]
    columns = {
        "a": [None if i % 17 == 0 else float(value) for i, value in enumerate(a)],
        "b": b.tolist(),
        "empty": [float("nan")] * 400,
        "constant": [7.0] * 400,
    }
    dataset = make_dataset(columns, label)
    request = train_request(dataset, TABLE, ["no", "yes"], optimiser={"learning_rate": 0.01})
    fit(request, tmp_path, None, lambda line: None)
    assert history(tmp_path)[-1]["validation_accuracy"] > 0.85
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["mean"][0] == pytest.approx(50, abs=2)
    assert (stats["mean"][2], stats["deviation"][2], stats["deviation"][3]) == (0, 1, 1)


def test_texts(train_request, make_dataset, tmp_path):
    rng = np.random.default_rng(0)
    words = {"ham": ["see", "you", "at", "home", "later", "mum"], "spam": ["free", "prize", "win", "cash", "now"]}
    label = ["spam" if i % 3 == 0 else "ham" for i in range(300)]
    texts = [" ".join(rng.choice(words[name], 5)) for name in label]
    dataset = make_dataset({"text": texts}, label)
    request = train_request(dataset, TEXT, ["ham", "spam"], recipe={"kind": "text-cnn", "embedding": 8, "channels": 16})
    fit(request, tmp_path, None, lambda line: None)
    assert history(tmp_path)[-1]["validation_accuracy"] > 0.95
    assert (tmp_path / "tokenizer.json").is_file()


def test_an_empty_split_is_a_bad_request(train_request, make_dataset, tmp_path):
    dataset = make_dataset({"pixels": [[0] * 64] * 5}, ["1"] * 5)
    with pytest.raises(BadRequest, match="the validation split has no rows"):
        fit(train_request(dataset), tmp_path, None, lambda line: None)


def test_ranks_that_die_without_a_word_are_an_error_with_their_exit_code(train_request, tmp_path):
    (tmp_path / "model.py").write_text("import os; os._exit(7)")
    request = planned(train_request(recipe={"kind": "model.py"}), tmp_path / "model.py")
    with pytest.raises(DrydockError, match="the ranks ended with exit code 7"):
        fit(request, tmp_path / "room", tmp_path / "model.py", lambda line: None)


def test_the_command_line_of_a_gang(train_request, tmp_path):
    line = command(train_request(ranks=2), tmp_path)
    assert {"tasks.train.gang", "--ranks=2", f"--rendezvous={tmp_path / 'rendezvous'}", str(tmp_path)} <= set(line)


def test_the_history_is_passed_on_once_an_epoch_also_over_a_restart(tmp_path):
    path, seen = tmp_path / "history.jsonl", []
    reader = History(path, lambda line: seen.append(line["epoch"]))
    reader.follow()
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    reader.follow()
    path.write_text('{"epoch": 1}\n')
    reader.follow()
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n')
    reader.follow()
    assert seen == [1, 2, 3]


def test_the_ranks_share_each_batch_and_miss_no_row():
    from tasks.train.batches import shares

    for world in (1, 2, 4):
        parts = [list(shares(103, 20, 1, 3, rank, world)) for rank in range(world)]
        assert {len(rows) for part in parts for rows in part} == {20 // world}
        rows = np.concatenate([rows for part in parts for rows in part])
        assert len(set(rows.tolist())) == len(rows) == 100
    few = [list(shares(5, 64, 0, 1, rank, 2)) for rank in range(2)]
    assert [len(part[0]) for part in few] == [2, 2]
