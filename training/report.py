"""run_dir/index.html: a run on one page that opens without a server.

python -m training.report runs/emoji/diffusion
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from latentdiff.charts import Curve, chart, short
from latentdiff.config import read_yaml
from latentdiff.errors import InputError, run_command
from latentdiff.page import COLOURS, key, options, panel, tiles, write_page

PAGE, METRICS = "index.html", "metrics.jsonl"
FAULT, UNREADABLE = "fault.json", "unreadable.jsonl"

EARLIER_GRIDS = 12
LISTED_SAMPLES = 100

TITLES = {
    "loss": "Loss",
    "loss_at": "Loss by noise level",
    "validation": "Held-out data",
    "evaluation": "Evaluation",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
    "mfu": "Model FLOPs utilization",
    "data_wait": "Time spent waiting for data",
    "peak_memory_gib": "Peak memory, GiB",
}
"""Panels in their order; figures called a/b share panel a, others have one of their own. Those of
evaluations called evaluation/a.b share the panel of b."""

FROM_ZERO = ("learning_rate", "images_per_second", "mfu", "data_wait", "peak_memory_gib")

LEVELS = tuple(f"hsl({250 - 27 * number} 62% 50%)" for number in range(10))


def write_report(run_dir: Path) -> Path:
    """Write run_dir/index.html from what lies beside it; returns its path.

    Read are config.yaml, metrics.jsonl, samples/, unreadable.jsonl (one {"sample", "reason"} a
    line) and fault.json, each where there is one. The page holds all but the pictures.
    """
    config = read_yaml(run_dir / "config.yaml") if (run_dir / "config.yaml").is_file() else {}
    rows = list(_lines(run_dir / METRICS))
    curves = _curves(rows)
    sections = (
        _head(run_dir.resolve().name, config, rows, curves),
        _fault(run_dir),
        _panels(curves),
        _samples(run_dir, config),
        _unreadable(run_dir),
        options(config),
    )
    write_page(run_dir / PAGE, run_dir.resolve().name, sections, STYLE)
    return run_dir / PAGE


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; a half-written last one is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _curves(rows: Iterable[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of each figure, in the order of lines."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def _head(
    name: str, config: dict[str, Any], rows: list[dict[str, Any]], curves: dict[str, Any]
) -> str:
    """The run's name, how far it is, and its newest figures."""
    done = rows[-1]["step"] if rows else 0
    total = config.get("max_steps") or done or 1
    written = time.strftime("%Y-%m-%d %H:%M", time.gmtime(rows[-1]["time"])) if rows else ""
    state = "finished" if done >= total else f"{done / total:.1%}"
    figures = [("step", f"{done:,} <small>of {total:,}</small>")]
    for figure, label in (
        ("loss", "loss"),
        ("images_per_second", "images a second"),
        ("mfu", "MFU"),
        ("peak_memory_gib", "GiB at most"),
    ):
        if figure in curves:
            value = curves[figure][-1][1]
            figures.append((label, f"{value:.1%}" if figure == "mfu" else short(value)))
    return (
        f"<header><h1>{escape(name)}</h1><p>{state}{f' · {written} UTC' if written else ''}</p>"
        f'<div class="bar"><i style="width:{min(1, done / total):.2%}"></i></div>'
        f"{tiles(figures)}</header>"
    )


def _panels(curves: dict[str, list[tuple[float, float]]]) -> str:
    """Every figure in a chart, those that belong together in one."""
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        group, _, member = name.partition("/")
        if group == "evaluation" and "." in member:
            member, _, figure = member.rpartition(".")
            group = f"Evaluation: {figure}"
        panels.setdefault(group, {})[member or group] = curve
    order = [group for group in TITLES if group in panels]
    order += [group for group in panels if group not in TITLES]
    if not order:
        return "<section><h2>Curves</h2><p>Nothing was logged yet.</p></section>"
    parts = []
    for group in order:
        members = panels[group]
        colours = LEVELS if group == "loss_at" else COLOURS
        if list(members) == [group]:
            told = _newest(members[group])
        else:
            told = key(
                (
                    f"{escape(member)}{_newest(curve) if group != 'loss_at' else ''}"
                    for member, curve in members.items()
                ),
                colours,
            )
        title = TITLES.get(group, group.replace("_", " "))
        picture = chart(members, colours, from_zero=group in FROM_ZERO)
        parts.append(panel(title, told, picture))
    return f'<section><h2>Curves</h2><div class="charts">{"".join(parts)}</div></section>'


def _newest(curve: Curve) -> str:
    return f"<b>{short(curve[-1][1])}</b>"


def _samples(run_dir: Path, config: dict[str, Any]) -> str:
    """The newest grid of samples, and earlier ones from evenly over the run."""
    grids = sorted((run_dir / "samples").glob("step-*.png"), key=lambda path: _step(path.stem))
    if not grids:
        return ""
    *earlier, newest = grids
    shown = [
        earlier[len(earlier) * number // EARLIER_GRIDS]
        for number in range(EARLIER_GRIDS)
        if len(earlier) > EARLIER_GRIDS
    ] or earlier
    prompts = config.get("sample_prompts") or ()
    told = "".join(f"<li>{escape(str(prompt))}</li>" for prompt in prompts)
    row = "".join(f"<figure>{_picture(path)}</figure>" for path in reversed(shown))
    return (
        f'<section><h2>Samples</h2><figure class="newest">{_picture(newest)}</figure>'
        + (f"<details><summary>Prompts</summary><ol>{told}</ol></details>" if told else "")
        + (f'<div class="row">{row}</div>' if row else "")
        + "</section>"
    )


def _picture(path: Path) -> str:
    link, step = quote(f"samples/{path.name}"), f"step {_step(path.stem):,}"
    return (
        f'<a href="{link}"><img src="{link}" alt="samples at {step}" loading="lazy"></a>'
        f"<figcaption>{step}</figcaption>"
    )


def _step(stem: str) -> int:
    digits = stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0


def _fault(run_dir: Path) -> str:
    """What stopped the run last, if a number that was not finite did."""
    if not (run_dir / FAULT).is_file():
        return ""
    text = (run_dir / FAULT).read_text(encoding="utf-8", errors="replace")
    fault = next(_lines_of(text), {})
    return (
        '<section class="fault"><h2>Stopped</h2><p>The loss or a gradient was not finite at step '
        f"{escape(str(fault.get('step', '?')))}; that step was not taken.</p>"
        f"<details><summary>{FAULT}</summary><pre>{escape(text[:20_000])}</pre></details></section>"
    )


def _lines_of(text: str) -> Iterator[dict[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError:
        return
    if isinstance(value, dict):
        yield value


def _unreadable(run_dir: Path) -> str:
    """How many samples could not be read and why, and the first of them."""
    reasons: Counter[str] = Counter()
    listed: list[str] = []
    for row in _lines(run_dir / UNREADABLE):
        reason = str(row.get("reason"))
        reasons[reason] += 1
        if len(listed) < LISTED_SAMPLES:
            listed.append(f"<tr><td>{escape(str(row.get('sample')))}<td>{escape(reason)}")
    if not reasons:
        return ""
    counts = ", ".join(f"{escape(reason)}: {count:,}" for reason, count in reasons.most_common())
    return (
        f"<section><h2>Unreadable samples</h2><p>{sum(reasons.values()):,} were passed over "
        f"({counts}).</p><details><summary>The first {len(listed)}</summary><table><tr><th>sample"
        f"<th>reason{''.join(listed)}</table></details></section>"
    )


STYLE = """
.newest img { max-width: 100%; border-radius: 6px; display: block }
.row { display: flex; gap: 12px; overflow-x: auto; padding: 14px 0 }
.row img { height: 130px; border-radius: 4px; display: block }
.newest figcaption, .row figcaption { color: var(--dim); font-size: 13px; padding-top: 4px }
ol { margin: 6px 0; columns: 2 280px }
.fault { border-left: 4px solid #cf222e; padding-left: 16px; margin-top: 28px }
.fault h2 { margin-top: 0 }
"""


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise InputError("Name one run directory: python -m training.report runs/NAME.")
    print(write_report(Path(sys.argv[1])))


if __name__ == "__main__":
    run_command(main)
