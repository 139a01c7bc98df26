"""What a plot says in words and numbers, read from its file."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.estimates import Estimate
from benchmarks.panels import Dots, Line, Panel, save


def test_dots_have_a_named_row_each_and_share_the_names(tmp_path: Path) -> None:
    rows = {"first model": Estimate(1, 0, 2), "second model": Estimate(3, 2, 4)}
    save(tmp_path / "a.svg", Dots("Left", "%", rows), Dots("Right", "%", rows), height=2)
    text = (tmp_path / "a.svg").read_text("utf-8")
    words = re.findall(r">([^<>]+)</text>", text)
    assert {"Left", "Right", "%"} <= set(words)
    assert words.count("first model") == words.count("second model") == 1
    assert words.index("first model") < words.index("second model")


def test_the_same_plot_is_the_same_file(tmp_path: Path) -> None:
    line = Line("name", [(1, 2), (10, 3)], [(1, 3), (2, 4)])
    for name in ("a.svg", "b.svg"):
        save(tmp_path / name, Panel("Title", "x", "y", [line], log_y=False))
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert b">name<" in first
