"""How alike two pictures look: a hash that finds candidates, and thumbnails that decide.

A picture is seen in two views, whole and without its even margins, each a thumbnail of SIDE x SIDE
pixels. A view's hash is 64 bits of its low frequencies (Zauner 2010, "Implementation and
benchmarking of perceptual image hash functions", section 3.2.1), which nearly survive whatever
leaves the picture recognisable. Flat drawings often share a hash, so of two whose hashes are near
the thumbnails are laid over each other, and what then still differs is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from PIL import Image

SIDE = 32
"""Of a thumbnail, in pixels."""
VIEWS = 2
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
MARGIN_STEP = 24
"""How much a margin's pixels may differ in a channel, of 255: what JPEG leaves of an even one."""
TRIMMED_SIDE = 128
"""Longest side, or up to twice as much, of what margins are looked for in, in pixels."""
TRIMS = 4
"""How often: a border may lie around a margin."""


def views(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails uint8 [VIEWS, SIDE, SIDE, 3] and log aspect ratios float32 [VIEWS] of an RGB
    picture: whole, and trimmed.
    """
    small = image.reduce(max(1, max(image.size) // TRIMMED_SIDE))
    box = trimmed_box(np.asarray(small))
    x, y = image.width / small.width, image.height / small.height
    boxes = [(0, 0, *image.size), (box[0] * x, box[1] * y, box[2] * x, box[3] * y)]
    thumbnails = [image.resize((SIDE, SIDE), Image.Resampling.BOX, each) for each in boxes]
    aspects = [np.log((right - left) / (low - top)) for left, top, right, low in boxes]
    return np.stack([np.asarray(each) for each in thumbnails]), np.array(aspects, np.float32)


def trimmed_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what lies inside the even margins of uint8 [h, w, 3].

    A margin is as wide as its outermost line goes on unchanged. All of a picture that is nothing
    but margins.
    """
    left, top, bottom, right = 0, 0, *pixels.shape[:2]
    for _ in range(TRIMS):
        inside = pixels[top:bottom, left:right].astype(np.int16)
        ground = np.median(np.concatenate([inside[0], inside[-1]]), axis=0)
        differs = (np.abs(inside - ground) > MARGIN_STEP).any(axis=2)
        rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
        if not len(rows):
            return (left, top, right, bottom) if _ else (0, 0, pixels.shape[1], pixels.shape[0])
        box = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
        if box == (left, top, right, bottom):
            break
        left, top, right, bottom = map(int, box)
    return left, top, right, bottom


@functools.cache
def _dct() -> np.ndarray:
    """Rows 1 to 8 of the orthonormal DCT-II, [8, SIDE]."""
    k, n = np.arange(1, 9)[:, None], np.arange(SIDE)[None]
    return np.sqrt(2 / SIDE) * np.cos(np.pi * (2 * n + 1) * k / (2 * SIDE))


def phash(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 [..., SIDE, SIDE, 3] -> uint64 [...]: which of the 8 x 8 lowest frequencies of the
    luminance but the constant ones are above their median, the lowest in the highest bit.
    """
    grey = thumbnails.astype(np.float64) @ LUMA.astype(np.float64)
    low = (_dct() @ grey @ _dct().T).reshape(*grey.shape[:-2], 64).round(6)
    bits = low > np.median(low, axis=-1, keepdims=True)
    return np.packbits(bits, axis=-1).view(">u8")[..., 0].astype(np.uint64)


def candidates(
    hashes: np.ndarray, most_bits: int, window: int, orders: int = 16
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, j) of hashes that differ in at most `most_bits` bits, some of them repeatedly.

    The sorted neighbourhood of Hernández & Stolfo (1995): in each of `orders` orders, by the hash
    rotated by other numbers of bits, each is compared with the `window` after it. The time is that
    of sorting. A pair is found when some run of bits in which they agree is longer than what it
    takes to tell all but `window` hashes apart.
    """
    rows = np.arange(len(hashes))
    for turn in range(0, 64, 64 // orders):
        rotated = hashes << np.uint64(turn) | hashes >> np.uint64((64 - turn) % 64)
        order = np.lexsort((rows, rotated))
        ordered = rotated[order]
        for step in range(1, min(window, len(hashes) - 1) + 1):
            near = np.bitwise_count(ordered[step:] ^ ordered[:-step]) <= most_bits
            places = np.flatnonzero(near)
            yield order[places], order[places + step]


RADIUS = 3
"""Bits of 64 in which the hashes of pictures that no split may tell apart differ."""


def near_any(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of `hashes` differ from one of `others` in at most RADIUS bits, bool [N]; none is
    missed: those two agree in one of RADIUS + 1 parts of the bits.
    """
    others, found = np.unique(others), np.zeros(len(hashes), dtype=bool)
    bits = 64 // (RADIUS + 1)
    for shift in range(0, 64, bits):
        there, here = ((each >> shift) & (2**bits - 1) for each in (others, hashes))
        order = np.argsort(there, kind="stable")
        there, ordered = there[order], others[order]
        starts, ends = (np.searchsorted(there, here, side) for side in ("left", "right"))
        for number in np.flatnonzero(~found).tolist():
            like = ordered[starts[number] : ends[number]]
            found[number] = (np.bitwise_count(like ^ hashes[number]) <= RADIUS).any()
    return found


EDGE = 3
"""Pixels of a thumbnail that are not compared on each side: a border, or what was cut off."""
GAIN = (0.7, 1.4)
"""Contrast of one picture relative to the other, at most."""
GREY = 6.0
"""Root mean square of the chroma, of 255, below which a picture counts as without colour."""
WITHOUT_COLOUR = 4.0
"""How much more a difference counts where one picture alone has colour, which could differ too."""
NOISE = 2.0
"""Of 255: what differs between pictures that are one colour."""
RIDGE = np.diag(np.array([1, 1, 300, 300, 30, 30], dtype=np.float32))
"""Keeps the motion small where the picture says little of it."""
PIECE = 1024
"""Pairs that are compared together, in 100 MB or so."""


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How much of a picture the other does not explain, float32 [P]; 0 for the same one.

    One step of Lucas & Kanade (1981): the second luminance is fitted by the first, brightened,
    changed in contrast, moved and scaled a little, all linear in six numbers. What is left, and the
    difference in colour where both have any, but for the saturation, is relative to the variance.
    Of both ways the larger.

    first, second: thumbnails uint8 [P, SIDE, SIDE, 3].
    """
    found = np.empty(len(first), dtype=np.float32)
    for start in range(0, len(first), PIECE):
        here = slice(start, start + PIECE)
        a, b = (_parts(each[here]) for each in (first, second))
        found[here] = np.maximum(_unexplained(a, b), _unexplained(b, a))
    return found


@functools.cache
def _blur() -> np.ndarray:
    """(1, 2, 1) / 4 twice along an axis, its ends repeated, [SIDE, SIDE]."""
    once = np.zeros((SIDE, SIDE), dtype=np.float32)
    for row in range(SIDE):
        for step, weight in ((-1, 0.25), (0, 0.5), (1, 0.25)):
            once[row, min(max(row + step, 0), SIDE - 1)] += weight
    return once @ once


def _parts(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blurred luminance [P, SIDE, SIDE] and, of the inner pixels, chroma [P, 3, n]."""
    planes = np.moveaxis(thumbnails, -1, 1).astype(np.float32)
    planes = _blur() @ planes @ _blur().T
    luminance = np.einsum("pcyx,c->pyx", planes, LUMA)
    return luminance, _inner(planes - luminance[:, None])


def _inner(planes: np.ndarray) -> np.ndarray:
    inner = planes[..., EDGE:-EDGE, EDGE:-EDGE]
    return inner.reshape(*inner.shape[:-2], -1)


def _unexplained(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    (a, chroma_a), (b, chroma_b) = first, second
    y, x = np.gradient(a, axis=(1, 2))
    place = (np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2) / SIDE
    inner, target = _inner(a), _inner(b)
    terms = np.stack(
        [
            inner - inner.mean(axis=1, keepdims=True),
            np.ones_like(inner),
            *map(_inner, (x, y, x * place, y * place[:, None])),
        ],
        axis=1,
    )
    normal = terms @ terms.transpose(0, 2, 1) + RIDGE
    fitted = np.linalg.solve(normal, terms @ target[..., None])
    fitted[:, 0] = fitted[:, 0].clip(*GAIN)
    rest = target - (terms * fitted).sum(axis=1)
    spread = target - target.mean(axis=1, keepdims=True)
    power_a, power_b = (np.square(each).mean(axis=(1, 2)) for each in (chroma_a, chroma_b))
    coloured = [power > GREY**2 for power in (power_a, power_b)]
    gain = ((chroma_a * chroma_b).mean(axis=(1, 2)) / (power_a + NOISE**2)).clip(*GAIN)
    other = np.square(chroma_a * gain[:, None, None] - chroma_b).mean(axis=(1, 2))
    left = np.square(rest).mean(axis=1) + np.where(coloured[0] & coloured[1], other, 0)
    whole = np.square(spread).mean(axis=1) + np.where(coloured[0] & coloured[1], power_b, 0)
    return left / (whole + NOISE**2) * np.where(coloured[0] ^ coloured[1], WITHOUT_COLOUR, 1)
