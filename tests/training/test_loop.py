"""The loop: its learning rate, its arithmetic, and a run that does not care where it stopped."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from latentdiff.config import load_config, load_yaml, save_yaml
from latentdiff.errors import InputError
from latentdiff.rng import keyed_normal
from training import loop
from training.data import endless_orders
from training.loop import (
    Losses,
    OptimizerConfig,
    RunConfig,
    check_compiler,
    make_accelerator,
    make_optimizer,
    seeded,
)

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
            "ema_decay": 0.7,
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
        with seeded(config.seed):
            self.network = nn.Sequential(
                nn.Conv2d(2, width, 3, padding=1), nn.GroupNorm(1, width), nn.Conv2d(width, 2, 1)
            )
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batches(self, steps: range, rank: int, processes: int) -> Iterator[Tensor]:
        for samples in endless_orders(steps, self.config.batch_size, rank, processes):
            yield keyed_normal(self.config.seed, "noise", 0, samples, (2, 8, 8))

    def losses(self, network: Callable[..., Any], batch: Tensor, device: torch.device) -> Losses:
        batch = batch.contiguous(memory_format=torch.channels_last)
        loss = (network(batch) - batch / 2).square().mean()
        return {"loss": loss, "twice": 2 * loss.detach()}

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


# The learning rate


@settings(deadline=None)
@given(st.floats(1e-6, 1), st.integers(0, 30), st.integers(0, 30), st.integers(0, 60))
def test_the_rate_is_a_trapezium(rate: float, warmup: int, cooldown: int, plateau: int) -> None:
    optimizer = OptimizerConfig(learning_rate=rate, warmup_steps=warmup, cooldown_steps=cooldown)
    steps = warmup + plateau + cooldown + 1
    corners = {-1: 0.0} if warmup else {}
    corners |= {warmup - 1: rate, steps - cooldown: rate}
    corners |= {steps: 0.0} if cooldown else {}
    expected = np.interp(range(steps), list(corners), list(corners.values()))
    rates = [optimizer.rate(step, steps) for step in range(steps)]
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    assert all(0 < value <= rate for value in rates)


def test_a_short_run_takes_the_lower_of_rise_and_fall() -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=4, cooldown_steps=4)
    assert [optimizer.rate(step, 4) for step in range(4)] == [0.25, 0.5, 0.5, 0.25]


# The arithmetic


def test_the_loop_is_adamw_with_clipped_gradients(tmp_path: Path) -> None:
    """Against Loshchilov & Hutter (2019), algorithm 2, written out."""
    program = Denoising(config(tmp_path))
    network = Denoising(config(tmp_path)).network.to(torch.float64)
    moments = {name: (0.0, 0.0) for name, _ in network.named_parameters()}
    average = {name: value.detach().clone() for name, value in network.named_parameters()}
    for step, batch in enumerate(program.batches(range(STEPS), 0, 1)):
        loss = program.losses(network, batch.double(), torch.device("cpu"))["loss"]
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


def test_weight_decay_spares_biases_norms_and_frozen_weights() -> None:
    network = Denoising(config(Path("unused"))).network
    network[2].weight.requires_grad_(False)
    options = OptimizerConfig(learning_rate=0.1, weight_decay=0.3)
    decayed, spared = make_optimizer(network, options).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(network[0].weight)}
    rest = (network[0].bias, network[1].weight, network[1].bias, network[2].bias)
    assert {id(p) for p in spared["params"]} == {id(p) for p in rest}


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

    def batches(self, steps: range, rank: int, processes: int) -> Iterator[Tensor]:
        batches = super().batches(steps, rank, processes)
        yield from itertools.islice(batches, max(0, self.fatal - steps.start))
        raise Killed


@pytest.mark.parametrize("stops", [(1,), (2,), (7,), (11,), (3, 4, 8)])
def test_stopped_and_resumed_it_is_the_same_run_bit_for_bit(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    whole = train(Denoising(config(tmp_path / "whole")))
    for stop in stops:
        with pytest.raises(Killed):
            train(Mortal(config(tmp_path / "parts"), stop))
        assert not (tmp_path / "parts" / "model").exists()
    parts = train(Denoising(config(tmp_path / "parts")))
    for name, value in whole.weights().items():
        assert value.equal(parts.weights()[name])
    assert contents(last(tmp_path / "parts")) == contents(last(tmp_path / "whole"))
    assert contents(tmp_path / "parts" / "model") == contents(tmp_path / "whole" / "model")


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    assert train(Denoising(config(tmp_path))).finished == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(Mortal(config(tmp_path), 0)).finished == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


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
    with pytest.raises(InputError, match="mixed_precision: Input should be 'no' or 'bf16'"):
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

    def losses(self, network: Callable[..., Any], batch: Tensor, device: torch.device) -> Losses:
        losses = super().losses(network, batch, device)
        if next(self.calls) >= 7:
            zero = losses["loss"] - losses["loss"].detach()
            losses["loss"] = losses["loss"] + self.factor * zero
        return losses


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize(("log_every", "every"), [(3, 2), (2, 3), (100, 4)])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(
    tmp_path: Path, factor: float, log_every: int, every: int
) -> None:
    options = config(tmp_path, log_every=log_every, checkpoint_every=every)
    with pytest.raises(FloatingPointError, match=r"not finite at step 8.*lower the learning rate"):
        train(Exploding(options, factor))
    assert not (tmp_path / "model").exists()
    assert last(tmp_path).name == f"step-{7 // every * every:06d}"
    for name in ("network.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert all(value.isfinite().all() for value in load_file(last(tmp_path) / name).values())
    assert train(Denoising(options)).finished == 1


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"no C\+\+ compiler 'no-such-compiler'"):
        train(Denoising(config(tmp_path / "run", compile=True)))
    assert not (tmp_path / "run").exists()
    check_compiler(config(tmp_path), torch.device("cpu"))
    check_compiler(config(tmp_path, compile=True), torch.device("cuda"))


# What a run leaves


def test_a_run_leaves_its_config_logs_samples_checkpoints_and_model(tmp_path: Path) -> None:
    options = config(tmp_path)
    train(Denoising(options))
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoints",
        "config.yaml",
        "logs",
        "model",
        "samples",
    ]
    assert load_yaml(RunConfig, tmp_path / "config.yaml") == options
    grids = ["step-000004.png", "step-000008.png", "step-000012.png"]
    assert sorted(os.listdir(tmp_path / "samples")) == grids
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000010", "step-000012"]
    state = json.loads((last(tmp_path) / "state.json").read_text())
    inputs = {"noise": "a", "text encoder": "b"}
    assert state == {"step": 12, "samples": 72, "seed": 3, "inputs": inputs}

    log = EventAccumulator(str(tmp_path / "logs"))
    log.Reload()
    assert {"loss", "twice", "grad_norm", "learning_rate"} <= set(log.Tags()["scalars"])
    losses = {event.step: event.value for event in log.Scalars("loss")}
    assert list(losses) == [2, 3, 4, 6, 8, 9, 10, 12]
    twice = {event.step: event.value for event in log.Scalars("twice")}
    assert twice == pytest.approx({step: 2 * value for step, value in losses.items()})
    rates = [event.value for event in log.Scalars("learning_rate")]
    expected = [options.optimizer.rate(step - 1, STEPS) for step in losses]
    assert rates == pytest.approx(expected)
