"""Prompts and real pictures of a protocol, from scenes and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from latentdiff.config import load_yaml
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.errors import InputError
from latentdiff.metrics.prompts import PromptsConfig, open_prompts
from latentdiff.metrics.references import (
    FIRST_RENDER,
    ReferenceConfig,
    SeenScenes,
    open_reference,
    open_training,
)
from latentdiff.metrics.scene_accuracy import KINDS, prompt_for
from latentdiff.model_files import file_digest

SCENES = Path(__file__).parents[2] / "configs/tiny/scenes.yaml"
ROWS = [("a fox", "people"), ("", "art"), ("a cat", "art"), ("a dog", "people"), ("a cup", "art")]


def prompts_config(**values: Any) -> PromptsConfig:
    made: PromptsConfig = TypeAdapter(PromptsConfig).validate_python(values)
    return made


def reference_config(**values: Any) -> ReferenceConfig:
    made: ReferenceConfig = TypeAdapter(ReferenceConfig).validate_python(values)
    return made


@pytest.fixture(params=["txt", "jsonl", "parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """ROWS in each kind of file."""
    path = tmp_path / f"captions.{request.param}"
    named = [{"caption": caption, "group": group} for caption, group in ROWS]
    if request.param == "txt":
        path.write_text("\n".join(caption for caption, _ in ROWS))
    elif request.param == "jsonl":
        path.write_text("\n".join(map(json.dumps, named)))
    else:
        pq.write_table(pa.Table.from_pylist(named), path)
    return path


def test_captions_of_a_file_come_in_its_order(file: Path) -> None:
    found = open_prompts(prompts_config(type="file", path=file), None)
    assert found.texts == ["a fox", "a cat", "a dog", "a cup"]
    assert found.offsets == [0, 1, 2, 3]
    assert found.groups == {}
    first = open_prompts(prompts_config(type="file", path=file), 2)
    assert first.texts == ["a fox", "a cat"]
    assert first.digest != found.digest


def test_categories_stand_together(file: Path) -> None:
    if file.suffix == ".txt":
        with pytest.raises(InputError, match="no column 'group'"):
            open_prompts(prompts_config(type="file", path=file, group_column="group"), None)
        return
    found = open_prompts(prompts_config(type="file", path=file, group_column="group"), 2)
    assert found.texts == ["a fox", "a dog", "a cat", "a cup"]
    assert found.groups == {"people": range(2), "art": range(2, 4)}
    assert list(found.stretches(range(1, 4))) == [range(1, 2), range(2, 4)]
    with pytest.raises(InputError, match="2 captions of people and not 3"):
        open_prompts(prompts_config(type="file", path=file, group_column="group"), 3)


def test_another_file_than_the_protocols_is_refused(file: Path) -> None:
    digest = file_digest(file)
    open_prompts(prompts_config(type="file", path=file, sha256=digest), None)
    with pytest.raises(InputError, match=f"its sha256 is {digest}"):
        open_prompts(prompts_config(type="file", path=file, sha256="0" * 64), None)
    with pytest.raises(InputError, match="4 captions and not 5"):
        open_prompts(prompts_config(type="file", path=file), 5)
    with pytest.raises(InputError, match="no file of captions"):
        open_prompts(prompts_config(type="file", path=file.with_name("none.txt")), 5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"no json"),
        ("a.jsonl", b"[1]"),
        ("a.jsonl", b'{"caption": 5}'),
        ("a.parquet", b"no parquet"),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.txt", b"\n\n"),
        ("a.txt", b"x" * 10_001),
    ],
)
def test_what_holds_no_captions_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError):
        open_prompts(prompts_config(type="file", path=tmp_path / name), None)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a", "x"), ("b", ""), ("c", "x")], "category of row 2 of"),
        ([("a", "x"), ("b", None)], "category of row 2 of"),
        ([("a", "x"), ("b", "../x")], r"row 2 of .*'\.\./x', is no name"),
        ([("a", "x"), ("b", "a/b")], "row 2 of"),
        ([("a", "x"), ("b", ".x")], "row 2 of"),
        ([("a", "x"), ("b", "x\n")], "row 2 of"),
        ([("a", "x"), (" ", "y"), (None, "y")], "All captions of y at"),
    ],
)
@pytest.mark.parametrize("count", [None, 1])
def test_categories_are_names_with_captions(
    tmp_path: Path, rows: list[tuple[str | None, str | None]], words: str, count: int | None
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"caption": c, "group": g}) for c, g in rows))
    with pytest.raises(InputError, match=words):
        open_prompts(prompts_config(type="file", path=path, group_column="group"), count)


@pytest.mark.parametrize("name", ["people", "Art 2.0", "a-b_c", "Ländliches"])
def test_names_of_people_are_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"caption": "a fox", "group": name}))
    found = open_prompts(prompts_config(type="file", path=path, group_column="group"), None)
    assert list(found.groups) == [name]


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"caption": ["a fox"] * 9}), path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 20 + content[24:])  # footer whole, first page not
    with pytest.raises(OSError, match=r"\w") as error:
        pq.read_table(path)
    assert not isinstance(error.value, pa.ArrowException)
    with pytest.raises(InputError, match="cannot be read as captions"):
        open_prompts(prompts_config(type="file", path=path), None)


def test_scenes_are_those_of_the_kinds() -> None:
    scenes = load_yaml(ScenesConfig, SCENES)
    found = open_prompts(prompts_config(type="scenes", scenes=SCENES), 3)
    assert found.texts == [prompt_for(s) for kind in KINDS for s in kind.scenes(scenes, 3)]
    assert found.offsets == [0, 1, 2] * 4
    assert list(found.groups) == ["one", "one_held_out", "two", "two_held_out"]
    mine = open_prompts(prompts_config(type="scenes"), 3, scenes)
    assert mine.digest == found.digest
    fewer = scenes.model_copy(update={"backgrounds": {**scenes.backgrounds, "pink": (9, 9, 9)}})
    assert open_prompts(prompts_config(type="scenes"), 3, fewer).digest != found.digest
    with pytest.raises(InputError, match=r"no vocabulary\.json"):
        open_prompts(prompts_config(type="scenes"), 3)


def test_renders_are_of_the_kinds_and_of_other_scenes() -> None:
    prompts = open_prompts(prompts_config(type="scenes", scenes=SCENES, kinds=["two", "one"]), 3)
    assert prompts.asked is not None
    source = EmojiScenes(prompts.asked.config)
    found = open_reference(reference_config(type="renders", count=4), prompts)
    assert len(found) == 8
    assert found.groups == {"one": range(4), "two": range(4, 8)}
    asked = {source.render(scene).tobytes() for scene in prompts.asked.scenes}
    real = {np.asarray(found.image(number)).tobytes() for number in range(8)}
    assert len(real) == 8
    assert not real & asked
    more = open_reference(reference_config(type="renders", count=5), prompts)
    assert more.digest != found.digest


@pytest.mark.parametrize("number", range(4), ids=[kind.name for kind in KINDS])
def test_no_render_repeats_another_or_what_is_asked_for(number: int) -> None:
    """On the grid of 8 some would: the same objects in the same places on the same background."""
    kind = KINDS[number]
    config = prompts_config(type="scenes", scenes=SCENES, kinds=[kind.name])
    prompts = open_prompts(config, 100)
    assert prompts.asked is not None
    source = kind.source(prompts.asked.config)
    plain = [source.scene(FIRST_RENDER + number) for number in range(100)]
    pictures = [source.render(scene).tobytes() for scene in (*prompts.asked.scenes, *plain)]
    found = open_reference(reference_config(type="renders", count=100), prompts)
    real = [np.asarray(found.image(number)).tobytes() for number in range(100)]
    assert len(set(real)) == 100
    assert not set(real) & set(pictures[:100])
    # In the order of their numbers, and only what repeats is left out.
    kept = [p for p in dict.fromkeys(pictures[100:]) if p not in pictures[:100]]
    assert real[: len(kept)] == kept
    assert open_reference(reference_config(type="renders", count=100), prompts).digest == (
        found.digest
    )
    fewer = open_reference(reference_config(type="renders", count=100), open_prompts(config, 1))
    assert (fewer.digest == found.digest) == (len(kept) == 100)


def test_a_reference_of_more_scenes_than_there_are_is_refused() -> None:
    config = prompts_config(type="scenes", scenes=SCENES, kinds=["one_held_out"])
    with pytest.raises(InputError, match="and not 2000; set a smaller count"):
        open_reference(reference_config(type="renders", count=2000), open_prompts(config, 5))


def test_seen_scenes_are_those_of_training() -> None:
    prompts = open_prompts(prompts_config(type="scenes", scenes=SCENES), 1)
    found = open_training(SeenScenes(type="seen_scenes", count=5), prompts)
    source = EmojiScenes(load_yaml(ScenesConfig, SCENES))
    for number in range(5):
        np.testing.assert_array_equal(np.asarray(found.image(number)), source[number]["image"])


def test_sources_are_named_and_held_to_their_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    for name, shade in (("art", 10), ("people", 200)):
        (tmp_path / name).mkdir()
        for number in range(2):
            grey = Image.new("RGB", (8, 8), (shade + number,) * 3)
            grey.save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text("grey")
    (tmp_path / "art" / "1.png").write_bytes(b"damaged")
    sources = {name: {"type": "folder", "path": tmp_path / name} for name in ("people", "art")}
    (tmp_path / "a.txt").write_text("a fox\na cat")
    prompts = open_prompts(prompts_config(type="file", path=tmp_path / "a.txt"), None)
    found = open_reference(reference_config(type="sources", sources=sources), prompts)
    assert found.groups == {"people": range(2), "art": range(2, 4)}
    shades = [np.asarray(found.image(number))[0, 0, 0] for number in range(3)]
    assert shades == [200, 201, 10]
    with pytest.raises(InputError, match="Picture 1 of the reference cannot be read"):
        found.image(3)
    open_reference(reference_config(type="sources", sources=sources, sha256=found.digest), prompts)
    other = reference_config(type="sources", sources=sources, sha256="0" * 64)
    with pytest.raises(InputError, match=f"its sha256 is {found.digest}"):
        open_reference(other, prompts)
    with pytest.raises(InputError, match="for prompts of type scenes"):
        open_reference(reference_config(type="renders", count=4), prompts)
