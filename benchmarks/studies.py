"""What the notes on latent diffusion claim, measured on emoji scenes: trains, evaluates, compares.

    python -m benchmarks.studies spaces    # latents, pixels, small pictures made larger
    python -m benchmarks.studies towers    # a larger text encoder, a larger U-Net

Every network is trained by the programs of training/, one after the other; what is finished is not
done again, and the same command continues after a kill. The models of one study learn from the
same scenes, with a CLIP of the studies' own that stays as it is; only the last of `towers` reads
the bundled model's text encoder, which learned beside a U-Net in latents. A CLIP does not know left
from right: of two objects it is asked what they are, not where. Operations and minutes are those of
training the U-Net alone.
Prints a Markdown table of the figures of inference.evaluate, Frechet distance and CLIP score by the
bundled CLIP; writes benchmarks/studies_NAME.svg, the same figures, and a sheet of pictures,
benchmarks/studies_NAME.png. The 95% intervals are over prompts and seeds; each network is trained
once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from benchmarks.estimates import clip_score, frechet, right
from benchmarks.generate import machine
from benchmarks.panels import Dots, save
from latentdiff.model_files import read_json
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.pipeline import TextToImage
from latentdiff.sheet import labelled_sheet
from training.flops import step_flops

RUNS = Path("runs/studies")
EMOJI = "latentdiff/pretrained/emoji"
TOKENS = 32
PROMPTS = [
    "a fox on a blue background",
    "a pizza on a purple background",
    "a penguin on a cyan background",
    "a house on a green background",
    "a rocket above a house on a black background",
    "a fox to the left of a red apple on a blue background",
]

Options = dict[str, Any]

CLIPS: dict[str, Options] = {
    "small": {"hidden_size": 32, "layers": 1, "heads": 2},
    "large": {"hidden_size": 192, "layers": 6, "heads": 6},
}
UNETS: dict[str, Options] = {
    "small": {"block_out_channels": [48, 88], "norm_num_groups": 8},
    "large": {},
}


@dataclass(frozen=True)
class Step:
    """A program of training/ with its YAML and what takes the place of its values."""

    program: str
    options: Options

    @property
    def arguments(self) -> list[str]:
        """Of the command line."""
        words = ["--config", f"configs/studies/{self.program}.yaml"]
        for name, value in self.options.items():
            words += [f"--{name}", str(value).replace("'", "")]
        return words

    def run(self) -> None:
        command = [sys.executable, "-m", f"training.{self.program}", *self.arguments]
        subprocess.run(command, check=True)


@dataclass(frozen=True)
class Model:
    """One of the models of a study."""

    name: str
    title: str
    steps: int
    unet: Options
    before: tuple[Step, ...]
    """What is trained or cached first."""
    options: Options
    batch_size: int

    @property
    def run_dir(self) -> Path:
        return RUNS / self.name

    @property
    def training(self) -> tuple[Step, ...]:
        """All that is trained and cached, the U-Net last."""
        options = {f"unet.{name}": value for name, value in self.unet.items()} | self.options
        own = {"run_dir": self.run_dir, "max_steps": self.steps, "batch_size": self.batch_size}
        own["optimizer.cooldown_steps"] = self.steps // 2
        return *self.before, Step("diffusion", own | options)

    def results(self) -> dict[str, Any]:
        """inference.evaluate's, of the model, which is trained first."""
        for step in self.training:
            step.run()
        command = [sys.executable, "-m", "inference.evaluate"]
        command += ["--config", "configs/emoji/evaluate.yaml"]
        command += ["--model", str(self.run_dir / "model")]
        command += ["--run_dir", str(self.run_dir / "evaluation")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results: dict[str, Any] = read_json(self.run_dir / "evaluation" / "evaluation.json")
        return results

    def rate(self) -> float:
        """Samples per second that the U-Net was trained on: the median over the training."""
        lines = (self.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
        return median(rate for line in lines if (rate := json.loads(line).get("images_per_second")))

    def operations(self, unet: UNetConfig) -> int:
        """Of all the training of its U-Net."""
        return self.steps * self.batch_size * size(unet)[1]


def size(config: UNetConfig) -> tuple[int, int]:
    """Of a U-Net the weights, and the operations of training on one sample."""
    with torch.device("meta"):
        unet = UNet(config)
        x = torch.empty(1, config.in_channels, config.sample_size, config.sample_size)
        text = torch.empty(1, TOKENS, config.cross_attention_dim)
        flops = step_flops(unet, x, torch.zeros(1), text)
    return sum(value.numel() for value in unet.parameters()), flops


def autoencoder(name: str, options: Options) -> tuple[Step, Options]:
    """What trains a VAE, and what the U-Net is to be told of it."""
    run_dir, cache = RUNS / f"{name}-autoencoder", RUNS / f"{name}-cache"
    return Step("autoencoder", {"run_dir": run_dir} | options), {
        "cache": cache,
        "autoencoder": run_dir / "model",
    }


def cached(latents: Options, text_encoder: Path | str) -> Step:
    """The scenes as these latents and this encoder's tokens."""
    named = {"run_dir": latents["cache"], "autoencoder": latents["autoencoder"]}
    return Step("cache_latents", named | {"text_encoder": text_encoder})


@dataclass(frozen=True)
class TextEncoder:
    """What a U-Net reads."""

    directory: Path | str
    width: int
    before: tuple[Step, ...] = ()
    """What trains it."""


def text_encoder(name: str) -> TextEncoder:
    """The bundled model's, or the tower of one of the CLIPs."""
    if name == "bundled":
        return TextEncoder(EMOJI, 128)
    size, clip = CLIPS[name], RUNS / f"clip-{name}"
    train = Step("clip", {"run_dir": clip} | {f"text.{n}": value for n, value in size.items()})
    return TextEncoder(clip / "model", size["hidden_size"], (train,))


def model(
    name: str,
    title: str,
    steps: int,
    unet: Options,
    text: TextEncoder,
    latents: Options,
    before: tuple[Step, ...] = (),
    batch_size: int = 64,
) -> Model:
    """Of a U-Net that reads `text`, which is trained before it, as the cache is made."""
    return Model(
        name,
        title,
        steps,
        unet | {"cross_attention_dim": text.width},
        (*text.before, *before, cached(latents, text.directory)),
        latents | {"text_encoder": text.directory},
        batch_size,
    )


def in_latents(text: str, unet: str) -> Model:
    """With the bundled VAE."""
    return model(
        f"text-{text}-unet-{unet}",
        f"{text} text encoder, {unet} U-Net",
        2000,
        UNETS[unet],
        text_encoder(text),
        {"cache": RUNS / f"text-{text}-cache", "autoencoder": EMOJI},
    )


def towers() -> list[Model]:
    """Two text encoders by two U-Nets, a quarter of the operations or all of them; and the text
    encoder that learned beside a U-Net.
    """
    four = [in_latents(text, unet) for text in CLIPS for unet in UNETS]
    return [*four, in_latents("bundled", "large")]


def spaces() -> list[Model]:
    """U-Nets of 7.3 to 7.8 million weights that read the larger CLIP, given equal operations.

    An operation buys the fewest samples in pixels; in batches of 16 they are still 1,440 steps.
    """
    three = {"in_channels": 3, "out_channels": 3}
    nothing = {"vae.block_out_channels": [8], "max_steps": 1, "optimizer.learning_rate": 1e-9}
    small, small_latents = autoencoder("small", {})
    pixels, pixel_latents = autoencoder("pixels", nothing | {"optimizer.cooldown_steps": 0})
    return [
        replace(in_latents("large", "large"), title="latents, 8 x 8 x 16"),
        model(
            "small",
            "small pictures, 16 x 16 x 3, made larger",
            1630,
            three | {"sample_size": 16} | levels([32, 96, 176]),
            text_encoder("large"),
            small_latents,
            (small,),
        ),
        model(
            "pixels",
            "pixels, 64 x 64 x 3",
            1440,
            three | {"sample_size": 64} | levels([16, 32, 96, 176]),
            text_encoder("large"),
            pixel_latents,
            (pixels,),
            batch_size=16,
        ),
    ]


def levels(channels: list[int]) -> Options:
    """A U-Net that reads text at its lowest level alone."""
    plain = len(channels) - 1
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownBlock2D"] * plain + ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"] + ["UpBlock2D"] * plain,
    }


STUDIES = {"spaces": spaces, "towers": towers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    study = parser.parse_args().study
    models = STUDIES[study]()
    results = [model.results() for model in models]
    print(machine(), f"protocol {results[0]['id']}", "", table(models, results), sep="\n")
    titles = [model.title for model in models]
    plot = Path(__file__).with_name(f"studies_{study}.svg")
    save(
        plot,
        *(
            Dots(title, across, dict(zip(titles, map(estimate, results), strict=True)))
            for title, across, estimate in (
                ("Objects right", "% of pictures", lambda each: right(each, "objects")),
                ("Distance from real pictures", "Fréchet distance", frechet),
                ("Fit of picture and prompt", "CLIP score", clip_score),
            )
        ),
        height=0.8 + 0.45 * len(models),
    )
    sheet(models).save(plot.with_suffix(".png"))


def table(models: list[Model], results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| | U-Net | samples | PFLOP | minutes | autoencoder | objects right, % "
        "| Fréchet distance | CLIP score |"
    ]
    lines.append("|---" * 9 + "|")
    for model, result in zip(models, results, strict=True):
        unet = UNetConfig.from_diffusers(read_json(model.run_dir / "model/unet/config.json"))
        samples, psnr = model.batch_size * model.steps, result.get("vae_psnr_db")
        lines.append(
            f"| {model.title} | {size(unet)[0] / 1e6:.1f} M | {samples:,} | "
            f"{model.operations(unet) / 1e15:.2f} | {samples / model.rate() / 60:.0f} | "
            f"{'exact' if psnr is None else f'{psnr:.1f} dB'} | {right(result, 'objects')} | "
            f"{frechet(result)} | {clip_score(result)} |"
        )
    return "\n".join(lines)


def sheet(models: list[Model]) -> Image.Image:
    """A row of pictures of each model, the same prompts and seeds in each."""
    pictures: list[Image.Image] = []
    labels: list[str] = []
    for model in models:
        loaded = TextToImage.load(model.run_dir / "model")
        drawn = loaded.generate(PROMPTS, seed=list(range(len(PROMPTS))))
        assert isinstance(drawn, list)
        pictures += drawn
        labels += [f"{model.title}: {prompt}" for prompt in PROMPTS]
    return labelled_sheet(pictures, labels, columns=len(PROMPTS), scale=2)


if __name__ == "__main__":
    main()
