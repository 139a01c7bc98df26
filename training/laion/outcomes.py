"""What the status of a sample says of its picture."""

from __future__ import annotations

from latentdiff.data.lockfile import DUPLICATES, KEPT, TAKEN_DOWN, TOO_SMALL

HAD = (KEPT, *DUPLICATES, TOO_SMALL, TAKEN_DOWN)
"""The picture was there, or not asked for."""
GONE = (
    *("403", "404", "410", "http error", "dns", "connection", "timeout", "redirects"),
    *("content type", "not an image"),
)
"""Its server gives no picture any more. What else is not HAD was refused: by the server's wish, by
our limits, or because it is another picture than the metadata describe.
"""
