"""The learning rate as a function of the step, and which parameters get what."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from latentdiff.errors import InputError
from training.adafactor import Adafactor
from training.optimizers import OptimizerConfig, make_optimizer


def network() -> nn.ModuleDict:
    """A U-Net's and a text encoder's parameters, in small."""
    return nn.ModuleDict(
        {
            "unet": nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 5)),
            "text_encoder": nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)),
            "text_encoder_2": nn.Linear(5, 5, bias=False),
        }
    )


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


def test_a_cosine_cooldown_is_pytorchs() -> None:
    """CosineAnnealingLR over the last 20 of 50 steps, the plateau before it."""
    config = OptimizerConfig(
        learning_rate=0.3, warmup_steps=0, cooldown_steps=20, cooldown="cosine"
    )
    oracle = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
    scheduler = CosineAnnealingLR(oracle, T_max=20)
    assert {config.rate(step, 50) for step in range(30)} == {0.3}
    for step in range(30, 50):
        assert config.rate(step, 50) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        oracle.step()
        scheduler.step()


# Groups


def test_weight_decay_spares_biases_norms_and_frozen_weights() -> None:
    parts = network()
    parts["unet"][2].weight.requires_grad_(False)  # type: ignore[index]
    options = OptimizerConfig(learning_rate=0.1, weight_decay=0.3)
    groups = {group["weight_decay"]: group for group in make_optimizer(parts, options).param_groups}
    assert groups.keys() == {0.3, 0.0}
    names = {id(parameter): name for name, parameter in parts.named_parameters()}
    assert {names[id(p)] for p in groups[0.3]["params"]} == {
        "unet.0.weight",
        "text_encoder.0.weight",
        "text_encoder_2.weight",
    }
    assert {names[id(p)] for p in groups[0.0]["params"]} == {
        "unet.0.bias",
        "unet.1.weight",
        "unet.1.bias",
        "unet.2.bias",
        "text_encoder.0.bias",
        "text_encoder.1.weight",
        "text_encoder.1.bias",
    }
    assert {group["scale"] for group in groups.values()} == {1.0}


def test_the_text_encoder_has_a_rate_of_its_own() -> None:
    parts = network()
    options = OptimizerConfig(learning_rate=0.1, text_encoder_learning_rate=0.01, warmup_steps=4)
    optimizer = make_optimizer(parts, options)
    rates = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(parts.parameters()))
    for name, parameter in parts.named_parameters():
        group, tower = rates[id(parameter)], name.startswith("text_encoder")
        assert group["lr"] == pytest.approx(0.01 if tower else 0.1)
        assert options.rate(0, 9) * group["scale"] == pytest.approx(0.0025 if tower else 0.025)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_every_option_arrives(name: Any) -> None:
    options = OptimizerConfig(name=name, learning_rate=0.02, betas=(0.8, 0.95), weight_decay=0.3)
    optimizer = make_optimizer(network(), options)
    assert type(optimizer) is (torch.optim.AdamW if name == "adamw" else Adafactor)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.02
        if name == "adamw":
            assert (group["betas"], group["fused"]) == ((0.8, 0.95), True)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_rate_of_each_step_is_the_one_that_is_set(name: Any) -> None:
    """Twice the rate, twice the step: no optimizer here has a schedule of its own."""
    moved = []
    for rate in (0.01, 0.02):
        torch.manual_seed(0)
        parts = network()
        optimizer = make_optimizer(parts, OptimizerConfig(name=name, learning_rate=1.0))
        before = {n: p.detach().clone() for n, p in parts.named_parameters()}
        for parameter in parts.parameters():
            parameter.grad = torch.randn_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        moved.append({n: p.detach() - before[n] for n, p in parts.named_parameters()})
    for key, value in moved[0].items():
        assert value.any()
        torch.testing.assert_close(moved[1][key], 2 * value, rtol=1e-3, atol=1e-6)


# What is not there


def test_8_bits_without_bitsandbytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match=r"pip install 'latentdiff\[8bit\]'"):
        make_optimizer(network(), OptimizerConfig(name="adamw8bit", learning_rate=0.1))


def test_8_bits_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=None))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=None))
    with pytest.raises(InputError, match="adamw8bit runs on NVIDIA GPUs"):
        make_optimizer(network(), OptimizerConfig(name="adamw8bit", learning_rate=0.1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernels are CUDA's")
def test_8_bits_are_nearly_adamw() -> None:
    """Also where kernels were channels_last, whose moments would follow another order."""
    pytest.importorskip("bitsandbytes")

    def trained(name: Any) -> nn.Module:
        torch.manual_seed(0)
        kernel = nn.Conv2d(64, 64, 3).to("cuda", memory_format=torch.channels_last)  # type: ignore
        optimizer = make_optimizer(kernel, OptimizerConfig(name=name, learning_rate=0.01))
        for _ in range(4):
            for parameter in kernel.parameters():
                parameter.grad = torch.randn(parameter.shape).cuda()
            optimizer.step()
        return kernel

    eight, whole = trained("adamw8bit"), trained("adamw")
    for mine, theirs in zip(eight.parameters(), whole.parameters(), strict=True):
        assert (mine - theirs).abs().mean() < 0.002
