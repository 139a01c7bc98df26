r"""What a fine-tune on ten new emoji concepts learns and what it forgets: full and LoRA.

accelerate launch -m training.cache_latents --config configs/finetune/cache_latents.yaml
accelerate launch -m training.diffusion --config configs/finetune/diffusion.yaml
accelerate launch -m training.diffusion --config configs/finetune/diffusion.yaml \
    --run_dir runs/finetune/lora --optimizer.learning_rate 2e-3 \
    --lora.rank 32 --lora.targets "[attention,feed_forward,convolution]"
python -m benchmarks.finetune

Prints a Markdown table of object accuracy on single objects, before and after.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np

from latentdiff.config import load_yaml
from latentdiff.data.scenes import EmojiScenes, Scene, ScenesConfig
from latentdiff.drawing import drawn
from latentdiff.metrics.protocol import Protocol
from latentdiff.metrics.scene_accuracy import KINDS, Judge, prompt_for, shares
from latentdiff.pipeline import TextToImage

SCENES = Path("configs/finetune/scenes.yaml")
OLD = Path("configs/emoji/scenes.yaml")
PROTOCOL = load_yaml(Protocol, "configs/protocols/emoji_scenes.yaml")


def asked(config: ScenesConfig, nouns: set[str], count: int) -> list[Scene]:
    """Scenes of one of the nouns each, on a background seen with it."""
    scenes = KINDS[0].scenes(config, 40 * count)
    return [scene for scene in scenes if scene.objects[0].concept in nouns][:count]


def accuracy(model: TextToImage, judge: Judge, scenes: list[Scene]) -> dict[str, float]:
    """Shares in percent, drawn as the emoji scenes' protocol says."""
    pictures = drawn(model, [prompt_for(scene) for scene in scenes], PROTOCOL)
    return shares(judge.all(map(np.asarray, pictures), scenes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--prompts", type=int, default=200, help="of new and of old concepts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the bundled model says that it does not know the new words
    config, before = load_yaml(ScenesConfig, SCENES), load_yaml(ScenesConfig, OLD)
    judge = Judge(config)
    old = {concept.nouns[0] for concept in before.concepts}
    new = {concept.nouns[0] for concept in config.concepts} - old
    groups = {
        "new": asked(config, new, options.prompts),
        "old": asked(config, old, options.prompts),
    }
    renderer = EmojiScenes(config)
    print("| weights | ten new concepts | 69 old concepts | backgrounds |")
    print("|---|---|---|---|")

    def row(name: str, figures: dict[str, dict[str, float]]) -> None:
        background = np.mean([figures[group]["background"] for group in groups])
        cells = [f"{figures[group]['objects']:.1f}%" for group in groups]
        print(f"| {name} | {' | '.join(cells)} | {background:.1f}% |", flush=True)

    real = {
        group: shares(judge.all([renderer.render(scene) for scene in scenes], scenes))
        for group, scenes in groups.items()
    }
    row("real renders", real)
    bundled = TextToImage.load("emoji")
    row("before", {group: accuracy(bundled, judge, scenes) for group, scenes in groups.items()})
    full = TextToImage.load(options.runs / "diffusion" / "model")
    row("full", {group: accuracy(full, judge, scenes) for group, scenes in groups.items()})
    bundled.load_lora(options.runs / "lora" / "model" / "pytorch_lora_weights.safetensors")
    row("LoRA", {group: accuracy(bundled, judge, scenes) for group, scenes in groups.items()})


if __name__ == "__main__":
    main()
