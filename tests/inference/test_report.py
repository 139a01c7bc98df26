"""Sweeps of a protocol's free fields: what is evaluated, what is refused, what the page says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inference import report
from inference.report import ReportConfig, Sweep, settings_of
from inference.report_curves import line_of
from inference.report_page import write_report_page
from latentdiff.errors import InputError
from latentdiff.metrics.protocol import protocol_id
from latentdiff.pipeline import TextToImage
from tests.read_page import Page

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:The prompt is longer")


def config(run_dir: Path, model: Path, **changes: Any) -> ReportConfig:
    """Two prompts of each kind, at two guidance scales and then by one step more."""
    sweeps = (
        Sweep(guidance_scale=(1, 4), num_inference_steps=(1,)),
        Sweep(num_inference_steps=(2, 1)),
    )
    options = {
        "protocol": ROOT / "configs/protocols/tiny.yaml",
        "models": {"tiny": str(model)},
        "prompts": 2,
        "sweeps": sweeps,
    }
    return ReportConfig(run_dir=run_dir, **(options | changes))


@pytest.fixture(scope="module")
def swept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a report leaves; to be read, never changed."""
    run_dir = tmp_path_factory.mktemp("report")
    report.report(config(run_dir, tiny_model))
    return run_dir


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# Evaluations


def test_sweeps_are_all_combinations_and_none_twice(tmp_path: Path) -> None:
    protocols = config(tmp_path, tmp_path).protocols()
    found = [(p.num_inference_steps, p.guidance_scale) for p in protocols]
    assert found == [(1, 1.0), (1, 4.0), (2, 4.0)]
    assert {p.count for p in protocols} == {2}
    assert {(p.sampler, p.seed) for p in protocols} == {("ddim", 0)}


def test_every_point_is_its_own_evaluation(swept: Path, tiny: TextToImage) -> None:
    told = read(swept / "report.json")
    assert told["planned"] == len(told["points"]) == 3
    assert told["id"] == protocol_id(told["fixed"])
    prompt = told["prompts"][0]
    pictures = []
    for point in told["points"]:
        kept = read(swept / point["directory"] / "evaluation.json")
        assert point["results"] == {name: v for name, v in kept.items() if name != "fixed"}
        assert point["settings"].items() <= kept.items()
        assert kept["id"] == told["id"]
        picture = tiny.generate(prompt["text"], **point["settings"])
        with Image.open(swept / point["directory"] / "pictures" / "000000.png") as drawn:
            pictures.append(np.asarray(drawn, int))
        np.testing.assert_allclose(pictures[-1], np.asarray(picture, int), atol=1)
    assert np.abs(pictures[0] - pictures[1]).mean() > 1
    assert np.abs(pictures[1] - pictures[2]).mean() > 1


def test_a_finished_report_draws_nothing_and_a_new_point_only_itself(
    swept: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "again"
    shutil.copytree(swept, run_dir)
    (run_dir / "report.json").unlink()
    drawn: list[float] = []
    generate = TextToImage.generate

    def counted(self: TextToImage, prompts: list[str], **options: Any) -> Any:
        drawn.extend(options["guidance_scale"] for _ in prompts)
        return generate(self, prompts, **options)

    monkeypatch.setattr(TextToImage, "generate", counted)
    report.report(config(run_dir, tiny_model))
    assert drawn == []
    assert read(run_dir / "report.json") == read(swept / "report.json")
    more = (
        *config(run_dir, tiny_model).sweeps,
        Sweep(guidance_scale=(2,), num_inference_steps=(1,)),
    )
    report.report(config(run_dir, tiny_model, sweeps=more))
    assert drawn == [2.0] * 8
    assert len(read(run_dir / "report.json")["points"]) == 4


def test_another_process_draws_and_leaves_the_page_to_the_first(
    swept: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two, alone, does all the drawing; the first then only reads."""
    shared = config(tmp_path / "shared", tiny_model)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert report.report(shared) is None
    assert not (shared.run_dir / "index.html").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(TextToImage, "generate", None)
    assert report.report(shared) == shared.run_dir / "index.html"
    mine, theirs = (read(folder / "report.json") for folder in (shared.run_dir, swept))
    assert mine == theirs


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"sampler": ["euler"]}, "leaves guidance_scale, num_inference_steps free and not sampler"),
        ({"seed": [1]}, "and not seed"),
    ],
)
def test_what_is_not_free_is_not_swept(
    sweep: dict[str, Any], message: str, tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(InputError, match=message):
        report.report(config(tmp_path / "out", tiny_model, sweeps=[sweep]))
    assert not (tmp_path / "out").exists()


def test_unknown_samplers_are_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    protocol = ROOT / "configs/protocols/emoji_scenes.yaml"
    sweeps = [{"sampler": ["ddim", "eular"]}]
    with pytest.raises(InputError, match="did you mean 'euler'"):
        report.report(config(tmp_path / "out", tmp_path, protocol=protocol, sweeps=sweeps))
    assert not (tmp_path / "out").exists()


def test_models_of_other_scenes_are_refused_and_the_first_ones_page_stays(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Their prompts are others, and so is the protocol's id."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    scenes = read(other / "vocabulary.json")
    scenes["backgrounds"]["dark green"] = [0, 60, 0]
    (other / "vocabulary.json").write_text(json.dumps(scenes))
    one = config(
        tmp_path / "out",
        tiny_model,
        models={"tiny": str(tiny_model), "other": str(other)},
        prompts=1,
        sweeps=[Sweep(num_inference_steps=(1,))],
    )
    with pytest.raises(InputError, match=r"do not compare: they differ in prompts: "):
        report.report(one)
    told = read(one.run_dir / "report.json")
    assert [point["model"] for point in told["points"]] == ["tiny"]
    assert "1 of 2 evaluations so far" in Page(one.run_dir / "index.html").text


# The page


def test_the_page_shows_what_was_measured(swept: Path) -> None:
    page, told = Page(swept / "index.html"), read(swept / "report.json")
    page.assert_safe()
    assert told["id"] in page.text
    for words in ("Against guidance", "Against steps", "Pareto front", "Nearest training pictures"):
        assert words in page.text
    assert "Against samplers" not in page.text  # there is one
    assert "evaluations so far" not in page.text
    for point in told["points"]:
        low, high = point["results"]["features"]["clip"]["clip_score_interval"]
        assert f"{low:.4g} to {high:.4g}" in page.text
    assert all(prompt["text"] in page.text for prompt in told["prompts"])


def test_its_pictures_are_beside_it(swept: Path) -> None:
    page, told = Page(swept / "index.html"), read(swept / "report.json")
    links = page.all("img", "src")
    assert len(links) == 3 * 8 + 2 * 8  # all pictures, and the best ones' with their neighbours
    assert page.all("a", "href") == links
    assert all((swept / link).is_file() for link in links)
    assert len({prompt["number"] for prompt in told["prompts"]}) == 8


def made_up(**changes: Any) -> dict[str, Any]:
    """A report of four guidance scales and, by another sampler, three numbers of steps."""
    settings = [("ddim", 25, g) for g in (1.0, 2.0, 4.0, 8.0)]
    settings += [("euler", steps, 4.0) for steps in (4, 16, 25)]
    points = []
    for number, (sampler, steps, guidance) in enumerate(settings):
        clip = {
            "frechet": 20.0 - number,
            "frechet_at_infinity": 10.0,
            "frechet_points": [[10, 60.0], [20, 35.0], [40, 22.5]],
            "clip_score": 25.0 + (number - 3) ** 2,
            "clip_score_interval": [24.0, 35.0],
            "kid": 0.5,
        }
        points.append(
            {
                "model": "m",
                "directory": f"evaluations/m/{number}",
                "settings": {
                    "sampler": sampler,
                    "num_inference_steps": steps,
                    "guidance_scale": guidance,
                    "seed": 0,
                },
                "results": {"features": {"clip": clip}},
            }
        )
    report = {"protocol": "p", "id": "abc", "fixed": {"name": "p"}, "pictures": 40, "planned": 7}
    return report | {"points": points, "prompts": [{"number": 0, "text": "a fox"}]} | changes


def charts(page: Page, heading: str) -> Iterator[str]:
    """The drawings below a heading, up to the next."""
    section = page.source.partition(f"<h2>{heading}")[2].partition("<h2>")[0]
    yield from re.findall(r"<svg.*?</svg>", section)


def test_each_curve_has_the_points_that_differ_in_one_setting(tmp_path: Path) -> None:
    page = Page(write_report_page(tmp_path, made_up()))
    page.assert_safe()
    drawings = {
        name: list(charts(page, f"Against {name}")) for name in ("guidance", "steps", "samplers")
    }
    for name, count in (("guidance", 4), ("steps", 3), ("samplers", 2)):
        assert [svg.count("<circle") for svg in drawings[name]] == [count] * 4
    assert all('<text class="mid"' in svg and ">ddim<" in svg for svg in drawings["samplers"])
    falling = re.findall(r'class="curve"[^>]*d="M([^"]*)"', drawings["guidance"][0])[0]
    heights = [float(place.split()[1]) for place in falling.split("L")]
    assert heights == sorted(heights)  # 20, 19, 18, 17: down the page
    assert drawings["guidance"][1].count('class="interval"') == 4


def test_the_front_and_the_line_to_infinity_are_drawn(tmp_path: Path) -> None:
    """Frechet falls from 20 to 14 and the score is 34, 29, 26, 25, 26, 29, 34: the last is all."""
    page = Page(write_report_page(tmp_path, made_up()))
    (trade,) = charts(page, "Likeness to real")
    assert trade.count("<title>") == 7
    (front,) = re.findall(r'class="guide"[^>]*d="M([^"]*)"', trade)
    assert front.count("L") == 0
    (bias,) = charts(page, "Against the number")
    assert bias.count("<circle") == 3
    assert ">∞<" in bias
    assert "10 at ∞" in page.text


def test_the_best_figures_are_bold(tmp_path: Path) -> None:
    page = Page(write_report_page(tmp_path, made_up()))
    table = page.source.partition("<h2>Figures")[2].partition("<details>")[0]
    assert re.findall(r"<td><b>(.*?)</b>", table) == ["34", "14", "34"]


def test_what_others_wrote_is_shown_and_not_run(tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    told = made_up(
        protocol=attack, id=attack, fixed={attack: attack}, prompts=[{"number": 0, "text": attack}]
    )
    for point in told["points"]:
        point["model"] = attack
        point["settings"]["sampler"] += attack
        clip = point["results"]["features"].pop("clip")
        point["results"]["features"][attack] = clip | {"by_group": {attack: 1.0}}
        point["results"]["neighbours"] = {attack: {"closer": 0.5}}
        for folder in ("pictures", "neighbours"):
            path = tmp_path / point["directory"] / folder / "000000.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (2, 2)).save(path)
    page = Page(write_report_page(tmp_path, told))
    page.assert_safe()
    assert page.text.count("alert(1)") > 20
    assert len(page.all("img", "src")) == 7 + 2


@pytest.mark.parametrize("without", ["features", "results", "points"])
def test_little_is_a_page_too(tmp_path: Path, without: str) -> None:
    told = made_up()
    for point in told["points"]:
        point["results"] = {} if without == "results" else {"one": {"objects": 50.0}}
    if without == "points":
        told["points"] = told["points"][:1]
    page = Page(write_report_page(tmp_path, told))
    assert "protocol abc" in page.text
    assert page.source.count("<svg") == (3 if without == "features" else 0)
    assert page.all("img", "src") == []


@given(
    st.lists(
        st.tuples(st.integers(2, 10**6), st.floats(0, 1e3)),
        min_size=2,
        max_size=20,
        unique_by=lambda p: p[0],
    )
)
def test_the_line_is_that_of_least_squares(points: list[tuple[int, float]]) -> None:
    slope, value = np.polyfit([1 / n for n, _ in points], [y for _, y in points], 1)
    marks, (first, last) = line_of(points, float(value))
    assert [(mark.x, mark.y) for mark in marks] == [(1 / n, y) for n, y in points]
    assert first == (0.0, value)
    assert last[0] == max(1 / n for n, _ in points)
    expected = value + slope * last[0]
    assert last[1] == pytest.approx(expected, rel=1e-5, abs=1e-4 * (1 + abs(value)))


def test_every_setting_is_a_field_of_the_sweep() -> None:
    (protocol,) = config(Path("x"), Path("y"), sweeps=[Sweep()]).protocols()
    assert settings_of(protocol).keys() == Sweep.model_fields.keys()
