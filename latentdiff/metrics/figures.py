"""Figures of feature arrays: pure functions of the ordered rows, computed once, on one process."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentdiff.metrics.arrays import Features
from latentdiff.metrics.bootstrap import Interval, interval, mean_interval, share_interval
from latentdiff.metrics.clip_score import clip_scores
from latentdiff.metrics.features import Extractor, TextExtractor
from latentdiff.metrics.frechet import Moments, frechet_at_infinity, frechet_distance
from latentdiff.metrics.kernel import cmmd, kid
from latentdiff.metrics.manifold import prdc
from latentdiff.metrics.neighbours import Neighbours, memorization, nearest
from latentdiff.metrics.prompts import Prompts

RESAMPLES = 25
"""Of the interval of a Frechet distance."""
SIZES = 15
"""Points of the line through FID against 1/N."""
NEIGHBOURS = 5
"""k of precision, recall, density and coverage."""
KID_SUBSET = 1000

SCENE_COLUMNS = (
    "objects",
    "objects_in_place",
    "background",
    "real_renders",
    "vae_reconstructions",
    "psnr_db",
)
"""Of the rows of emoji scenes: five times 1 where right, else 0, and the VAE's PSNR."""

Groups = Mapping[str, range]


def figures(
    prompts: Prompts,
    extractors: Sequence[Extractor],
    rows: Mapping[str, np.ndarray],
    real: Mapping[str, Mapping[str, np.ndarray]],
    groups: Mapping[str, Groups],
) -> dict[str, Any]:
    """All figures of one evaluation, as plain values.

    rows: of the drawn pictures by name, [N, D]: the extractors' and those of their prompts as
    NAME_text, "scenes" (SCENE_COLUMNS), "pixels". real: the same of the pictures of "reference" and
    "training", where there are any; groups: theirs. Memorization is of what training never showed:
    the held-out kinds of scenes, or all prompts of other kinds.
    """
    found: dict[str, Any] = {}
    unseen: list[str] = []
    if prompts.asked is not None:
        unseen = [kind.name for kind in prompts.asked.kinds if kind.split == "held_out"]
        found = scene_figures(rows["scenes"], prompts.groups, unseen)
    reference, training = real.get("reference", {}), real.get("training", {})
    by_feature = found["features"] = dict[str, Any]()
    for extractor in extractors:
        name, own = extractor.name, dict[str, Any]()
        if reference:
            own |= distances(rows[name], reference[name], prompts.groups, groups["reference"])
        if isinstance(extractor, TextExtractor):
            texts = rows[f"{name}_text"]
            own |= clip_figures(rows[name], texts, reference.get(name), prompts.groups)
        by_feature[name] = own
    if training:
        by_neighbour = found["neighbours"] = dict[str, Any]()
        for name, seen in training.items():
            drawn = _nearest(rows[name], prompts.groups, unseen, seen)
            others = None
            if reference:
                others = _nearest(reference[name], groups["reference"], unseen, seen)
            by_neighbour[name] = copies(drawn, others)
    return found


def _nearest(
    rows: np.ndarray, groups: Groups, chosen: Sequence[str], training: np.ndarray
) -> Neighbours:
    """The nearest training rows of the chosen groups' rows; of all where none is chosen."""
    ranges = [groups[name] for name in chosen if name in groups] or [range(len(rows))]
    found = [nearest(rows[some.start : some.stop], training) for some in ranges]
    return Neighbours(
        np.concatenate([part.rows for part in found]),
        np.concatenate([part.distances for part in found]),
    )


def distances(
    drawn: np.ndarray, real: np.ndarray, drawn_groups: Groups, real_groups: Groups
) -> dict[str, Any]:
    """What two sets of features [N, D] and [M, D] say of their pictures, as plain values.

    Keys: frechet and its 95% interval; frechet_at_infinity and frechet_points, [N, distance], of
    which it is taken; kid, and the kid_deviation between its subsets of kid_subset_size; precision,
    recall, density, coverage; frechet_by_group, of each group of drawn pictures that has real ones
    of its own. What takes more pictures than there are is left out.
    """
    if min(len(drawn), len(real)) < 2:
        return {}
    reference = Moments.of(real)

    def frechet(features: Features) -> float:
        return frechet_distance(Moments.of(features), reference)

    value, kinds = frechet(drawn), list(drawn_groups.values())
    spread = interval(frechet, drawn, resamples=RESAMPLES, value=value, groups=kinds)
    found: dict[str, Any] = {"frechet": value, "frechet_interval": both(spread)}
    if len(drawn) >= 4 * drawn.shape[1]:  # that FID_N is linear in 1/N holds well above D pictures
        sizes = np.linspace(2 * drawn.shape[1], len(drawn), SIZES).astype(int).tolist()
        line = frechet_at_infinity(drawn, reference, sizes)
        found["frechet_at_infinity"] = line.value
        found["frechet_points"] = [[point.count, point.distance] for point in line.points]
    size = min(KID_SUBSET, len(drawn) // 2, len(real) // 2)  # subsets that differ
    if size >= 2:
        found["kid"], found["kid_deviation"] = kid(drawn, real, subset_size=size)
        found["kid_subset_size"] = size
    if min(len(drawn), len(real)) > NEIGHBOURS:
        found |= vars(prdc(real, drawn, NEIGHBOURS))
    found["frechet_by_group"] = {
        name: frechet_distance(
            Moments.of(drawn[rows.start : rows.stop]),
            Moments.of(real[real_groups[name].start : real_groups[name].stop]),
        )
        for name, rows in drawn_groups.items()
        if name in real_groups and min(len(rows), len(real_groups[name])) > 1
    }
    return found


def clip_figures(
    drawn: Features, texts: Features, real: Features | None, groups: Groups
) -> dict[str, Any]:
    """clip_score, its interval, its means by_group and, with real pictures [M, D], the cmmd.

    drawn, texts: [N, D], of pictures and of their prompts.
    """
    found: dict[str, Any] = means("clip_score", clip_scores(drawn, texts), groups)
    return found if real is None else found | {"cmmd": cmmd(drawn, real)}


def means(name: str, values: np.ndarray, groups: Groups) -> dict[str, Any]:
    """The mean of values [N], its 95% interval, and the mean of each group."""
    return {
        name: float(values.mean()),
        f"{name}_interval": both(mean_interval(values, groups=list(groups.values()))),
        f"{name}_by_group": {
            group: float(values[rows.start : rows.stop].mean()) for group, rows in groups.items()
        },
    }


def scene_figures(rows: np.ndarray, groups: Groups, unseen: Sequence[str]) -> dict[str, Any]:
    """Of the rows [N, 6] of SCENE_COLUMNS: the shares that are right in percent, for each kind.

    vae_psnr_db is the mean over the pictures of the kinds that are `unseen`, where there are any,
    and left out where the VAE gives one of them back exactly, whose PSNR is infinite.
    """
    found: dict[str, Any] = {}
    for name, numbers in groups.items():
        right = rows[numbers.start : numbers.stop, :-1]
        shares, intervals = {}, {}
        for column, values in zip(SCENE_COLUMNS, right.T, strict=False):
            successes, count = int(values.sum()), len(values)
            shares[column] = round(100 * successes / count, 1)
            wilson = share_interval(successes, count)
            intervals[column] = [round(100 * wilson.low, 1), round(100 * wilson.high, 1)]
        found[name] = {**shares, "intervals": intervals}
    chosen = [rows[groups[name].start : groups[name].stop, -1] for name in unseen]
    psnr = np.concatenate([np.empty(0), *chosen])
    if len(psnr) and np.isfinite(psnr).all():
        ends = np.cumsum([0, *map(len, chosen)]).tolist()
        kinds = [range(*pair) for pair in itertools.pairwise(ends)]
        found["vae_psnr_db"] = round(float(psnr.mean()), 2)
        spread = both(mean_interval(psnr, groups=kinds))
        found["vae_psnr_db_interval"] = [round(end, 2) for end in spread]
    return found


def copies(drawn: Neighbours, real: Neighbours | None) -> dict[str, Any]:
    """The median distance to the nearest training picture and, with real ones', memorization's."""
    found: dict[str, Any] = {"median_distance": float(np.median(drawn.distances))}
    return found if real is None else found | vars(memorization(drawn.distances, real.distances))


def both(ends: Interval) -> list[float]:
    """The two ends of an interval."""
    return [ends.low, ends.high]
