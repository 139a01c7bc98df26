"""A page that opens without a server: its frame, its style, and what stands on it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from latentdiff.model_files import staged_file

COLOURS = tuple(f"var(--c{number})" for number in range(6))


def write_page(file: Path, title: str, sections: Iterable[str], style: str = "") -> None:
    """One HTML file of sections, which are HTML; style: more of it than STYLE."""
    with staged_file(file) as path:
        path.write_text(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n"
            f"<body><main>{''.join(sections)}</main></body></html>\n",
            encoding="utf-8",
        )


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """(label, value), both HTML, in large letters."""
    cells = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for label, value in figures)
    return f'<div class="tiles">{cells}</div>'


def key(labels: Iterable[str], colours: Sequence[str]) -> str:
    """What each colour of a chart stands for; labels are HTML."""
    entries = "".join(
        f'<span><i style="background:{colours[number % len(colours)]}"></i>{label}</span>'
        for number, label in enumerate(labels)
    )
    return f'<div class="key">{entries}</div>'


def panel(title: str, told: str, picture: str) -> str:
    """A chart under its title, a text, and what is told beside that, HTML."""
    return f"<figure><figcaption><h3>{escape(title)}</h3>{told}</figcaption>{picture}</figure>"


def options(values: Mapping[str, Any]) -> str:
    """A section of every value by its dotted name, or nothing where there are none."""
    if not values:
        return ""
    rows = "".join(f"<tr><th>{escape(name)}<td>{escape(value)}" for name, value in _flat(values))
    return (
        f'<section><h2>Configuration</h2><div class="options"><table>{rows}</table></div></section>'
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{name}", text


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f8fa; --ink: #1f2328; --dim: #656d76;
  --edge: #d8dee4; --bar: #0969da; --c0: #0969da; --c1: #d4630c; --c2: #0a8f6c; --c3: #9a3fa0;
  --c4: #a37b00; --c5: #57606a }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --card: #151b23; --ink: #e6edf3;
  --dim: #8b949e; --edge: #2b323b; --bar: #4493f8; --c0: #4493f8; --c1: #f0883e; --c2: #3fb98f;
  --c3: #cb79d1; --c4: #d4ac2b; --c5: #9aa4af } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 18px; margin: 36px 0 12px }
h3 { font-size: 14px; margin: 0; font-weight: 600 } p { margin: 4px 0; color: var(--dim) }
.bar { height: 6px; border-radius: 3px; background: var(--edge); margin: 14px 0; overflow: hidden }
.bar i { display: block; height: 100%; background: var(--bar) }
.tiles { display: flex; flex-wrap: wrap; gap: 10px 40px } .tiles div { display: grid }
.tiles b { font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums }
.tiles small { font-size: 14px; font-weight: 400; color: var(--dim) }
.tiles span { color: var(--dim); font-size: 13px }
figure { margin: 0 }
.charts { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)) }
.charts figure { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: 12px 14px 8px; display: flex; flex-direction: column; gap: 4px }
.charts figcaption { display: flex; flex-wrap: wrap; gap: 2px 12px; margin-bottom: auto;
  justify-content: space-between; align-items: baseline }
.charts b { font-variant-numeric: tabular-nums; font-weight: 600; color: var(--ink) }
.key { display: flex; flex-wrap: wrap; gap: 0 10px; font-size: 12px; color: var(--dim) }
.key i { display: inline-block; width: 8px; height: 8px; border-radius: 4px; margin-right: 4px }
.key b { margin-left: 4px }
svg { width: 100%; height: auto; display: block; overflow: visible }
svg text { font-size: 11.5px; fill: var(--dim) }
.end { text-anchor: end } .mid { text-anchor: middle }
.grid { stroke: var(--edge); stroke-width: 1 }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round } .range { opacity: .18 }
details { margin: 8px 0 } summary { cursor: pointer; color: var(--dim) }
pre { background: var(--card); padding: 12px; border-radius: 6px; overflow: auto; font-size: 13px }
table { border-collapse: collapse; font-size: 13px } .options { columns: 2 420px }
th, td { text-align: left; padding: 2px 18px 2px 0; vertical-align: top; overflow-wrap: anywhere }
th { font-weight: 400; color: var(--dim); white-space: nowrap }
td { font-family: ui-monospace, Menlo, monospace }
"""
