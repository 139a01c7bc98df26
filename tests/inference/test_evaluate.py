"""The evaluation, with judges and models that are known to be right or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference import evaluate
from inference.evaluate import EvaluateConfig
from latentdiff.config import load_yaml
from latentdiff.data.scenes import (
    EmojiScenes,
    Placed,
    Scene,
    ScenesConfig,
    is_held_out_colour,
    is_held_out_pair,
)
from latentdiff.errors import InputError
from latentdiff.metrics.scene_accuracy import KINDS, Judge, prompt_for, shares
from latentdiff.pipeline import TextToImage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scenes() -> ScenesConfig:
    return load_yaml(ScenesConfig, ROOT / "configs/emoji/scenes.yaml")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_lists_hold_what_their_names_say(kind: evaluate.Kind, scenes: ScenesConfig) -> None:
    asked = kind.scenes(scenes, 200)
    assert len(asked) == 200
    assert asked == kind.scenes(scenes, 200)
    assert asked[:50] == kind.scenes(scenes, 50)
    for scene in asked:
        names = [placed.concept for placed in scene.objects]
        assert len(names) == (2 if kind.pairs else 1)
        unseen = (
            is_held_out_pair(*names)
            if kind.pairs
            else is_held_out_colour(names[0], scene.background)
        )
        assert unseen == (kind.split == "held_out")


def test_prompts_say_all_of_a_scene() -> None:
    fox, apple = Placed("fox", 0, 0, 24), Placed("red apple", 32, 0, 24)
    alone = Scene((fox,), None, "blue", "")
    assert prompt_for(alone) == "a fox on a blue background"
    both = Scene((apple, fox), "right", "orange", "")
    assert prompt_for(both) == "a red apple to the right of a fox on an orange background"


def test_judge_tells_right_from_wrong(scenes: ScenesConfig) -> None:
    source, judge = EmojiScenes(scenes), Judge(scenes)
    wanted = Scene((Placed("fox", 0, 16, 32), Placed("robot", 32, 16, 32)), "left", "blue", "")
    mirrored = Scene((Placed("fox", 32, 16, 32), Placed("robot", 0, 16, 32)), "right", "blue", "")
    other = Scene((Placed("fox", 0, 16, 32), Placed("ghost", 32, 16, 32)), "left", "blue", "")
    red = Scene(wanted.objects, "left", "red", "")

    def answers(shown: Scene) -> tuple[bool, bool, bool]:
        verdict = judge(source.render(shown), wanted)
        return verdict.objects_right, verdict.in_place, verdict.background_right

    assert answers(wanted) == (True, True, True)
    assert answers(mirrored) == (True, False, True)
    assert answers(other) == (False, False, True)
    assert answers(red) == (True, True, False)


def test_shares_are_percentages(scenes: ScenesConfig) -> None:
    source, judge = EmojiScenes(scenes), Judge(scenes)
    fox, lion = (Scene((Placed(name, 8, 8, 40),), None, "blue", "") for name in ("fox", "lion"))
    verdicts = [judge(source.render(fox), fox)] * 2 + [judge(source.render(lion), fox)]
    assert shares(verdicts) == {"objects": 66.7, "objects_in_place": 66.7, "background": 100.0}


@pytest.mark.filterwarnings("ignore:The prompt is longer")
def test_an_untrained_model_fails_and_real_renders_pass(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(
        run_dir=tmp_path / "out", model=tiny_model, prompts=3, num_inference_steps=2
    )
    results = evaluate.evaluate(config)
    for kind in KINDS:
        assert results[kind.name]["real_renders"] == 100.0
        assert results[kind.name]["objects_in_place"] < 100.0
        with Image.open(config.run_dir / f"{kind.name}.png") as page:
            assert page.width > 128
    assert results["vae_psnr_db"] < 15


def test_a_perfect_model_scores_full_marks(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pictures are renders of what each prompt asks for."""
    real = TextToImage.load(tiny_model).parts.vocabulary
    assert real is not None
    source = EmojiScenes(real)
    answers = {prompt_for(s): s for kind in KINDS for s in kind.scenes(real, 4)}

    def generate(self: TextToImage, prompts: list[str], **_: object) -> list[Image.Image]:
        return [Image.fromarray(source.render(answers[prompt])) for prompt in prompts]

    monkeypatch.setattr(TextToImage, "generate", generate)
    monkeypatch.setattr(
        "sys.argv",
        ["evaluate", "--config", str(ROOT / "configs/tiny/evaluate.yaml"), "--model",
         str(tiny_model), "--run_dir", str(tmp_path)],
    )  # fmt: skip
    evaluate.main()
    results = json.loads((tmp_path / "evaluation.json").read_text())
    for kind in KINDS:
        assert results[kind.name]["objects_in_place"] == 100.0
        assert results[kind.name]["background"] == 100.0


def test_a_model_without_scenes_is_refused(tiny: TextToImage, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny.save(directory)
    (directory / "vocabulary.json").unlink()
    with pytest.raises(InputError, match=r"vocabulary\.json"):
        evaluate.evaluate(EvaluateConfig(run_dir=tmp_path / "out", model=directory))
    assert not (tmp_path / "out").exists()


def test_sheet_frames_what_is_right(scenes: ScenesConfig) -> None:
    source, judge = EmojiScenes(scenes), Judge(scenes)
    fox = Scene((Placed("fox", 8, 8, 40),), None, "blue", "")
    picture = source.render(fox)
    wrong = Scene((Placed("lion", 8, 8, 40),), None, "blue", "")
    verdicts = [judge(picture, fox), judge(picture, wrong)]
    page = np.asarray(evaluate.sheet([picture, picture], ["fox", "lion"], verdicts))
    cell = page.shape[1] // 8
    left, right = page[:, :cell], page[:, cell : 2 * cell]
    green, red = np.array([0, 128, 0]), np.array([255, 0, 0])
    assert (left == green).all(axis=-1).any()
    assert not (left == red).all(axis=-1).any()
    assert (right == red).all(axis=-1).any()
