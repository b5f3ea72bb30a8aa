"""Let a smaller network learn a trained one's answers: on the loop and the engines that train everything.

The student's targets are the teacher's probabilities mixed with the labels, so that the loop's cross entropy is the
distillation loss (Hinton 2015, arXiv:1503.02531, at temperature 1) and the loop itself need not know.
"""

from __future__ import annotations

from pathlib import Path

from tasks.compress.network import Learn, Source, answers_of
from tasks.spec.compress import Distilled
from tasks.spec.errors import BadRequest
from tasks.spec.requests import TrainRequest
from tasks.store.files import sha256_file
from tasks.train.prepare import load_stats, read_split


def distil(teacher: Source, variant: Distilled, data: Path, folder: Path, learn: Learn) -> Source:
    """Return the student, trained in ``folder``; what a killed attempt left there is gone on with.

    Raises:
        BadRequest: the student is no smaller than its teacher, or its code is not there.
    """
    _check_size(teacher, variant)
    folder.mkdir(exist_ok=True)
    learn(student_request(teacher, variant), folder, lambda prepared: soften(teacher, variant.weight, data, prepared))
    return Source(teacher.request, folder, variant.student)


def student_request(teacher: Source, variant: Distilled) -> TrainRequest:
    """What training is asked: the workload's own ``train`` with the student's recipe."""
    request = teacher.request
    stopping = request.train.stopping
    if variant.epochs is not None:
        stopping = stopping.model_copy(update={"max_epochs": variant.epochs})
    own = teacher.folder / "model.py"
    if variant.student.kind == "model.py" and not own.is_file():
        raise BadRequest(f"{variant.label}: a student of kind 'model.py' needs train.recipe.kind 'model.py' too")
    return TrainRequest(
        workload=request.workload,
        dataset=request.dataset,
        revision=f"{request.workload}-student",
        feature=request.feature,
        label=request.label,
        train=request.train.model_copy(update={"recipe": variant.student, "stopping": stopping}),
        model_py_sha256=sha256_file(own) if variant.student.kind == "model.py" else None,
    )


def soften(teacher: Source, weight: float, data: Path, folder: Path) -> None:
    """Replace the prepared training targets by probabilities, float32 [B, K]: ``weight`` of the teacher's answer,
    the rest of the label."""
    import numpy as np

    request = teacher.request
    rows, y = read_split(data, request.feature, request.label, "train")
    targets = (1 - weight) * np.eye(len(request.label.names), dtype=np.float32)[y]
    np.save(folder / "arrays" / "train.y.npy", targets + np.float32(weight) * answers_of(teacher, rows))


def _check_size(teacher: Source, variant: Distilled) -> None:
    from tasks.train.recipes import build

    request = teacher.request
    if variant.student.kind == "pretrained":
        raise BadRequest(f"{variant.label}: a student is trained from nothing; its recipe can't be 'pretrained'")
    names = request.label.names
    student = build(variant.student, request.feature, len(names), load_stats(teacher.folder), teacher.folder)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    if parameters >= teacher.parameters:
        raise BadRequest(
            f"{variant.label}: the student has {parameters} parameters, must have fewer than its teacher's "
            f"{teacher.parameters}; make its recipe smaller"
        )
