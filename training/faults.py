"""What ends a run early: a signal, a number that is not finite, a process that is lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from latentdiff.errors import InputError
from latentdiff.model_files import staged_file, write_json
from training.config import RunConfig, StepLosses

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine back."""

STOPPED = 128 + signal.SIGTERM
"""Exit status of a run that saved and stopped when told to."""


class Stop:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside the block the signals only set a flag, which the loop reads between steps."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Agreement:
    """Whether any process was asked to stop: known to all of them at the same step, one step late,
    so that none waits for the slowest to say so.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.pending: tuple[Tensor, dist.Work] | None = None
        self.stop = False

    def tell(self, asked: bool) -> bool:
        """Say of this step whether to stop; hear what was said of the step before."""
        if self.accelerator.num_processes == 1:
            return asked
        if self.pending is not None:
            vote, work = self.pending
            work.wait()
            self.stop = bool(vote.item())
        vote = torch.tensor(float(asked), device=self.accelerator.device)
        work = dist.all_reduce(vote, async_op=True)
        assert work is not None
        self.pending = vote, work
        return self.stop


FAULT = "fault.json"
"""What stopped a run, in its directory."""


class Unreadable:
    """The list of samples that could not be read, run_dir/unreadable.jsonl, over all processes."""

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        self.path, self.most = config.run_dir / "unreadable.jsonl", config.max_unreadable
        self.accelerator = accelerator
        self.known: set[int] = set()
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
            self.known = {json.loads(line)["sample"] for line in whole}
            if accelerator.is_main_process and whole != lines:
                with staged_file(self.path) as staged:
                    staged.write_text("".join(whole), encoding="utf-8")
        self.told = 0

    def update(self, found: dict[int, str]) -> None:
        """Add what this process has found by now; called by all of them at the same step.

        Raises InputError when there are more than config.max_unreadable.
        """
        news = list(found.items())[self.told :]
        self.told = len(found)
        every = sorted(set(gather_object(news)))
        added = [(sample, reason) for sample, reason in every if sample not in self.known]
        self.known.update(sample for sample, _ in added)
        if added and self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                for sample, reason in added:
                    file.write(json.dumps({"sample": sample, "reason": reason}) + "\n")
        if len(self.known) > self.most:
            raise InputError(
                f"{len(self.known)} samples cannot be read, more than max_unreadable, {self.most}; "
                f"{self.path} lists them. See to the data, or raise max_unreadable."
            )


class NotFiniteError(FloatingPointError):
    """A loss or a gradient was infinite or no number; the step was not taken."""


def report_not_finite(
    config: RunConfig, step: int, taken: Sequence[StepLosses], accelerator: Accelerator
) -> NotFiniteError:
    """Write run_dir/fault.json and make the error to raise; called by every process.

    step: the optimizer step, from 0, that was not taken. taken: this process's micro-batches.
    """
    path = config.run_dir / FAULT
    mine = [
        {
            "process": accelerator.process_index,
            "samples": list(losses.samples),
            "loss": losses.loss.item(),
            "per_sample": [] if losses.per_sample is None else losses.per_sample.tolist(),
        }
        for losses in taken
    ]
    micro_batches = gather_object(mine)
    if accelerator.is_main_process:
        write_json({"step": step, "micro_batches": micro_batches}, path)
    return NotFiniteError(
        f"The loss or its gradient is not finite at step {step}, which was not taken. {path} has "
        "the losses of its samples; the newest checkpoint is from before. Lower the learning rate, "
        "or change the precision or the data that is to blame, and give the same command again."
    )
