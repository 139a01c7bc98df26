"""Evaluations as the library does them; tests/inference/test_evaluate.py has the program's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentdiff.config import load_yaml
from latentdiff.errors import InputError
from latentdiff.metrics.evaluation import Place, evaluate_protocol, main_figures
from latentdiff.metrics.protocol import Protocol
from latentdiff.pipeline import TextToImage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    """34 pictures of one step: two pieces."""
    tiny = load_yaml(Protocol, ROOT / "configs/protocols/tiny.yaml").model_dump()
    prompts = {"type": "scenes", "kinds": ["one", "two_held_out"]}
    few = {"count": 17, "num_inference_steps": 1, "prompts": prompts}
    return Protocol.model_validate(tiny | few)


@pytest.fixture(scope="module")
def results(tiny: TextToImage, protocol: Protocol, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return evaluate_protocol(tiny, protocol, tmp_path_factory.mktemp("alone"))


@pytest.mark.filterwarnings("ignore:The prompt is longer")
def test_processes_of_a_disk_of_their_own_make_all_rows(
    tiny: TextToImage, protocol: Protocol, results: dict[str, Any], tmp_path: Path
) -> None:
    """The first of two that never meet has the figures of one."""
    place = Place(1, 2)
    assert evaluate_protocol(tiny, protocol, tmp_path / "other", place=place) is None
    assert len(list((tmp_path / "other" / "drawn").glob("pieces-*/*.safetensors"))) == 2
    assert evaluate_protocol(tiny, protocol, tmp_path / "first", place=Place(0, 2)) == results


def test_main_figures_are_single_numbers_of_what_the_unet_draws(results: dict[str, Any]) -> None:
    found = main_figures(json.loads(json.dumps(results)))
    kinds = {
        f"{kind}.{figure}"
        for kind in ("one", "two_held_out")
        for figure in ("objects", "objects_in_place", "background")
    }
    clip = {
        "frechet", "kid", "kid_deviation", "precision", "recall", "density", "coverage",
        "clip_score", "cmmd",
    }  # fmt: skip
    clip = {f"features.clip.{figure}" for figure in clip}
    neighbours = {
        f"neighbours.{name}.{figure}"
        for name in ("clip", "pixels")
        for figure in ("median_distance", "closer", "near")
    }
    assert found.keys() == kinds | clip | neighbours
    assert found["features.clip.frechet"] == results["features"]["clip"]["frechet"]
    assert found["one.background"] == results["one"]["background"]
    assert found["neighbours.pixels.near"] == results["neighbours"]["pixels"]["near"]


def test_weights_of_another_digest_are_another_model(
    tiny: TextToImage, protocol: Protocol, tmp_path: Path
) -> None:
    nothing = {"features": (), "reference": None, "training": None}
    small = protocol.model_copy(update=nothing | {"count": 1})
    evaluate_protocol(tiny, small, tmp_path, weights="one")
    with pytest.raises(InputError, match=r"model\.sha256: \"one\" and \"other\""):
        evaluate_protocol(tiny, small, tmp_path, weights="other")
