"""What a gang reads, by digest: listed where it is prepared, held to the list on every node that it was brought to."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.spec.errors import IntegrityLost
from tasks.store.files import sha256_file, write_json
from tasks.train.brought import ENCODER

LIST = "inputs.json"
NAMES = ("train.json", "stats.json", "tokenizer.json", "ids.json", "model.py")


def list_inputs(folder: Path) -> None:
    """Write the list, last of all that is prepared: where it is, the folder is ready to train in."""
    named = [folder / name for name in NAMES if (folder / name).exists()]
    files = [*sorted((folder / "arrays").iterdir()), *sorted((folder / ENCODER).glob("*")), *named]
    write_json(folder / LIST, {str(path.relative_to(folder)): sha256_file(path) for path in files})


def check_inputs(folder: Path) -> None:
    """Read every input and hold it to the list.

    Raises:
        IntegrityLost: one is missing, or its bytes are others than were prepared.
    """
    try:
        listed = json.loads((folder / LIST).read_text())
    except (OSError, ValueError):
        raise IntegrityLost(f"{folder}: has no readable {LIST}, so its inputs are not whole") from None
    for name, digest in listed.items():
        found = sha256_file(folder / name) if (folder / name).is_file() else "nothing"
        if found != digest:
            raise IntegrityLost(f"{folder}: {name} has digest {found[:12]}, must be {digest[:12]}; train again")
