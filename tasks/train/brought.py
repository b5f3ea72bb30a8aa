"""What a workload brings along: its ``model.py``, a pretrained encoder. Planned by digest, copied, and held to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.spec.errors import BadRequest
from tasks.spec.feature import Texts
from tasks.spec.value import sha256_of
from tasks.store.files import sha256_file

ENCODER = "encoder"
# Of a Hugging Face folder; pickled weights are not read.
ENCODER_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def copy_model_py(source: Path, target: Path, sha256: str | None) -> None:
    """Copy a model.py. Raises BadRequest: it is another one than was planned."""
    shutil.copyfile(source, target)
    if sha256_file(target) != sha256:
        target.unlink()
        raise BadRequest(f"{source}: changed since this run was planned; start a new run")


def encoder_sha256(folder: Path) -> str:
    """Return the digest of an encoder's files.

    Raises:
        BadRequest: one is missing.
    """
    for name in ENCODER_FILES:
        if not (folder / name).is_file():
            raise BadRequest(f"train.recipe.folder: {folder} has no {name}, must hold {', '.join(ENCODER_FILES)}")
    return sha256_of({name: sha256_file(folder / name) for name in ENCODER_FILES})


def copy_encoder(source: Path, target: Path, sha256: str | None) -> None:
    """Copy an encoder's files. Raises BadRequest: they are others than were planned."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ENCODER_FILES:
        shutil.copyfile(source / name, target / name)
    if encoder_sha256(target) != sha256:
        shutil.rmtree(target)
        raise BadRequest(f"{source}: changed since this run was planned; start a new run")


def tokenizer_of(folder: Path, feature: Texts) -> Any:
    """Return the tokenizer of ``folder/encoder``, without padding and cutting of its own.

    Raises:
        BadRequest: it is no tokenizer, or another encoder's: it knows more words, or pads with another token than 0.
    """
    from tokenizers import Tokenizer

    path = folder / ENCODER / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise BadRequest(f"{path}: is no tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    words = json.loads((folder / ENCODER / "config.json").read_text()).get("vocab_size", 0)
    if tokenizer.get_vocab_size() > words:
        raise BadRequest(
            f"{path}: has a vocabulary of {tokenizer.get_vocab_size()}, the encoder's config.json says {words}; "
            "take both from one model"
        )
    if feature.vocabulary != words:
        raise BadRequest(f"data.feature.vocabulary = {feature.vocabulary}, must be {words}, as the encoder's is")
    return tokenizer
