"""The loader that registered versions name: ``mlflow.pyfunc.load_model("models:/digits@champion")``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tasks.serve.package import open_package
from tasks.spec.errors import BadRequest
from tasks.spec.settings import resolve


class PackageModel:
    """Rows in (a list, an array or a one-column or numeric data frame), class names out; of tagged words a
    text of as many tags, of numbers their digits."""

    def __init__(self, folder: Path, keys: Path) -> None:
        self.package = open_package(folder, None, keys)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        rows = model_input.to_numpy() if hasattr(model_input, "to_numpy") else model_input
        if self.package.signature.feature.holds == "texts":
            rows = [str(row[0]) if hasattr(row, "__len__") and not isinstance(row, str) else str(row) for row in rows]
        if self.package.signature.feature.holds == "ids":
            rows = [list(row) for row in rows.tolist()] if hasattr(rows, "tolist") else rows
        answers = self.package.predict(rows)
        return self.package.labels(rows, self.package.best(answers), answers)


def _load_pyfunc(path: str) -> PackageModel:
    """Called by MLflow with the folder named by the flavor's ``data``.

    Raises:
        IntegrityLost: the package is not whole, or not signed by a key of ``DRYDOCK_KEYS`` (else the site's own).
    """
    keys = Path(os.environ.get("DRYDOCK_KEYS") or resolve().home_path / "keys")
    if not keys.is_dir():
        raise BadRequest(f"{keys}: is not there; DRYDOCK_KEYS must name the folder with the public keys of the signer")
    return PackageModel(Path(path), keys)
