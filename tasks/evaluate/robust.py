"""How accuracy holds when inputs are a little worse than the holdout's, and what inputs out of range do.

    B rows   H height   W width   C columns
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tasks.evaluate.answers import Answers, ask
from tasks.serve.package import Package
from tasks.spec.errors import BadRequest
from tasks.spec.rules import Measurement

MOST_ROWS = 500
NOISE_RATIO, TYPO_RATIO = 0.1, 0.1
# No id of a source: a Unicode noncharacter.
NEVER_SEEN = "\ufffe"
Rows = Any


def measure_robustness(
    package: Package, rows: Rows, answers: Answers, names: tuple[str, ...]
) -> tuple[Measurement, ...]:
    """Measure accuracy (of tagged words entity F1 too, of numbers their errors) under each of these perturbations, on
    at most 500 rows, and ``out_of_range``: the share of impossible inputs that are refused or answered as others are.
    ``answers``: to the rows as they are."""
    picked = np.linspace(0, len(rows) - 1, min(MOST_ROWS, len(rows))).astype(int)
    rows = [rows[k] for k in picked] if isinstance(rows, list) else rows[picked]
    feature = package.signature.feature
    found = []
    for name in names:
        changed = PERTURBATIONS[feature.kind][name](rows, feature, np.random.default_rng(0))
        other = answers.instead(picked, ask(package, changed, answers.names))
        of_all = other.measure_part(f"perturbed:{name}", np.arange(len(picked)))
        found += [m for m in of_all if m.metric in ("accuracy", "entity_f1", "rmse", "mae")]
    asked = OUT_OF_RANGE[feature.kind](feature)
    stood = sum(_stands(package, row) for row in asked)
    return (*found, Measurement(metric="out_of_range", value=stood / len(asked), samples=len(asked)))


def _stands(package: Package, row: Any) -> bool:
    """Whether an impossible row is refused as a bad request, or answered with probabilities."""
    try:
        answer = package.predict([row])
    except BadRequest:
        return True
    return bool(np.isfinite(answer).all())


def _image_noise(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    """Gaussian, a tenth of the range."""
    noisy = rows + draw.normal(scale=NOISE_RATIO * feature.max_value, size=rows.shape)
    return np.clip(noisy, 0, feature.max_value).astype(np.float32)


def _image_blur(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    """The mean of each 3 x 3 neighbourhood."""
    image = np.pad(rows.reshape(-1, feature.height, feature.width), ((0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = feature.height, feature.width
    shifted = [image[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return (sum(shifted) / 9).reshape(rows.shape).astype(np.float32)


def _image_shift(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    """One pixel to the right; what comes in is empty."""
    image = np.zeros((len(rows), feature.height, feature.width), dtype=np.float32)
    image[:, :, 1:] = rows.reshape(image.shape)[:, :, :-1]
    return image.reshape(rows.shape)


def _text_typos(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    """Two neighbouring letters change places in a tenth of the words."""
    return [" ".join(_typo(word, draw) for word in row.split(" ")) for row in rows]


def _typo(word: str, draw: np.random.Generator) -> str:
    if len(word) < 3 or draw.random() >= TYPO_RATIO:
        return word
    at = int(draw.integers(0, len(word) - 1))
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _text_upper(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    return [row.upper()[: feature.max_chars] for row in rows]


def _tokens_typos(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    return [[_typo(word, draw) for word in row] for row in rows]


def _tokens_lower(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    return [[word.lower() for word in row] for row in rows]


def _table_noise(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    """Gaussian, a tenth of each column's deviation."""
    return (rows + draw.normal(size=rows.shape) * NOISE_RATIO * np.nanstd(rows, axis=0)).astype(np.float32)


def _table_missing(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    """A tenth of the values is missing."""
    return np.where(draw.random(rows.shape) < NOISE_RATIO, np.float32(np.nan), rows).astype(np.float32)


def _ids_unknown_user(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    """Nobody was seen before."""
    return [[NEVER_SEEN, item] for _, item in rows]


def _ids_unknown_item(rows: Rows, feature: Any, draw: np.random.Generator) -> Rows:
    return [[user, NEVER_SEEN] for user, _ in rows]


PERTURBATIONS: dict[str, dict[str, Callable[[Rows, Any, np.random.Generator], Rows]]] = {
    "image": {"noise": _image_noise, "blur": _image_blur, "shift": _image_shift},
    "text": {"typos": _text_typos, "upper-case": _text_upper},
    "tokens": {"typos": _tokens_typos, "lower-case": _tokens_lower},
    "table": {"noise": _table_noise, "missing": _table_missing},
    "ids": {"unknown-user": _ids_unknown_user, "unknown-item": _ids_unknown_item},
}
OUT_OF_RANGE: dict[str, Callable[[Any], list[Any]]] = {
    "image": lambda f: [[value] * f.shape[0] for value in (-1.0, f.max_value + 1.0, float("nan"), float("inf"))],
    "text": lambda f: ["", "\x00", "\U0001f6a2" * min(f.max_chars, 2000), "x" * (f.max_chars + 1)],
    "tokens": lambda f: ["", "\x00", "\U0001f6a2 " * min(f.max_chars, 2000), "x" * (f.max_chars + 1)],
    "ids": lambda f: [["", ""], [NEVER_SEEN, "x" * 10_000], [None, 1], [1.5, True]],
    "table": lambda f: [[value] * f.shape[0] for value in (-1e30, 1e30, float("nan"), float("inf"))],
}
