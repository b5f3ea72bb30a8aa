"""Reading workload files. The one reader of ``workload.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.spec.compress import Distilled
from tasks.spec.errors import BadRequest
from tasks.spec.workload import Workload

FILE, MODEL_PY = "workload.yaml", "model.py"


def workload_names(workloads: Path) -> list[str]:
    """Return the names of all workload folders, sorted; a hidden one is not whole yet."""
    return sorted(path.parent.name for path in workloads.glob(f"*/{FILE}") if path.parent.name[0] != ".")


def load_workload(workloads: Path, name: str) -> Workload:
    """Read, check and return one workload.

    Raises:
        BadRequest: no such workload (the message lists those there are), or one line on what is wrong in it.
    """
    path = workloads / name / FILE
    where = f"{workloads.name}/{name}/{FILE}"
    if not path.is_file():
        known = ", ".join(workload_names(workloads)) or "none"
        raise BadRequest(f"workload {name!r} is not there: found {known} in {workloads}; ./drydock new {name} makes it")
    data = read_yaml(path, where)
    workload = Workload.parse(data, where)
    if workload.name != name:
        raise BadRequest(f"{where}: name = {workload.name!r}, must be the folder's name {name!r}")
    if (field := _needs_model_py(workload)) and not path.with_name(MODEL_PY).is_file():
        raise BadRequest(f"{where}: {field} = {MODEL_PY!r}, and there is no {MODEL_PY} beside this file")
    return workload


def _needs_model_py(workload: Workload) -> str | None:
    """The first field that names the folder's own ``model.py``."""
    students = {
        f"compress.variants.{place}.student.kind": student.kind
        for place, variant in enumerate(workload.compress.variants)
        if isinstance(variant, Distilled)
        for student in variant.students
        if student.kind == MODEL_PY
    }
    recipes = {"train.recipe.kind": workload.train.recipe.kind} | students
    return next((field for field, kind in recipes.items() if kind == MODEL_PY), None)


def read_yaml(path: Path, where: str) -> dict[str, Any]:
    """Return a YAML file's mapping; duplicate keys and anything but plain data are refused."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Refuses a key that is written twice: YAML itself would keep the last without a word."""

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise BadRequest(f"{where}: {twice[0]} is written twice (line {node.start_mark.line + 1})")
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, OSError, ValueError) as error:  # ValueError: no UTF-8, or a date that is none
        raise BadRequest(f"{where}: is not readable YAML: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(data, dict):
        raise BadRequest(f"{where}: must be a mapping with a name, data and train section")
    return data
