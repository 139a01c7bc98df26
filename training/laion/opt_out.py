"""Whether a site forbids the use of a picture for training, in the headers of its answer."""

from __future__ import annotations

from email.message import Message

WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives that have a colon of their own."""
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
        if colon and name.strip() not in WITH_VALUE:
            ours = name.strip() in ("*", *agents)
            part = rest
        word = part.strip()
        if ours:
            words += MEANS.get(word, (word,))
    return words
