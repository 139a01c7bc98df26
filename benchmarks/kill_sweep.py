"""Kill a training run with SIGKILL at random moments and at every file-system step of a save.

    python -m benchmarks.kill_sweep --kills 200

A small convolution trains with accumulated gradients across the ends of epochs and saves every
second step. After each kill the same command carries on; counted are kills after which it could
not, checkpoints that were begun and lost, and runs that do not end in the bytes of a run that
nobody disturbed. Exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import importlib
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from latentdiff.data.order import Plan, Share
from latentdiff.rng import keyed_normal
from training import checkpoints, loop
from training.config import RunConfig, StepLosses, seeded
from training.optimizers import OptimizerConfig
from training.parallel import Wrapped

STEPS, EVERY, KEPT = 13, 2, 2
SAMPLES, BATCH, MICRO_BATCH = 26, 4, 2  # 6 steps an epoch
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}


class Progress:
    """Steps taken by the process that was killed, in memory that outlives it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8)

    def set(self, steps: int) -> None:
        self.memory[:] = struct.pack("q", steps)

    def get(self) -> int:
        return int(struct.unpack("q", self.memory[:])[0])


class Halving:
    """A convolution learns to halve noise, which is keyed by epoch and sample."""

    def __init__(self, config: RunConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.inputs, self.unreadable = {"noise": "keyed"}, dict[int, str]()
        with seeded(config.seed):
            self.network = nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)
            )
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.plan = Plan(config.seed, [SAMPLES], config.batch_size)

    def batches(self, steps: range, share: Share) -> Generator[list[Any], None, None]:
        for step in steps:
            self.progress.set(step)
            batch = self.plan.batch(step)
            yield [(batch.epoch, samples) for samples in share.split(batch.samples)]

    def losses(self, forward: Callable[..., Any], batch: Any, device: torch.device) -> StepLosses:
        epoch, samples = batch
        noise = keyed_normal(self.config.seed, "noise", epoch, samples, (2, 8, 8))
        return StepLosses((forward(noise) - noise / 2).square().mean())

    def validation(self, forward: Callable[..., Any], device: torch.device, share: Share) -> None:
        return None

    def evaluate(self, done: int, wrapped: Wrapped) -> dict[str, float]:
        return {}

    def samples(self, device: torch.device) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def finish(self, directory: Path, device: torch.device) -> None:
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(weights, directory / "network.safetensors")
        (directory / "model_index.json").write_text("{}")


class Fatal:
    """Kills its own process at file-system step `number` of saving checkpoints and pruning them."""

    def __init__(self, number: int) -> None:
        self.left, self.inside = number, False
        for owner, name, wrap in (
            (os, "fsync", self.counted),
            (checkpoints, "save_file", self.counted),
            (checkpoints.Checkpointer, "_no_room", self.watched),
        ):
            mock.patch.object(owner, name, wrap(getattr(owner, name))).start()
        sys.addaudithook(self.hook)

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            self.count()
            return real(*arguments)

        return operation

    def watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """What is called in the thread that trains, and counts all the same."""

        def operation(*arguments: Any) -> Any:
            self.inside = True
            try:
                return real(*arguments)
            finally:
                self.inside = False

        return operation

    def hook(self, event: str, arguments: object) -> None:
        if event in OPERATIONS:
            self.count()

    def count(self) -> None:
        if self.inside or threading.current_thread().name.startswith("checkpoint-"):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


class Sweep:
    """A directory of runs, and what became of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.progress = root, Progress()
        self.kills = self.unresumable = self.unequal = self.runs = 0
        self.lost_steps, self.lost_checkpoints = 0, 0

    def start(self, run_dir: Path, steps: int = STEPS, fatal: int | None = None) -> int:
        """The command of a run in a process of its own; the process's id."""
        sys.stdout.flush()
        if child := os.fork():
            return child
        try:
            log = os.open(run_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if fatal is not None:
                Fatal(fatal)
            config = RunConfig(
                run_dir=run_dir,
                seed=3,
                max_steps=steps,
                batch_size=BATCH,
                micro_batch_size=MICRO_BATCH,
                checkpoint_every=EVERY,
                checkpoints_kept=KEPT,
                sample_every=100,
                log_every=5,
                trackers=(),
                ema_decays=(0.9, 0.5),
                optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.1, warmup_steps=2),
            )
            loop.train(Halving(config, self.progress), config, loop.make_accelerator(config))
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)

    def finished(self, child: int) -> bool:
        """Wait for a process; whether it came to its end. Raises when it failed by itself."""
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (0, -signal.SIGKILL):
            self.unresumable += 1
        return status != -signal.SIGKILL

    def killed(self, run_dir: Path) -> None:
        """Count what a kill has cost."""
        self.kills += 1
        whole = checkpoints.complete(run_dir / "checkpoints")
        newest = int(whole[-1].name.removeprefix("step-")) if whole else 0
        steps = self.progress.get()
        self.lost_steps = max(self.lost_steps, steps - newest)
        self.lost_checkpoints = max(self.lost_checkpoints, (steps // EVERY) - -(-newest // EVERY))

    def check(self, run_dir: Path) -> None:
        """Whether a run ended as the undisturbed one did; then it is removed."""
        self.runs += 1
        if contents(run_dir) != self.expected:
            self.unequal += 1
            print(f"{run_dir} ended otherwise: {sorted(contents(run_dir))}")
            return
        shutil.rmtree(run_dir)

    def undisturbed(self) -> float:
        """Seconds that a run takes which nobody kills."""
        run_dir = self.root / "undisturbed"
        run_dir.mkdir(parents=True)
        began = time.perf_counter()
        if not self.finished(self.start(run_dir)) or self.unresumable:
            raise RuntimeError(run_dir.with_suffix(".log").read_text()[-4000:])
        self.expected = contents(run_dir)
        return time.perf_counter() - began

    def at_random(self, kills: int, seconds: float) -> None:
        """Kills at random moments of lives of one run after another."""
        draw, end = random.Random(0), self.kills + kills
        while self.kills < end:
            run_dir = self.root / f"random-{self.runs}"
            run_dir.mkdir()
            ended = False
            while not ended:
                self.progress.set(self.newest(run_dir))
                child = self.start(run_dir)
                if self.kills < end:
                    time.sleep(draw.uniform(0, seconds))
                    os.kill(child, signal.SIGKILL)
                if not (ended := self.finished(child)):
                    self.killed(run_dir)
            self.check(run_dir)

    @staticmethod
    def newest(run_dir: Path) -> int:
        whole = checkpoints.complete(run_dir / "checkpoints")
        return int(whole[-1].name.removeprefix("step-")) if whole else 0

    def at_each_step(self, name: str, before: int, litter: bool, stride: int) -> int:
        """A kill at every `stride`-th file-system step of the next save; how many steps it has.

        before: steps taken before, with their checkpoints. litter: what an earlier kill leaves, a
        staged directory and one that is half removed, lies there.
        """
        start = self.root / f"{name}-start"
        start.mkdir()
        if before:
            self.finished(self.start(start, steps=before))
            shutil.rmtree(start / "model")
        if litter:
            for folder in (".staged-killed", f"step-{before + EVERY:06d}"):
                (start / "checkpoints" / folder).mkdir(parents=True)
                (start / "checkpoints" / folder / checkpoints.NETWORK).write_bytes(b"half")
        fatal = 0
        while True:
            run_dir = self.root / f"{name}-{fatal}"
            shutil.copytree(start, run_dir)
            self.progress.set(before)
            # To the end of this one save, and of the one of its own at its last step.
            if self.finished(self.start(run_dir, before + EVERY, fatal)):
                shutil.rmtree(run_dir)
                return fatal
            self.killed(run_dir)
            self.finished(self.start(run_dir))
            self.check(run_dir)
            fatal += stride


def contents(run_dir: Path) -> dict[str, bytes]:
    """The files of the last checkpoint and of the finished model."""
    last = run_dir / "checkpoints" / f"step-{STEPS:06d}"
    files = [path for path in (*last.glob("*"), *(run_dir / "model").glob("*")) if path.is_file()]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Case:
    """A state of the disk in which a save begins."""

    name: str
    before: int
    litter: bool


CASES = (
    Case("the first save", 0, False),
    Case("a save that prunes", 4, False),
    Case("a save after a kill", 4, True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in all, at least")
    parser.add_argument("--stride", type=int, default=1, help="of the file-system steps, every")
    options = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # seconds, which every process would take anew
    with tempfile.TemporaryDirectory() as root:
        sweep = Sweep(Path(root))
        seconds = sweep.undisturbed()
        for case in CASES:
            name = case.name.replace(" ", "-")
            steps = sweep.at_each_step(name, case.before, case.litter, options.stride)
            print(
                f"{case.name}: killed at {len(range(0, steps, options.stride))} steps", flush=True
            )
        chance = max(0, options.kills - sweep.kills)
        sweep.at_random(chance, seconds)
        print(f"at random moments: killed {chance} times")
    print(
        f"{sweep.kills} kills, {sweep.runs} runs: unresumable {sweep.unresumable}, "
        f"other ends {sweep.unequal}, checkpoints lost at most {sweep.lost_checkpoints}, "
        f"steps lost at most {sweep.lost_steps} (one checkpoint every {EVERY})"
    )
    return int(bool(sweep.unresumable or sweep.unequal or sweep.lost_checkpoints > 1))


if __name__ == "__main__":
    sys.exit(main())
