"""The model that travels with the code."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from latentdiff.config import load_yaml
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.hub import model_path
from latentdiff.metrics.arrays import unit
from latentdiff.metrics.clip_features import ClipConfig, ClipExtractor
from latentdiff.metrics.psnr import psnr, reconstruct
from latentdiff.metrics.scene_accuracy import KINDS, Judge, prompt_for
from latentdiff.pipeline import TextToImage

ROOT = Path(__file__).parents[1]
BUNDLE = model_path(None)
CLIP = ROOT / "latentdiff/pretrained/emoji_clip"
PROMPT = "a fox to the left of a red apple on a blue background"


@pytest.fixture(scope="module")
def bundle() -> TextToImage:
    return TextToImage.load()


@pytest.mark.parametrize(
    ("folder", "most", "suffixes"),
    [
        (BUNDLE, 32_000_000, {".json", ".txt", ".safetensors", ".md", ".png"}),
        (CLIP, 3_600_000, {".json", ".safetensors", ".md"}),
    ],
)
def test_weights_are_few_in_safetensors_alone(folder: Path, most: int, suffixes: set[str]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= most
    assert {path.suffix for path in files} == suffixes
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                assert tensor.dtype == torch.float16 or not tensor.is_floating_point()
                assert torch.isfinite(tensor).all()


def test_knows_the_scenes_it_was_trained_on(bundle: TextToImage) -> None:
    config = load_yaml(ScenesConfig, ROOT / "configs/emoji/scenes.yaml")
    assert bundle.parts.vocabulary is not None
    wording = {"reading_order": config.reading_order}  # of captions, not of what they can ask for
    assert bundle.parts.vocabulary.model_copy(update=wording) == config


def test_card_counts_the_parameters(bundle: TextToImage) -> None:
    card = (BUNDLE / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)/` \|.*\| ([\d,]+) \|$", card, re.M))
    parts = bundle.parts
    for name, network in (
        ("unet", parts.unet),
        ("vae", parts.autoencoder.vae),
        ("text_encoder", parts.text_encoder.model),
    ):
        assert int(rows[name].replace(",", "")) == sum(p.numel() for p in network.parameters())


def test_clips_card_says_what_it_is_and_finds() -> None:
    """Its parameters, and how many of 256 unseen captions and pictures find each other."""
    card = (CLIP / "README.md").read_text("utf-8")
    extractor = ClipExtractor(ClipConfig())
    counts = re.findall(r"\| ([\d,]+) \|$", card, re.M)
    parameters = sum(weight.numel() for weight in extractor.clip.parameters())
    assert sum(int(count.replace(",", "")) for count in counts) == parameters
    scenes = EmojiScenes(load_yaml(ScenesConfig, ROOT / "configs/emoji/scenes.yaml"), "held_out")
    shown = [scenes.scene(index) for index in range(256)]
    images = torch.from_numpy(np.stack([scenes.render(scene) for scene in shown])).movedim(-1, 1)
    similarity = unit(extractor(images)) @ unit(extractor.text([s.caption for s in shown])).T
    for axis, words in ((0, r"(\d+)% of the captions"), (1, r"(\d+)% of the\s+pictures")):
        (share,) = re.findall(words, card)
        found = (similarity.argmax(axis=axis) == np.arange(256)).mean()
        assert 100 * found == pytest.approx(float(share), abs=1)


def test_vae_keeps_unseen_scenes(bundle: TextToImage) -> None:
    assert bundle.parts.vocabulary is not None
    scenes = EmojiScenes(bundle.parts.vocabulary, "held_out")
    pictures = np.stack([scenes[index]["image"] for index in range(64)])
    assert psnr(reconstruct(bundle.parts.autoencoder, pictures), pictures).mean() >= 36


def test_draws_what_is_asked(bundle: TextToImage) -> None:
    """The evaluation's first twelve scenes of each kind: its bars are 97% of single objects, 85% of
    held-out pairs and 99% of backgrounds.
    """
    assert bundle.parts.vocabulary is not None
    judge = Judge(bundle.parts.vocabulary)
    asked = [scene for kind in KINDS for scene in kind.scenes(bundle.parts.vocabulary, 12)]
    pictures = bundle.generate([prompt_for(scene) for scene in asked], seed=0)
    assert isinstance(pictures, list)
    verdicts = [judge(np.asarray(p), scene) for p, scene in zip(pictures, asked, strict=True)]
    assert all(verdict.background_right for verdict in verdicts)
    assert sum(verdict.in_place for verdict in verdicts) >= 44


def test_batches_do_not_change_a_picture(bundle: TextToImage) -> None:
    """Alone, and at the first, fourth and last place of eight."""
    alone = np.asarray(bundle.generate(PROMPT, seed=7, num_inference_steps=10), dtype=int)
    for place in (0, 3, 7):
        prompts = ["a panda on a red background"] * 8
        prompts[place] = PROMPT
        seeds = list(range(100, 108))
        seeds[place] = 7
        pictures = bundle.generate(prompts, seed=seeds, num_inference_steps=10)
        assert isinstance(pictures, list)
        assert np.abs(np.asarray(pictures[place], dtype=int) - alone).max() <= 1


def test_diffusers_draws_the_same_picture(bundle: TextToImage) -> None:
    """StableDiffusionPipeline with DDIM, the same initial noise, 25 steps, within 2/255."""
    settings: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 3.0}
    ours = np.asarray(bundle.generate(PROMPT, seed=7, sampler="ddim", **settings), dtype=int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(BUNDLE, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        generator=torch.Generator().manual_seed(7),
        **settings,
    ).images[0]
    assert np.abs(np.asarray(theirs, dtype=int) - ours).max() <= 2
