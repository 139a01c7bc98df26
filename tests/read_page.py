"""HTML pages as tests read them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tags, text and attributes of a page; every element that needs an end must have one."""

    VOID = ("meta", "img", "tr", "td", "th", "path", "circle", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]

    def assert_safe(self) -> None:
        """Nothing runs, and nothing comes from elsewhere."""
        assert "script" not in self.tags
        assert not [name for _, name, _ in self.attributes if name.startswith("on")]
        assert not re.search(r"<script|https?://|url\(|@import|<link|<iframe", self.source)
