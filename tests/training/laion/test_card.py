"""The card's numbers are the lockfile's, and a check finds what is not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from latentdiff.data.lockfile import SCHEMA
from tests.training.laion.lock_of import lock, row, rows
from training.laion.card import CardConfig, card
from training.laion.croissant import FIELDS
from training.laion.describe import SHOWN, code, figure, share, size_category

HOSTILE = (
    "</td>|x|`--- <script>alert(1)</script> ![a](https://b.example/c.png)\n---\nlicense: mit {0}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cards"


@pytest.fixture
def write(tmp_path: Path, folder: Path) -> Callable[..., str]:
    """write(rows, family=..., option=value): makes the card and returns its text."""

    def make(
        content: list[dict[str, Any]] | None = None, family: str = "plain", **options: Any
    ) -> str:
        directory = lock(tmp_path / "data", rows() if content is None else content, family)
        card(CardConfig(folder=folder, **options), "tiny", directory)
        return (folder / "tiny.md").read_text(encoding="utf-8")

    return make


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    part = text.split(f"\n## {heading}\n", 1)[1]
    lines = part[part.index("\n|") :].lstrip("\n").split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def number(text: str) -> int:
    return int(text.split(" ")[0].replace(",", ""))


def test_the_first_table_counts_the_rows(write: Callable[..., str]) -> None:
    content = [*rows(3000), row(3000, caption="drawing drawing 1")]
    kept = [each for each in content if each["status"] == "kept"]
    text = write(content)
    values = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", text, re.M))
    assert number(values["samples selected"]) == 3001
    assert number(values["samples kept"]) == len(kept)
    splits = Counter(each["split"] for each in kept)
    assert values["of them to train / to validate"] == (
        f"{splits['train']:,} / {splits['validation']:,}"
    )
    assert number(values["different captions"]) == len({each["caption"] for each in kept})
    assert number(values["different domains"]) == 3
    assert values["the pictures' files"] == f"{sum(each['bytes'] for each in kept) / 1e6:.4g} MB"


def test_the_statuses_are_counted(write: Callable[..., str]) -> None:
    content = rows(200)
    text = write(content)
    expected = Counter(each["status"] for each in content)
    found = {
        name.strip("`"): number(count)
        for name, count, _ in table(text, "What became of the selected samples")
    }
    assert found == expected
    assert f"Refused for that reason: {expected['opted out']}." in text
    assert f"{expected['duplicate: near']} duplicates were found" in text
    lost = sum(count for name, count in expected.items() if name in ("404", "timeout", "opted out"))
    assert f"Of those selected, {lost} could not be had" in text


def test_the_funnel_is_the_selections(write: Callable[..., str]) -> None:
    text = write(rows(60))
    assert table(text, "Selection") == [
        ["`metadata`", "0", "0", "67"],
        ["`width >= 512`", "7", "2", "60"],
    ]
    assert "`part-0.parquet`" in text
    assert "somebody" not in text
    assert "Preset: `sd15`. https://a.example/model: a score of 5 or more." in text


def test_the_sizes_and_scores_are_those_of_kept_samples(write: Callable[..., str]) -> None:
    content = rows(101)
    text, kept = write(content), [each for each in content if each["status"] == "kept"]
    sizes = {name: cells for name, *cells in table(text, "Pictures")}
    widths = sorted(each["width"] for each in kept)
    middle = widths[(len(widths) - 1) // 2 : len(widths) // 2 + 1]
    assert sizes["width"][:2] == [str(len(kept)), f"{widths[0]:,}"]
    assert int(sizes["width"][3].replace(",", "")) in middle
    assert sizes["width"][5] == f"{widths[-1]:,}"
    scores = {name: cells for name, *cells in table(text, "Scores")}
    known = [each["punsafe"] for each in kept if each["punsafe"] is not None]
    assert scores["punsafe"][0] == str(len(known))
    assert float(scores["punsafe"][5]) == pytest.approx(max(known), rel=1e-3)
    assert scores["pwatermark"] == ["0", "", "", "", "", ""]


def test_all_kept_samples_carry_what_they_must(write: Callable[..., str]) -> None:
    text = write(rows(80))
    for name in ("sha256", "status", "opt_out"):
        assert f"100.0% carry {name}" in text
    assert "0.0% carry pwatermark" in text


def test_there_is_a_picture_of_each_quantity_that_is_known(
    write: Callable[..., str], folder: Path
) -> None:
    shown = re.findall(r"!\[[^]]+\]\((tiny/[a-z_0-9]+\.svg)\)", write())
    assert sorted(shown) == sorted(f"tiny/{path.name}" for path in (folder / "tiny").glob("*.svg"))
    assert {"tiny/width.svg", "tiny/aspect.svg", "tiny/caption_words.svg"} <= set(shown)
    assert "tiny/similarity.svg" in shown
    assert "tiny/pwatermark.svg" not in shown


def test_the_front_matter_is_hugging_faces(write: Callable[..., str]) -> None:
    text = write(pretty_name="Tiny: a set", languages=("en", "de"), licence="cc0-1.0")
    data = DatasetCard(text).data
    assert data.pretty_name == "Tiny: a set"
    assert data.license == "cc0-1.0"
    assert data.language == ["en", "de"]
    assert data.size_categories == ["n<1K"]
    assert data.task_categories == ["text-to-image"]


@pytest.mark.parametrize(
    ("samples", "name"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (8121, "1K<n<10K"),
        (10**6, "1M<n<10M"),
        (2 * 10**9, "1B<n<10B"),
        (10**12, "n>1T"),
    ],
)
def test_size_categories(samples: int, name: str) -> None:
    assert size_category(samples) == name


def test_the_datasheet_has_its_sections_and_answers(write: Callable[..., str]) -> None:
    text = write(contact="data@example.org", funding="A grant.", creators=("A", "B"))
    datasheet = text.split("## Datasheet")[1]
    sections = "Motivation Composition Collection Preprocessing Uses Distribution Maintenance"
    assert re.findall(r"^### (\w+)", datasheet, re.M) == sections.split()
    for question, answer in re.findall(r"^\*\*([^*]+\?)\*\* (.*)$", datasheet, re.M):
        assert len(answer) > 2, question
    assert datasheet.count("?**") >= 35
    assert "**Who can be reached?** data@example.org" in text
    assert "**Who paid for it?** A grant." in text
    assert "**By whom?** A, B" in text


def test_the_past_of_laion_5b_is_told_unless_it_is_something_else(
    write: Callable[..., str],
) -> None:
    assert "metadata of before that" in write(family="laion2b_en")
    safe = write(family="relaion2b_en_research_safe")
    assert "Stanford Internet Observatory" in safe
    assert "metadata of before that" not in safe
    assert "Stanford" not in write(family="plain")
    assert "Stanford" not in write(family="laion2b_en", history="Drawings by many hands.")


def test_every_column_of_the_lockfile_is_explained(write: Callable[..., str]) -> None:
    assert set(FIELDS) == set(SCHEMA.names)
    assert [line[0].strip("`") for line in table(write(), "Fields of the lockfile")] == SCHEMA.names


def test_what_others_wrote_stays_text(write: Callable[..., str], folder: Path) -> None:
    content = [
        row(each, language=HOSTILE, license=HOSTILE, nsfw=HOSTILE, format=HOSTILE, caption=HOSTILE)
        for each in range(9)
    ]
    content[3] |= {"url": f"https://<img src=x>|`{HOSTILE}"}
    content.append(row(9, status=HOSTILE))
    text = write(content)
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.S))
    assert "<script" not in outside
    assert "b.example" not in outside
    assert "<img" not in outside
    assert len(outside) > 5000
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "cc-by-4.0"
    assert all(len(cells) == 3 for cells in table(text, "What became of the selected samples"))


@given(st.integers(1, 10**10), st.floats(0, 1))
def test_shares_are_whole_only_where_they_are(whole: int, of: float) -> None:
    part = round(whole * of)
    shown = share(part, whole)
    assert float(shown[:-1]) == pytest.approx(100 * part / whole, abs=0.1)
    assert (shown == "100.0%") == (part == whole)
    assert (shown == "0.0%") == (part == 0)


@given(st.text(max_size=300))
def test_code_spans_hold_nothing_that_ends_them(text: str) -> None:
    shown = code(text)
    assert shown[0] == shown[-1] == "`"
    inside = shown[1:-1]
    assert not set("`|\n\r") & set(inside)
    assert inside.isprintable()
    assert 0 < len(inside) <= SHOWN


@given(st.text("abc 123.-", min_size=1, max_size=SHOWN).map(str.strip).filter(bool))
def test_plain_names_stay_as_they_are(text: str) -> None:
    assert code(text) == f"`{' '.join(text.split())}`"


@given(st.integers(0, 10**9) | st.floats(1e-4, 0.999))
def test_figures_say_their_values(value: float) -> None:
    assert float(figure(value).replace(",", "")) == pytest.approx(value, rel=1e-3)


def test_a_check_passes_right_after_writing(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    assert "Before you publish it, set card.contact, card.creators" in capsys.readouterr().out
    write(check=True)
    assert "as they should be" in capsys.readouterr().out


def test_a_check_writes_nothing(write: Callable[..., str], folder: Path) -> None:
    write()
    (folder / "tiny" / "width.svg").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit):
        write(check=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("tiny.md", "differs"),
        ("tiny.croissant.json", "differs"),
        ("tiny/facts.json", "differs"),
        ("tiny/aspect.svg", "differs"),
        ("tiny/of_old.svg", "belongs to no number"),
    ],
)
def test_a_check_names_what_was_changed(
    write: Callable[..., str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    path: str,
    told: str,
) -> None:
    write()
    there = folder / path
    there.write_text((there.read_text() if there.exists() else "") + "<!-- 1 -->\n")
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        write(check=True)
    assert raised.value.code == 1
    printed = capsys.readouterr().out
    assert f"{there} {told}" in printed
    assert "tiny/height.svg" not in printed


def test_a_check_names_the_first_line_that_differs(
    write: Callable[..., str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write().split("\n")
    lines[20] = "another"
    (folder / "tiny.md").write_text("\n".join(lines[:-9]))
    with pytest.raises(SystemExit):
        write(check=True)
    assert "first in line 21:\n- another\n+ " in capsys.readouterr().out


def test_the_lockfile_lies_beside_the_card_unless_it_is_elsewhere(
    write: Callable[..., str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "https://a.example/lock.parquet"
    write(lockfile_url=url)
    assert not (folder / "tiny" / "lock.parquet").exists()
    assert url in (folder / "tiny.croissant.json").read_text()
    write()
    copy = folder / "tiny" / "lock.parquet"
    assert copy.read_bytes() == (tmp_path / "data" / "lock.parquet").read_bytes()
    copy.write_bytes(b"")
    with pytest.raises(SystemExit):
        write(check=True)
    assert f"{copy} is not a copy" in capsys.readouterr().out


def test_what_is_said_of_laion_can_be_said_otherwise(write: Callable[..., str]) -> None:
    names = "passing_on larger labels scored_by errors self_contained confidential collectors"
    options = {name: f"Of {name} something else." for name in names.split()}
    text = write(**options)
    assert all(answer in text for answer in options.values())
    for laion in ("Links, not pictures", "other people's servers", "without a password"):
        assert laion not in text


@pytest.mark.parametrize(
    "change", [{"caption": "another"}, {"width": 9999}, {"similarity": 0.9}, {"url": "http://n/"}]
)
def test_a_check_fails_when_one_row_is_another(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    content = rows()
    write(content)
    content[5] |= change
    with pytest.raises(SystemExit):
        write(content, check=True)
    assert "tiny.md differs" in capsys.readouterr().out


def test_the_same_lockfile_gives_the_same_bytes(write: Callable[..., str], folder: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    write()
    first = contents()
    write()
    assert contents() == first
    assert len(first) > 8


def test_charts_of_an_earlier_card_go(write: Callable[..., str], folder: Path) -> None:
    write()
    assert (folder / "tiny" / "punsafe.svg").exists()
    write([row(each, punsafe=None) for each in range(5)])
    assert not (folder / "tiny" / "punsafe.svg").exists()


def test_facts_beside_the_card_are_json(write: Callable[..., str], folder: Path) -> None:
    write(rows(40))
    assert json.loads((folder / "tiny" / "facts.json").read_text())["samples"] == 40


def test_an_uncommon_licence_needs_its_address() -> None:
    with pytest.raises(ValidationError, match="licence_url must say where the text of mine is"):
        CardConfig(licence="mine")
    assert CardConfig(licence="mine", licence_url="https://a.example/mine").licence == "mine"
