"""Activations computed again in the backward pass: the same gradients, less kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from latentdiff.models.blocks import BasicTransformerBlock
from latentdiff.models.unet import UNet, UNetConfig

KINDS: dict[str, dict[str, Any]] = {
    "sd": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}


def unet(kind: str = "sd") -> UNet:
    options = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")} | KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(
            UNetConfig(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                cross_attention_dim=20,
                attention_head_dim=2,
                norm_num_groups=4,
                **options,
            )
        )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def gradients(network: UNet, run: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Of every parameter, of the sample and of the text."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, hidden = noise(2, 4, 8, 8).requires_grad_(), noise(2, 5, 20).requires_grad_()
    added: tuple[Tensor, ...] = ()
    if network.config.addition_embed_type is not None:
        added = noise(2, 16), torch.tensor([[64.0, 64, 0, 8, 64, 64]] * 2)
    network.zero_grad(set_to_none=True)
    out = run(x, torch.tensor([7.0, 700.0]), network.condition(hidden, *added))
    (out * noise(*out.shape)).sum().backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"out": out, "x": x.grad, "hidden": hidden.grad} | found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("bfloat16", [False, True])
def test_gradients_are_the_same_bit_for_bit(kind: str, bfloat16: bool) -> None:
    network = unet(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        plain = gradients(network, network)
        network.gradient_checkpointing = True
        again = gradients(network, network)
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert value.any(), name
        assert value.equal(again[name]), name


def alive_after_forward(network: UNet) -> tuple[int, int]:
    """How many of the blocks' inner activations a forward pass keeps, of how many."""
    seen: list[weakref.ref[Tensor]] = []
    inner = [m for name, m in network.named_modules() if name.endswith((".conv2", ".ff.net.0"))]
    hooks = [m.register_forward_hook(lambda *a: seen.append(weakref.ref(a[2]))) for m in inner]
    out = network(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.randn(2, 5, 20))
    alive = sum(reference() is not None for reference in seen)
    total = len(seen)
    out.sum().backward()
    for hook in hooks:
        hook.remove()
    assert (len(seen) > total) == network.gradient_checkpointing
    return alive, total


def test_activations_are_freed_and_computed_again() -> None:
    network = unet()
    feed_forwards = sum(name.endswith(".ff.net.0") for name, _ in network.named_modules())
    alive, total = alive_after_forward(network)
    assert feed_forwards <= alive <= total
    network.gradient_checkpointing = True
    assert alive_after_forward(network) == (0, total)
    network.gradient_checkpointing = False
    assert alive_after_forward(network) == (alive, total)


def test_it_is_off_until_set_and_kept_by_no_file() -> None:
    network = unet()
    assert not network.gradient_checkpointing
    names = set(network.state_dict())
    network.gradient_checkpointing = True
    assert network.gradient_checkpointing
    assert set(network.state_dict()) == names


def test_without_gradients_nothing_is_different() -> None:
    network = unet()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.randn(2, 5, 20)
    with torch.no_grad():
        plain = network(*inputs)
        network.gradient_checkpointing = True
        calls: list[nn.Module] = []
        hook = network.mid_block.resnets[0].conv1.register_forward_hook(
            lambda module, *_: calls.append(module)
        )
        assert network(*inputs).equal(plain)
        hook.remove()
    assert len(calls) == 1


def test_blocks_compile_whole() -> None:
    """No break in the graph: the compiler sees all of a block, recomputation included."""
    block = BasicTransformerBlock(16, 16, 2)
    x, text = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    (plain,) = torch.autograd.grad(
        block(x, block.attn2.keys_values(text)).sum(), [block.ff.net[2].weight]
    )
    block.gradient_checkpointing = True
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    out = compiled(x, block.attn2.keys_values(text))
    (again,) = torch.autograd.grad(out.sum(), [block.ff.net[2].weight])
    assert_close(again, plain)
