"""Exponential moving averages of a network's weights, of several lengths at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.parallel import local


class EMA:
    """theta_ema <- d theta_ema + (1 - d) theta, with d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d forgets the random start (the schedule of TensorFlow's
    ExponentialMovingAverage). Averages are kept in fp32, of the parameters that require grad, in
    shards where those are in shards; make it after the network is wrapped.
    """

    def __init__(self, network: nn.Module, decays: Sequence[float]) -> None:
        self.network = network
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.averages = {
            decay: {name: p.detach().float().clone() for name, p in self.parameters.items()}
            for decay in decays
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (from 1)."""
        parameters = [local(parameter).float() for parameter in self.parameters.values()]
        for decay, average in self.averages.items():
            weight = 1 - min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_([local(value) for value in average.values()], parameters, weight)

    @contextmanager
    def weights_in(self, index: int = 0) -> Iterator[nn.Module]:
        """The network with its averages in it and in eval mode inside the block, its own after it.

        index: which of the decays.
        """
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        modes = [(module, module.training) for module in self.network.modules()]
        try:
            self._put(list(self.averages.values())[index])
            yield self.network.eval()
        finally:
            self._put(own)
            for module, training in modes:
                module.training = training

    def state(self) -> dict[str, Tensor]:
        """The averages themselves, as "0.9999/parameter"."""
        return {
            f"{decay}/{name}": value
            for decay, average in self.averages.items()
            for name, value in average.items()
        }

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
