"""The moving average against its formula, and the network's own weights kept safe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from training.ema import EMA


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)


def walk(net: nn.Module, step: int) -> None:
    """New weights, as an optimizer would write them."""
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            random = torch.Generator().manual_seed(1000 * step + number)
            parameter.copy_(torch.randn(parameter.shape, generator=random))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
def test_the_average_is_the_formulas(decay: float) -> None:
    net = network()
    ema = EMA(net, decay)
    expected = {name: value.detach().double().numpy() for name, value in net.named_parameters()}
    for step in range(1, 31):
        walk(net, step)
        ema.update(net, step)
        d = min(decay, (1 + step) / (10 + step))
        for name, value in net.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * value.detach().double().numpy()
    assert ema.average.keys() == expected.keys()
    for name, value in ema.average.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_of_half_precision_weights_is_kept_in_single_precision() -> None:
    net = network(torch.bfloat16)
    ema = EMA(net, 0.999)
    walk(net, 1)
    for step in range(1, 9):
        ema.update(net, step)
    assert {value.dtype for value in ema.average.values()} == {torch.float32}
    weight = ema.average["0.weight"]
    assert not weight.equal(weight.bfloat16().float())


def test_the_averages_are_in_the_network_only_inside_the_block() -> None:
    net = network()
    ema = EMA(net, 0.9)
    walk(net, 1)
    ema.update(net, 1)
    own = {name: value.clone() for name, value in net.state_dict().items()}
    with ema.weights_in(net) as inside:
        assert inside is net
        assert not net.training
        for name, value in net.named_parameters():
            assert value.equal(ema.average[name])
            assert not value.equal(own[name])
    with pytest.raises(KeyError), ema.weights_in(net):
        raise KeyError
    assert net.training
    assert all(value.equal(own[name]) for name, value in net.state_dict().items())


def test_a_network_that_was_not_training_stays_so() -> None:
    net = network().eval()
    with EMA(net, 0.9).weights_in(net):
        pass
    assert not net.training


def test_states_are_restored_and_others_refused() -> None:
    net = network()
    ema, other = EMA(net, 0.9), EMA(network(), 0.9)
    walk(net, 1)
    ema.update(net, 1)
    other.load_state_dict(ema.state_dict())
    assert all(value.equal(ema.average[name]) for name, value in other.average.items())
    assert all(value is not ema.average[name] for name, value in other.average.items())
    state = ema.state_dict()
    for bad in (
        {name: value for name, value in state.items() if name != "0.bias"},
        state | {"more": torch.zeros(1)},
        state | {"0.bias": torch.zeros(5)},
    ):
        with pytest.raises(RuntimeError, match="other names or shapes"):
            other.load_state_dict(bad)
