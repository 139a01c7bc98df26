"""How often a model of emoji scenes draws what the prompt says.

python -m inference.evaluate --config configs/emoji/evaluate.yaml

Prints one line of JSON, and writes it and labelled sheets of the pictures into run_dir.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field
from tqdm.auto import tqdm

from inference.sheet import labelled_sheet
from latentdiff.config import Config, load_config
from latentdiff.data.scenes import EmojiScenes
from latentdiff.errors import InputError, run_command
from latentdiff.metrics.psnr import psnr, reconstruct
from latentdiff.metrics.scene_accuracy import KINDS, Judge, Verdict, prompt_for, shares
from latentdiff.pipeline import TextToImage

BATCH = 8
SHOWN = 48


class EvaluateConfig(Config):
    """A run of inference.evaluate."""

    run_dir: Path
    """evaluation.json and the sheets go here."""
    model: Path | None = None
    """A model directory; the bundled model by default."""
    device: str = "cpu"
    """Where the model runs: "cpu", "cuda", "cuda:1"."""
    seed: int = Field(default=0, ge=0)
    """Prompt i of a kind is drawn with seed + i."""
    prompts: int = Field(default=200, gt=0, le=1024)
    """Prompts of each kind."""
    num_inference_steps: int = Field(default=25, gt=0)
    """Calls of the U-Net for a picture."""
    guidance_scale: float = Field(default=4.0, ge=0)
    """Classifier-free guidance."""
    sampler: str = "ddim"
    """The sampler's name."""


def sheet(
    pictures: Sequence[np.ndarray], prompts: Sequence[str], verdicts: Sequence[Verdict]
) -> Image.Image:
    """Pictures framed green where all is right, else red, with what was found instead."""
    labels, frames = [], []
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        right = verdict.in_place and verdict.background_right
        names = ", ".join(item.concept for item in verdict.found)
        labels.append(prompt if right else f"{prompt} [found: {names}; {verdict.background}]")
        frames.append("green" if right else "red")
    images = [Image.fromarray(picture) for picture in pictures]
    return labelled_sheet(images, labels, columns=8, scale=2, frames=frames)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All figures; see the module's text. Raises InputError for a model not made for scenes."""
    model = TextToImage.load(config.model, device=config.device)
    scenes = model.parts.vocabulary
    if scenes is None:
        raise InputError(
            f"{config.model} has no vocabulary.json; this measures models of emoji scenes."
        )
    judge, renderer = Judge(scenes), EmojiScenes(scenes)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = config.model_dump(mode="json", exclude={"run_dir"})
    results["model"] = "bundled" if config.model is None else config.model.name
    unseen = []
    for kind in KINDS:
        asked = kind.scenes(scenes, config.prompts)
        prompts = [prompt_for(scene) for scene in asked]
        pictures: list[np.ndarray] = []
        for first in tqdm(range(0, len(asked), BATCH), desc=kind.title, unit="batch"):
            made = model.generate(
                prompts[first : first + BATCH],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                sampler=config.sampler,
                seed=config.seed + first,
            )
            assert isinstance(made, list)
            pictures += [np.asarray(picture) for picture in made]
        real = np.stack([renderer.render(scene) for scene in asked])
        through_vae = reconstruct(model.parts.autoencoder, real)
        verdicts = judge.all(pictures, asked)
        results[kind.name] = shares(verdicts) | {
            "real_renders": shares(judge.all(real, asked))["objects_in_place"],
            "vae_reconstructions": shares(judge.all(through_vae, asked))["objects_in_place"],
        }
        if kind.split == "held_out":
            unseen.append(psnr(through_vae, real))
        page = sheet(pictures[:SHOWN], prompts[:SHOWN], verdicts[:SHOWN])
        page.save(config.run_dir / f"{kind.name}.png")
    results["vae_psnr_db"] = round(float(np.concatenate(unseen).mean()), 2)
    return results


def main() -> None:
    config = load_config(EvaluateConfig)
    line = json.dumps(evaluate(config))
    (config.run_dir / "evaluation.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    run_command(main)
