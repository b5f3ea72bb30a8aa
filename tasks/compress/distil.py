"""Let a smaller network learn a trained one's answers: on the loop and the engines that train everything.

The student's targets are the teacher's probabilities mixed with the labels, so that the loop's cross entropy is the
distillation loss (Hinton 2015, arXiv:1503.02531, at temperature 1) and the loop itself need not know.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.compress.network import Learn, Source, answers_of
from tasks.spec.compress import Distilled
from tasks.spec.errors import BadRequest
from tasks.spec.recipe import Recipe
from tasks.spec.requests import TrainRequest
from tasks.store.files import sha256_file
from tasks.train.prepare import load_stats, read_split

TIMED_CALLS = 100


def distil(teacher: Source, variant: Distilled, data: Path, folder: Path, learn: Learn) -> Source:
    """Return the student, trained in ``folder``; what a killed attempt left there is gone on with. Of several all are
    trained, each in a folder of its own, and the one that the objective prefers is returned, with a note of the others.

    Raises:
        BadRequest: a student is no smaller than its teacher, or its code is not there.
    """
    for recipe in variant.students:
        _check_size(teacher, variant, recipe)
    found = []
    for place, recipe in enumerate(variant.students):
        own = folder / str(place)
        own.mkdir(parents=True, exist_ok=True)
        asked = student_request(teacher, variant, recipe)
        learn(asked, own, lambda prepared: soften(teacher, variant.weight, data, prepared))
        found.append(Source(teacher.request, own, recipe))
    return found[0] if len(found) == 1 else preferred(found, variant, data)


def preferred(students: list[Source], variant: Distilled, data: Path) -> Source:
    """Return the student that the objective prefers on the validation split, of those that are hardly worse than the
    best; its note says why the others lost. Energy goes with the time on a processor."""
    request = students[0].request
    rows, y = read_split(data, request.feature, request.label, "validation")
    right = [float((answers_of(student, rows).argmax(axis=1) == y).mean()) for student in students]
    name, cost = COSTS[request.objective or "quality"]
    costs = [cost(student, rows, share) for student, share in zip(students, right, strict=True)]
    near = [k for k, share in enumerate(right) if share >= max(right) - variant.worse]
    taken = min(near, key=lambda k: (costs[k], -right[k]))
    told = [f"{name} = {abs(cost):.4g}" for cost in costs]
    lost = [
        f"student {k}: " + (told[k] if k in near else f"accuracy = {right[k]:.4g}, the best has {max(right):.4g}")
        for k in range(len(students))
        if k != taken
    ]
    students[taken].note = "; ".join([f"student {taken} ({students[taken].recipe.kind}) taken: {told[taken]}", *lost])
    return students[taken]


def _seconds_a_row(student: Source, rows: Any) -> float:
    def seconds(row: int) -> float:
        started = time.perf_counter()
        answers_of(student, rows[row : row + 1])
        return time.perf_counter() - started

    return statistics.median(seconds(call % len(rows)) for call in range(TIMED_CALLS))


# What each objective looks at, less is better: of a student, the validation rows and the share that it answers right.
COSTS: dict[str, tuple[str, Callable[[Source, Any, float], float]]] = {
    "quality": ("accuracy", lambda student, rows, right: -right),
    "size": ("parameters", lambda student, rows, right: student.parameters),
    "latency": ("seconds a row", lambda student, rows, right: _seconds_a_row(student, rows)),
    "energy": ("seconds a row", lambda student, rows, right: _seconds_a_row(student, rows)),
}


def student_request(teacher: Source, variant: Distilled, recipe: Recipe) -> TrainRequest:
    """What training is asked: the workload's own ``train`` with the student's recipe."""
    request = teacher.request
    stopping = request.train.stopping
    if variant.epochs is not None:
        stopping = stopping.model_copy(update={"max_epochs": variant.epochs})
    own = teacher.folder / "model.py"
    if recipe.kind == "model.py" and not own.is_file():
        raise BadRequest(f"{variant.label}: a student of kind 'model.py' needs train.recipe.kind 'model.py' too")
    return TrainRequest(
        workload=request.workload,
        dataset=request.dataset,
        revision=f"{request.workload}-student",
        feature=request.feature,
        label=request.label,
        train=request.train.model_copy(update={"recipe": recipe, "stopping": stopping}),
        model_py_sha256=sha256_file(own) if recipe.kind == "model.py" else None,
    )


def soften(teacher: Source, weight: float, data: Path, folder: Path) -> None:
    """Replace the prepared training targets by probabilities, float32 [B, K]: ``weight`` of the teacher's answer,
    the rest of the label."""
    import numpy as np

    request = teacher.request
    rows, y = read_split(data, request.feature, request.label, "train")
    targets = (1 - weight) * np.eye(len(request.label.names), dtype=np.float32)[y]
    np.save(folder / "arrays" / "train.y.npy", targets + np.float32(weight) * answers_of(teacher, rows))


def _check_size(teacher: Source, variant: Distilled, recipe: Recipe) -> None:
    from tasks.train.recipes import build

    request = teacher.request
    if recipe.kind == "pretrained":
        raise BadRequest(f"{variant.label}: a student is trained from nothing; its recipe can't be 'pretrained'")
    names = request.label.names
    student = build(recipe, request.feature, len(names), load_stats(teacher.folder), teacher.folder)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    if parameters >= teacher.parameters:
        raise BadRequest(
            f"{variant.label}: the student has {parameters} parameters, must have fewer than its teacher's "
            f"{teacher.parameters}; make its recipe smaller"
        )
