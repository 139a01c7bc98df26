"""The moving averages against their formula, and the network's own weights kept safe."""

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


def test_each_average_is_the_formulas() -> None:
    net = network()
    decays = (0.0, 0.3, 0.9, 0.999)
    ema = EMA(net, decays)
    start = {name: value.detach().double().numpy() for name, value in net.named_parameters()}
    expected = {f"{decay}/{name}": value for decay in decays for name, value in start.items()}
    for step in range(1, 31):
        walk(net, step)
        ema.update(step)
        for decay in decays:
            d = min(decay, (1 + step) / (10 + step))
            for name, value in net.named_parameters():
                key = f"{decay}/{name}"
                expected[key] = d * expected[key] + (1 - d) * value.detach().double().numpy()
    assert ema.state().keys() == expected.keys()
    for name, value in ema.state().items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_of_half_precision_weights_is_kept_in_single_precision() -> None:
    net = network(torch.bfloat16)
    ema = EMA(net, (0.999,))
    walk(net, 1)
    for step in range(1, 9):
        ema.update(step)
    assert {value.dtype for value in ema.state().values()} == {torch.float32}
    weight = ema.state()["0.999/0.weight"]
    assert not weight.equal(weight.bfloat16().float())


def test_only_what_is_trained_is_averaged() -> None:
    net = network()
    net[0].requires_grad_(False)
    assert set(EMA(net, (0.9, 0.5)).state()) == {
        "0.9/1.weight",
        "0.9/1.bias",
        "0.5/1.weight",
        "0.5/1.bias",
    }


@pytest.mark.parametrize("index", [0, 1])
def test_the_averages_are_in_the_network_only_inside_the_block(index: int) -> None:
    net = network()
    ema = EMA(net, (0.9, 0.1))
    walk(net, 1)
    ema.update(1)
    own = {name: value.clone() for name, value in net.state_dict().items()}
    averages = {name: value.clone() for name, value in ema.state().items()}
    with ema.weights_in(index) as inside:
        assert inside is net
        assert not net.training
        for name, value in net.named_parameters():
            assert value.equal(averages[f"{(0.9, 0.1)[index]}/{name}"])
            assert not value.equal(own[name])
    with pytest.raises(KeyError), ema.weights_in():
        raise KeyError
    assert all(value.equal(own[name]) for name, value in net.state_dict().items())
    assert all(value.equal(averages[name]) for name, value in ema.state().items())


def test_every_part_goes_back_to_the_mode_it_was_in() -> None:
    """A frozen part stays in eval mode though the whole trains."""
    net = network()
    net[1].eval()
    with EMA(net, (0.9,)).weights_in():
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == [True, True, False]
