"""The evaluation, with judges and models that are known to be right or wrong."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from inference import evaluate
from inference.evaluate import EvaluateConfig
from latentdiff.config import load_yaml, save_yaml
from latentdiff.data.scenes import (
    EmojiScenes,
    Placed,
    Scene,
    ScenesConfig,
    is_held_out_colour,
    is_held_out_pair,
)
from latentdiff.errors import InputError
from latentdiff.metrics import evaluation
from latentdiff.metrics.features import TextExtractor, open_extractor
from latentdiff.metrics.frechet import Moments, frechet_distance
from latentdiff.metrics.pages import sheet
from latentdiff.metrics.protocol import Protocol
from latentdiff.metrics.scene_accuracy import KINDS, Judge, Kind, prompt_for, shares
from latentdiff.pipeline import TextToImage
from tests.launched import launch, printed_by

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/protocols/tiny.yaml"


@pytest.fixture(scope="module")
def scenes() -> ScenesConfig:
    return load_yaml(ScenesConfig, ROOT / "configs/emoji/scenes.yaml")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_lists_hold_what_their_names_say(kind: Kind, scenes: ScenesConfig) -> None:
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


def config(run_dir: Path, model: Path, **changes: Any) -> EvaluateConfig:
    """Three prompts of each kind, by two steps."""
    options = {"protocol": TINY, "prompts": 3, "num_inference_steps": 2} | changes
    return EvaluateConfig(run_dir=run_dir, model=str(model), **options)


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves; to be read, never changed."""
    run_dir = tmp_path_factory.mktemp("alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tiny model reads 32 characters
        evaluate.evaluate(config(run_dir, tiny_model))
    return run_dir


def results_of(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "evaluation.json").read_text())
    return found


def test_an_untrained_model_fails_and_real_renders_pass(alone: Path) -> None:
    results = results_of(alone)
    for kind in KINDS:
        assert results[kind.name]["real_renders"] == 100.0
        assert results[kind.name]["objects_in_place"] < 100.0
        with Image.open(alone / f"{kind.name}.png") as page:
            assert page.width > 128
    assert results["vae_psnr_db"] < 15
    assert results["prompts"] == 3
    assert results["pictures"] == 12


def test_pictures_and_rows_are_those_of_the_models_own_calls(
    alone: Path, tiny: TextToImage
) -> None:
    """Row i is of the prompt i drawn with its seed, by the extractor that the protocol names."""
    scenes = tiny.parts.vocabulary
    assert scenes is not None
    protocol = load_yaml(Protocol, TINY)
    asked = [scene for kind in KINDS for scene in kind.scenes(scenes, 3)]
    extractor = open_extractor(protocol.features[0])
    assert isinstance(extractor, TextExtractor)
    rows = {path.stem: np.load(path) for path in (alone / "drawn").glob("*.npy")}
    for number, scene in enumerate(asked):
        picture = tiny.generate(
            prompt_for(scene),
            seed=number % 3,
            num_inference_steps=2,
            guidance_scale=4.0,
            sampler="ddim",
        )
        assert isinstance(picture, Image.Image)
        pixels = np.asarray(picture)
        with Image.open(alone / "pictures" / f"{number:06d}.png") as kept:
            np.testing.assert_allclose(np.asarray(kept, int), pixels, atol=1)
            vector = extractor(torch.tensor(np.asarray(kept)).permute(2, 0, 1)[None])
        np.testing.assert_allclose(rows["clip"][number], vector[0], rtol=1e-4, atol=1e-5)
        words = extractor.text([prompt_for(scene)])
        np.testing.assert_allclose(rows["clip_text"][number], words[0], rtol=1e-4, atol=1e-5)
    assert rows["pixels"].shape == (12, 3 * 32 * 32)


def test_figures_are_functions_of_the_rows(alone: Path) -> None:
    found = results_of(alone)["features"]["clip"]
    drawn, text = (np.load(alone / "drawn" / f"{name}.npy") for name in ("clip", "clip_text"))
    (real,) = (
        np.load(path) for path in (alone / "real").glob("*/clip.npy") if len(np.load(path)) == 24
    )
    assert found["frechet"] == frechet_distance(Moments.of(drawn), Moments.of(real))
    one = frechet_distance(Moments.of(drawn[3:6]), Moments.of(real[6:12]))
    assert found["frechet_by_group"]["one_held_out"] == one
    cosine = (drawn * text).sum(1) / np.linalg.norm(drawn, axis=1) / np.linalg.norm(text, axis=1)
    assert found["clip_score"] == pytest.approx(100 * np.maximum(cosine, 0).mean(), rel=1e-5)
    low, high = found["clip_score_interval"]
    assert low <= found["clip_score"] <= high


def test_neighbours_are_training_pictures(alone: Path, tiny: TextToImage) -> None:
    assert tiny.parts.vocabulary is not None
    source = EmojiScenes(tiny.parts.vocabulary)
    training = [source[row]["image"].tobytes() for row in range(12)]
    kept = sorted((alone / "neighbours").glob("*.png"))
    assert len(kept) == 12
    for path in kept:
        with Image.open(path) as picture:
            assert np.asarray(picture).tobytes() in training
    drawn = np.load(alone / "drawn" / "pixels.npy")
    reals = [np.load(path) for path in (alone / "real").glob("*/pixels.npy")]
    (real,) = (rows for rows in reals if len(rows) == 24)
    seen = np.stack([np.frombuffer(picture, np.uint8) for picture in training])
    seen = seen.reshape(12, 32, 2, 32, 2, 3).mean(axis=(2, 4)).round().reshape(12, -1) / 255
    unseen = [3, 4, 5, 9, 10, 11]  # of the kinds one_held_out and two_held_out
    mine = np.linalg.norm(drawn[unseen, None] - seen, axis=-1).min(axis=1)
    theirs = np.linalg.norm(real[[*range(6, 12), *range(18, 24)], None] - seen, axis=-1).min(axis=1)
    found = results_of(alone)["neighbours"]["pixels"]
    assert found["median_distance"] == pytest.approx(np.median(mine), rel=1e-2)
    assert found["closer"] == pytest.approx((mine[:, None] < theirs).mean(), abs=0.05)


def same_figures(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """To 1e-6."""
    mine, theirs = (dict(shown_numbers(results)) for results in (mine, theirs))
    assert mine.keys() == theirs.keys()
    assert len(mine) > 20
    for name, value in theirs.items():
        assert mine[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def shown_numbers(results: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in results.items() if isinstance(results, dict) else enumerate(results):
        if isinstance(value, dict | list):
            yield from shown_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


@pytest.fixture(scope="module")
def in_pieces(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EvaluateConfig]:
    """98 pictures, which are four pieces, made by one process."""
    folder, scenes = tmp_path_factory.mktemp("pieces"), ROOT / "configs/tiny/scenes.yaml"
    (folder / "protocol.yaml").write_text(
        f"{{name: pieces, count: 98, prompts: {{type: scenes, kinds: [one], scenes: {scenes}}}, "
        "features: [{type: clip}], reference: {type: renders, count: 10}}"
    )
    changes = {"protocol": folder / "protocol.yaml", "prompts": None}
    made, threads = config(folder / "one", tiny_model, **changes), torch.get_num_threads()
    torch.set_num_threads(1)  # as each launched process has: sums in another order differ
    evaluate.evaluate(made)
    yield made
    torch.set_num_threads(threads)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_one(
    in_pieces: EvaluateConfig, tmp_path: Path, processes: int
) -> None:
    """Each of them makes two pieces, or one."""
    several = in_pieces.model_copy(update={"run_dir": tmp_path / "several"})
    save_yaml(several, tmp_path / "several.yaml")
    arguments = ["--config", str(tmp_path / "several.yaml")]
    printed = printed_by(launch("inference.evaluate", arguments, processes))
    assert json.loads(printed.splitlines()[-1]) == results_of(several.run_dir)
    same_figures(results_of(several.run_dir), results_of(in_pieces.run_dir))
    assert len(np.load(several.run_dir / "drawn" / "scenes.npy")) == 98


def test_a_killed_evaluation_continues(
    in_pieces: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first batch of its second piece: the first is not drawn again."""
    again = in_pieces.model_copy(update={"run_dir": tmp_path / "killed"})
    generate, drawn = TextToImage.generate, list[int]()

    def counted(self: TextToImage, prompts: list[str], **settings: Any) -> Any:
        if len(drawn) == 4:
            drawn.append(0)
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return generate(self, prompts, **settings)

    monkeypatch.setattr(TextToImage, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(again)
    assert not (tmp_path / "killed" / "evaluation.json").exists()
    evaluate.evaluate(again)
    assert drawn == [8] * 4 + [0] + [8] * 8 + [2]
    same_figures(results_of(again.run_dir), results_of(in_pieces.run_dir))


@pytest.mark.filterwarnings("ignore:The prompt is longer")
def test_a_finished_evaluation_draws_nothing(
    alone: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "again"
    shutil.copytree(alone, run_dir)
    (run_dir / "evaluation.json").unlink()
    monkeypatch.setattr(TextToImage, "generate", None)
    evaluate.evaluate(config(run_dir, tiny_model))
    assert results_of(run_dir) == results_of(alone)
    monkeypatch.setattr(evaluation, "figures", None)
    assert evaluate.evaluate(config(run_dir, tiny_model)) == results_of(alone)


def test_pictures_that_were_not_kept_are_not_promised(alone: Path, tiny_model: Path) -> None:
    shown = next((alone / "pictures").iterdir())
    kept = shown.read_bytes()
    shown.unlink()
    with pytest.raises(InputError, match=r"what it measured is kept; choose another run_dir"):
        evaluate.evaluate(config(alone, tiny_model, keep_pictures=True))
    shown.write_bytes(kept)


def test_another_evaluation_in_the_same_place_is_refused(alone: Path, tiny_model: Path) -> None:
    before = (alone / "evaluation.json").read_bytes()
    with pytest.raises(InputError, match=r"protocol.num_inference_steps: 2 and 3"):
        evaluate.evaluate(config(alone, tiny_model, num_inference_steps=3))
    assert (alone / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "none"}, "no sampler 'none'"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"model": "/nowhere"}, "no model directory"),
        ({"protocol": ROOT / "configs/protocols/none.yaml"}, "no configuration file"),
        (
            {"protocol": ROOT / "configs/protocols/mjhq.yaml"},
            "of 8, for example|no file of captions",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    options = {"model": str(tiny_model), "protocol": TINY, "prompts": 3} | changes
    with pytest.raises(InputError, match=words):
        evaluate.evaluate(EvaluateConfig(run_dir=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_captions_of_a_file_are_drawn_and_measured(tiny_model: Path, tmp_path: Path) -> None:
    """Two categories, without a reference: each picture by itself, at another size."""
    lines = [{"caption": f"a fox {n}", "category": "ab"[n % 2]} for n in range(4)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "protocol.yaml").write_text(
        f"{{name: file, num_inference_steps: 1, height: 32, width: 64, size: 16, "
        f"prompts: {{type: file, path: {tmp_path / 'captions.jsonl'}, group_column: category}}, "
        "features: [{type: clip, name: ours}]}"
    )
    options = {"protocol": tmp_path / "protocol.yaml", "keep_pictures": True}
    evaluate.evaluate(EvaluateConfig(run_dir=tmp_path / "out", model=str(tiny_model), **options))
    results = results_of(tmp_path / "out")
    assert results["features"]["ours"].keys() == {
        "clip_score", "clip_score_interval", "clip_score_by_group",
    }  # fmt: skip
    assert results["features"]["ours"]["clip_score_by_group"].keys() == {"a", "b"}
    assert "one" not in results
    assert "neighbours" not in results
    for number in range(4):
        with Image.open(tmp_path / "out" / "pictures" / f"{number:06d}.png") as picture:
            assert picture.size == (64, 32)
    for group in "ab":
        assert (tmp_path / "out" / f"{group}.png").is_file()


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

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(TextToImage, "generate", generate)
    monkeypatch.setattr(
        "sys.argv",
        ["evaluate", "--config", str(ROOT / "configs/tiny/evaluate.yaml"), "--model",
         str(tiny_model), "--run_dir", str(tmp_path)],
    )  # fmt: skip
    evaluate.main()
    results = results_of(tmp_path)
    for kind in KINDS:
        assert results[kind.name]["objects_in_place"] == 100.0
        assert results[kind.name]["background"] == 100.0


def test_a_model_without_scenes_is_refused(tiny: TextToImage, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny.save(directory)
    (directory / "vocabulary.json").unlink()
    with pytest.raises(InputError, match=r"vocabulary\.json"):
        evaluate.evaluate(config(tmp_path / "out", directory))
    assert not (tmp_path / "out").exists()


def test_sheet_frames_what_is_right(scenes: ScenesConfig) -> None:
    source, judge = EmojiScenes(scenes), Judge(scenes)
    fox = Scene((Placed("fox", 8, 8, 40),), None, "blue", "")
    picture = source.render(fox)
    wrong = Scene((Placed("lion", 8, 8, 40),), None, "blue", "")
    verdicts = [judge(picture, fox), judge(picture, wrong)]
    page = np.asarray(sheet([picture, picture], ["fox", "lion"], verdicts))
    cell = page.shape[1] // 8
    left, right = page[:, :cell], page[:, cell : 2 * cell]
    green, red = np.array([0, 128, 0]), np.array([255, 0, 0])
    assert (left == green).all(axis=-1).any()
    assert not (left == red).all(axis=-1).any()
    assert (right == red).all(axis=-1).any()
