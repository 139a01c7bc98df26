"""The page of a run: what it shows, and what it refuses to trust."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.read_page import Page
from training.report import write_report


def run(folder: Path, steps: int = 40, **options: Any) -> Path:
    """A run directory of `steps` steps logged each, half of what it was to take."""
    (folder / "samples").mkdir(parents=True)
    config = {"run_dir": "runs/x", "max_steps": 2 * steps, "optimizer": {"learning_rate": 0.5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | options))
    lines = [
        {"step": step, "time": 1.7e9 + step, "loss": 1 / step, "loss_at/0.0": 2.0, "mfu": 0.25}
        for step in range(1, steps + 1)
    ]
    lines.append({"step": steps, "time": 1.7e9, "validation/loss": 0.125, "odd_figure": 7.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_it_shows_the_newest_figures_and_every_curve(tmp_path: Path) -> None:
    page = Page(write_report(run(tmp_path / "my run")))
    for words in ("my run", "50.0%", "of 80", "Held-out data", "odd figure", "25.0%"):
        assert words in page.text
    assert "optimizer.learning_rate" in page.text
    assert page.source.count("<svg") == 5
    assert "1.0" not in re.findall(r"\d\.\d", "".join(page.all("svg", "aria-label")))


def test_figures_of_evaluations_have_a_panel_for_each_kind(tmp_path: Path) -> None:
    folder = run(tmp_path / "r")
    names = ("one.objects", "two.objects", "features.clip.frechet", "weight")
    line = {"step": 40, "time": 1.7e9} | {f"evaluation/{name}": 1.5 for name in names}
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    page = Page(write_report(folder))
    assert page.source.count("<svg") == 8
    for words in ("Evaluation: objects", "Evaluation: frechet", "features.clip"):
        assert words in page.text


def test_nothing_in_it_is_fetched_from_elsewhere(tmp_path: Path) -> None:
    folder = run(tmp_path / "r")
    for step in range(20):
        Image.new("RGB", (2, 2)).save(folder / "samples" / f"step-{step:06d}.png")
    page = Page(write_report(folder))
    page.assert_safe()
    links = page.all("img", "src") + page.all("a", "href")
    assert links
    assert all((folder / link).is_file() for link in links)


def test_the_newest_grid_comes_first_and_early_ones_from_all_over_the_run(tmp_path: Path) -> None:
    folder = run(tmp_path / "r")
    for step in (*range(0, 9000, 100), 1_000_000):
        Image.new("RGB", (2, 2)).save(folder / "samples" / f"step-{step:06d}.png")
    shown = [
        int(re.findall(r"\d+", name)[0]) for name in Page(write_report(folder)).all("img", "src")
    ]
    assert shown[0] == 1_000_000
    assert len(shown) == 13
    assert shown[1:] == sorted(shown[1:], reverse=True)
    assert shown[-1] == 0
    assert max(a - b for a, b in itertools.pairwise(shown[1:])) <= 800


def test_what_others_wrote_is_shown_and_not_run(tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    folder = run(tmp_path / "<i>run&", sample_prompts=[attack], **{attack: attack})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "time": 1.7e9, attack: 1.0, f"a/{attack}": 2.0}) + "\n")
    (folder / "unreadable.jsonl").write_text(json.dumps({"sample": attack, "reason": attack}))
    (folder / "fault.json").write_text(json.dumps({"step": attack}))
    Image.new("RGB", (2, 2)).save(folder / "samples" / "step-1.png")
    (folder / "samples" / 'step-"onload="x.png').write_bytes(b"")
    page = Page(write_report(folder))
    page.assert_safe()
    assert page.text.count("alert(1)") >= 8


def test_faults_and_unreadable_samples_are_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "r")
    rows = [{"sample": n, "reason": "truncated" if n % 3 else "no picture"} for n in range(300)]
    (folder / "unreadable.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "fault.json").write_text(json.dumps({"step": 17, "loss": [float("nan")]}))
    page = Page(write_report(folder))
    assert "not finite at step 17" in page.text
    assert "300 were passed over (truncated: 200, no picture: 100)" in page.text
    assert page.source.count("<tr><td>") == 100


@pytest.mark.parametrize("damage", ["empty", "torn", "absent", "constant", "null"])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    line = '{"step": 1, "time": 1.7e9, "loss": 3.0}\n'
    text = {
        "empty": "",
        "torn": line + '{"step": 2, "lo',
        "constant": line + line.replace("1,", "2,"),
        "null": line.replace("3.0", "null"),
    }
    if damage != "absent":
        (folder / "metrics.jsonl").write_text(text[damage])
    page = Page(write_report(folder))
    assert ("Nothing was logged yet" in page.text) == (damage in ("empty", "absent", "null"))
    assert page.source.count("<svg") == (damage in ("torn", "constant"))


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", steps=20_000)
    assert write_report(folder).stat().st_size < 150_000
