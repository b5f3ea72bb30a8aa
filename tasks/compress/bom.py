"""The package's bill of materials: what the model was made of and by, as a CycloneDX ML-BOM (ECMA-424, version 1.6).

It lies in the package, so the manifest and the signature cover it. It names no time and no random number: the same
package has the same bill.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from tasks.spec.recipe import Recipe
from tasks.spec.requests import CompressRequest
from tasks.store.files import sha256_file, write_json

NAME = "bom.json"
MADE_WITH = ("drydock", "torch", "onnx", "onnxscript", "onnxruntime", "numpy", "tokenizers")
INPUTS = {"image": "image", "text": "text", "tokens": "text", "table": "numeric", "ids": "ids"}


def write_bom(request: CompressRequest, recipe: Recipe, package: Path) -> None:
    """Write ``bom.json`` beside ``model.onnx``: the model with its card, its data, and the libraries that made it."""
    write_json(package / NAME, bill(request, recipe, sha256_file(package / "model.onnx")))


def bill(request: CompressRequest, recipe: Recipe, model_sha256: str) -> dict[str, Any]:
    """Return the bill as plain data. Pure but for the versions of the installed libraries."""
    data_ref = f"dataset:{request.dataset.digest_sha256}"
    libraries = [_library(name) for name in MADE_WITH if _version(name)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{_uuid(model_sha256)}",
        "version": 1,
        "metadata": {"component": _model(request, recipe, model_sha256, data_ref)},
        "components": [
            {
                "type": "data",
                "bom-ref": data_ref,
                "name": f"{request.workload} dataset",
                "data": [{"type": "dataset", "name": "training, validation and holdout rows"}],
                "hashes": [{"alg": "SHA-256", "content": request.dataset.digest_sha256}],
            },
            *libraries,
        ],
        "dependencies": [{"ref": _ref(request), "dependsOn": [data_ref, *(item["bom-ref"] for item in libraries)]}],
    }


def _model(request: CompressRequest, recipe: Recipe, model_sha256: str, data_ref: str) -> dict[str, Any]:
    variant, number = request.variant, request.label.number is not None
    return {
        "type": "machine-learning-model",
        "bom-ref": _ref(request),
        "name": request.workload,
        "version": model_sha256[:12],
        "hashes": [{"alg": "SHA-256", "content": model_sha256}],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "regression" if number else "classification",
                "architectureFamily": recipe.kind,
                "modelArchitecture": variant.label,
                "datasets": [{"ref": data_ref}],
                "inputs": [{"format": INPUTS[request.feature.kind]}],
                "outputs": [{"format": "number" if number else f"probabilities of {len(request.label.names)} classes"}],
            }
        },
    }


def _library(name: str) -> dict[str, Any]:
    version = _version(name)
    purl = f"pkg:pypi/{name}@{version.partition('+')[0]}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _ref(request: CompressRequest) -> str:
    return f"model:{request.workload}:{request.variant.label}"


def _uuid(model_sha256: str) -> str:
    """A name-based UUID (RFC 9562, version 8: of our own making) of the model's digest."""
    digits = hashlib.sha256(f"drydock bom {model_sha256}".encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-8{digits[13:16]}-8{digits[17:20]}-{digits[20:32]}"
