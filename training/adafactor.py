"""Adafactor (Shazeer & Stern 2018): the second moment of a matrix as its rows' and columns'."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

SMALLEST = 1e-30
"""epsilon_1 of the paper, added to squared gradients."""
THRESHOLD = 1.0
"""d of the paper: updates are scaled down to this root mean square."""


class Adafactor(torch.optim.Optimizer):
    """Algorithm 4 of the paper without momentum, its step size alpha_t the learning rate given.

    The paper's relative step sizes, which PyTorch's Adafactor has, are left out: the learning rate
    is a function of the global step alone. A kernel [out, in, k, k] counts as the matrix
    [out, in k k]. Sharded parameters (FSDP2) take the same steps as whole ones; their rows' and
    columns' moments are whole on every process.

    Args:
        params: parameters, or groups of them with an lr and a weight_decay of their own.
        lr: alpha_t.
        weight_decay: decoupled (Loshchilov & Hutter 2019).
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step along the gradients that there are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state.setdefault("step", torch.zeros(()))
        state["step"] += 1
        beta2 = 1 - state["step"].item() ** -0.8  # section 7.2
        squares = gradient.square() + SMALLEST
        if parameter.ndim > 1:
            squares = squares.flatten(1)
            row = _average(state, "row", whole(squares.mean(dim=1)), beta2)
            column = _average(state, "column", whole(squares.mean(dim=0)), beta2)
            rows = _replicated(row / row.mean(), gradient).rsqrt()[:, None]
            columns = _replicated(column, gradient).rsqrt()
            update = ((gradient.flatten(1) * rows) * columns).view(gradient.shape)
        else:
            update = gradient * _average(state, "square", squares, beta2).rsqrt()
        size = whole(torch.linalg.vector_norm(update)) / math.sqrt(update.numel())
        rate = group["lr"] / (size / THRESHOLD).clamp(min=1)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update * _replicated(rate, gradient))


def _average(state: dict[str, Tensor], name: str, value: Tensor, beta2: float) -> Tensor:
    """Move a running average towards `value`; beta2 is 0 at the first step."""
    state.setdefault(name, torch.zeros_like(value)).lerp_(value, 1 - beta2)
    return state[name]


def whole(values: Tensor) -> Tensor:
    """What processes share, on each of them."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def _replicated(values: Tensor, like: Tensor) -> Tensor:
    """Equal values of all processes, to calculate with a tensor that they share."""
    if not isinstance(like, DTensor):
        return values
    placements = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(values, like.device_mesh, placements, run_check=False)
