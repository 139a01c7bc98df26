"""Operations of a step against counts by hand."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentdiff.checkpoint import ModelParts
from latentdiff.models.unet import UNet
from training.flops import FlopMeter, measured_peak, named_peak, peak_flops


def flops(network: nn.Module, *args: Any) -> int:
    meter = FlopMeter(network)
    meter.watch(lambda *args: None)(*args)
    assert meter.flops is not None
    return meter.flops


def test_a_linear_chain_needs_three_products_a_layer_and_two_in_the_first() -> None:
    """Forward, gradient of the weights, gradient of the input; nobody wants the first input's."""
    network = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5))
    first, second = 2 * 3 * 7 * 11, 2 * 3 * 11 * 5
    assert flops(network, torch.zeros(3, 7)) == 2 * first + 3 * second


def test_a_convolution_is_a_product_for_each_place_of_its_kernel() -> None:
    network = nn.Conv2d(3, 4, 3, padding=1)
    forward = 2 * (2 * 8 * 6) * 4 * (3 * 9)
    assert flops(network, torch.zeros(2, 3, 8, 6)) == 2 * forward


def test_frozen_layers_pass_gradients_on_and_need_none() -> None:
    network = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5))
    first, second = 2 * 3 * 7 * 11, 2 * 3 * 11 * 5
    network[1].requires_grad_(False)
    assert flops(network, torch.zeros(3, 7)) == 2 * first + 2 * second
    network.requires_grad_(False)
    assert flops(network, torch.zeros(3, 7)) == first + second


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_v = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=F.scaled_dot_product_attention(x, x, self.to_v(x)))


def test_attention_counts_its_two_products_whatever_the_device_would_run() -> None:
    product, projection = 2 * 6 * 10 * 10 * 8, 2 * 6 * 10 * 8 * 8
    # The softmax does not learn: of its products only that with v has a gradient.
    assert flops(Attention(), torch.zeros(6, 10, 8)) == 3 * product + 2 * projection


class Twice(nn.Module):
    """Computes its middle anew in the backward pass, if told to."""

    def __init__(self, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.gradient_checkpointing:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


def test_what_checkpointing_computes_twice_counts_once() -> None:
    network = Twice(True)
    assert flops(network, torch.zeros(5, 6)) == flops(Twice(False), torch.zeros(5, 6))
    assert network.gradient_checkpointing


def test_the_unet_of_a_model_is_counted_without_a_trace(tiny_parts: ModelParts) -> None:
    """In proportion to the batch, close to three forward passes, nothing computed."""
    unet: UNet = copy.deepcopy(tiny_parts.unet).requires_grad_(True)
    text = torch.zeros(1, 32, 48)

    def count(batch: int) -> int:
        cond = unet.condition(text.expand(batch, -1, -1).detach())
        return flops(unet, torch.zeros(batch, 4, 8, 8), torch.zeros(batch), cond)

    one = count(1)
    assert count(5) == 5 * one
    assert all(value.grad is None for value in unet.parameters())
    unet.requires_grad_(False)
    forward = count(1)
    assert 2.7 * forward < one < 3 * forward


def test_only_the_first_call_is_counted_and_every_call_is_passed_on() -> None:
    network = nn.Linear(2, 3, bias=False)
    meter = FlopMeter(network)
    forward = meter.watch(network)
    assert meter.flops is None
    for batch in (4, 6):
        x = torch.ones(batch, 2)
        assert forward(x).equal(network(x))
        assert meter.flops == 2 * (2 * 4 * 2 * 3)


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312e12),
        ("NVIDIA A100-PCIE-40GB", torch.float32, True, 156e12),
        ("NVIDIA A100-PCIE-40GB", torch.float32, False, 19.5e12),
        ("NVIDIA A10", torch.bfloat16, False, 125e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, False, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12),
        ("NVIDIA H200", torch.bfloat16, False, 989.4e12),
        ("NVIDIA H200 NVL", torch.bfloat16, False, 835.5e12),
        ("NVIDIA L4", torch.bfloat16, False, 121e12),
        ("NVIDIA L40S", torch.bfloat16, False, 362e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, False, 165.2e12),
        ("Tesla T4", torch.float16, False, 65e12),
        ("Tesla T4", torch.bfloat16, False, None),
        ("NVIDIA H100 80GB HBM3", torch.float64, False, None),
        ("Somebody's card", torch.float16, False, None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(
    name: str, dtype: torch.dtype, tf32: bool, expected: float | None
) -> None:
    assert named_peak(name, dtype, tf32) == expected


def test_a_cpu_is_measured() -> None:
    """Between a clock of 1 GHz with one operation and all the cores of the largest machines."""
    assert 1e9 < measured_peak(torch.float32, size=256, seconds=0.05) < 1e15
    assert peak_flops(torch.device("meta"), torch.float32) is None
