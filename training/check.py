"""Minutes before weeks: everything about a run that can be known before it.

    python -m training.check configs/emoji/diffusion.yaml [--program diffusion] [--max_steps 100]

Takes a config as the program itself does, overrides too, and runs under accelerate launch as well.
Prints one sentence a finding and exits with status 1 if any of them is a FAIL. A few real steps
are taken, in a temporary directory: nothing of the run is written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from latentdiff.config import load_config
from latentdiff.errors import InputError, run_command
from training.check_diffusion import OF_DIFFUSION
from training.config import RunConfig
from training.diffusion import DiffusionProgram
from training.faults import NotFiniteError
from training.findings import Check, Context, Finding, judged
from training.loop import Run, make_accelerator
from training.monitor import Monitor, duration, peak_memory
from training.parallel import leave, local

PROGRAMS = ("diffusion", "autoencoder", "clip")

STEPS = 3
"""Steps that are taken, the first of them untimed."""


def check_learning_rate(context: Context) -> Iterator[Finding]:
    """The horizon, in steps and in samples."""
    config, options = context.config, context.config.optimizer
    total, rise, fall = config.max_steps, options.warmup_steps, options.cooldown_steps
    sentence = (
        f"The learning rate rises to {options.learning_rate:g} over {_steps(rise, config)} and "
        + (f"falls ({options.cooldown}) over the last {_steps(fall, config)}" if fall else "stays")
        + f"; training ends after {_steps(total, config)}."
    )
    yield judged(rise + fall > total, sentence, "warning")
    if rise + fall > total:
        peak = max(options.rate(step, total) for step in range(0, total, max(1, total // 1000)))
        yield Finding(
            "warning",
            f"Warm-up and cooldown take more than max_steps: the rate comes to {peak:g} at most.",
        )


def _steps(count: int, config: RunConfig) -> str:
    return f"{count:,} steps ({count * config.batch_size:,} samples)"


# What a few steps show


def check_step(context: Context) -> Iterator[Finding]:
    """Real steps, as the loop takes them: finite, and how long the run will be."""
    config = context.apart()
    steps = range(min(STEPS, config.max_steps))
    try:
        run = Run(context.program, config, context.accelerator)
        context.averages = {name: value.clone() for name, value in run.ema.state().items()}
        ends = []
        with (
            Monitor(config, context.accelerator, 0, run.meter) as run.monitor,
            closing(context.program.batches(steps, context.share)) as batches,
        ):
            for step, micro_batches in zip(steps, batches, strict=True):
                run.step(step, micro_batches)
                figures = run.monitor.log(step + 1)
                ends.append(time.perf_counter())
    except NotFiniteError as error:
        yield Finding("FAIL", str(error).split(". ")[0] + ".")
        return
    except InputError as error:  # gradients that are lost
        yield Finding("FAIL", str(error))
        return
    except torch.OutOfMemoryError:
        yield Finding(
            "FAIL",
            "A step does not fit into the device's memory; lower micro_batch_size or set "
            "gradient_checkpointing.",
        )
        return
    context.run = run
    norm = f", its gradient's norm {figures['grad_norm']:.3g}" if "grad_norm" in figures else ""
    yield Finding("ok", f"After {len(steps)} steps the loss is {figures['loss']:.4g}{norm}.")
    if len(ends) > 1:
        pace = (ends[-1] - ends[0]) / (len(ends) - 1)
        yield Finding(
            "ok",
            f"A step takes {pace:.3g} s ({config.batch_size / pace:.3g} samples a second): "
            f"{duration(pace * config.max_steps)} in all, besides samples and validation.",
        )


def check_optimizer(context: Context) -> Iterator[Finding]:
    """Every field of the configuration is in the optimizer that took the steps."""
    if context.run is None:
        return
    options, network = context.config.optimizer, context.run.program.network
    groups = context.run.optimizer.param_groups
    trained = [id(value) for value in network.parameters() if value.requires_grad]
    held = [id(value) for group in groups for value in group["params"]]
    count = sum(value.numel() for value in network.parameters() if value.requires_grad)
    yield judged(
        sorted(trained) != sorted(held) or not trained,
        f"The optimizer holds {len(held)} of {len(trained)} trained tensors ({count:,} weights).",
    )
    step = min(STEPS, context.config.max_steps) - 1
    rate = options.rate(step, context.config.max_steps)
    wrong = []
    for group in groups:
        wanted: dict[str, Any] = {"lr": rate * group.get("scale", 1.0)}
        if "betas" in group:
            wanted["betas"] = tuple(options.betas)
        if any(value.ndim > 1 for value in group["params"]):
            wanted["weight_decay"] = options.weight_decay
        wrong += [name for name, value in wanted.items() if group[name] != value]
    told = f"{options.name} was told lr {rate:.3g} at step {step}, weight_decay "
    told += f"{options.weight_decay:g}, betas {options.betas[0]:g} and {options.betas[1]:g}"
    yield judged(bool(wrong), told + (f"; it has another {wrong[0]}." if wrong else "."))


def check_ema(context: Context) -> Iterator[Finding]:
    """Each average has moved, and can follow within the run."""
    if context.run is None:
        return
    moved = {
        name.split("/", 1)[0]
        for name, value in context.run.ema.state().items()
        if not torch.equal(local(value), local(context.averages[name]))
    }
    for decay in context.config.ema_decays:
        yield judged(
            str(decay) not in moved,
            f"The average of decay {decay} "
            + ("has moved with the steps." if str(decay) in moved else "has not moved."),
        )
        if 1 / (1 - decay) > context.config.max_steps / 2:
            yield Finding(
                "warning",
                f"A decay of {decay} averages over some {1 / (1 - decay):,.0f} steps, of only "
                f"{context.config.max_steps:,}.",
            )


def check_memory(context: Context) -> Iterator[Finding]:
    """Where the memory of a process goes."""
    if context.run is None:
        return
    run, device = context.run, context.accelerator.device
    weights = sum(_bytes(value) for value in run.program.network.parameters())
    trained = sum(_bytes(value) for value in run.ema.parameters.values())
    parts = {
        "weights": weights,
        "gradients": trained,
        "optimizer": sum(map(_bytes, _optimizer_state(run))),
        "averages": sum(map(_bytes, run.ema.state().values())),
    }
    peak = peak_memory(device)
    told = ", ".join(f"{name} {_size(count)}" for name, count in parts.items())
    rest = f"with activations and all else the process came to {_size(peak)}"
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    of = "" if room is None else f" of the GPU's {_size(room)}"
    full = room is not None and peak > 0.95 * room
    yield judged(full, f"Memory: {told}; {rest}{of}.", "warning")


def check_disk(context: Context) -> Iterator[Finding]:
    """Room for the checkpoints that are kept and the one being written."""
    if context.run is None:
        return
    run, config = context.run, context.config
    whole = sum(map(_bytes_of_all, run.wrapped.state().values()))
    whole += sum(map(_bytes_of_all, run.ema.state().values()))
    whole += sum(map(_bytes_of_all, _optimizer_state(run)))
    needed = whole * (config.checkpoints_kept + 1)
    place = config.run_dir.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    yield judged(
        needed > free,
        f"A checkpoint takes {_size(whole)}; {config.checkpoints_kept} kept and one being written "
        f"need {_size(needed)}, and {place} has {_size(free)} free.",
    )


def _optimizer_state(run: Run) -> list[Tensor]:
    states = run.optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _bytes(value: Tensor) -> int:
    """Here."""
    return local(value).nbytes


def _bytes_of_all(value: Tensor) -> int:
    """On all processes together."""
    return value.numel() * value.element_size()


def _size(count: float) -> str:
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.1f} MiB"


OF_ALL: tuple[Check, ...] = (
    check_learning_rate,
    check_step,
    check_optimizer,
    check_ema,
    check_memory,
    check_disk,
)


def check(config: RunConfig, make_program: Callable[[Any], Any]) -> Iterator[Finding]:
    """Every finding about a run. Raises InputError where the program itself would."""
    with tempfile.TemporaryDirectory() as folder:
        apart = config.model_copy(update={"run_dir": Path(folder), "trackers": ()})
        accelerator = make_accelerator(apart)
        context = Context(config, make_program(apart), accelerator, Path(folder))
        context.share.check(config.batch_size)
        checks = OF_ALL
        if isinstance(context.program, DiffusionProgram):
            checks = OF_DIFFUSION + OF_ALL
        for one in checks:
            yield from one(context)
        leave(accelerator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("config", type=Path, help="the program's YAML file")
    parser.add_argument("--program", choices=PROGRAMS, default="diffusion")
    known, overrides = parser.parse_known_args()
    module = import_module(f"training.{known.program}")
    name = known.program.capitalize()
    argv = ["--config", str(known.config), *overrides]
    config = load_config(getattr(module, f"{name}Config"), argv)
    failed = False
    for finding in check(config, getattr(module, f"{name}Program")):
        if PartialState().is_main_process:
            print(finding, flush=True)
        failed = failed or finding.level == "FAIL"
    sys.exit(failed)


if __name__ == "__main__":
    run_command(main)
