"""The loop that every training program runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from tqdm.auto import tqdm

from latentdiff.config import Config, save_yaml
from latentdiff.errors import InputError
from latentdiff.model_files import staged_directory
from training import checkpoints
from training.ema import EMA

Precision = Annotated[
    Literal["no", "bf16"],
    BeforeValidator(lambda value: "no" if value is False else value),  # YAML reads no as false
]


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019) with a warm-up, a plateau and a linear cooldown."""

    learning_rate: float = Field(gt=0)
    """The plateau's learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moments."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, of weight matrices and kernels only."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear rise from zero."""
    cooldown_steps: int = Field(default=0, ge=0)
    """Steps of linear fall to zero before `max_steps`; zero keeps the plateau to the end."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""

    def rate(self, step: int, max_steps: int) -> float:
        """The learning rate of optimizer step `step` (from 0), a function of nothing else."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        left = max_steps - step
        fall = min(1.0, left / self.cooldown_steps) if self.cooldown_steps else 1.0
        return self.learning_rate * min(rise, fall)


class RunConfig(Config):
    """What every training program has."""

    run_dir: Path
    """Logs, samples, checkpoints and the finished model go here; running again continues it."""
    seed: int = Field(ge=0)
    """Initial weights, order and noise are functions of it."""
    max_steps: int = Field(gt=0)
    """Optimizer steps in all, counted over all resumes."""
    batch_size: int = Field(gt=0)
    """Samples per optimizer step over all processes."""
    checkpoint_every: int = Field(gt=0)
    """Steps between checkpoints."""
    checkpoints_kept: int = Field(default=2, gt=0)
    """How many of the newest checkpoints stay on the disk."""
    sample_every: int = Field(gt=0)
    """Steps between sample grids, drawn from the averaged weights."""
    log_every: int = Field(default=20, gt=0)
    """Steps between lines in the log."""
    mixed_precision: Precision = "no"
    """Arithmetic of the network; weights stay fp32."""
    compile: bool = False
    """Compile the network (torch.compile): slower start, faster steps."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights."""
    optimizer: OptimizerConfig
    """The optimizer and its learning rate."""


Losses = dict[str, Tensor]


class Program(Protocol):
    """What a training program hands to the loop."""

    @property
    def network(self) -> nn.Module:
        """What is trained."""

    @property
    def inputs(self) -> dict[str, str]:
        """What it learns from, by name: digests that a resumed run must find again."""

    def batches(self, steps: range, rank: int, processes: int) -> Iterator[Any]:
        """For each step, this process's slice of that step's batch."""

    def losses(self, network: Callable[..., Any], batch: Any, device: torch.device) -> Losses:
        """Means over the slice, by name; "loss" is the one to descend."""

    def samples(self, device: torch.device) -> Image.Image:
        """A picture of what the network can do; called with the averaged weights in it."""

    def finish(self, directory: Path, device: torch.device) -> None:
        """Write the finished model; called once with the averaged weights in the network."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights drawn inside the block are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay falls on matrices and kernels, not on biases and norms."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def check_compiler(config: RunConfig, device: torch.device) -> None:
    """Raises InputError where torch.compile would fail at the first step."""
    compiler = os.environ.get("CXX", "g++")
    if config.compile and device.type == "cpu" and shutil.which(compiler) is None:
        raise InputError(
            f"compile is on, but there is no C++ compiler {compiler!r}; install one, name it in "
            "CXX, or say --compile false."
        )


def train(program: Program, config: RunConfig, accelerator: Accelerator) -> None:
    """Train `program.network` to `config.max_steps`, from the newest checkpoint if there is one.

    Raises InputError when the run directory belongs to another network, data, seed or batch size,
    when the processes cannot share a batch evenly, and when there is no compiler;
    FloatingPointError when the loss is no longer finite.
    """
    check_compiler(config, accelerator.device)
    if config.batch_size % accelerator.num_processes:
        raise InputError(
            f"batch_size is {config.batch_size}, which {accelerator.num_processes} processes "
            "cannot share evenly; choose a multiple of their number."
        )
    model_dir = config.run_dir / "model"
    folder = config.run_dir / "checkpoints"
    network = program.network
    optimizer = make_optimizer(network, config.optimizer)
    wrapped, prepared = accelerator.prepare(network, optimizer)
    ema = EMA(network, config.ema_decay)
    start = 0
    if saved := checkpoints.complete(folder):
        state = checkpoints.load(saved[-1], network, ema, optimizer)
        start = state["step"]
        known = state.get("inputs", {})
        if changed := [name for name in program.inputs if known.get(name) != program.inputs[name]]:
            raise InputError(
                f"{saved[-1]} learned from another {' and another '.join(changed)}; restore what "
                "was there or choose another run_dir."
            )
        if (state["seed"], state["samples"]) != (config.seed, start * config.batch_size):
            raise InputError(
                f"{saved[-1]} was made with another seed or batch_size, whose order of samples "
                "would not continue; restore them or choose another run_dir."
            )
    if start >= config.max_steps and model_dir.exists():
        accelerator.print(f"{config.run_dir} is finished: {model_dir}")
        return
    if accelerator.is_main_process:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        save_yaml(config, config.run_dir / "config.yaml")
    accelerator.init_trackers("logs")
    forward = torch.compile(wrapped) if config.compile else wrapped
    bar = tqdm(
        total=config.max_steps * config.batch_size,
        initial=start * config.batch_size,
        unit="images",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0.05,
        disable=not accelerator.is_main_process,
    )
    steps = range(start, config.max_steps)
    batches = program.batches(steps, accelerator.process_index, accelerator.num_processes)
    for step, batch in zip(steps, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.rate(step, config.max_steps)
        losses = program.losses(forward, batch, accelerator.device)
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.optimizer.max_grad_norm)
        prepared.step()
        prepared.zero_grad(set_to_none=True)
        done = step + 1
        ema.update(network, done)
        bar.update(config.batch_size)
        save = done % config.checkpoint_every == 0 or done == config.max_steps
        if save or done % config.log_every == 0:
            figures = _figures(losses, norm, accelerator)
            figures["learning_rate"] = config.optimizer.rate(step, config.max_steps)
            accelerator.log(figures, step=done)
            bar.set_postfix({name: f"{figures[name]:.4f}" for name in losses}, refresh=False)
            if not all(value == value and abs(value) != float("inf") for value in figures.values()):
                raise FloatingPointError(
                    f"The loss or its gradient is not finite at step {done}: {figures}. The last "
                    f"checkpoint in {folder} is from before; lower the learning rate."
                )
        if not accelerator.is_main_process:
            continue
        if done % config.sample_every == 0 or done == config.max_steps:
            with ema.weights_in(network), torch.no_grad():
                _save_samples(program.samples(accelerator.device), config.run_dir, done)
        if save:
            state = {
                "seed": config.seed,
                "samples": done * config.batch_size,
                "inputs": program.inputs,
            }
            checkpoints.save(folder, done, network, ema, optimizer, state, config.checkpoints_kept)
    bar.close()
    # A gloo thread lets go of the last step's tensors under Python's lock. Let it do so now: the
    # process group waits for it, with that lock in its hands, when this function ends.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(model_dir, ignore_errors=True)
        with ema.weights_in(network), torch.no_grad(), staged_directory(model_dir) as directory:
            program.finish(directory, accelerator.device)
        accelerator.print(f"finished: {model_dir}")
    accelerator.end_training()


def _figures(losses: Losses, norm: Tensor | None, accelerator: Accelerator) -> dict[str, float]:
    """The losses as means over the processes, and this step's gradient norm before clipping."""
    means = {name: accelerator.reduce(value.detach(), "mean") for name, value in losses.items()}
    figures = {name: float(value) for name, value in means.items()}
    return figures if norm is None else figures | {"grad_norm": float(norm)}


def _save_samples(picture: Image.Image, run_dir: Path, step: int) -> None:
    folder = run_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"step-{step:06d}.png")


def make_accelerator(config: RunConfig) -> Accelerator:
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on CPUs would not meet
        mixed_precision=config.mixed_precision,
        log_with="tensorboard",
        project_dir=config.run_dir,
    )
