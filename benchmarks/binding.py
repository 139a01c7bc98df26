"""Whether a model of emoji scenes knows which of two objects stands where, from noise alone.

python -m benchmarks.binding

For each caption of two objects there is one estimate D(x, sigma, caption) of the latents, from pure
noise at the largest sigma. It is right where it is nearer to the scene's latents than to those of
the scene with its two objects in each other's places: chance is 50%. No sampler and no recogniser
takes part, so that it tells binding (which attribute belongs to which object) from drawing well.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.scenes import EmojiScenes
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.errors import run_command
from latentdiff.metrics.scene_accuracy import KINDS
from latentdiff.pipeline import TextToImage
from latentdiff.rng import keyed_normal

BATCH = 40


def encode(model: TextToImage, pictures: list[np.ndarray]) -> Tensor:
    """Latents [B, C, h, w] of pictures, uint8 [H, W, 3]."""
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return model.parts.autoencoder.encode(images).mean


@torch.inference_mode()
def binding(model: TextToImage, scenes: EmojiScenes, count: int) -> dict[str, float]:
    """Share of right estimates by relation, in [0, 1], and of all of them."""
    parts = model.parts
    denoiser = Denoiser(parts.unet, parts.schedule, parts.parameterization)
    largest = parts.schedule.sigma(torch.tensor(float(len(parts.schedule) - 1)))
    asked, right = Counter[str](), Counter[str]()
    for first in range(0, count, BATCH):
        some = [scenes.scene(number) for number in range(first, min(first + BATCH, count))]
        latents = encode(model, [scenes.render(scene) for scene in some])
        mirrored = encode(model, [scenes.render(scenes.swapped(scene, 0)) for scene in some])
        noise = keyed_normal(0, "binding", 0, range(first, first + len(some)), latents.shape[1:])
        sigma = largest.expand(len(some)).float()
        text = parts.text_encoder(parts.text_encoder.tokenize([scene.caption for scene in some]))
        estimate = denoiser(torch.sqrt(1 + largest**2).float() * noise, sigma, text)
        error, other = ((estimate - x).square().sum((1, 2, 3)) for x in (latents, mirrored))
        for scene, is_right in zip(some, (error < other).tolist(), strict=True):
            for name in (str(scene.relation), "all"):
                asked[name] += 1
                right[name] += is_right
    return {name: right[name] / asked[name] for name in sorted(asked)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji", help="a model of emoji scenes")
    parser.add_argument("--captions", type=int, default=400, help="of each split")
    options = parser.parse_args()
    model = TextToImage.load(options.model)
    print("| pairs | left | right | above | below | all |\n|---|---|---|---|---|---|")
    for kind in (kind for kind in KINDS if kind.pairs):
        shares = binding(model, kind.source(model.parts.scenes()), options.captions)
        cells = [f"{shares[name]:.1%}" for name in ("left", "right", "above", "below", "all")]
        print(f"| {kind.title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
