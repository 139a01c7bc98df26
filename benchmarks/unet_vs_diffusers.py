"""How fast the U-Net is, and how much memory it takes, beside diffusers' UNet2DConditionModel.

    python -m benchmarks.unet_vs_diffusers [--config configs/emoji/diffusion.yaml]
    python -m benchmarks.unet_vs_diffusers --family sd1 --size 32 --tokens 77 --repeats 3
        [--dtype float32|bfloat16] [--threads N] [--clock wall|cpu] [--compile]

Both have the same weights. Prints one JSON object: medians in milliseconds, and the median of
diffusers / ours over the turns, each of which runs both, in changing order; and by how many
megabytes a step raises the resident memory of a process of its own.
`forward` is one denoising step with guidance: batch 2, the text projected before, as a sampler
does; diffusers projects it in every step. `training` is forward, backward and AdamW at the batch
size; a published family is not trained here. bfloat16 means autocast. Both are channels_last, as
the training and the pipeline run it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.generate import machine
from benchmarks.unet_parity import lively_weights
from latentdiff.config import parse, read_yaml
from latentdiff.families import family_configs
from latentdiff.models.unet import UNet, UNetConfig

Work = Callable[[], Any]
NETWORKS = ("ours", "diffusers")
FAMILIES = ("sd1", "sd1_inpaint", "sd2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/emoji/diffusion.yaml"))
    parser.add_argument("--family", choices=FAMILIES, help="published sizes instead of --config")
    parser.add_argument("--size", type=int, help="side of the latents, if not the trained one")
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
    parser.add_argument("--growth", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    config = configuration(arguments)
    if arguments.growth:
        network, step = arguments.growth
        print(growth(STEPS[step](build(network, config), config, arguments)))
        return
    ours, theirs = (build(network, config) for network in NETWORKS)
    results: dict[str, Any] = {
        "machine": machine(),
        "torch": torch.__version__,
        **{name: str(value) for name, value in vars(arguments).items() if value is not None},
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
    }
    for name in ("forward",) if arguments.family else STEPS:
        our_step = STEPS[name](ours, config, arguments)
        their_step = STEPS[name](theirs, config, arguments)
        tolerance = 1e-4 if arguments.dtype == "float32" else 0.05
        # Also the first call of each, which is not timed.
        torch.testing.assert_close(our_step(), their_step(), atol=tolerance, rtol=tolerance)
        results[name] = compare(our_step, their_step, arguments) | memory(name)
    print(json.dumps(results, indent=2))


def configuration(arguments: argparse.Namespace) -> UNetConfig:
    if arguments.family:
        prediction_type = "v_prediction" if arguments.family == "sd2" else "epsilon"
        return UNetConfig.from_diffusers(family_configs(arguments.family, prediction_type)["unet"])
    return parse(UNetConfig, read_yaml(arguments.config)["unet"], str(arguments.config))


def build(network: str, config: UNetConfig) -> nn.Module:
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(config.to_diffusers())
        built = UNet(config) if network == "ours" else theirs
    built.load_state_dict(lively_weights(theirs.state_dict()), strict=True, assign=True)
    return built


def denoising_step(network: nn.Module, config: UNetConfig, arguments: argparse.Namespace) -> Work:
    sample, timestep, text = inputs(config, 2, arguments)
    forward = ready(network, arguments)
    cond: Any = text
    if isinstance(network, UNet):
        with torch.no_grad(), autocast(arguments):
            cond = network.condition(text)

    @torch.no_grad()
    def step() -> Tensor:
        with autocast(arguments):
            return prediction(forward(sample, timestep, cond))

    return step


def training_step(network: nn.Module, config: UNetConfig, arguments: argparse.Namespace) -> Work:
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # each trains its own, not a view of a block
    sample, timestep, text = inputs(config, arguments.batch_size, arguments)
    target = torch.roll(sample, 1, 0)
    forward = ready(network, arguments)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def step() -> Tensor:
        with autocast(arguments):
            output = prediction(forward(sample, timestep, text))
        loss = (output.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


STEPS = {"forward": denoising_step, "training": training_step}


def prediction(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample


def inputs(
    config: UNetConfig, batch: int, arguments: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = arguments.size or config.sample_size
    sample = torch.randn(batch, config.in_channels, size, size, generator=generator)
    text = torch.randn(batch, arguments.tokens, config.cross_attention_dim, generator=generator)
    timestep = 1000 * torch.rand(batch, generator=generator)
    return sample.contiguous(memory_format=torch.channels_last), timestep, text


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


def memory(step: str) -> dict[str, float]:
    """Megabytes by which one step raises a new process's peak, for each network, and the ratio."""

    def measured(network: str) -> float:
        command = [sys.executable, "-m", "benchmarks.unet_vs_diffusers", *sys.argv[1:]]
        command += ["--growth", network, step]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    ours, theirs = (measured(network) for network in NETWORKS)
    return {
        "ours_MB": round(ours, 1),
        "diffusers_MB": round(theirs, 1),
        "memory_diffusers_over_ours": round(theirs / ours, 3),
    }


def growth(step: Work) -> float:
    """Megabytes between the resident memory before a step and its peak within; Linux only.

    The peak is this process's own: getrusage's ru_maxrss would be no less than its parent's.
    """
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak until now
    step()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
