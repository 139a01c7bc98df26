"""The loop that every training program runs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from latentdiff.config import save_yaml
from latentdiff.data.order import Share
from latentdiff.errors import InputError
from latentdiff.model_files import staged_directory, staged_file
from latentdiff.threads import warn_of_idle_cores
from training.alone import alone_in
from training.checkpoints import Checkpointer, load
from training.config import Program, RunConfig, StepLosses
from training.ema import EMA
from training.faults import (
    FAULT,
    STOPPED,
    Agreement,
    Unreadable,
    report_not_finite,
    stop_on_signals,
)
from training.flops import FlopMeter
from training.monitor import Monitor
from training.optimizers import make_optimizer
from training.parallel import agreed, leave, means, parallelize

LOST = timedelta(minutes=30)
"""How long a process waits for another before it gives it up for lost."""

SMALLEST_SCALE = 2.0**-10
"""fp16's loss scale below which gradients that are not finite have another cause."""


def make_accelerator(config: RunConfig) -> Accelerator:
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on CPUs would not meet
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_dir=config.run_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LOST)],
    )
    warn_of_idle_cores(accelerator.device.type)
    return accelerator


def train(program: Program, config: RunConfig, accelerator: Accelerator) -> None:
    """Train `program.network` to `config.max_steps`, from the newest checkpoint if there is one.

    Asked to stop by a signal it saves, and exits with faults.STOPPED. Raises InputError when the
    run directory belongs to another network, data, seed or batch size, when the processes cannot
    share a batch evenly, and when there is no compiler; NotFiniteError when a loss or a gradient is
    not finite.
    """
    Run(program, config, accelerator).run()


class Run:
    """One process's part of a run."""

    def __init__(self, program: Program, config: RunConfig, accelerator: Accelerator) -> None:
        self.program, self.config, self.accelerator = program, config, accelerator
        check_compiler(config, accelerator.device)
        self.share = Share(
            accelerator.process_index, accelerator.num_processes, config.micro_batch_size
        )
        self.share.check(config.batch_size)
        self.meter = FlopMeter(program.network)
        self.wrapped = parallelize(program.network, accelerator, config.mixed_precision)
        self.optimizer = make_optimizer(program.network, config.optimizer)
        self.prepared = accelerator.prepare_optimizer(self.optimizer)  # skips fp16's overflows
        self.ema = EMA(program.network, config.ema_decays)
        self.forward: Callable[..., Any] = self.wrapped.forward
        if config.compile:
            self.forward = torch.compile(self.forward)
        self.forward = self.meter.watch(self.forward)
        self.checkpoints = Checkpointer(
            config.run_dir / "checkpoints", config.checkpoints_kept, accelerator
        )
        self.start = self.resume()

    def resume(self) -> int:
        """Restore the newest checkpoint and return the steps that it has taken."""
        saved = self.checkpoints.latest()
        if saved is None:
            return 0
        program, config = self.program, self.config
        state = load(saved, self.wrapped, self.ema, self.optimizer, self.accelerator.scaler)
        known = state["inputs"]
        if changed := [name for name in program.inputs if known.get(name) != program.inputs[name]]:
            raise InputError(
                f"{saved} learned from another {' and another '.join(changed)}; restore what "
                "was there or choose another run_dir."
            )
        step: int = state["step"]
        if (state["seed"], state["samples"]) != (config.seed, step * config.batch_size):
            raise InputError(
                f"{saved} was made with another seed or batch_size, whose order of samples "
                "would not continue; restore them or choose another run_dir."
            )
        return step

    def run(self) -> None:
        """From the first step, or the one after the newest checkpoint, to the finished model."""
        config, accelerator = self.config, self.accelerator
        model = config.run_dir / "model"
        if self.start >= config.max_steps and agreed(accelerator, model.exists()):
            accelerator.print(f"{config.run_dir} is finished: {model}")
            leave(accelerator)
            return
        with alone_in(config.run_dir) if accelerator.is_main_process else nullcontext():
            self.run_alone(model)

    def run_alone(self, model: Path) -> None:
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            (config.run_dir / FAULT).unlink(missing_ok=True)
            save_yaml(config, config.run_dir / "config.yaml")
        self.unreadable = Unreadable(config, accelerator)
        with Monitor(config, accelerator, self.start, self.meter) as self.monitor:
            try:
                stopped = self.steps()
            finally:
                self.checkpoints.join()
            self.checkpoints.wait()
        if stopped:
            accelerator.print(f"stopped: the same command continues {config.run_dir}")
        else:
            self.finish(model)
        leave(accelerator)
        if stopped:
            sys.exit(STOPPED)

    def steps(self) -> bool:
        """Take every step that is left. Returns whether a signal stopped it before the last."""
        config = self.config
        steps = range(self.start, config.max_steps)
        batches = self.program.batches(steps, self.share)
        agreement = Agreement(self.accelerator)
        if self.start:  # a kill may have come in the middle of it
            with self.monitor.pause():
                self.evaluate(self.start, last=self.start == config.max_steps)
        with stop_on_signals() as asked, closing(batches):
            for step, micro_batches in zip(steps, self.monitor.timed(batches), strict=True):
                self.step(step, micro_batches)
                done = step + 1
                stop = asked.asked or self.checkpoints.failed
                if agreement.tell(stop) and done < config.max_steps:
                    self.save(done)  # and nothing else: what told it to stop does not wait long
                    return True  # a checkpoint that failed does not come here: save has raised
                self.after(done, last=done == config.max_steps)
        return False

    def step(self, step: int, micro_batches: list[Any]) -> None:
        """One optimizer step, number `step` from 0: Algorithm 1, lines 2 to 5, over the batch."""
        config, accelerator = self.config, self.accelerator
        share = 1 / len(micro_batches)
        taken: list[StepLosses] = []
        for number, batch in enumerate(micro_batches, 1):
            waits = number < len(micro_batches)
            with self.wrapped.no_sync() if waits else nullcontext():
                losses = self.program.losses(self.forward, batch, accelerator.device)
                accelerator.backward(losses.loss * share)
            taken.append(losses)
        accelerator.unscale_gradients(self.prepared)
        if step == self.start + 1:  # not at the first: a LoRA's A learns from the second step on
            self.tell_of_lost_gradients()
        norm = self.wrapped.clip_grad_norm(config.optimizer.max_grad_norm)
        if not torch.isfinite(norm) and self.overflows_too_often():
            raise report_not_finite(config, step, taken, accelerator)
        rate = config.optimizer.rate(step, config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)
        self.ema.update(step + 1)
        self.monitor.step(taken, norm, rate)

    def tell_of_lost_gradients(self) -> None:
        """Say which trained tensors have a gradient of nothing but zeros, as a compiler's mistake
        leaves them. Raises InputError where that is more than one in ten.
        """
        trained, lost = self.wrapped.trained, self.wrapped.without_gradient()
        if not lost:
            return
        told = f"No gradient reaches {len(lost)} of {len(trained)} trained tensors, {lost[0]} among"
        if 10 * len(lost) > len(trained):
            raise InputError(f"{told} them; set compile to false, or train in fp32.")
        self.accelerator.print(f"{told} them.")

    def overflows_too_often(self) -> bool:
        """Whether a gradient that is not finite is more than fp16's, whose step is left out while
        the scale of the loss falls.
        """
        scaler = self.accelerator.scaler
        return scaler is None or scaler.get_scale() < SMALLEST_SCALE

    def after(self, done: int, last: bool) -> None:
        """What is due when `done` steps are taken: log, validate, evaluate, sample, save."""
        config, accelerator = self.config, self.accelerator
        if last or done % config.log_every == 0:
            self.unreadable.update(self.program.unreadable)
            self.monitor.log(done)
        if last or done % config.checkpoint_every == 0:
            self.save(done)  # first: what fails below is tried again from here
        with self.monitor.pause():
            if last or done % config.validation_interval == 0:
                self.monitor.record(done, self.validation())
            self.evaluate(done, last)
            if last or done % config.sample_every == 0:
                with self.ema.weights_in(), torch.no_grad():
                    picture = self.program.samples(accelerator.device)
                if accelerator.is_main_process:
                    save_samples(picture, config.run_dir, done)

    def save(self, done: int) -> None:
        state = {
            "seed": self.config.seed,
            "samples": done * self.config.batch_size,
            "inputs": self.program.inputs,
        }
        self.checkpoints.save(
            done, self.wrapped, self.ema, self.optimizer, self.accelerator.scaler, state
        )

    def validation(self) -> dict[str, float]:
        """Loss on held-out data of the weights and of each of their averages."""
        program, device = self.program, self.accelerator.device
        sums: dict[str, tuple[float, int]] = {}
        with torch.no_grad():
            if (own := program.validation(self.wrapped.forward, device, self.share)) is None:
                return {}
            sums["validation/loss"] = own
            for index, decay in enumerate(self.config.ema_decays):
                with self.ema.weights_in(index):
                    averaged = program.validation(self.wrapped.forward, device, self.share)
                assert averaged is not None
                sums[f"validation/loss_ema_{decay}"] = averaged
        return means(self.accelerator, sums)

    def evaluate(self, done: int, last: bool) -> None:
        """Measure the averaged weights after `done` steps, where that is due and was not done."""
        every = self.config.evaluate_every
        if not every or (done % every and not last) or self.monitor.has(done, "evaluation"):
            return
        with self.ema.weights_in(), torch.no_grad():
            figures = self.program.evaluate(done, self.wrapped)
        self.monitor.record(done, figures)

    def finish(self, directory: Path) -> None:
        """Write the finished model, with the first of the averages in it."""
        accelerator = self.accelerator
        with self.ema.weights_in(), self.wrapped.whole(), torch.no_grad():
            if accelerator.is_main_process:
                shutil.rmtree(directory, ignore_errors=True)
                with staged_directory(directory) as staged:
                    self.program.finish(staged, accelerator.device)
        accelerator.print(f"finished: {directory}")


def check_compiler(config: RunConfig, device: torch.device) -> None:
    """Raises InputError where torch.compile would fail at the first step."""
    compiler = os.environ.get("CXX", "g++")
    if config.compile and device.type == "cpu" and shutil.which(compiler) is None:
        raise InputError(
            f"compile is on, but there is no C++ compiler {compiler!r}; install one, name it in "
            "CXX, or say --compile false."
        )


def save_samples(picture: Any, run_dir: Path, step: int) -> None:
    """run_dir/samples/step-NNNNNN.png."""
    with staged_file(run_dir / "samples" / f"step-{step:06d}.png") as path:
        picture.save(path, "PNG")
