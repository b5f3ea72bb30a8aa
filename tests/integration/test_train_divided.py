"""Ranks that divide the network itself: they learn what one process learns, and end in the same bits after a fault."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest

from tasks.spec.errors import BadRequest
from tasks.spec.train import Train
from tasks.train.fit import fit

pytestmark = pytest.mark.timeout(180)
WORDS = {"O": ["see", "you", "at", "home", "later", "mum"], "B-X": ["free", "prize", "win", "cash", "now"]}
ENCODER = {"kind": "transformer", "width": 16, "heads": 2, "layers": 2, "feedforward": 32, "dropout": 0.0}
LEARNS = {"name": "adamw", "learning_rate": 0.003, "weight_decay": 0.01, "clip_norm": 0.5}
# Measured at 3e-7 (tensor) and 2e-7 (pipeline) over three epochs, of losses and the gradients' norm: only the order of
# sums differs.
SAME = 1e-5
PIPE = {"parallel": "pipeline"}
WAYS = {"tensor": {"parallel": "tensor"}, "pipeline": PIPE}


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def curve(folder: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return np.array([[line["train_loss"], line["validation_loss"], line["gradient_norm"]] for line in lines])


@pytest.fixture(scope="module")
def tagging(make_dataset, train_request):
    """``tagging(**train)``: a request to tag words, three epochs; batches are of other widths."""
    rng = np.random.default_rng(0)
    every = [(word, tag) for tag, words in WORDS.items() for word in words]
    rows = [[every[n] for n in rng.integers(0, len(every), rng.integers(1, 9))] for _ in range(240)]
    tokens, tags = ([" ".join(pair[k] for pair in row) for row in rows] for k in (0, 1))
    data = make_dataset({"tokens": tokens}, tags)
    feature = {"kind": "tokens", "max_tokens": 12, "vocabulary": 300}
    asked = {"recipe": ENCODER, "optimiser": LEARNS, "batch_size": 16, "class_weights": "balanced"}
    asked |= {"stopping": {"max_epochs": 3, "patience_epochs": 3, "metric": "entity_f1"}}
    asked |= {"checkpoints": {"every_steps": 3, "keep": 100}}
    return lambda **train: train_request(data, feature, ["O", "B-X"], **asked | train)


def kill_a_rank(folder: Path) -> None:
    """Kill the second rank; the launcher is the child of this process that works in the folder."""
    children = psutil.Process().children()
    launcher = next(child for child in children if str(folder) in child.cmdline())
    max(launcher.children(), key=lambda rank: rank.create_time()).kill()


class Alone(NamedTuple):
    """What one process learnt, and what it had saved after an epoch."""

    curve: np.ndarray
    saved: Path


@pytest.fixture(scope="module")
def alone(tagging, tmp_path_factory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    fit(tagging(ranks=1), folder / "run", None, keeping(folder / "run", folder / "saved"))
    return Alone(curve(folder / "run"), folder / "saved")


def keeping(folder: Path, saved: Path):
    """Keep a copy of what was saved when the first epoch ended, for others to go on with. What was saved later is left
    out: the ranks do not wait for this process."""

    def on_epoch(line):
        if line["epoch"] == 3 and not saved.exists():
            shutil.copytree(folder / "checkpoints", saved, ignore=shutil.ignore_patterns(".*", "*-step-*", "*[23]"))

    return on_epoch


def goes_on(request, saved: Path, folder: Path, capfd) -> np.ndarray:
    """Go on with what others saved; return the last epoch's figures."""
    shutil.copytree(saved, folder / "checkpoints")
    fit(request, folder, None, lambda line: None)
    assert "resumed after epoch" in capfd.readouterr().out
    return curve(folder)[-1]


@pytest.mark.parametrize("way", list(WAYS))
def test_ranks_that_divide_a_network_learn_as_one_process_also_after_a_death(tagging, alone, way, tmp_path, capfd):
    request, plain, harmed = tagging(ranks=2, **WAYS[way]), tmp_path / "plain", tmp_path / "harmed"
    done = fit(request, plain, None, keeping(plain, tmp_path / "saved"))
    assert np.abs(curve(plain) - alone.curve).max() < SAME
    assert done["parameters"] == 300 * 16 + 12 * 16 + 2 * 16 + 2 * 16 + 2 * (4 * 272 + 544 + 528 + 64) + 2 * 17
    killed = []

    def on_epoch(line):
        if not killed:
            kill_a_rank(harmed)
            killed.append(line["epoch"])

    fit(request, harmed, None, on_epoch)
    assert killed == [1]
    assert "resumed after epoch" in capfd.readouterr().out
    assert len(curve(harmed)) == 3
    assert sha256(harmed) == sha256(plain)
    # Others go on with what they saved, and they with what others did.
    assert np.abs(goes_on(tagging(ranks=2), tmp_path / "saved", tmp_path / "ddp", capfd) - alone.curve[-1]).max() < SAME
    assert np.abs(goes_on(request, alone.saved, tmp_path / "from-one", capfd) - alone.curve[-1]).max() < SAME


@pytest.mark.parametrize("way", list(WAYS))
def test_copies_of_a_divided_network_learn_as_one_process(tagging, alone, way, tmp_path, capfd):
    """Two copies of two ranks each: a mesh."""
    request = tagging(ranks=4, copies=2, **WAYS[way])
    fit(request, tmp_path / "mesh", None, keeping(tmp_path / "mesh", tmp_path / "saved"))
    assert np.abs(curve(tmp_path / "mesh") - alone.curve).max() < SAME
    assert np.abs(goes_on(tagging(ranks=1), tmp_path / "saved", tmp_path / "one", capfd) - alone.curve[-1]).max() < SAME


def test_both_schedules_of_a_pipeline_end_in_the_same_bits(tagging, tmp_path):
    """Dropout included: parts are passed and summed in one order."""
    asked = {"recipe": ENCODER | {"dropout": 0.1}, "parallel": "pipeline", "ranks": 2}
    asked |= {"stopping": {"max_epochs": 1, "patience_epochs": 1}}
    ways = {name: {"schedule": name, "micro_batches": 4} for name in ("1f1b", "gpipe")}
    for name, way in ways.items():
        fit(tagging(**asked, pipeline=way), tmp_path / name, None, lambda line: None)
    assert sha256(tmp_path / "1f1b") == sha256(tmp_path / "gpipe")


def test_a_loss_that_is_no_number_ends_ranks_that_divide_a_network(tagging, tmp_path, capfd):
    wild = {"name": "sgd", "learning_rate": 1e30}
    request = tagging(ranks=2, optimiser=wild, **WAYS["pipeline"])
    with pytest.raises(BadRequest, match=r"loss is \S+ in epoch \d+; lower train.optimiser.learning_rate"):
        fit(request, tmp_path, None, lambda line: None)
    assert "restart" not in capfd.readouterr().err.lower(), "a restart can't help"


@pytest.mark.parametrize(
    ("recipe", "more", "words"),
    [
        (ENCODER | {"dropout": 0.1}, {}, "recipe.dropout = 0.1, must be 0 where parallel is 'tensor'"),
        (ENCODER, {"ranks": 4}, "recipe.heads = 2, must be a multiple of nodes x ranks / copies = 4"),
        (ENCODER | {"feedforward": 33}, {}, "feedforward = 33, must be a multiple of nodes x ranks / copies = 2"),
        ({"kind": "cnn"}, {}, "parallel = 'tensor', must be ddp, fsdp or auto where recipe.kind is 'cnn'"),
        ({"kind": "model.py"}, PIPE, "must be ddp, fsdp or auto where recipe.kind is 'model.py'"),
        ({"kind": "pretrained", "folder": "x", "lora_rank": 2}, PIPE, "recipe.lora_rank = 2, must be 0"),
        (ENCODER, PIPE | {"ranks": 4}, "recipe.layers = 2, must be at least nodes x ranks / copies = 4 where"),
        ({"kind": "mlp", "hidden": [8]}, PIPE | {"ranks": 4}, "recipe.hidden = (8,), must have at least nodes x"),
        (ENCODER, PIPE | {"batch_size": 66}, "batch_size = 66, must be a multiple of copies x accumulate x"),
        (ENCODER, PIPE | {"pipeline": {"micro_batches": 1}}, "pipeline.micro_batches = 1, must be at least nodes x"),
        (ENCODER, PIPE | {"gradients": "powersgd"}, "gradients = 'powersgd', must be fp32 where parallel is 'pip"),
        (ENCODER, {"parallel": "ddp", "pipeline": {"schedule": "gpipe"}}, "must be left out where parallel is 'ddp'"),
        (ENCODER, PIPE | {"ranks": 4, "copies": 4}, "must divide nodes x ranks = 4 into groups of 2 or"),
        (ENCODER, PIPE | {"ranks": 6, "copies": 4}, "must divide nodes x ranks = 6 into groups of 2 or more"),
        (ENCODER, {"parallel": "fsdp", "copies": 2}, "copies = 2, must be 1 where parallel is 'fsdp'"),
        (ENCODER, PIPE | {"ranks": 4, "copies": 2, "batch_size": 12}, "a multiple of copies x accumulate x pipeline"),
        (ENCODER, PIPE | {"pipeline": {"schedule": "dual"}}, 'pipeline.schedule = "dual"'),
    ],
)
def test_what_ranks_can_not_divide_is_told_where_it_is_read(recipe, more, words):
    asked = {"recipe": recipe, "parallel": "tensor", "ranks": 2} | more
    with pytest.raises(BadRequest) as caught:
        Train.parse(asked, "the test's workload")
    assert words in str(caught.value)


def test_an_encoder_from_a_folder_that_ranks_can_not_divide_is_one_line():
    from tasks.train.encoder import Encoder, Sizes
    from tasks.train.stages import EncoderStage
    from tasks.train.tensor import divide_heads

    encoder = Encoder(Sizes(vocabulary=30, positions=8, width=16, heads=2, layers=2, inner=32), 2, 0.0)
    with pytest.raises(BadRequest, match="has 2 attention heads, must be a multiple of nodes x ranks / copies = 3"):
        divide_heads(encoder, 3)
    with pytest.raises(BadRequest, match="the encoder has 2 layers, must have at least nodes x ranks / copies = 3"):
        EncoderStage(encoder, 0, 3, half=False)


@pytest.mark.parametrize("kind", ["classes", "number", "text", "tokens"])
def test_stages_one_after_another_answer_as_the_whole_network(kind, tmp_path):
    import copy

    import torch
    from pydantic import TypeAdapter

    from tasks.spec.feature import Feature
    from tasks.train.recipes import build
    from tasks.train.stages import DenseStage, EncoderStage

    stats = {"mean": [1.0, 2.0], "deviation": [3.0, 4.0]}
    stats |= {"target": {"mean": 50.0, "deviation": 9.0}} if kind == "number" else {}
    texts = kind in ("text", "tokens")
    recipe = ENCODER | {"layers": 4} if texts else {"kind": "mlp", "hidden": [8, 7], "dropout": 0.0}
    feature = {"kind": kind, "max_tokens": 12, "vocabulary": 300} if texts else {"kind": "table", "columns": ["a", "b"]}
    train = Train.parse({"recipe": recipe}, "the test's workload")
    read = TypeAdapter(Feature).validate_python(feature)
    whole = build(train.recipe, read, 1 if kind == "number" else 3, None if texts else stats, tmp_path)
    rows = torch.randint(0, 300, (6, 9)) if texts else torch.randn(6, 2)
    found, names = rows, set()
    for rank in range(3):
        stage = (EncoderStage if texts else DenseStage)(copy.deepcopy(whole), rank, 3, half=False)
        assert rank == 0 or stage.takes(rows) == tuple(found.shape)
        found = stage(found, rows=rows)
        assert stage.gives(rows) == tuple(found.shape)
        names |= set(stage.network.state_dict())
    assert torch.equal(found, whole(rows))
    assert stage.logits(rows) == tuple(found.shape)
    assert names == set(whole.state_dict())
