"""LoRAs on networks: attached, weighted, fused, restored bit by bit, removed; against the sums."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from latentdiff.errors import InputError
from latentdiff.lora import Adapters, LoRA, LoRALayer


class Network(nn.Module):
    """A strided and a 1 x 1 convolution and two matrices, one of them without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.proj_in = nn.Conv2d(6, 8, 1)
        self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=False)])
        self.out = nn.Linear(8, 5)
        self.norm = nn.LayerNorm(5, eps=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, n, 5]."""
        x = self.proj_in(self.conv(x).tanh()).flatten(2).transpose(1, 2)
        return self.norm(self.out(self.blocks[0](x).tanh()))


SHAPES = {"conv": (6, 3, 3, 3), "proj_in": (8, 6, 1, 1), "blocks.0": (8, 8), "out": (5, 8)}


def network(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network()


def picture(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def layer(name: str, rank: int, alpha: float, seed: int = 0) -> LoRALayer:
    generator = torch.Generator().manual_seed(1000 * seed + len(name))
    out, *rest = SHAPES[name]
    down = torch.randn(rank, *rest, generator=generator)
    return LoRALayer(down, torch.randn(out, rank, generator=generator) / 4, alpha)


def lora(seed: int = 0, rank: int = 2, alpha: float = 1.5) -> dict[str, LoRALayer]:
    return {name: layer(name, rank, alpha, seed) for name in SHAPES}


def changed(base: Network, *weighted: tuple[float, dict[str, LoRALayer]]) -> Network:
    """A copy whose weights are the sums, written out in float64."""
    base = copy.deepcopy(base).double()
    with torch.no_grad():
        for weight, layers in weighted:
            for name, layer in layers.items():
                rank = layer.down.shape[0]
                delta = layer.up.double() @ layer.down.double().reshape(rank, -1)
                target = base.get_submodule(name).weight
                target += weight * layer.alpha / rank * delta.reshape(target.shape)
    return base


def assert_computes(attached: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            attached(picture()).double(),
            expected(picture().double()),
            rtol=10 * tolerance,
            atol=tolerance,
        )


def bits(module: nn.Module) -> dict[str, Tensor]:
    views = {2: torch.int16, 4: torch.int32}
    return {
        name: value.detach().clone().view(views[value.element_size()])
        for name, value in module.state_dict().items()
    }


def test_two_with_weights_are_their_sum() -> None:
    net, base = network(), network()
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": lora(1)}, 0.7)
    assert_computes(net, changed(base, (0.7, lora(1))))
    adapters.add("two", {"unet": lora(2, rank=5, alpha=5)}, -0.4)
    assert_computes(net, changed(base, (0.7, lora(1)), (-0.4, lora(2, rank=5, alpha=5))))
    assert adapters.weights == {"one": 0.7, "two": -0.4}

    adapters.set_weights({"one": 2})
    assert_computes(net, changed(base, (2, lora(1)), (-0.4, lora(2, rank=5, alpha=5))))
    adapters.set_weights({"one": 0, "two": 1})
    assert_computes(net, changed(base, (1, lora(2, rank=5, alpha=5))))
    assert adapters.weights == {"one": 0, "two": 1}


def test_a_layer_touches_its_module_alone() -> None:
    for name in SHAPES:
        net, base = network(), network()
        Adapters({"unet": net}).add("one", {"unet": {name: lora()[name]}})
        assert_computes(net, changed(base, (1, {name: lora()[name]})))


def test_matrices_and_1x1_kernels_fit_one_another() -> None:
    net, base = network(), network()
    layers = lora()
    matrix = LoRALayer(layers["proj_in"].down.flatten(1), layers["proj_in"].up, 1.5)
    kernel = LoRALayer(layers["out"].down[..., None, None], layers["out"].up, 1.5)
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": {"proj_in": matrix, "out": kernel}})
    expected = changed(base, (1, {name: layers[name] for name in ("proj_in", "out")}))
    assert_computes(net, expected)
    adapters.fuse()
    assert_computes(net, expected)


def test_removed_leaves_no_trace() -> None:
    net, base = network(), network()
    with torch.no_grad():
        before = net(picture())
    adapters = Adapters({"unet": net})
    adapters.add("one.two", {"unet": lora(1)})
    adapters.add("two", {"unet": lora(2)})
    adapters.remove("one.two")
    assert_computes(net, changed(base, (1, lora(2))))
    adapters.remove("two")
    with torch.no_grad():
        assert torch.equal(net(picture()), before)
    assert [name for name, _ in net.named_modules()] == [name for name, _ in base.named_modules()]
    assert not any(module._forward_hooks for module in net.modules())
    assert adapters.weights == {}
    adapters.add("two", {"unet": lora(2)})


def test_names_and_values_of_saved_weights_stay() -> None:
    net, base = network(), network()
    Adapters({"unet": net}).add("one", {"unet": lora()})
    torch.testing.assert_close(dict(net.state_dict()), dict(base.state_dict()), rtol=0, atol=0)
    net.load_state_dict(base.state_dict(), strict=True)
    assert [name for name, _ in net.named_parameters()] == list(base.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_then_unfused_is_restored_to_the_bit(dtype: torch.dtype) -> None:
    net = network().to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    before, strides = bits(net), net.conv.weight.stride()
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": lora(1)}, 0.7)
    adapters.add("two", {"unet": lora(2)}, 0.4)
    for _ in range(3):
        adapters.fuse()
        adapters.fuse()
        assert adapters.fused
        fused = bits(net)
        same = [name for name in before if torch.equal(before[name], fused[name])]
        assert same == [name for name in before if "weight" not in name or "norm" in name]
        assert net.conv.weight.stride() == strides
        adapters.unfuse()
        adapters.unfuse()
        assert not adapters.fused
        after = bits(net)
        assert all(torch.equal(before[name], after[name]) for name in before)
    adapters.remove("one")
    adapters.remove("two")
    assert all(torch.equal(value, bits(net)[name]) for name, value in before.items())


def test_fused_weights_are_rounded_once() -> None:
    """To the bfloat16 nearest to the sum, not to a sum of rounded matrices."""
    net = network().bfloat16()
    expected = changed(net, (0.7, lora(1)), (0.4, lora(2)))
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": lora(1)}, 0.7)
    adapters.add("two", {"unet": lora(2)}, 0.4)
    adapters.fuse()
    for name in SHAPES:
        nearest = expected.get_submodule(name).weight.float().bfloat16()
        torch.testing.assert_close(net.get_submodule(name).weight, nearest, rtol=0, atol=0)


def test_fused_computes_the_same_and_once() -> None:
    net, base = network(), network()
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": lora(1)}, 0.7)
    adapters.add("two", {"unet": lora(2)}, 0.4)
    expected = changed(base, (0.7, lora(1)), (0.4, lora(2)))
    assert_computes(net, expected)
    adapters.fuse()
    assert_computes(net, expected)
    assert list(net.state_dict()) == list(base.state_dict())
    saved = network(seed=5)
    saved.load_state_dict(net.state_dict())
    assert_computes(saved, expected)
    adapters.unfuse()
    assert_computes(net, expected)


@given(
    ranks=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    alphas=st.lists(st.floats(0.1, 4), min_size=3, max_size=3),
    weights=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_fused_and_attached_agree(
    ranks: list[int], alphas: list[float], weights: list[float]
) -> None:
    net, base = network(), network()
    adapters = Adapters({"unet": net})
    weighted = []
    for seed, (rank, alpha, weight) in enumerate(zip(ranks, alphas, weights, strict=False)):
        weighted.append((weight, lora(seed, rank, alpha)))
        adapters.add(str(seed), {"unet": weighted[-1][1]}, weight)
    expected = changed(base, *weighted)
    assert_computes(net, expected, 1e-4)
    adapters.fuse()
    assert_computes(net, expected, 1e-4)
    adapters.unfuse()
    for name, value in base.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)


def test_follows_its_network_to_another_dtype() -> None:
    net, base = network(), network()
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": lora()})
    net.double()
    expected = changed(base, (1, lora()))
    torch.testing.assert_close(net(picture().double()), expected(picture().double()))
    net.bfloat16()
    assert net(picture(torch.bfloat16)).dtype == torch.bfloat16
    adapters.fuse()
    net.float()
    adapters.unfuse()
    rounded = network().bfloat16().float().state_dict()
    torch.testing.assert_close(dict(net.state_dict()), dict(rounded), rtol=0, atol=0)


def test_a_copy_keeps_its_own() -> None:
    net, base = network(), network()
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": lora()})
    twin = copy.deepcopy(net)
    adapters.remove("one")
    assert_computes(net, base.double())
    assert_computes(twin, changed(base, (1, lora())))


def test_gradients_reach_the_layers() -> None:
    net = network()
    layers = lora()
    for value in layers.values():
        value.down.requires_grad_()
        value.up.requires_grad_()
    net.requires_grad_(False)
    Adapters({"unet": net}).add("one", {"unet": layers}, 0.5)
    tensors = [tensor for value in layers.values() for tensor in (value.down, value.up)]
    optimizer = torch.optim.SGD(tensors, lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = net(picture())[..., 0].mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in tensors)
    assert losses[0] > losses[1] > losses[2]
    assert all(parameter.grad is None for parameter in net.parameters())


def test_several_parts_and_published_names() -> None:
    unet, bare, prefixed = network(0), network(1), nn.ModuleDict({"text_model": network(2)})
    published = {f"text_model.{name}": value for name, value in lora().items()}
    parts = {"unet": unet, "text_encoder": bare, "text_encoder_2": prefixed}
    whole = {"unet": lora(), "text_encoder": published, "text_encoder_2": published}
    Adapters(parts).add("one", whole)
    assert_computes(unet, changed(network(0), (1, lora())))
    assert_computes(bare, changed(network(1), (1, lora())))
    assert_computes(prefixed["text_model"], changed(network(2), (1, lora())))


REFUSED: dict[str, tuple[LoRA, str]] = {
    "another width": (
        {"unet": {**lora(), "out": LoRALayer(torch.ones(2, 9), torch.ones(5, 2), 1.0)}},
        r"'new' is for another model: it changes out in unet, of shape \[5, 9\], which this one "
        r"has as \[5, 8\]",
    ),
    "another kernel": (
        {"unet": {**lora(), "conv": LoRALayer(torch.ones(2, 3, 1, 1), torch.ones(6, 2), 1.0)}},
        r"it changes conv in unet, of shape \[6, 3\], which this one has as \[6, 3, 3, 3\]",
    ),
    "an unknown module": (
        {"unet": {**lora(), "blocks.1": lora()["blocks.0"]}},
        r"it changes blocks.1 in unet, of shape \[8, 8\], which this one lacks",
    ),
    "no weight to adapt": (
        {"unet": {**lora(), "norm": lora()["out"]}},
        "it changes norm in unet, .* which this one lacks",
    ),
    "an unknown part": (
        {"unet": lora(), "text_encoder_2": lora()},
        "it changes conv in text_encoder_2, .* which this one lacks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_models_is_refused_before_anything_changes(case: str) -> None:
    unfit, message = REFUSED[case]
    net, base = network(), network()
    adapters = Adapters({"unet": net})
    with pytest.raises(InputError, match=message):
        adapters.add("new", unfit)
    assert adapters.weights == {}
    assert [name for name, _ in net.named_modules()] == [name for name, _ in base.named_modules()]
    assert not any(module._forward_hooks for module in net.modules())
    adapters.add("new", {"unet": lora()})


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda a: a.add("one", {"unet": lora()}), "There is a LoRA named 'one' already"),
        (lambda a: a.add("two", {"unet": lora()}, math.nan), "finite number; 'two' has nan"),
        (lambda a: a.add("two", {"unet": lora()}, "1"), "finite number; 'two' has '1'"),
        (lambda a: a.set_weights({"one": 2, "two": 1}), "no LoRA named 'two'; attached: 'one'"),
        (lambda a: a.set_weights({"one": math.inf}), "finite number; 'one' has inf"),
        (lambda a: a.remove("two"), "no LoRA named 'two'; attached: 'one'"),
    ],
)
def test_refused_and_nothing_changed(act: Callable[[Adapters], None], message: str) -> None:
    net = network()
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": lora()}, 0.5)
    with pytest.raises(InputError, match=message):
        act(adapters)
    assert adapters.weights == {"one": 0.5}
    assert_computes(net, changed(network(), (0.5, lora())))


@pytest.mark.parametrize(
    "act",
    [
        lambda a: a.add("two", {"unet": lora()}),
        lambda a: a.set_weights({"one": 2}),
        lambda a: a.remove("one"),
    ],
)
def test_fused_ones_are_not_changed(act: Callable[[Adapters], None]) -> None:
    net = network()
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": lora()}, 0.5)
    adapters.fuse()
    with pytest.raises(InputError, match="unfuse them before"):
        act(adapters)
    assert_computes(net, changed(network(), (0.5, lora())))
    adapters.unfuse()
    act(adapters)


def test_fusing_nothing_does_nothing() -> None:
    adapters = Adapters({"unet": network()})
    adapters.fuse()
    assert not adapters.fused
    adapters.add("one", {"unet": lora()})


def test_compiles_without_a_break() -> None:
    net = network()
    Adapters({"unet": net}).add("one", {"unet": lora()}, 0.5)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(picture()), net(picture()))


def test_fusing_that_fails_halfway_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    before = bits(net)
    adapters = Adapters({"unet": net})
    adapters.add("one", {"unet": lora()})
    delta, calls = LoRALayer.delta, []

    def runs_out(self: LoRALayer, device: torch.device) -> Tensor:
        calls.append(self)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return delta(self, device)

    monkeypatch.setattr(LoRALayer, "delta", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        adapters.fuse()
    assert not adapters.fused
    assert all(torch.equal(value, bits(net)[name]) for name, value in before.items())
    assert_computes(net, changed(network(), (1, lora())))
