"""Protocols: presets that load, ids that are what they should be of, and refusals."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentdiff.config import load_yaml, parse
from latentdiff.errors import InputError
from latentdiff.metrics.identity import digest_of, first_difference
from latentdiff.metrics.protocol import (
    FILTERS,
    Protocol,
    brought,
    fixed,
    protocol_id,
    refuse_unlike,
)

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs/protocols").glob("*.yaml"))
BASE: dict[str, Any] = {"name": "p", "prompts": {"type": "file", "path": "a.txt"}, "count": 10}
DIGESTS = {"prompts": "1" * 64, "features": {"inception": "2" * 64}, "reference": "3" * 64}


def protocol(**changes: Any) -> Protocol:
    return parse(Protocol, BASE | changes, "test")


def id_of(made: Protocol, digests: dict[str, Any] = DIGESTS) -> str:
    return protocol_id(fixed(made, digests))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_loads_under_its_own_name(path: Path) -> None:
    assert load_yaml(Protocol, path).name == path.stem


def test_the_presets_are_there() -> None:
    names = {path.stem for path in PRESETS}
    assert {"coco_30k", "fid_10k", "mjhq", "emoji_scenes", "tiny"} <= names


def test_mjhqs_captions_are_written_once_however_often(tmp_path: Path) -> None:
    """By the lines that the preset's comment gives."""
    words = (ROOT / "configs/protocols/mjhq.yaml").read_text()
    script = re.findall(r"<<'END'\n(.*?)#   END", words, re.DOTALL)[0].replace("#   ", "")
    rows = {n: {"prompt": f"prompt {n}", "category": "art" if n < "c" else "logo"} for n in "abcd"}
    (tmp_path / "meta_data.json").write_text(json.dumps(rows))
    for category in ("art", "logo"):
        (tmp_path / category).mkdir()
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["caption"] for line in lines] == [f"prompt {n}" for n in "abcd"]
    lines = (tmp_path / "logo/metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == ["c.jpg", "d.jpg"]


def test_an_id_is_of_canonical_json() -> None:
    values = {
        "name": "p", "count": 10, "seed": 0, "num_inference_steps": 25, "guidance_scale": 4,
        "sampler": "ddim", "resize": "lanczos", "edition": 2, **DIGESTS,
    }  # fmt: skip
    words = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert id_of(protocol()) == hashlib.sha256(words.encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "q"}, {"count": 11}, {"seed": 1}, {"num_inference_steps": 26},
        {"guidance_scale": 4.5}, {"sampler": "euler"}, {"height": 64}, {"width": 64},
        {"size": 32}, {"resize": "box"},
    ],
)  # fmt: skip
def test_every_value_that_is_not_free_changes_the_id(change: dict[str, Any]) -> None:
    assert id_of(protocol(**change)) != id_of(protocol())


@pytest.mark.parametrize("name", list(DIGESTS))
def test_every_digest_changes_the_id(name: str) -> None:
    other = DIGESTS | {name: {"inception": "4" * 64} if name == "features" else "4" * 64}
    assert id_of(protocol(), other) != id_of(protocol())


@settings(max_examples=40)
@given(st.integers(1, 1000), st.floats(0, 20), st.sampled_from(["ddim", "heun"]))
def test_what_is_free_does_not_change_it(steps: int, guidance: float, sampler: str) -> None:
    free = {"free": ["num_inference_steps", "guidance_scale", "sampler"]}
    varied = {"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler}
    assert id_of(protocol(**free, **varied)) == id_of(protocol(**free))
    assert id_of(protocol(**free)) != id_of(protocol())


def test_where_files_lie_does_not_change_it() -> None:
    elsewhere = {"type": "file", "path": "/b.txt", "sha256": "5" * 64}
    assert id_of(protocol(prompts=elsewhere)) == id_of(protocol())


def test_figures_of_different_ids_are_refused_by_what_differs() -> None:
    made = [
        {"id": id_of(p), "fixed": fixed(p, DIGESTS), "model": "m"}
        for p in (protocol(), protocol(), protocol(num_inference_steps=50, seed=3))
    ]
    refuse_unlike(made[0], made[1])
    with pytest.raises(InputError, match=r"differ in num_inference_steps: 25 and 50;"):
        refuse_unlike(made[0], made[2])


LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
VALUES = st.dictionaries(st.text(), LEAVES | st.lists(LEAVES) | st.dictionaries(st.text(), LEAVES))


@settings(max_examples=40)
@given(VALUES)
def test_equal_values_have_one_digest_and_no_difference(values: dict[str, Any]) -> None:
    """Also when read back from a file, with keys in another order, and without those of null."""
    again = json.loads(json.dumps(dict(reversed(values.items()))))
    told = {name: value for name, value in again.items() if value is not None}
    for other in (again, told):
        assert digest_of(other) == digest_of(values)
        assert first_difference(values, other) is None


@settings(max_examples=40)
@given(VALUES, VALUES)
def test_a_difference_is_named_where_digests_differ(a: dict[str, Any], b: dict[str, Any]) -> None:
    for one, other in ((a, b), (a, a | b), ({"x": a}, {"x": b}), ({"x": a}, {})):
        assert (first_difference(one, other) is None) == (digest_of(one) == digest_of(other))


@settings(max_examples=40)
@given(VALUES.filter(bool), LEAVES.filter(lambda value: value is not None), st.data())
def test_a_changed_value_is_named(values: dict[str, Any], other: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(values)))
    found = first_difference(values, values | {name: other})
    if digest_of(values[name]) == digest_of(other):
        assert found is None
    else:
        assert found is not None
        assert found.startswith(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": [{"type": "clip"}, {"type": "clip"}]}, "names of their own"),
        ({"features": [{"type": "clip", "name": "scenes"}]}, "names of their own"),
        ({"reference": {"type": "renders", "count": 1}}, "name the features"),
        ({"free": ["prompts"]}, "free"),
        ({"steps": 5}, "steps"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        protocol(**changes)


@pytest.mark.parametrize("name", list(FILTERS))
def test_pictures_come_to_size_by_pillows_filter(name: str) -> None:
    """The middle of a wide picture, or the picture itself."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(brought(image, (96, 64), name), pixels)
    middle = image.resize((32, 32), FILTERS[name], box=(16, 0, 80, 64))
    np.testing.assert_array_equal(brought(image, (32, 32), name), np.asarray(middle))
