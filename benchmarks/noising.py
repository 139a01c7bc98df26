"""Noising a latent in one shot is noising it step by step: by algebra, by samples, by the network.

    python -m benchmarks.noising [--model DIRECTORY] [--pictures 512]

Ho et al. (2020) define noising as a chain, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise_t
(equation 2), and train with its closed form, x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 -
alphas_cumprod_t) noise (equation 4). Here the chain is walked, all of its steps with fresh noise at
each, on the latents of emoji scenes. Prints and plots (benchmarks/noising.svg):

- by algebra, the largest difference between the coefficients that the chain multiplies up and those
  of the closed form;
- by samples, of (x_t - sqrt(alphas_cumprod_t) x_0) / sqrt(1 - alphas_cumprod_t), which must be
  N(0, 1) for both, mean, standard deviation and the Kolmogorov-Smirnov distance from N(0, 1);
- by the network, the error of its estimate of x_0, which a chain that made anything else of x_0
  would raise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import kstest
from torch import Tensor

from benchmarks.binding import BATCH, encode
from benchmarks.panels import Line, Panel, save
from latentdiff.data.scenes import EmojiScenes
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.errors import InputError, run_command
from latentdiff.pipeline import TextToImage
from latentdiff.rng import keyed_normal

LOOKS = (1, 3, 10, 30, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
"""Numbers of steps after which both are looked at."""
SHOWN = (1, 10, 100, 500, 1000)
"""Of these, the ones in the table."""


@dataclass(frozen=True)
class Measured:
    """What one way makes of the latents at a timestep."""

    mean: float
    std: float
    distance: float
    """Kolmogorov-Smirnov's, from N(0, 1)."""
    error: float
    """Mean square of the network's estimate less x_0."""
    uncertainty: float
    """Standard error of that mean over pictures."""


def chain(betas: Tensor) -> Iterator[tuple[float, float]]:
    """After each step the factors of x_0 and of the noises together, which add as squares do."""
    signal, variance = 1.0, 0.0
    for beta in betas.tolist():
        signal *= (1 - beta) ** 0.5
        variance = (1 - beta) * variance + beta
        yield signal, variance**0.5


def largest_difference(betas: Tensor, alphas_cumprod: Tensor) -> float:
    """Between the chain's factors and the closed form's, at any timestep."""
    differences = [
        max(abs(signal - alpha**0.5), abs(noise - (1 - alpha) ** 0.5))
        for (signal, noise), alpha in zip(chain(betas), alphas_cumprod.tolist(), strict=True)
    ]
    return max(differences)


def noise(x0: Tensor, step: int) -> Tensor:
    """N(0, I) for each picture; step 0 is the one shot's."""
    return keyed_normal(0, "noising", step, range(len(x0)), x0.shape[1:])


def walked(x0: Tensor, betas: Tensor) -> Iterator[Tensor]:
    """x_1, x_2, ...: equation 2 of Ho et al. (2020), one step after the other."""
    x = x0
    for step, beta in enumerate(betas.tolist(), 1):
        x = (1 - beta) ** 0.5 * x + beta**0.5 * noise(x0, step)
        yield x


@torch.inference_mode()
def measure(model: TextToImage, text: Tensor, x0: Tensor, x: Tensor, step: int) -> Measured:
    """x: [B, C, h, w], x0 after `step` steps; text: the tokens [B, L, D] of what x0 shows."""
    parts = model.parts
    denoiser = Denoiser(parts.unet, parts.schedule, parts.parameterization)
    alpha, sigma = parts.schedule.alphas_cumprod[step - 1], parts.schedule.sigmas[step - 1]
    rest = ((x - alpha.sqrt() * x0) / (1 - alpha).sqrt()).flatten().double()
    errors = []
    for rows in torch.arange(len(x0)).split(BATCH):
        noised = x[rows] / alpha.sqrt().float()
        estimate = denoiser(noised, sigma.expand(len(rows)), text[rows])
        errors.append((estimate - x0[rows]).square().mean((1, 2, 3)))
    error = torch.cat(errors)
    return Measured(
        float(rest.mean()),
        float(rest.std()),
        float(kstest(rest.numpy(), "norm").statistic),
        float(error.mean()),
        float(error.std() / len(error) ** 0.5),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="emoji", help="a model of emoji scenes")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("noising.svg"))
    options = parser.parse_args()
    model = TextToImage.load(options.model)
    source = EmojiScenes(model.parts.scenes())
    scenes = [source.scene(index) for index in range(options.pictures)]
    alphas_cumprod = model.parts.schedule.alphas_cumprod
    config = model.parts.scheduler_config
    if config.beta_schedule != "scaled_linear":
        raise InputError(f"{options.model} has other betas than Stable Diffusion's.")
    ends, count = (config.beta_start**0.5, config.beta_end**0.5), config.num_train_timesteps
    betas = torch.linspace(*ends, count, dtype=torch.float64) ** 2
    with torch.inference_mode():
        x0 = encode(model, [source.render(scene) for scene in scenes])
        encoder = model.parts.text_encoder
        text = encoder(encoder.tokenize([scene.caption for scene in scenes]))
    shot, steps = dict[int, Measured](), dict[int, Measured]()
    for step, x in enumerate(walked(x0, betas), 1):
        if step in LOOKS:
            alpha = alphas_cumprod[step - 1]
            at_once = alpha.sqrt().float() * x0 + (1 - alpha).sqrt().float() * noise(x0, 0)
            shot[step] = measure(model, text, x0, at_once, step)
            steps[step] = measure(model, text, x0, x, step)
    print(f"Coefficients differ by {largest_difference(betas, alphas_cumprod):.0e} at most.\n")
    print(table(shot, steps))
    lines = [line("in one shot", shot), line("step by step", steps, dashed=True)]
    title = "What the network makes of noised latents"
    save(options.plot, Panel(title, "timestep", "mean squared error of x0", lines))


def table(shot: dict[int, Measured], steps: dict[int, Measured]) -> str:
    """Markdown."""
    lines = ["| steps | | mean | standard deviation | KS distance | error of the estimate |"]
    lines.append("|---" * 6 + "|")
    for step in SHOWN:
        for name, found in (("one shot", shot[step]), ("step by step", steps[step])):
            lines.append(
                f"| {step:,} | {name} | {found.mean:+.4f} | {found.std:.4f} | "
                f"{found.distance:.4f} | {found.error:.5f} ± {found.uncertainty:.5f} |"
            )
    return "\n".join(lines)


def line(name: str, measured: dict[int, Measured], dashed: bool = False) -> Line:
    return Line(name, [(step, found.error) for step, found in measured.items()], dashed=dashed)


if __name__ == "__main__":
    run_command(main)
