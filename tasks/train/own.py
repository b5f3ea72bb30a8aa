"""The workload's own ``model.py``: ``build(feature, num_classes, **options)``, and if it wants ``loss``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tasks.spec.errors import BadRequest
from tasks.spec.feature import Feature
from tasks.spec.recipe import OwnModel


def own(recipe: OwnModel, feature: Feature, num_classes: int, folder: Path) -> nn.Module:
    """Return what its ``build`` gives.

    Raises:
        BadRequest: it is not there, has no ``build``, or fails in it.
    """
    module = _load(folder / "model.py")
    if not callable(getattr(module, "build", None)):
        raise BadRequest("model.py: has no function build(feature, num_classes, **options)")
    try:
        found = module.build(feature, num_classes, **recipe.options)
    except Exception as error:
        raise BadRequest(f"model.py: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise BadRequest(f"model.py: build gave {type(found).__name__}, must be a torch.nn.Module")
    return found


def own_loss(folder: Path) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return its ``loss``; None where it has none."""
    found = getattr(_load(folder / "model.py"), "loss", None)
    if found is not None and not callable(found):
        raise BadRequest(f"model.py: loss is {type(found).__name__}, must be a function loss(logits, target)")
    return found


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("workload_model", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise BadRequest("model.py: not in the workload's folder; train.recipe.kind 'model.py' needs it")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadRequest(f"model.py: {type(error).__name__}: {error}") from error
    return module
