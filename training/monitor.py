"""What is seen of a run while it goes: the bar, metrics.jsonl, trackers and the page."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.errors import InputError
from latentdiff.model_files import staged_file
from training.config import DTYPES, RunConfig, StepLosses
from training.flops import FlopMeter, peak_flops
from training.parallel import agreed
from training.report import METRICS, write_report

BANDS = 10
"""Parts of the noise schedule whose losses are told apart, of equal numbers of timesteps."""

REPORT_SHARE = 0.01
"""The page is written as often as costs at most this share of the time."""

T = TypeVar("T")


class Monitor:
    """Figures of a run, means over the steps between two lines of the log.

    Used as a context around the steps. Every process calls step and log alike; the main one shows
    and writes. Nothing is read from a GPU between two logs.

    start_step: steps that the run has taken already; what metrics.jsonl says of later ones is
        dropped, for they are taken again.
    meter: what the network's calls need, for the model FLOPs utilization (MFU) of Chowdhery et al.
        (2022), appendix B.
    Raises InputError when a tracker's package is not installed.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        start_step: int,
        meter: FlopMeter | None = None,
    ) -> None:
        self.config, self.accelerator, self.meter = config, accelerator, meter
        self.is_main = accelerator.is_main_process
        self.done = start_step
        self.metrics = config.run_dir / METRICS
        given = {str(tracker) for tracker in accelerator.log_with}
        if absent := [name for name in config.trackers if name not in given]:
            raise InputError(
                f"The package of the tracker {absent[0]} is not installed; install it, or leave "
                "the name out of trackers."
            )
        self.peak: float | None = None
        if meter is not None:
            self.peak = peak_flops(accelerator.device, DTYPES[config.mixed_precision])
        self.began: float | None = None
        self.in_pause = False
        self.page_seconds, self.page_written = 0.0, -math.inf
        self._open_window()

    def __enter__(self) -> Monitor:
        if self.is_main:
            self.config.run_dir.mkdir(parents=True, exist_ok=True)
            drop_after(self.metrics, self.done)
        # TensorBoard hides what an earlier start wrote of the steps that are taken again.
        self.accelerator.init_trackers(
            "logs", init_kwargs={"tensorboard": {"purge_step": self.done + 1}}
        )
        self.bar = tqdm(
            total=self.config.max_steps,
            initial=self.done,
            disable=not self.is_main,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps{postfix}",
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.is_main:
            try:
                write_report(self.config.run_dir)
            except OSError:
                if error is None:
                    raise

    def _open_window(self) -> None:
        self.figures: dict[str, Tensor] = {}
        self.band_sums: Tensor | None = None
        self.steps = self.timed_steps = self.timed_calls = 0
        self.opened, self.paused, self.waited = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside the block is not training: it counts for the ETA, not for the speed."""
        if self.in_pause:
            yield
            return
        start, self.in_pause = time.perf_counter(), True
        try:
            yield
        finally:
            self.paused += time.perf_counter() - start
            self.in_pause = False

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; how long the loop waits for each is figure data_wait."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def step(self, taken: Sequence[StepLosses], norm: Tensor | None, rate: float) -> None:
        """One optimizer step: its micro-batches, the gradient's norm before clipping, its rate."""
        for losses in taken:
            self._add("loss", losses.loss / len(taken))
            for name, value in losses.figures.items():
                self._add(name, value / len(taken))
            if losses.per_sample is not None and losses.position is not None:
                self.bands(losses.per_sample, losses.position)
        if norm is not None:
            self._add("grad_norm", norm)
        self.rate = rate
        self.done += 1
        self.steps += 1
        self.bar.update()
        if self.began is None:  # the first step compiles and reads ahead; time starts after it
            self.began, self.began_step = time.perf_counter(), self.done
            self.opened, self.paused, self.waited = self.began, 0.0, 0.0
        else:
            self.timed_steps += 1
            self.timed_calls += len(taken)

    def bands(self, loss: Tensor, position: Tensor) -> None:
        """Losses [B] of samples at position [B] in [0, 1) of the noise schedule, 0 the cleanest."""
        band = (position.to(loss.device) * BANDS).long().clamp(0, BANDS - 1)
        member = band == torch.arange(BANDS, device=loss.device)[:, None]
        values = torch.where(member, loss.detach().float(), 0.0).sum(dim=1)
        sums = torch.stack([values, member.sum(dim=1)])
        self.band_sums = sums if self.band_sums is None else self.band_sums + sums

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self.figures[name] = self.figures[name] + value if name in self.figures else value

    def log(self, done: int) -> dict[str, float]:
        """Close the window: gather its figures from every process, show and write them."""
        figures = self._gathered()
        figures["learning_rate"] = self.rate
        self._open_window()
        self.bar.set_postfix_str(self._summary(figures), refresh=False)
        self.record(done, figures)
        return figures

    def record(self, done: int, figures: dict[str, float]) -> None:
        """Write figures, the same on every process, for the first `done` steps."""
        if not figures:
            return
        self.accelerator.log(figures, step=done)
        if not self.is_main:
            return
        line = {"step": done, "time": round(time.time(), 1)} | {
            name: value if math.isfinite(value) else None for name, value in figures.items()
        }
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        start = time.perf_counter()
        if self.page_seconds <= REPORT_SHARE * (start - self.page_written):
            with self.pause():
                write_report(self.config.run_dir)
            self.page_written = time.perf_counter()
            self.page_seconds = self.page_written - start

    def has(self, done: int, group: str) -> bool:
        """Whether figures called group/... were written for the first `done` steps."""
        found = False
        if self.is_main and self.metrics.exists():
            with self.metrics.open("rb") as lines:
                name = f'"{group}/'.encode()
                found = any(name in line and _step(line) == done for line in lines)
        return agreed(self.accelerator, found)

    def _gathered(self) -> dict[str, float]:
        """All figures of the window, by one collective; the device's work is done when it is."""
        device, names = self.accelerator.device, list(self.figures)
        bands = torch.zeros(2, 0) if self.band_sums is None else self.band_sums
        values = [*self.figures.values(), *bands.flatten()]
        shown = torch.tensor([float(value) for value in values])
        seconds = time.perf_counter() - self.opened - self.paused
        own = torch.tensor([seconds, self.waited, peak_memory(device)])
        rows = self.accelerator.gather(torch.cat([shown, own])[None].to(device)).cpu().double()

        means = rows[:, : len(names)].mean(dim=0) / self.steps
        figures = dict(zip(names, means.tolist(), strict=True))
        sums, counts = rows[:, len(names) : -3].sum(dim=0).reshape(2, -1).tolist()
        for band, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                figures[f"loss_at/{band / BANDS:.1f}"] = total / count
        slowest, memory = rows[:, [-3, -1]].amax(dim=0).tolist()
        speed = self._speed(slowest, float(rows[:, -2].mean()))
        return figures | speed | {"peak_memory_gib": memory / 2**30}

    def _speed(self, seconds: float, waited: float) -> dict[str, float]:
        """images_per_second, data_wait (share of the time) and mfu of the window's timed steps."""
        if not self.timed_steps:
            return {}
        speed = {
            "images_per_second": self.timed_steps * self.config.batch_size / seconds,
            "data_wait": waited / seconds,
        }
        if self.meter is not None and self.meter.flops is not None and self.peak is not None:
            speed["mfu"] = self.timed_calls * self.meter.flops / seconds / self.peak
        return speed

    def _summary(self, figures: dict[str, float]) -> str:
        words = [f"loss {figures['loss']:.4f}"] if "loss" in figures else []
        if "images_per_second" in figures:
            words.append(f"{figures['images_per_second']:.3g} images/s")
        if "mfu" in figures:
            words.append(f"MFU {figures['mfu']:.0%}")
        words.append(f"{figures['peak_memory_gib']:.1f} GiB")
        if self.began is not None and self.done > self.began_step:
            pace = (time.perf_counter() - self.began) / (self.done - self.began_step)
            words.append(f"ETA {duration(pace * (self.config.max_steps - self.done))}")
        return " · ".join(words)


def peak_memory(device: torch.device) -> float:
    """Bytes of the GPU that tensors took at most so far; on a CPU, of this process's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def duration(seconds: float) -> str:
    """Two units of it: 3 d 4 h, 2 h 5 min, 7 min 10 s, 42 s."""
    left = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    words: list[str] = []
    for unit, length in units:
        count, left = divmod(left, length)
        if count or words or unit == "s":
            words.append(f"{count} {unit}")
    return " ".join(words[:2])


def drop_after(metrics: Path, step: int) -> None:
    """Leave in a metrics file only whole lines of the first `step` steps."""
    if not metrics.exists():
        return
    with metrics.open("rb") as lines, staged_file(metrics) as staged, staged.open("wb") as kept:
        kept.writelines(line for line in lines if _step(line) <= step)


def _step(line: bytes) -> float:
    """The step of a line; infinite where a kill has left half of one."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
        return step if isinstance(step, int) else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
