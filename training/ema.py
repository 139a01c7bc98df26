"""An exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """theta_ema <- d theta_ema + (1 - d) theta, with d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d forgets the random start (the schedule of TensorFlow's
    ExponentialMovingAverage). Buffers are copied, not averaged. Averages are kept in fp32.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {
            name: value.detach().float().clone() for name, value in network.named_parameters()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """After optimizer step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = [value.detach().float() for _, value in network.named_parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)

    @contextmanager
    def weights_in(self, network: nn.Module) -> Iterator[nn.Module]:
        """The network with the averaged weights inside the block, its own after it."""
        own = {name: value.detach().clone() for name, value in network.named_parameters()}
        training = network.training
        try:
            self._copy(self.average, network)
            yield network.eval()
        finally:
            self._copy(own, network)
            network.train(training)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.cpu().contiguous() for name, value in self.average.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError unless names and shapes are this network's."""
        own = {name: value.shape for name, value in self.average.items()}
        if own != {name: value.shape for name, value in state.items()}:
            raise RuntimeError("the averaged weights have other names or shapes")
        for name, value in self.average.items():
            value.copy_(state[name])

    @staticmethod
    @torch.no_grad()
    def _copy(values: dict[str, Tensor], network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            parameter.copy_(values[name])
