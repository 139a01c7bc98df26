"""What the monitor says of a run, against what was fed to it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from latentdiff.errors import InputError
from training import monitor as module
from training.config import RunConfig, StepLosses
from training.flops import FlopMeter
from training.monitor import Monitor, drop_after, duration, peak_memory
from training.optimizers import OptimizerConfig


def config(run_dir: Path, **values: Any) -> RunConfig:
    return RunConfig(
        **{
            "run_dir": run_dir,
            "seed": 0,
            "max_steps": 100,
            "batch_size": 8,
            "checkpoint_every": 10,
            "sample_every": 10,
            "optimizer": OptimizerConfig(learning_rate=0.5),
            **values,
        }
    )


def watch(config: RunConfig, start: int = 0, meter: FlopMeter | None = None) -> Monitor:
    accelerator = Accelerator(cpu=True, log_with=list(config.trackers), project_dir=config.run_dir)
    return Monitor(config, accelerator, start, meter)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(value: float, **figures: float) -> StepLosses:
    return StepLosses(
        torch.tensor(value), {name: torch.tensor(figure) for name, figure in figures.items()}
    )


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(module, "time", self)

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_figures_are_means_over_micro_batches_and_steps(tmp_path: Path) -> None:
    with watch(config(tmp_path)) as monitor:
        monitor.step([losses(1.0, kl=4.0), losses(3.0, kl=6.0)], torch.tensor(2.0), 0.1)
        monitor.step([losses(5.0, kl=1.0), losses(7.0, kl=3.0)], torch.tensor(4.0), 0.2)
        first = monitor.log(2)
        monitor.step([losses(9.0, kl=0.0)], torch.tensor(1.0), 0.3)
        second = monitor.log(3)
    assert (first["loss"], first["kl"], first["grad_norm"]) == (4.0, 3.5, 3.0)
    assert first["learning_rate"] == 0.2
    assert (second["loss"], second["kl"], second["grad_norm"]) == (9.0, 0.0, 1.0)
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [2, 3]
    assert {name: written[0][name] for name in first} == first
    assert (tmp_path / "index.html").is_file()


def test_trackers_are_told_the_same(tmp_path: Path) -> None:
    with watch(config(tmp_path)) as monitor:
        monitor.step([losses(1.5)], None, 0.1)
        monitor.log(1)
        monitor.record(1, {"validation/loss": 0.25})
    monitor.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(1, 0.25)]


@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 9, width=32), st.floats(0, 1, exclude_max=True))),
        min_size=1,
        max_size=4,
    )
)
def test_bands_are_means_of_the_samples_in_each_tenth(batches: list[list[Any]]) -> None:
    monitor = Monitor.__new__(Monitor)
    monitor.band_sums = None
    for batch in batches:
        monitor.bands(
            torch.tensor([loss for loss, _ in batch]),
            torch.tensor([place for _, place in batch], dtype=torch.float64),
        )
    rows = [row for batch in batches for row in batch]
    values, places = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    edges = np.linspace(0, 1, 11)
    counts = np.histogram(places, edges)[0]
    sums = np.histogram(places, edges, weights=values)[0]
    assert monitor.band_sums is not None
    # NumPy's tenths are rounded otherwise than a product with ten: leave out what lies on them.
    if not np.isclose(places[:, None] * 10, np.arange(11), atol=1e-9)[places > 0].any():
        np.testing.assert_array_equal(monitor.band_sums[1], counts)
        np.testing.assert_allclose(monitor.band_sums[0], sums, rtol=1e-5, atol=1e-6)


def test_bands_are_logged_where_there_were_samples(tmp_path: Path) -> None:
    batch = StepLosses(
        torch.tensor(2.0),
        per_sample=torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        position=torch.tensor([0.05, 0.999, 0.95]),
    )
    with watch(config(tmp_path)) as monitor:
        monitor.step([batch, batch], None, 0.1)
        figures = monitor.log(1)
    bands = {name: value for name, value in figures.items() if name.startswith("loss_at/")}
    assert bands == {"loss_at/0.0": 1.0, "loss_at/0.9": 2.5}


def test_processes_are_averaged_and_the_slowest_and_largest_count(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process sends three times each of this one's numbers."""
    batch = StepLosses(
        torch.tensor(1.0), per_sample=torch.tensor([5.0]), position=torch.tensor([0.31])
    )
    with watch(config(tmp_path)) as monitor:
        monkeypatch.setattr(monitor.accelerator, "gather", lambda row: torch.cat([row, 3 * row]))
        monkeypatch.setattr(module, "peak_memory", lambda device: 2.0**30)
        monitor.step([batch], torch.tensor(7.0), 0.1)
        clock.now += 2
        monitor.step([batch], torch.tensor(9.0), 0.1)
        figures = monitor.log(2)
    assert (figures["loss"], figures["grad_norm"]) == (2.0, 16.0)
    assert figures["loss_at/0.3"] == 5.0
    assert figures["peak_memory_gib"] == 3.0
    assert math.isclose(figures["images_per_second"], 8 / 6, rel_tol=1e-5)


def test_speed_leaves_out_the_first_step_and_pauses(tmp_path: Path, clock: Clock) -> None:
    network = nn.Linear(3, 5, bias=False)
    meter = FlopMeter(network)
    meter.watch(network)(torch.zeros(4, 3))
    with watch(config(tmp_path), 20, meter) as monitor:
        monitor.peak = 1e4
        clock.now += 50  # compiling
        monitor.step([losses(1.0)] * 2, None, 0.1)
        for _ in range(3):
            clock.now += 2
            monitor.step([losses(1.0)] * 2, None, 0.1)
        with monitor.pause():
            clock.now += 30
            with monitor.pause():
                clock.now += 5
        figures = monitor.log(24)
        assert math.isclose(figures["images_per_second"], 3 * 8 / 6, rel_tol=1e-5)
        flops = 3 * 2 * (2 * 2 * 4 * 3 * 5)
        assert math.isclose(figures["mfu"], flops / 6 / 1e4, rel_tol=1e-5)
        # 35 of 41 seconds were spent in pauses; they will come again: 76 steps at 41 / 3 seconds.
        assert monitor._summary(figures).endswith(f"ETA {duration(76 * 41 / 3)}")
        clock.now += 4
        monitor.step([losses(1.0)], None, 0.1)
        assert math.isclose(monitor.log(25)["images_per_second"], 2.0, rel_tol=1e-5)


def test_a_log_after_the_first_step_knows_no_speed(tmp_path: Path) -> None:
    with watch(config(tmp_path)) as monitor:
        monitor.step([losses(1.0)], None, 0.1)
        assert "images_per_second" not in monitor.log(1)


def test_waiting_for_data_is_a_share_of_the_time(tmp_path: Path, clock: Clock) -> None:
    def batches() -> Any:
        for seconds in (7, 1, 0):
            clock.now += seconds
            yield seconds

    with watch(config(tmp_path)) as monitor:
        seen = []
        for batch in monitor.timed(batches()):
            seen.append(batch)
            clock.now += 2
            monitor.step([losses(1.0)], None, 0.1)
        assert seen == [7, 1, 0]
        assert math.isclose(monitor.log(3)["data_wait"], 1 / 5, rel_tol=1e-5)


# Resuming


def test_what_is_done_again_is_written_once(tmp_path: Path) -> None:
    for start, end in ((0, 7), (4, 9), (9, 10)):
        with watch(config(tmp_path), start) as monitor:
            for step in range(start, end):
                monitor.step([losses(float(100 * start + step))], None, 0.1)
                monitor.log(step + 1)
        monitor.accelerator.end_training()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        *((step + 1, step) for step in range(4)),
        *((step + 1, 400 + step) for step in range(4, 9)),
        (10, 909),
    ]
    logged = {}
    for file in sorted((tmp_path / "logs").glob("*"), key=lambda file: file.stat().st_mtime_ns):
        events = EventAccumulator(str(file))  # alone: as a directory they are read by their names
        events.Reload()
        logged.update({event.step: event.value for event in events.Scalars("loss")})
    assert logged == {line["step"]: line["loss"] for line in lines(tmp_path)}


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = '{"step": 1}\n{"step": 3}\n{"step": 2}\n'
    file.write_text(whole + '[]\n{"step": "2"}\n{"step": 2')
    drop_after(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [file]
    drop_after(tmp_path / "absent", 2)


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    with watch(config(tmp_path)) as monitor:
        monitor.step([losses(float("nan"), kl=float("inf"))], None, 0.1)
        monitor.log(1)
    assert (lines(tmp_path)[0]["loss"], lines(tmp_path)[0]["kl"]) == (None, None)


def test_the_page_is_written_when_the_steps_raise(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), watch(config(tmp_path)):
        raise ZeroDivisionError
    assert (tmp_path / "index.html").is_file()


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tracker comet_ml is not installed"):
        watch(config(tmp_path, trackers=("tensorboard", "comet_ml")))
    with watch(config(tmp_path / "none", trackers=())) as monitor:
        monitor.step([losses(1.0)], None, 0.1)
        monitor.log(1)
    assert not (tmp_path / "none" / "logs").exists()


# Small things


def test_memory_is_of_this_process() -> None:
    before = peak_memory(torch.device("cpu"))
    grown: Tensor = torch.ones(int(before / 8) + 2**25)
    assert peak_memory(torch.device("cpu")) - before > grown.nbytes / 4
    assert peak_memory(torch.device("cpu")) < 2**40


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (42, "42 s"), (130, "2 min 10 s"), (7500, "2 h 5 min"), (273600, "3 d 4 h")],
)
def test_durations_have_two_units(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
