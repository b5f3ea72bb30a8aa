"""Every recipe learns, on every strategy the same, and its export answers as the network did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tasks.spec.errors import BadRequest
from tasks.spec.requests import CompressRequest
from tasks.store.room import Room
from tasks.train.batches import shares
from tasks.train.brought import encoder_sha256
from tasks.train.fit import fit

pytestmark = pytest.mark.timeout(180)
WORDS = {"ham": ["see", "you", "at", "home", "later", "mum"], "spam": ["free", "prize", "win", "cash", "now"]}
TEXT = {"kind": "text", "max_tokens": 12, "vocabulary": 300}
TINY = {"vocab_size": 300, "max_position_embeddings": 16, "hidden_size": 16, "num_attention_heads": 2}
TINY |= {"num_hidden_layers": 2, "intermediate_size": 32, "model_type": "bert", "hidden_act": "gelu"}


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def compressed(request, room: Room, done, variant: str = "fp32"):
    from tasks.compress.compress import compress

    ref = room.publish({"run_id": "none"} | done)
    asked = {name: getattr(request, name).model_dump(mode="json") for name in ("dataset", "feature", "label", "train")}
    asked |= {"workload": "digits", "variant": variant, "trained": ref.model_dump()}
    out = Room(room.path.parent, f"packed-{variant}")
    return compress(CompressRequest.parse(asked, "the test's request"), out.begin(), learn=None)


@pytest.fixture(scope="module")
def messages(make_dataset):
    rng = np.random.default_rng(0)
    label = ["spam" if i % 3 == 0 else "ham" for i in range(400)]
    return make_dataset({"text": [" ".join(rng.choice(WORDS[name], rng.integers(1, 9))) for name in label]}, label)


@pytest.mark.parametrize(
    ("recipe", "epochs"),
    [({"kind": "cnn", "channels": [8, 16], "hidden": 32}, 8), ({"kind": "resnet18", "width": 8}, 2)],
)
def test_a_network_for_images_learns_and_is_exported(train_request, tmp_path, recipe, epochs):
    stopping = {"max_epochs": epochs, "patience_epochs": epochs}
    request = train_request(recipe=recipe, ranks=2, batch_size=32, stopping=stopping)
    room = Room(tmp_path, "trained")
    done = fit(request, room.begin(), None, lambda line: None)
    assert history(room.path)[-1]["validation_accuracy"] > 0.7
    assert compressed(request, room, done).parity_max_difference < 1e-4


def test_a_transformer_learns_and_is_exported_for_any_width(train_request, messages, tmp_path):
    from tasks.serve.package import open_package

    recipe = {"kind": "transformer", "width": 16, "heads": 2, "layers": 2, "feedforward": 32}
    asked = {"recipe": recipe, "batch_size": 16, "stopping": {"max_epochs": 4, "patience_epochs": 4}}
    request = train_request(messages, TEXT, ["ham", "spam"], **asked)
    room = Room(tmp_path, "trained")
    done = fit(request, room.begin(), None, lambda line: None)
    assert history(room.path)[-1]["validation_accuracy"] > 0.95
    found = compressed(request, room, done)
    assert found.parity_max_difference < 1e-4
    package = open_package(tmp_path / ".packed-fp32" / "package", found.package_sha256, None)
    for texts in ([""], ["win"], ["win", "see you at home later mum", "", "free prize now " * 9]):
        alone = np.concatenate([package.predict([text]) for text in texts])
        # What stands beside a text in its batch, and how far it is padded, changes nothing.
        assert np.abs(package.predict(texts) - alone).max() < 1e-5


def write_encoder(folder: Path, **changes) -> Path:
    """A tiny BERT as Hugging Face's files hold one, drawn, with a tokenizer of whole words."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    config = TINY | changes
    width, inner, draw = config["hidden_size"], config["intermediate_size"], torch.Generator().manual_seed(0)
    dense = {"attention.self.query": (width, width), "attention.self.key": (width, width)}
    dense |= {"attention.self.value": (width, width), "attention.output.dense": (width, width)}
    dense |= {"intermediate.dense": (inner, width), "output.dense": (width, inner)}
    tables = {"word_embeddings": config["vocab_size"], "position_embeddings": 16, "token_type_embeddings": 2}
    shapes = {f"embeddings.{name}.weight": (rows, width) for name, rows in tables.items()}
    norms = ["embeddings.LayerNorm"]
    for layer in range(config["num_hidden_layers"]):
        start = f"encoder.layer.{layer}"
        shapes |= {f"{start}.{name}.weight": shape for name, shape in dense.items()}
        shapes |= {f"{start}.{name}.bias": shape[:1] for name, shape in dense.items()}
        norms += [f"{start}.attention.output.LayerNorm", f"{start}.output.LayerNorm"]
    tensors = {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": torch.ones(width) for name in norms}
    tensors |= {f"{name}.bias": torch.zeros(width) for name in norms} | {"pooler.dense.weight": torch.ones(width)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    known = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS["ham"], *WORDS["spam"]]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def pretrained_request(train_request, messages, encoder: Path, **feature):
    recipe = {"kind": "pretrained", "folder": str(encoder)}
    asked = {"recipe": recipe, "batch_size": 16, "ranks": 2, "stopping": {"max_epochs": 3, "patience_epochs": 3}}
    schedule = {"kind": "linear", "warmup_ratio": 0.1}
    asked |= {"optimiser": {"name": "adamw", "learning_rate": 0.01, "schedule": schedule}}
    request = train_request(messages, TEXT | feature, ["ham", "spam"], **asked)
    return request.model_copy(update={"encoder_sha256": encoder_sha256(encoder)})


def test_a_pretrained_encoder_is_fine_tuned_and_exported_with_its_tokenizer(train_request, messages, tmp_path):
    encoder = write_encoder(tmp_path / "encoder")
    request, room = pretrained_request(train_request, messages, encoder), Room(tmp_path, "trained")
    done = fit(request, room.begin(), None, lambda line: None, encoder=encoder)
    assert history(room.path)[-1]["validation_accuracy"] > 0.95
    assert sorted(path.name for path in (room.path / "encoder").iterdir()) == ["config.json"]
    assert "[CLS]" in (room.path / "tokenizer.json").read_text()
    assert compressed(request, room, done).parity_max_difference < 1e-4


def test_an_encoder_learns_by_low_rank_and_is_exported_as_a_plain_one(train_request, messages, tmp_path):
    from safetensors.torch import load_file

    encoder = write_encoder(tmp_path / "encoder")
    request, room = pretrained_request(train_request, messages, encoder), Room(tmp_path, "trained")
    recipe = request.train.recipe.model_copy(update={"lora_rank": 2})
    request = request.model_copy(update={"train": request.train.model_copy(update={"recipe": recipe})})
    done = fit(request, room.begin(), None, lambda line: None, encoder=encoder)
    assert history(room.path)[-1]["validation_accuracy"] > 0.9
    before, after = load_file(encoder / "model.safetensors"), load_file(room.path / "weights.safetensors")
    changed = {name for name, value in after.items() if "attention" in name and not name.endswith("bias")}
    for name in changed:
        kind = name.split(".")[3] if name.count(".") == 4 else "norm"
        theirs = f"encoder.layer.{name.split('.')[1]}.attention.self.{kind}.weight"
        if theirs in before:
            assert (after[name] != before[theirs]).any() == (kind in ("query", "value")), name
    assert compressed(request, room, done).parity_max_difference < 1e-4


def test_an_encoder_that_does_not_fit_is_one_line(train_request, messages, tmp_path):
    encoder = write_encoder(tmp_path / "encoder")
    wrong = {
        "max_tokens": (TEXT | {"max_tokens": 64}, "data.feature.max_tokens = 64, must be at most 16"),
        "vocabulary": ({"vocabulary": 400}, "data.feature.vocabulary = 400, must be 300, as the encoder's is"),
    }
    for name, (feature, words) in wrong.items():
        request = pretrained_request(train_request, messages, encoder, **feature)
        with pytest.raises(BadRequest, match=words):
            fit(request, tmp_path / name, None, lambda line: None, encoder=encoder)
    other = write_encoder(tmp_path / "other", hidden_size=32)
    (encoder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    request = pretrained_request(train_request, messages, encoder)
    with pytest.raises(BadRequest, match=r"words.weight is \[300, 32\], must be \[300, 16\]; it is another model's"):
        fit(request, tmp_path / "shapes", None, lambda line: None, encoder=encoder)
    (encoder / "config.json").write_text("{}")
    with pytest.raises(BadRequest, match="changed since this run was planned"):
        fit(request, tmp_path / "changed", None, lambda line: None, encoder=encoder)


# What differs between strategies is the order of sums; over three epochs of digits it stays below this.
SAME_LOSS = 1e-4


def test_every_strategy_has_the_loss_curve_of_one_process(train_request, tmp_path, capfd):
    recipe = {"kind": "mlp", "hidden": [32], "dropout": 0.0}
    optimiser = {"name": "adamw", "learning_rate": 0.003, "clip_norm": 1.0, "weight_decay": 0.01}
    optimiser |= {"schedule": {"kind": "cosine", "warmup_ratio": 0.1}}
    asked = {"recipe": recipe, "batch_size": 32, "stopping": {"max_epochs": 3, "patience_epochs": 3}}
    asked |= {"optimiser": optimiser, "label_smoothing": 0.05}
    ways = {"one": {"ranks": 1}, "ddp": {"ranks": 2}, "parts": {"ranks": 2, "accumulate": 2}}
    ways |= {"bf16": {"ranks": 2, "gradients": "bf16"}, "powersgd": {"ranks": 2, "gradients": "powersgd"}}
    ways |= {"fsdp": {"ranks": 2, "parallel": "fsdp"}, "auto": {"ranks": 2, "parallel": "auto"}}
    ways |= {"tensor": {"ranks": 2, "parallel": "tensor", "accumulate": 2}}
    ways |= {"pipeline": {"ranks": 2, "parallel": "pipeline", "accumulate": 2}}
    curves = {}
    for name, way in ways.items():
        fit(train_request(**asked, **way), tmp_path / name, None, lambda line: None)
        curves[name] = [(line["train_loss"], line["validation_loss"]) for line in history(tmp_path / name)]
    thin = {"bf16": 2e-2, "powersgd": 1.0}
    for name, curve in curves.items():
        assert np.abs(np.array(curve) - np.array(curves["one"])).max() < thin.get(name, SAME_LOSS), name
    assert "auto: one, of measured rows/s: one" in capfd.readouterr().out, "two ranks are slower for so small a network"
    wire = {name: history(tmp_path / name)[-1]["wire_bytes"] for name in ("ddp", "bf16", "powersgd")}
    assert wire["bf16"] == wire["ddp"] / 2
    assert wire["powersgd"] < wire["ddp"] / 3
    assert curves["powersgd"][-1] < curves["powersgd"][0], "it learns"
    line = history(tmp_path / "fsdp")[-1]
    assert line["learning_rate"] < 0.0005 < 0.003, "the cosine came down"
    assert line["gradient_norm"] > 0
    assert line["wire_bytes"] == 26 * 3 * 4 * (64 * 32 + 32 + 32 * 10 + 10)


def test_an_encoder_tags_words_at_their_first_pieces_and_every_way_of_sharing_is_the_same(
    train_request, make_dataset, tmp_path
):
    """Rows have other numbers of tags: a batch in parts, on one rank or two, has the loss of the whole."""
    rng, encoder = np.random.default_rng(0), write_encoder(tmp_path / "encoder")
    words = [list(rng.choice(WORDS["ham"] + WORDS["spam"], rng.integers(1, 9))) for _ in range(240)]
    tags = [" ".join("B-X" if word in WORDS["spam"] else "O" for word in row) for row in words]
    data = make_dataset({"tokens": [" ".join(row) for row in words]}, tags)
    asked = {"recipe": {"kind": "pretrained", "folder": str(encoder), "dropout": 0.0}, "batch_size": 16}
    asked |= {"stopping": {"max_epochs": 3, "patience_epochs": 3, "metric": "entity_f1"}, "similar_lengths": True}
    asked |= {"optimiser": {"name": "adamw", "learning_rate": 0.01}, "class_weights": "balanced"}
    feature, curves = TEXT | {"kind": "tokens"}, []
    for way in ({"ranks": 1}, {"ranks": 2, "accumulate": 2}):
        request = train_request(data, feature, ["O", "B-X"], **asked, **way)
        request = request.model_copy(update={"encoder_sha256": encoder_sha256(encoder)})
        room = Room(tmp_path, f"trained-{way['ranks']}")
        done = fit(request, room.begin(), None, lambda line: None, encoder=encoder)
        curves.append([(line["train_loss"], line["validation_loss"]) for line in history(room.path)])
    assert np.abs(np.array(curves[0]) - np.array(curves[1])).max() < SAME_LOSS
    assert history(room.path)[-1]["validation_entity_f1"] > 0.95
    assert compressed(request, room, done).parity_max_difference < 1e-4
    for rank_rows in (1, 2):
        assert sorted(len(rows) for rows in shares(100, 8, 0, 1, 0, rank_rows, lengths=np.arange(100))) == 12 * [
            8 // rank_rows
        ]
    order = np.concatenate(list(shares(100, 8, 0, 1, 0, 1, lengths=np.arange(100))))
    assert len(set(order)) == 96
    assert max(np.ptp(batch) for batch in shares(100, 8, 0, 1, 0, 1, lengths=np.arange(100))) < 16
