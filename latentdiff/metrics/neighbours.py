"""Is it memorized? The nearest training picture of each picture, and what its distance says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from latentdiff.errors import InputError
from latentdiff.metrics.arrays import Features, blocks

BLOCK_VALUES = 1 << 24
"""Of a block of rows, and of the scores of one block with another."""
NEAR = 0.01


@dataclass(frozen=True)
class Neighbours:
    """The nearest training row of each of N rows."""

    rows: np.ndarray
    """int64 [N]."""
    distances: np.ndarray
    """float64 [N], Euclidean; 0 of an exact copy. Of pictures uint8, divided by
    255 sqrt(3 H W), it is the distance of Carlini et al. 2023, section 4."""


def nearest(queries: Features, training: Features) -> Neighbours:
    """The nearest of M training rows to each of N others, in features or in pixels.

    queries, training: [N, ...] and [M, ...] of rows of one shape, such as features [N, D] or
    pictures uint8 [N, 3, H, W]. Rows are compared in float64. Memory is flat: a block of each and
    their scores, of at most 128 MiB each; time 2 N M D flops. Raises InputError when rows differ
    in shape, there are no training rows, or a value is not finite.
    """
    if tuple(queries.shape[1:]) != tuple(training.shape[1:]) or not training.shape[0]:
        raise InputError(
            f"Rows of {list(queries.shape)} and {list(training.shape)} do not compare; both must "
            "be of one shape, and there must be training rows."
        )
    width = max(1, int(np.prod(training.shape[1:])))
    size = max(1, min(BLOCK_VALUES // width, math.isqrt(BLOCK_VALUES)))
    found = [_nearest(_flat(block), training, size) for block in blocks(queries, size)]
    return Neighbours(
        np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)]),
        np.concatenate([np.empty(0), *(distances for _, distances in found)]),
    )


def _nearest(queries: np.ndarray, training: Features, size: int) -> tuple[np.ndarray, np.ndarray]:
    """argmin_j |x - y_j| = argmin_j |y_j|^2 - 2 x . y_j, then the distance itself."""
    places = np.arange(len(queries))
    best = np.full(len(queries), np.inf)
    rows = np.zeros(len(queries), np.int64)
    first = 0
    for block in map(_flat, blocks(training, size)):
        scores = queries @ block.T
        scores *= -2
        scores += np.einsum("nd,nd->n", block, block)
        here = scores.argmin(axis=1)
        nearer = scores[places, here] < best
        best[nearer] = scores[places, here][nearer]
        rows[nearer] = first + here[nearer]
        first += len(block)
    winners = _flat(np.asarray(training[rows], dtype=np.float64))
    return rows, np.linalg.norm(queries - winners, axis=1)


def _flat(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(len(rows), -1)


@dataclass(frozen=True)
class Memorization:
    """How the drawn pictures' distances to the training pictures compare with the real ones'."""

    closer: float
    """The share of all pairs (drawn, real) in which the drawn picture is the nearer one to its
    nearest training picture, ties half: 0.5 of a model that draws like the data, 1 of copies."""
    near: float
    """The share of drawn pictures that are nearer than all but 1% of the real ones: 0.01 of a model
    that draws like the data."""


def memorization(drawn: np.ndarray, real: np.ndarray) -> Memorization:
    """Whether pictures are closer to the training pictures than real held-out ones are.

    Meehan et al. 2020, "A Non-Parametric Test to Detect Data-Copying in Generative Models":
    `closer` is one minus their Delta_T, the Mann-Whitney statistic over the number of pairs. It
    needs the distances of held-out pictures and no threshold, where the copies of Carlini et al.
    2023 need one and the authenticity of Alaa et al. 2022 every training picture's own neighbour.
    A few copies among many pictures hardly move it; `near` is for those.

    drawn, real: distances [N] and [M] to the nearest training picture (`nearest`), of pictures
    drawn from held-out captions and of held-out pictures. Raises InputError when one is empty.
    """
    if not len(drawn) or not len(real):
        raise InputError("Memorization takes distances of drawn pictures and of held-out ones.")
    ordered = np.sort(real)
    farther = len(real) - np.searchsorted(ordered, drawn, side="right")
    tied = len(real) - np.searchsorted(ordered, drawn, side="left") - farther
    closer = (farther + tied / 2).mean() / len(real)
    return Memorization(float(closer), float((drawn < np.quantile(real, NEAR)).mean()))
