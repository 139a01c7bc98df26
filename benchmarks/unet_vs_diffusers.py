"""How fast the U-Net is beside diffusers' UNet2DConditionModel with the same weights.

    python -m benchmarks.unet_vs_diffusers [--config configs/emoji/diffusion.yaml]
        [--dtype float32|bfloat16] [--threads N] [--repeats 15] [--clock wall|cpu] [--compile]

Prints one JSON object: medians in milliseconds, and the median of diffusers / ours over the turns,
each of which runs both, in changing order. `forward` is one denoising step with guidance: batch 2,
the text projected before, as a sampler does; diffusers projects it in every step. `training` is
forward, backward and AdamW at the batch size. bfloat16 means autocast. Both are channels_last, as
the training and the pipeline run it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.generate import machine
from latentdiff.config import parse, read_yaml
from latentdiff.models.unet import UNet, UNetConfig

Work = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/emoji/diffusion.yaml"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch_size", type=int, default=64, help="of the training step")
    parser.add_argument("--tokens", type=int, default=32, help="length of the text")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu counts the process's own time over all threads: for a machine that is busy",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    config = parse(UNetConfig, read_yaml(arguments.config)["unet"], str(arguments.config))
    theirs = UNet2DConditionModel.from_config(config.to_diffusers())
    ours = UNet(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    steps = {
        "forward": denoising_steps(ours, theirs, config, arguments),
        "training": training_steps(ours, theirs, config, arguments),
    }
    results = {
        "machine": machine(),
        "torch": torch.__version__,
        **{name: str(value) for name, value in vars(arguments).items()},
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
    }
    print(
        json.dumps(
            results | {name: compare(*both, arguments) for name, both in steps.items()},
            indent=2,
        )
    )


def denoising_steps(
    ours: UNet, theirs: UNet2DConditionModel, config: UNetConfig, arguments: argparse.Namespace
) -> tuple[Work, Work]:
    sample, timestep, text = inputs(config, 2, arguments.tokens)
    with torch.no_grad(), autocast(arguments):
        projected = ours.condition(text)
    our_forward, their_forward = ready(ours, arguments), ready(theirs, arguments)

    @torch.no_grad()
    def our_step() -> Tensor:
        with autocast(arguments):
            return our_forward(sample, timestep, projected)

    @torch.no_grad()
    def their_step() -> Tensor:
        with autocast(arguments):
            return their_forward(sample, timestep, text).sample

    tolerance = 1e-4 if arguments.dtype == "float32" else 0.05
    torch.testing.assert_close(our_step(), their_step(), atol=tolerance, rtol=tolerance)
    return our_step, their_step


def training_steps(
    ours: UNet, theirs: UNet2DConditionModel, config: UNetConfig, arguments: argparse.Namespace
) -> tuple[Work, Work]:
    sample, timestep, text = inputs(config, arguments.batch_size, arguments.tokens)
    target = torch.randn_like(sample)

    def step_of(network: nn.Module) -> Work:
        forward = ready(network, arguments)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            with autocast(arguments):
                output = forward(sample, timestep, text)
                output = output if isinstance(output, Tensor) else output.sample
            (output.float() - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return step_of(ours), step_of(theirs)


def inputs(config: UNetConfig, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    size = config.sample_size
    sample = torch.randn(batch, config.in_channels, size, size)
    text = torch.randn(batch, tokens, config.cross_attention_dim)
    return sample.contiguous(memory_format=torch.channels_last), 1000 * torch.rand(batch), text


def ready(network: nn.Module, arguments: argparse.Namespace) -> Callable[..., Any]:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return torch.compile(network) if arguments.compile else network


def autocast(arguments: argparse.Namespace) -> torch.autocast:
    enabled = arguments.dtype == "bfloat16"
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def compare(ours: Work, theirs: Work, arguments: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each, and of the ratio within a turn."""
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time

    def milliseconds(work: Work) -> float:
        started = clock()
        work()
        return 1000 * (clock() - started)

    for work in (ours, theirs, ours, theirs):
        work()
    turns = []
    for turn in range(arguments.repeats):
        first, second = (ours, theirs) if turn % 2 else (theirs, ours)
        taken = {first: milliseconds(first), second: milliseconds(second)}
        turns.append((taken[ours], taken[theirs]))
    return {
        "ours_ms": round(statistics.median(a for a, _ in turns), 2),
        "diffusers_ms": round(statistics.median(b for _, b in turns), 2),
        "diffusers_over_ours": round(statistics.median(b / a for a, b in turns), 3),
    }


if __name__ == "__main__":
    main()
