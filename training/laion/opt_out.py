"""Whether a site forbids the use of a picture for training, in the headers of its answer."""

from __future__ import annotations

import re
from email.message import Message

WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives that have a colon of their own."""
ANOTHER = re.compile(r"[a-z]\S*")
"""Names of agents, which what stands before a colon of a date is not: 06 Nov 2033 08."""
MEANS = {"none": ("noindex", "nofollow")}
"""https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag"""
RESERVED = "tdm-reservation"
"""Text and data mining reserved: the W3C's TDM Reservation Protocol."""


def forbidding(headers: Message, directives: tuple[str, ...], agents: tuple[str, ...]) -> str:
    """The first of `directives` that an answer gives to everyone or one of `agents`, else "".

    X-Robots-Tag holds directives between commas; those after `NAME:` are for that agent alone.
    """
    given = [word for value in headers.get_all("X-Robots-Tag", []) for word in _said(value, agents)]
    if (headers.get(RESERVED) or "").strip() == "1":
        given.append(RESERVED)
    return next((word for word in given if word in directives), "")


def _said(value: str, agents: tuple[str, ...]) -> list[str]:
    words: list[str] = []
    ours = True
    for part in value.lower().split(","):
        name, colon, rest = part.partition(":")
        name = name.strip()
        addressed = name in ("*", *agents)
        if colon and name not in WITH_VALUE and (addressed or ANOTHER.fullmatch(name)):
            ours, part = addressed, rest
        word = part.strip()
        if ours:
            words += MEANS.get(word, (word,))
    return words
