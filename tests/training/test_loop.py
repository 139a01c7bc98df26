"""The loop: its learning rate, its arithmetic, and a run that does not care where it stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from latentdiff.config import load_config, load_yaml, save_yaml
from latentdiff.data.order import Plan, Share
from latentdiff.errors import InputError
from latentdiff.rng import keyed_normal
from training import alone, checkpoints, loop
from training.checkpoints import DiskError
from training.config import RunConfig, StepLosses, seeded
from training.data import planned_orders
from training.faults import STOPPED, NotFiniteError
from training.loop import check_compiler, make_accelerator
from training.optimizers import OptimizerConfig
from training.parallel import Wrapped

STEPS = 12


def config(run_dir: Path, **values: Any) -> RunConfig:
    return RunConfig(
        **{
            "run_dir": run_dir,
            "seed": 3,
            "max_steps": STEPS,
            "batch_size": 6,
            "checkpoint_every": 2,
            "sample_every": 4,
            "log_every": 3,
            "ema_decays": (0.7, 0.9),
            "optimizer": OptimizerConfig(
                learning_rate=0.01,
                weight_decay=0.1,
                warmup_steps=2,
                cooldown_steps=4,
                max_grad_norm=0.5,
            ),
            **values,
        }
    )


class Denoising:
    """A small convolution learns to divide noise by two: noise keyed by sample, channels last."""

    def __init__(self, config: RunConfig, width: int = 5) -> None:
        self.config, self.finished = config, 0
        self.inputs = {"noise": "a", "text encoder": "b"}
        self.unreadable: dict[int, str] = {}
        with seeded(config.seed):
            self.network = nn.Sequential(
                nn.Conv2d(2, width, 3, padding=1), nn.GroupNorm(1, width), nn.Conv2d(width, 2, 1)
            )
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batches(self, steps: range, share: Share) -> Iterator[list[Tensor]]:
        plan = Plan(self.config.seed, [20, 9], self.config.batch_size)  # 3 + 1 batches an epoch
        for epoch, micro_batches in planned_orders(steps, plan, share):
            yield [self.batch(epoch, samples) for samples in micro_batches]

    def batch(self, epoch: int, samples: list[int]) -> Tensor:
        return keyed_normal(self.config.seed, "noise", epoch, samples, (2, 8, 8))

    def losses(
        self, forward: Callable[..., Any], batch: Tensor, device: torch.device
    ) -> StepLosses:
        batch = batch.contiguous(memory_format=torch.channels_last)
        loss = (forward(batch) - batch / 2).square().mean(dim=(1, 2, 3))
        position = torch.linspace(0, 0.99, len(batch))
        twice = {"twice": 2 * loss.mean().detach()}
        return StepLosses(loss.mean(), twice, loss.detach(), position, range(len(batch)))

    def validation(
        self, forward: Callable[..., Any], device: torch.device, share: Share
    ) -> tuple[float, int] | None:
        losses = self.losses(forward, self.batch(0, [-1, -2, -3]), device)
        return 3 * float(losses.loss), 3

    def evaluate(self, done: int, wrapped: Wrapped) -> dict[str, float]:
        assert not self.network.training
        return {"evaluation/weight": float(self.network[0].get_parameter("weight").mean())}

    def samples(self, device: torch.device) -> Image.Image:
        assert not self.network.training
        return Image.new("RGB", (4, 4))

    def finish(self, directory: Path, device: torch.device) -> None:
        self.finished += 1
        save_file(self.weights(), directory / "network.safetensors")

    def weights(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in self.network.state_dict().items()}


def train(program: Any) -> Any:
    loop.train(program, program.config, make_accelerator(program.config))
    return program


def last(run_dir: Path) -> Path:
    """The run's newest checkpoint."""
    return max((run_dir / "checkpoints").iterdir())


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


# The arithmetic


def test_the_loop_is_adamw_with_clipped_gradients(tmp_path: Path) -> None:
    """Against Loshchilov & Hutter (2019), algorithm 2, written out."""
    program = Denoising(config(tmp_path))
    network = Denoising(config(tmp_path)).network.to(torch.float64)
    moments = {name: (0.0, 0.0) for name, _ in network.named_parameters()}
    average = {name: value.detach().clone() for name, value in network.named_parameters()}
    for step, (batch,) in enumerate(program.batches(range(STEPS), Share(0, 1))):
        loss = program.losses(network, batch.double(), torch.device("cpu")).loss
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        scale = min(1.0, 0.5 / norm)
        rate = 0.01 * min(1.0, (step + 1) / 2, (STEPS - step) / 4)
        decay = min(0.7, (2 + step) / (11 + step))
        for (name, value), gradient in zip(network.named_parameters(), gradients, strict=True):
            g = gradient * scale
            m, v = moments[name]
            m, v = moments[name] = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.99 ** (step + 1))
            with torch.no_grad():
                if value.ndim > 1:
                    value *= 1 - rate * 0.1
                value -= rate * m_hat / (v_hat.sqrt() + 1e-8)
                average[name] = decay * average[name] + (1 - decay) * value
    train(program)
    close = {"atol": 2e-5, "rtol": 1e-4}
    for name, value in program.network.named_parameters():
        torch.testing.assert_close(value.double(), dict(network.named_parameters())[name], **close)
    model = load_file(tmp_path / "model" / "network.safetensors")
    for name, value in model.items():
        torch.testing.assert_close(value.double(), average[name], **close)


def test_seeded_weights_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    with seeded(1):
        first = torch.randn(3)
    with seeded(2):
        second = torch.randn(3)
    with seeded(1):
        assert torch.randn(3).equal(first)
    assert not first.equal(second)
    assert torch.get_rng_state().equal(state)


# The same run again


def test_the_same_config_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        torch.manual_seed(hash(name) % 1000)
        train(Denoising(config(tmp_path / name)))
    assert contents(last(tmp_path / "a")) == contents(last(tmp_path / "b"))
    assert last(tmp_path / "a").name == f"step-{STEPS:06d}"
    assert contents(tmp_path / "a" / "model") == contents(tmp_path / "b" / "model")

    train(Denoising(config(tmp_path / "c", seed=4)))
    others = contents(last(tmp_path / "c"))
    for name in ("network.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert others[name] != contents(last(tmp_path / "a"))[name]


class Killed(BaseException):
    """The process ends here."""


class Mortal(Denoising):
    """Ends with the batch of step `fatal`."""

    def __init__(self, config: RunConfig, fatal: int) -> None:
        super().__init__(config)
        self.fatal = fatal

    def batches(self, steps: range, share: Share) -> Iterator[list[Tensor]]:
        batches = super().batches(steps, share)
        yield from itertools.islice(batches, max(0, self.fatal - steps.start))
        raise Killed


@pytest.mark.parametrize("stops", [*((k,) for k in range(1, STEPS)), (3, 4, 8), (5, 5, 5)], ids=str)
def test_stopped_and_resumed_it_is_the_same_run_bit_for_bit(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """With accumulation, across the ends of epochs, at every step and more than once."""
    options = {"micro_batch_size": 2, "checkpoint_every": 1}
    whole = train(Denoising(config(tmp_path / "whole", **options)))
    for stop in stops:
        with pytest.raises(Killed):
            train(Mortal(config(tmp_path / "parts", **options), stop))
        assert not (tmp_path / "parts" / "model").exists()
        assert last(tmp_path / "parts").name == f"step-{stop:06d}"
    parts = train(Denoising(config(tmp_path / "parts", **options)))
    for name, value in whole.weights().items():
        assert value.equal(parts.weights()[name])
    assert contents(last(tmp_path / "parts")) == contents(last(tmp_path / "whole"))
    assert contents(tmp_path / "parts" / "model") == contents(tmp_path / "whole" / "model")


class Told(Denoising):
    """Is told to stop by the batch system while step `fatal` is taken."""

    fatal = 5

    def batches(self, steps: range, share: Share) -> Iterator[list[Tensor]]:
        for step, micro_batches in zip(steps, super().batches(steps, share), strict=True):
            if step == self.fatal:
                os.kill(os.getpid(), signal.SIGTERM)
            yield micro_batches


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    whole = train(Denoising(config(tmp_path / "whole", checkpoint_every=100)))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(Told(config(tmp_path / "parts", checkpoint_every=100)))
    assert stopped.value.code == STOPPED == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert last(tmp_path / "parts").name == "step-000006"
    assert not (tmp_path / "parts" / "model").exists()
    parts = train(Denoising(config(tmp_path / "parts", checkpoint_every=100)))
    assert contents(last(tmp_path / "parts")) == contents(last(tmp_path / "whole"))
    assert whole.finished == parts.finished == 1


class Patient(Denoising):
    """No faster than its disk, so that what a write came to is known at the next step."""

    steps = 0

    def losses(
        self, forward: Callable[..., Any], batch: Tensor, device: torch.device
    ) -> StepLosses:
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint-"):
                thread.join()
        self.steps += len(batch) == self.config.batch_size  # else it is the validation's
        return super().losses(forward, batch, device)


def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the next checkpoint: two intervals would be lost."""
    real = checkpoints.sync

    def full(path: Path) -> None:
        if path.suffix == ".safetensors" and checkpoints.complete(path.parents[1]):
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(checkpoints, "sync", full)
    program = Patient(config(tmp_path, checkpoint_every=4))
    with pytest.raises(DiskError, match=r"step 8 could not .*No space left.* step-000004 is whole"):
        train(program)
    assert program.steps == 9
    monkeypatch.undo()
    train(Denoising(config(tmp_path, checkpoint_every=4)))
    assert last(tmp_path).name == f"step-{STEPS:06d}"


class Measured(Denoising):
    """Is killed in the evaluation after `fatal` steps."""

    def __init__(self, config: RunConfig, fatal: int | None = None) -> None:
        super().__init__(config)
        self.fatal, self.measured = fatal, list[int]()

    def evaluate(self, done: int, wrapped: Wrapped) -> dict[str, float]:
        if done == self.fatal:
            raise Killed
        self.measured.append(done)
        return super().evaluate(done, wrapped)


@pytest.mark.parametrize("fatal", [4, STEPS])
def test_an_evaluation_that_was_killed_is_done_after_all(tmp_path: Path, fatal: int) -> None:
    """Though the checkpoint of its step was written before it; and none is done twice."""
    options = config(tmp_path / "parts", evaluate_every=4)
    with pytest.raises(Killed):
        train(Measured(options, fatal))
    assert last(tmp_path / "parts").name == f"step-{fatal:06d}"
    assert train(Measured(options)).measured == [*range(fatal, STEPS + 1, 4)]
    train(Denoising(config(tmp_path / "whole", evaluate_every=4)))
    figure = "evaluation/weight"
    parts, whole = (
        [(row["step"], row[figure]) for row in metrics(tmp_path / name) if figure in row]
        for name in ("parts", "whole")
    )
    assert parts == whole
    assert [step for step, _ in whole] == [4, 8, 12]
    further = config(tmp_path / "parts", evaluate_every=4, max_steps=14)
    assert train(Measured(further)).measured == [14]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole = train(Denoising(config(tmp_path / "whole")))
    pieces = train(Denoising(config(tmp_path / "pieces", micro_batch_size=2)))
    for name, value in whole.weights().items():
        torch.testing.assert_close(value, pieces.weights()[name], atol=1e-5, rtol=1e-4)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    assert train(Denoising(config(tmp_path))).finished == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(Mortal(config(tmp_path), 0)).finished == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_two_runs_in_one_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "PATIENCE", 0.1)
    with alone.alone_in(tmp_path), pytest.raises(InputError, match=r"Another process works in"):
        train(Denoising(config(tmp_path)))
    assert not os.listdir(tmp_path)
    assert train(Denoising(config(tmp_path))).finished == 1


def test_only_the_model_is_made_again_when_only_it_is_missing(tmp_path: Path) -> None:
    train(Denoising(config(tmp_path)))
    model = contents(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "moved")
    assert train(Denoising(config(tmp_path))).finished == 1
    assert contents(tmp_path / "model") == model


def test_more_steps_continue_a_finished_run(tmp_path: Path) -> None:
    train(Denoising(config(tmp_path)))
    assert train(Denoising(config(tmp_path, max_steps=STEPS + 2))).finished == 1
    assert last(tmp_path).name == f"step-{STEPS + 2:06d}"


# What is refused


def test_no_mixed_precision_can_be_said_as_the_help_says_it(tmp_path: Path) -> None:
    """YAML reads a bare no as false."""
    file = tmp_path / "run.yaml"
    save_yaml(config(tmp_path, mixed_precision="bf16"), file)
    for value in ("no", "bf16"):
        assert load_config(
            RunConfig, ["--config", str(file), "--mixed_precision", value]
        ) == config(tmp_path, mixed_precision=value)
    with pytest.raises(InputError, match="mixed_precision: Input should be 'no', 'bf16' or 'fp16'"):
        load_config(RunConfig, ["--config", str(file), "--mixed_precision", "yes"])


def test_a_network_of_another_shape_is_refused(tmp_path: Path) -> None:
    train(Denoising(config(tmp_path)))
    before = contents(last(tmp_path))
    with pytest.raises(InputError, match="another shape; choose another run_dir"):
        train(Denoising(config(tmp_path), width=6))
    assert contents(last(tmp_path)) == before


def test_what_it_learns_from_may_not_change_under_a_run(tmp_path: Path) -> None:
    train(Denoising(config(tmp_path)))
    before = contents(last(tmp_path))
    changed = Denoising(config(tmp_path, max_steps=STEPS + 2))
    changed.inputs = changed.inputs | {"text encoder": "c"}
    with pytest.raises(InputError, match="learned from another text encoder; restore"):
        train(changed)
    assert contents(last(tmp_path)) == before


@pytest.mark.parametrize("changes", [{"seed": 8}, {"batch_size": 8}])
def test_another_order_of_samples_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    train(Denoising(config(tmp_path)))
    before = contents(last(tmp_path))
    with pytest.raises(InputError, match="another seed or batch_size"):
        train(Denoising(config(tmp_path, max_steps=STEPS + 2, **changes)))
    assert contents(last(tmp_path)) == before


class Exploding(Denoising):
    """Its loss, or only its gradient, is not finite from step 7 on."""

    def __init__(self, config: RunConfig, factor: float) -> None:
        super().__init__(config)
        self.factor, self.calls = factor, itertools.count()

    def losses(
        self, forward: Callable[..., Any], batch: Tensor, device: torch.device
    ) -> StepLosses:
        losses = super().losses(forward, batch, device)
        if torch.is_grad_enabled() and next(self.calls) >= 7:
            zero = losses.loss - losses.loss.detach()
            losses = dataclasses.replace(losses, loss=losses.loss + self.factor * zero)
        return losses


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize(("log_every", "every"), [(3, 2), (2, 3), (100, 4)])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(
    tmp_path: Path, factor: float, log_every: int, every: int
) -> None:
    options = config(tmp_path, log_every=log_every, checkpoint_every=every)
    program = Exploding(options, factor)
    with pytest.raises(NotFiniteError, match=r"not finite at step 7.*Lower the learning rate"):
        train(program)
    assert not (tmp_path / "model").exists()
    fault = json.loads((tmp_path / "fault.json").read_text())
    assert fault["step"] == 7
    assert fault["micro_batches"][0]["samples"] == [0, 1, 2, 3, 4, 5]
    assert len(fault["micro_batches"][0]["per_sample"]) == 6
    for name, value in program.network.named_parameters():
        assert value.isfinite().all(), name  # the step was not taken
    assert last(tmp_path).name == f"step-{7 // every * every:06d}"
    for name in ("network.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert all(value.isfinite().all() for value in load_file(last(tmp_path) / name).values())
    assert train(Denoising(options)).finished == 1


def test_gradients_that_are_lost_stop_the_run_before_it_is_saved(tmp_path: Path) -> None:
    program = Denoising(config(tmp_path))
    for value in program.network[:2].parameters():
        value.register_hook(torch.zeros_like)
    with pytest.raises(InputError, match=r"reaches 4 of 6 trained tensors, 0\.weight among"):
        train(program)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"no C\+\+ compiler 'no-such-compiler'"):
        train(Denoising(config(tmp_path / "run", compile=True)))
    assert not (tmp_path / "run").exists()
    check_compiler(config(tmp_path), torch.device("cpu"))
    check_compiler(config(tmp_path, compile=True), torch.device("cuda"))


# What a run leaves


def test_a_run_leaves_its_config_logs_samples_checkpoints_and_model(tmp_path: Path) -> None:
    options = config(tmp_path, evaluate_every=6)
    train(Denoising(options))
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoints",
        "config.yaml",
        "index.html",
        "logs",
        "metrics.jsonl",
        "model",
        "samples",
    ]
    assert load_yaml(RunConfig, tmp_path / "config.yaml") == options
    grids = ["step-000004.png", "step-000008.png", "step-000012.png"]
    assert sorted(os.listdir(tmp_path / "samples")) == grids
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000010", "step-000012"]
    state = json.loads((last(tmp_path) / "state.json").read_text())
    inputs = {"noise": "a", "text encoder": "b"}
    assert state == {"step": 12, "samples": 72, "seed": 3, "inputs": inputs, "scaler": None}

    log = EventAccumulator(str(tmp_path / "logs"))
    log.Reload()
    tags = set(log.Tags()["scalars"])
    assert {"loss", "twice", "grad_norm", "learning_rate", "loss_at/0.0", "loss_at/0.9"} <= tags
    losses = {event.step: event.value for event in log.Scalars("loss")}
    assert list(losses) == [3, 6, 9, 12]
    twice = {event.step: event.value for event in log.Scalars("twice")}
    assert twice == pytest.approx({step: 2 * value for step, value in losses.items()})
    rates = [event.value for event in log.Scalars("learning_rate")]
    expected = [options.optimizer.rate(step - 1, STEPS) for step in losses]
    assert rates == pytest.approx(expected)
    for name, steps in {
        "validation/loss": [4, 8, 12],
        "validation/loss_ema_0.7": [4, 8, 12],
        "validation/loss_ema_0.9": [4, 8, 12],
        "evaluation/weight": [6, 12],
    }.items():
        assert [event.step for event in log.Scalars(name)] == steps, name


def test_the_logged_loss_is_the_mean_since_the_last_line(tmp_path: Path) -> None:
    """And the loss on held-out data is that of the weights as they stand, and of each average."""
    program = Denoising(config(tmp_path / "a", log_every=1))
    train(program)
    train(Denoising(config(tmp_path / "b", log_every=4)))
    single, four = (
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in "ab"
    )
    means = [sum(single[first : first + 4]) / 4 for first in range(0, STEPS, 4)]
    assert four == pytest.approx(means, rel=1e-6)
    shown = [line for line in metrics(tmp_path / "a") if "validation/loss" in line][-1]
    with torch.no_grad():
        own = program.validation(program.network, torch.device("cpu"), Share())
        model = load_file(tmp_path / "a" / "model" / "network.safetensors")
        program.network.load_state_dict(model)
        averaged = program.validation(program.network, torch.device("cpu"), Share())
    assert own is not None
    assert averaged is not None
    assert shown["validation/loss"] == pytest.approx(own[0] / 3)
    assert shown["validation/loss_ema_0.7"] == pytest.approx(averaged[0] / 3)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_unreadable_samples_are_listed_and_too_many_stop_it(tmp_path: Path) -> None:
    program = Denoising(config(tmp_path, max_unreadable=2))
    program.unreadable = {7: "damaged", 3: "too many pixels"}
    train(program)
    listed = [json.loads(line) for line in (tmp_path / "unreadable.jsonl").open()]
    assert listed == [
        {"sample": 3, "reason": "too many pixels"},
        {"sample": 7, "reason": "damaged"},
    ]
    again = Denoising(config(tmp_path, max_unreadable=2, max_steps=STEPS + 4))
    again.unreadable = {7: "damaged", 9: "damaged"}
    with pytest.raises(InputError, match="3 samples cannot be read, more than max_unreadable, 2"):
        train(again)
    assert len((tmp_path / "unreadable.jsonl").read_text().splitlines()) == 3
