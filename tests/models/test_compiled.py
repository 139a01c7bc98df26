"""Gradients in bf16 once compiled, which torch's own upsampling lost on CPUs."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

from latentdiff.models.blocks import Upsample2D


class UpAndOut(nn.Module):
    """The least that showed it: text and a small picture, enlarged, under a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 16, 3, stride=2, padding=1)
        self.text = nn.Linear(16, 16)
        self.up = Upsample2D(16)
        self.norm = nn.GroupNorm(4, 16)
        self.out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        small = self.down(x) + self.text(text)[:, :, None, None]
        return self.out(self.norm(self.up(small, x.shape[-2:])))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_every_gradient_is_there_once_compiled() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UpAndOut().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 16, requires_grad=True)
    named = {"text": text} | dict(network.named_parameters())

    def gradients(network: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(x, text).float().square().mean()
        return list(torch.autograd.grad(loss, list(named.values())))

    compiled = gradients(torch.compile(network))
    for name, one, other in zip(named, gradients(network), compiled, strict=True):
        assert (one - other).norm() <= 0.1 * one.norm(), name
