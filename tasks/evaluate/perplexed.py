"""Texts whose next piece is told, on the holdout: how perplexed a model is by each piece, and how many bits it takes
for each character.

Perplexity is of a model's own pieces; of models with others, or with another tokenizer, the bits of a character are
comparable. Pieces of one text go together, so intervals come from drawing texts; a unit is a line of sums, and every
metric is a function of the sums of all lines.

    B texts   U units (at most MOST_UNITS lots of texts)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tasks.evaluate.numeric import sums_of
from tasks.evaluate.tagged import interval
from tasks.spec.rules import Measurement

# Of a text: its nats, its pieces, its characters.
NATS, PIECES, CHARACTERS = range(3)


class TextAnswers(NamedTuple):
    """``nats``, ``pieces`` and ``characters`` float64 [B]: what a text costs, of how many answers, for how much."""

    nats: np.ndarray
    pieces: np.ndarray
    characters: np.ndarray
    names: tuple[str, ...] = ()

    gap_of = "bits_per_character"

    @property
    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        return self.pieces, -self.nats / self.pieces

    def measure(self) -> tuple[Measurement, ...]:
        return tuple(self.measure_part("overall", np.arange(len(self.nats))))

    def measure_part(self, where: str, rows: np.ndarray) -> list[Measurement]:
        lines = np.stack([self.nats[rows], self.pieces[rows], self.characters[rows]], axis=1)
        if not len(lines):
            # Still there with no samples: a rule on it is inconclusive then, and no error.
            return [Measurement(metric=name, slice=where, value=1.0, samples=0) for name in SCORES]
        sums, found = sums_of(lines, None), []
        for name, score in SCORES.items():
            value = score(sums.sum(axis=0))
            low, high = interval(score, sums, value)
            found.append(Measurement(metric=name, slice=where, value=value, samples=len(lines), low=low, high=high))
        return found

    def instead(self, rows: np.ndarray, probabilities: np.ndarray) -> TextAnswers:
        """As many pieces of the same texts, told by another model."""
        nats = -probabilities[:, 0].astype(np.float64) * self.pieces[rows]
        return TextAnswers(nats, self.pieces[rows], self.characters[rows])

    def columns(self) -> dict[str, list[Any]]:
        parts = zip((self.nats / math.log(2)).tolist(), self.pieces.tolist(), self.characters.tolist(), strict=True)
        said = [{"bits": bits, "pieces": pieces, "characters": characters} for bits, pieces, characters in parts]
        return {"label": self.characters.tolist(), "prediction": said}


def perplexity(sums: np.ndarray) -> float:
    """exp of the mean nats of a piece, of the sums of texts (nats, pieces, characters)."""
    return float(np.exp(sums[NATS] / max(sums[PIECES], 1)))


def bits_per_character(sums: np.ndarray) -> float:
    return float(sums[NATS] / math.log(2) / max(sums[CHARACTERS], 1))


SCORES = {"perplexity": perplexity, "bits_per_character": bits_per_character}


def bits_gain(mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> Measurement:
    """Champion minus candidate, in bits a character, so that more is better, with the interval of drawing texts, both
    answers to a text together. Each as ``TextAnswers.columns`` has it: the two may have read another length of it."""
    sides = [np.array([(said["bits"], said["characters"]) for said in side]) for side in (mine, theirs)]
    sums = sums_of(np.concatenate(sides, axis=1), None)
    value = _less(sums.sum(axis=0))
    low, high = interval(_less, sums, value)
    return Measurement(metric="bits_gain", value=value, samples=len(mine), low=low, high=high)


def _less(sums: np.ndarray) -> float:
    return float(sums[2] / max(sums[3], 1) - sums[0] / max(sums[1], 1))
