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
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from latentdiff.config import load_config
from latentdiff.data.order import Share
from latentdiff.errors import InputError, run_command
from latentdiff.rng import keyed_uniform
from training.config import DTYPES, RunConfig
from training.diffusion import DiffusionProgram
from training.faults import NotFiniteError
from training.loop import Run, make_accelerator
from training.monitor import Monitor, duration, peak_memory
from training.parallel import local

PROGRAMS = ("diffusion", "autoencoder", "clip")

STEPS = 3
"""Steps that are taken, the first of them untimed."""

LATENTS = 64
"""At least so many samples' latents are looked at."""


@dataclass(frozen=True)
class Finding:
    """One sentence about a run."""

    level: Literal["ok", "warning", "FAIL"]
    sentence: str

    def __str__(self) -> str:
        return f"{self.level:>7}  {self.sentence}"


def judged(bad: bool, sentence: str, level: Literal["warning", "FAIL"] = "FAIL") -> Finding:
    return Finding(level if bad else "ok", sentence)


class Context:
    """A run as it would start, in a directory of its own.

    config: what it is configured by, its own run_dir included.
    """

    def __init__(
        self, config: RunConfig, program: Any, accelerator: Accelerator, scratch: Path
    ) -> None:
        self.config, self.program, self.accelerator = config, program, accelerator
        self.share = Share(
            accelerator.process_index, accelerator.num_processes, config.micro_batch_size
        )
        self.scratch = scratch
        self.run: Run | None = None
        """After check_step, if its steps went well."""
        self.averages: dict[str, Tensor] = {}
        """The EMA's before them."""

    def apart(self) -> RunConfig:
        """The same configuration, in the scratch directory and told to nobody."""
        return self.config.model_copy(update={"run_dir": self.scratch, "trackers": ()})


Check = Callable[[Context], Iterator[Finding]]


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


# What a run of training.diffusion learns from


def check_order(context: Context) -> Iterator[Finding]:
    """What each epoch takes of every bucket."""
    config, plan = context.config, context.program.plan
    total, taken = sum(plan.counts), plan.steps_per_epoch * config.batch_size
    epochs = config.max_steps / plan.steps_per_epoch
    yield judged(
        taken < 0.9 * total,
        f"An epoch of {plan.steps_per_epoch:,} steps takes {taken:,} of {total:,} samples, other "
        f"ones each time; max_steps are {epochs:.3g} epochs.",
        "warning",
    )
    for bucket, count in enumerate(plan.counts):
        if bucket not in plan.filled and count:
            yield Finding(
                "warning",
                f"Bucket {bucket} holds {count} samples, fewer than batch_size: none is ever seen.",
            )


def check_noise(context: Context) -> Iterator[Finding]:
    """No two samples of a batch, on whatever process, have the same number or noise."""
    with closing(context.program.batches(range(1), context.share)) as steps:
        batches = next(steps)
    device = context.accelerator.device
    samples = torch.tensor([number for batch in batches for number in batch.samples])
    noise = torch.cat([batch.draw("noise", (4,)) for batch in batches])
    samples, noise = context.accelerator.gather((samples.to(device), noise.to(device)))
    distinct, drawn = len(samples.unique()), len(noise.unique(dim=0))
    count, processes = len(samples), context.accelerator.num_processes
    yield judged(
        distinct < count or drawn < count,
        f"{processes} process{'es' * (processes > 1)} took {distinct} distinct samples and drew "
        f"{drawn} distinct noises for a batch of {count}.",
    )


def check_captions(context: Context) -> Iterator[Finding]:
    """Captions that the tokenizer's limit cuts; captions dropped for guidance."""
    config, objective = context.config, context.program.config.objective
    cache = getattr(context.program.latents, "cache", None)
    if cache is not None:
        share = cache.cut / max(1, len(cache))
        yield judged(
            share > 0.05,
            f"{share:.1%} of the captions are longer than the {cache.key.tokens} tokens that the "
            "text encoder reads; their ends are not learned from.",
            "warning",
        )
    count, asked = 4096, objective.caption_dropout

    def draw(stream: str, shape: tuple[int, ...] | None) -> Tensor:
        return keyed_uniform(config.seed, stream, 0, range(count))

    share = float(objective.dropped(draw).float().mean())
    spread = 5 * (asked * (1 - asked) / count) ** 0.5
    yield judged(
        abs(share - asked) > spread,
        f"caption_dropout is {asked:g}; of the first {count} captions {share:.1%} are dropped.",
    )
    if asked == 0:
        yield Finding("warning", "No caption is dropped: classifier-free guidance will not work.")


def check_loss_weights(context: Context) -> Iterator[Finding]:
    """Finite and positive at each timestep."""
    parts, objective = context.program.parts, context.program.config.objective
    weights = objective.weights(parts.schedule, parts.parameterization)
    wrong = (~(weights.isfinite() & (weights > 0))).nonzero().flatten().tolist()
    if wrong:
        yield Finding(
            "FAIL",
            f"The loss weighs {weights[wrong[0]]:g} at timestep {wrong[0]}, and is not finite and "
            f"positive at {len(wrong)} of {len(weights)} timesteps.",
        )
    else:
        yield Finding(
            "ok",
            f"The loss weighs between {weights.min():.3g} and {weights.max():.3g} at each of "
            f"{len(weights)} timesteps.",
        )


@torch.no_grad()
def check_latents(context: Context) -> Iterator[Finding]:
    """Latents near N(0, 1) in every channel, and a VAE that is finite in the run's arithmetic."""
    program, device = context.program, context.accelerator.device
    autoencoder, size = program.parts.autoencoder.to(device), context.config.batch_size
    steps = range(min(-(-LATENTS // size), program.plan.steps_per_epoch))
    with closing(program.batches(steps, context.share)) as batches:
        taken = [
            batch.x0(autoencoder, device).float()
            for micro_batches in batches
            for batch in micro_batches
        ]
    values = torch.cat([x0.transpose(0, 1).flatten(1) for x0 in taken], dim=1)
    if not values.isfinite().all():
        yield Finding("FAIL", "Some latents are not finite; make the cache again in fp32.")
        return
    mean, std = values.mean(dim=1), values.std(dim=1)
    yield judged(
        bool((mean.abs() > 1).any() or (std < 0.5).any() or (std > 2).any()),
        f"Latents have means from {mean.min():.2f} to {mean.max():.2f} and standard deviations "
        f"from {std.min():.2f} to {std.max():.2f} over {len(mean)} channels; the noise schedule "
        "is made for 0 and 1.",
        "warning",
    )
    dtype = DTYPES[context.config.mixed_precision]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        picture = autoencoder.decode(taken[0][:1])
        posterior = autoencoder.encode(picture.float())
    finite = picture.isfinite().all() and posterior.mean.isfinite().all()
    yield judged(
        not bool(finite),
        f"The VAE decodes and encodes {'finite' if finite else 'infinite'} values in "
        f"{str(dtype).removeprefix('torch.')}.",
        "warning",
    )


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


OF_DIFFUSION: tuple[Check, ...] = (
    check_order,
    check_captions,
    check_loss_weights,
    check_noise,
    check_latents,
)
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
        accelerator.wait_for_everyone()
        accelerator.end_training()


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
