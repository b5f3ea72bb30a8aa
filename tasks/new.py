"""``drydock new``: the folder of a new workload, from a template that validates as it is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tasks.site import Site
from tasks.spec.errors import BadRequest
from tasks.spec.load import load_workload
from tasks.store.files import write_whole

NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
FEATURES = {
    "table": "{kind: table, columns: [width, height, weight]}",
    "image": "{kind: image, column: pixels, height: 28, width: 28}",
    "text": "{kind: text, column: text, max_tokens: 64, vocabulary: 4000}",
    "tokens": "{kind: tokens, column: tokens, max_tokens: 128, vocabulary: 8000}",
    "ids": "{kind: ids, user: user, item: item}",
    "next": "{kind: text, column: text, max_tokens: 128, vocabulary: 4000}",
}
RECIPES = {
    "table": "{kind: mlp, hidden: [64, 32]}",
    "image": "{kind: mlp, hidden: [256, 128]}",
    "text": "{kind: text-cnn}",
    "tokens": "{kind: transformer}",
    "ids": "{kind: factors, width: 16}\n  optimiser: {learning_rate: 0.005, weight_decay: 0.0003}\n  batch_size: 1024",
    "next": "{kind: gpt, width: 128, heads: 4, layers: 4}\n  optimiser: {name: adamw, weight_decay: 0.01}",
}
LABELS = {
    "tokens": "{column: label, classes: [O, B-person, I-person, B-location, I-location]}",  # for each word one
    "ids": "{kind: number, column: rating, min: 1, max: 5}",
    "next": "{kind: next}",
}
CLASSES = '{column: label, classes: ["no", "yes"]}'
COLUMNS = {"ids": "rating", "next": "text"}
CHECKS = {
    "ids": "{rule: range, column: rating, min: 1, max: 5}",
    "next": "{rule: unicode, column: text}",
}
RULES = {
    "tokens": (
        "{metric: entity_f1, min: 0.4, min_samples: 50}",
        "{metric: entity_f1, against: champion, max_drop: 0.01}",
    ),
    "ids": ("{metric: rmse, max: 1, min_samples: 50}", "{metric: rmse, against: champion, max_rise: 0.01}"),
    "next": (
        "{metric: perplexity, max: 100, min_samples: 50}",
        "{metric: bits_per_character, against: champion, max_rise: 0.02}",
    ),
}
SCORED = ("{metric: accuracy, min: 0.8, min_samples: 50}", "{metric: accuracy, against: champion, max_drop: 0.01}")
OWN = '{kind: "model.py", options: {hidden: 64}}'
TEMPLATE = """\
# What to build. Every other section has defaults: `./drydock validate {name}` prints the effective file.
name: {name}
description: Say in one line what the model is for.

data:
  source: {{kind: files, path: {path}}}   # or TSV, JSON lines, Parquet, NPZ, plain text; globs too
  feature: {feature}
  label: {label}
  clean:
    - {{rule: drop_missing, column: {column}}}
    - {check}
    - {{rule: drop_duplicates}}

train:
  recipe: {recipe}
  stopping: {{max_epochs: 30, patience_epochs: 5}}

gate:
  rules:
    - {rules[0]}
    - {rules[1]}

review: {{required: true}}
"""
MODEL = '''\
"""The workload's own network: `build` is all that Drydock asks for."""

from __future__ import annotations

import math

import torch
from torch import nn


def build(feature, num_classes: int, hidden: int = 64) -> nn.Module:
    """Return the module: the encoded input [B, N] (texts: token numbers, int64 [B, T]) -> logits [B, K]."""
    if feature.kind == "text":
        return nn.Sequential(nn.EmbeddingBag(feature.vocabulary, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    return nn.Sequential(nn.Linear(math.prod(feature.shape), hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
'''
MODEL_OF_TAGS = '''\
"""The workload's own network: `build` is all that Drydock asks for."""

from __future__ import annotations

from torch import Tensor, nn


class Tagger(nn.Module):
    """int64 [B, T] pieces of words -> logits [B, K, T]."""

    def __init__(self, vocabulary: int, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden, padding_idx=0)
        self.convolution = nn.Conv1d(hidden, hidden, 5, padding=2)
        self.head = nn.Conv1d(hidden, num_classes, 1)

    def forward(self, pieces: Tensor) -> Tensor:
        x = self.embedding(pieces).transpose(1, 2)
        return self.head(self.convolution(x).relu())


def build(feature, num_classes: int, hidden: int = 64) -> nn.Module:
    """Return the module: a word is asked at its first piece."""
    return Tagger(feature.vocabulary, num_classes, hidden)
'''


def new_workload(site: Site, name: str, feature: str, own_model: bool, is_next: bool = False) -> Path:
    """Make ``workloads/NAME`` whole, or not at all; return its workload.yaml. ``is_next``: the next piece of texts is
    to be told.

    Raises:
        BadRequest: a name that a workload may not have, or one that is there already; a network of one's own for ids
            or for the next piece; the next piece of what is no text.
    """
    folder = site.workload_folder(name)
    if not NAME.fullmatch(name):
        raise BadRequest(f"name {name!r}: must be lower-case letters, digits and hyphens, beginning with a letter")
    if folder.exists():
        raise BadRequest(f"{folder}: is there already; choose another name")
    if own_model and feature == "ids":
        raise BadRequest("--own-model: must be left out with --feature ids, which the recipe factors reads")
    if is_next and (feature != "text" or own_model):
        raise BadRequest("--label next: needs --feature text, and the recipe gpt in place of --own-model")
    feature = "next" if is_next else feature
    recipe = OWN if own_model else RECIPES[feature]
    working = folder.with_name(f".{name}.new")
    shutil.rmtree(working, ignore_errors=True)
    facts = {
        "feature": FEATURES[feature],
        "label": LABELS.get(feature, CLASSES),
        "path": "data.txt" if is_next else "data.csv",
        "column": COLUMNS.get(feature, "label"),
        "check": CHECKS.get(feature, "{rule: allowed_labels}"),
        "recipe": recipe,
        "rules": RULES.get(feature, SCORED),
    }
    text = TEMPLATE.format(name=name, **facts)
    write_whole(working / "workload.yaml", text)
    if own_model:
        model = MODEL_OF_TAGS if feature == "tokens" else MODEL
        write_whole(working / "model.py", model.replace("import torch\nfrom torch", "from torch"))
    working.rename(folder)
    load_workload(site.workloads, name)
    return folder / "workload.yaml"
