"""LoRAs trained by peft: what is attached, and that everyone reads what is saved alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from latentdiff.errors import InputError
from latentdiff.lora import Adapters
from latentdiff.lora_files import read_lora
from latentdiff.models.blocks import BasicTransformerBlock
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.pipeline import TextToImage
from training.lora import LoRAConfig, adapted, attach, collect, save_lora

EVERYTHING = LoRAConfig(rank=3, alpha=5, targets=("attention", "feed_forward", "convolution"))
MATRICES = LoRAConfig(rank=4, targets=("attention", "feed_forward"))


def networks(pair: bool) -> nn.ModuleDict:
    """Of SD, or of SDXL with its pair of towers; diffusers' U-Net."""
    unet: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "attention_head_dim": 2,
    }
    if pair:
        unet |= {
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(
                sample_size=8, norm_num_groups=8, cross_attention_dim=32, layers_per_block=1, **unet
            ),
            "text_encoder": CLIPTextModel(clip()),
        }
        if pair:
            made["text_encoder_2"] = CLIPTextModelWithProjection(clip())
    return nn.ModuleDict(made).eval()


def clip() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def ours(theirs: nn.ModuleDict) -> nn.ModuleDict:
    """The same with our U-Net."""
    unet = UNet(UNetConfig.from_diffusers(dict(theirs["unet"].config)))
    unet.load_state_dict(theirs["unet"].state_dict())
    towers = {name: copy.deepcopy(part) for name, part in theirs.items() if name != "unet"}
    return nn.ModuleDict({"unet": unet, **towers}).eval()


def randomize(network: nn.Module) -> None:
    """As if it had learned."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapted(network):
            layer.up.normal_(0, 0.3, generator=generator)


@torch.no_grad()
def outputs(parts: nn.ModuleDict) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, hidden, t = noise(2, 4, 8, 8), noise(2, 5, 32), torch.tensor([7, 700])
    pooled, sizes = noise(2, 16), torch.tensor([[64.0, 64, 0, 8, 64, 64]] * 2)
    added = (pooled, sizes) if "text_encoder_2" in parts else ()
    unet = parts["unet"]
    if isinstance(unet, UNet):
        found = {"unet": unet(x, t, unet.condition(hidden, *added))}
    else:
        names = ("text_embeds", "time_ids")
        words = dict(zip(names, added, strict=False))
        found = {"unet": unet(x, t, hidden, added_cond_kwargs=words).sample}
    ids = torch.tensor([[1, 5, 9, 2], [1, 4, 2, 2]])
    for name in parts.keys() - {"unet"}:
        found[name], found[f"pooled {name}"] = parts[name](input_ids=ids)[:2]
    return found


# What is attached


@pytest.mark.parametrize("config", [EVERYTHING, MATRICES])
def test_only_adapters_are_trained_and_they_change_nothing_yet(config: LoRAConfig) -> None:
    network = ours(networks(pair=True))
    before, weights = outputs(network), {id(p) for p in network.parameters()}
    attach(network, config, seed=0)
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    layers = list(adapted(network))
    assert trained == {id(tensor) for layer in layers for tensor in (layer.down, layer.up)}
    assert not trained & weights
    assert {layer.part for layer in layers} == {"unet", "text_encoder", "text_encoder_2"}
    for name, value in outputs(network).items():
        assert value.equal(before[name])


def test_targets_are_the_modules_that_they_say() -> None:
    """Counted by what a U-Net of one transformer on the way down, two up and one between has."""
    theirs = networks(pair=False)

    def count(*targets: Any) -> dict[str, int]:
        network = ours(theirs)
        attach(network, LoRAConfig(targets=targets), seed=0)
        return {part: len(layers) for part, layers in collect(network).items()}

    assert count("attention") == {"unet": 4 * 8, "text_encoder": 2 * 4}
    assert count("feed_forward") == {"unet": 4 * 2, "text_encoder": 2 * 2}
    both = count("attention", "feed_forward")
    assert both == {"unet": 4 * 10, "text_encoder": 2 * 6}
    frozen = ours(theirs)
    frozen["text_encoder"].requires_grad_(False)
    attach(frozen, LoRAConfig(targets=("convolution",)), seed=0)
    kernels = {
        name
        for name, module in theirs["unet"].named_modules()
        if isinstance(module, nn.Conv2d) and ("resnets" in name or "samplers" in name)
    }
    assert {part: set(layers) for part, layers in collect(frozen).items()} == {"unet": kernels}
    assert not any(p.requires_grad for p in frozen["text_encoder"].parameters())


def test_initial_values_are_a_function_of_seed_and_name() -> None:
    def downs(seed: int, config: LoRAConfig = MATRICES) -> dict[tuple[str, str], Tensor]:
        network = ours(networks(pair=False))
        torch.manual_seed(seed + 100)
        state = torch.get_rng_state()
        attach(network, config, seed)
        assert torch.get_rng_state().equal(state)
        return {(layer.part, layer.name): layer.down.detach() for layer in adapted(network)}

    first, second, other = downs(0), downs(0), downs(1)
    fewer = downs(0, LoRAConfig(rank=4, targets=("attention",)))
    assert first.keys() == second.keys() > fewer.keys()
    assert len({tuple(value.flatten()[:4].tolist()) for value in first.values()}) == len(first)
    for key, value in first.items():
        assert value.equal(second[key])
        assert not value.equal(other[key])
        bound = value.shape[1] ** -0.5
        assert 0.5 * bound < value.abs().max() <= bound
        assert key not in fewer or value.equal(fewer[key])


def test_adapters_of_bfloat16_weights_are_fp32() -> None:
    network = ours(networks(pair=False)).to(torch.bfloat16)
    attach(network, EVERYTHING, seed=0)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    ids = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        plain = network["text_encoder"](input_ids=ids)[0]
        randomize(network)
        changed = network["text_encoder"](input_ids=ids)[0]
    assert plain.dtype == changed.dtype == torch.bfloat16
    assert not torch.allclose(plain, changed, rtol=0.01)


def test_a_text_encoder_other_than_clip_is_refused() -> None:
    config = BertConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    network = nn.ModuleDict({"text_encoder": BertModel(config)})
    with pytest.raises(InputError, match="The text_encoder has no attention that a LoRA can adapt"):
        attach(network, LoRAConfig(), seed=0)


# Training


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradients_reach_adapters_only_also_with_checkpointing() -> None:
    network = ours(networks(pair=False))
    attach(network, EVERYTHING.model_copy(update={"targets": MATRICES.targets}), seed=0)
    randomize(network)
    unet, tower = network["unet"], network["text_encoder"]
    assert isinstance(unet, UNet)

    def gradients() -> dict[str, Tensor]:
        network.zero_grad(set_to_none=True)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        hidden = tower(input_ids=torch.tensor([[1, 5, 9, 2], [1, 4, 2, 2]])).last_hidden_state
        unet(x, torch.tensor([7.0, 700.0]), hidden).square().sum().backward()
        return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(plain) == 2 * len(list(adapted(network)))
    assert all("lora_" in name and value.any() for name, value in plain.items())
    unet.gradient_checkpointing = True
    tower.train().gradient_checkpointing_enable({"use_reentrant": False})
    for name, value in gradients().items():
        assert value.equal(plain[name])


def test_an_adapted_block_compiles_whole() -> None:
    network = nn.ModuleDict({"unet": nn.ModuleDict({"a": BasicTransformerBlock(16, 16, 2)})})
    attach(network, MATRICES, seed=0)
    randomize(network)
    block: Any = network["unet"]["a"]  # type: ignore[index]
    x, text = torch.randn(2, 4, 16), torch.randn(2, 3, 16)

    def run(x: Tensor, text: Tensor) -> Tensor:
        return block(x, block.attn2.keys_values(text))

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert_close(compiled(x, text), run(x, text))


# Files


@pytest.mark.parametrize("config", [EVERYTHING, MATRICES])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_diffusers_and_latentdiff_read_what_was_trained(
    pair: bool, config: LoRAConfig, tmp_path: Path
) -> None:
    """alpha included, which is in the file's header."""
    theirs = networks(pair)
    network, fresh = ours(theirs), ours(theirs)
    plain = outputs(network)
    attach(network, config, seed=0)
    randomize(network)
    expected = outputs(network)
    save_lora(tmp_path / "lora.safetensors", network)

    Adapters(fresh).add("lora", read_lora(tmp_path / "lora.safetensors"))  # type: ignore[arg-type]
    parts = dict(theirs.items()) | dict.fromkeys(["vae", "tokenizer", "feature_extractor"])
    parts["scheduler"] = DDIMScheduler(steps_offset=1, clip_sample=False)
    if pair:
        pipeline = StableDiffusionXLPipeline(tokenizer_2=None, add_watermarker=False, **parts)
    else:
        pipeline = StableDiffusionPipeline(
            safety_checker=None, requires_safety_checker=False, **parts
        )
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    for name, value in expected.items():
        assert not torch.allclose(value, plain[name], rtol=0.01)
        assert_close(outputs(fresh)[name], value, rtol=1e-4, atol=1e-5)
        assert_close(outputs(theirs)[name], value, rtol=1e-4, atol=1e-5)


def test_names_are_diffusers(tmp_path: Path) -> None:
    network = ours(networks(pair=True))
    attach(network, LoRAConfig(), seed=0)
    save_lora(tmp_path / "lora.safetensors", network)
    names = set(load_file(tmp_path / "lora.safetensors"))
    assert {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj.lora_A.weight",
    } <= names


def test_pictures_are_those_of_the_attached_network(tiny_model: Path, tmp_path: Path) -> None:
    model, reader = TextToImage.load(tiny_model), TextToImage.load(tiny_model)
    network = nn.ModuleDict(
        {"unet": model.parts.unet, "text_encoder": model.parts.towers["text_encoder"].model}
    )
    attach(network, EVERYTHING, seed=0)

    def picture(of: TextToImage) -> np.ndarray:
        image: Any = of.generate("a red fox", seed=3, num_inference_steps=3, guidance_scale=4.0)
        return np.asarray(image).astype(float)

    plain = picture(reader)
    np.testing.assert_array_equal(picture(model), plain)
    randomize(network)
    save_lora(tmp_path / "lora.safetensors", network)
    reader.load_lora(tmp_path / "lora.safetensors")
    changed = picture(model)
    assert np.abs(changed - plain).mean() > 2
    np.testing.assert_allclose(picture(reader), changed, atol=1)


# Going on from a file


def test_it_goes_on_from_a_saved_lora(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    first, second = ours(networks(pair=True)), ours(networks(pair=True))
    attach(first, EVERYTHING, seed=0)
    randomize(first)
    save_lora(file, first)
    attach(second, EVERYTHING.model_copy(update={"init_from": file}), seed=1)
    for mine, saved in zip(adapted(second), adapted(first), strict=True):
        assert (mine.part, mine.name, mine.alpha) == (saved.part, saved.name, saved.alpha)
        assert mine.down.equal(saved.down)
        assert mine.up.equal(saved.up)
        assert mine.down.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "alpha": 5}, r"it has rank 3 for unet\.down_blocks"),
        ({"rank": 3, "alpha": 6}, "its alpha is 5, not 6"),
        ({"rank": 3, "alpha": 5, "targets": ("attention",)}, "which is not adapted here"),
        (
            {"rank": 3, "alpha": 5, "targets": ("attention", "feed_forward", "convolution")},
            "it has nothing for unet",
        ),
    ],
)
def test_a_saved_lora_of_another_shape_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    saved, network = ours(networks(pair=False)), ours(networks(pair=False))
    attach(saved, EVERYTHING.model_copy(update={"targets": MATRICES.targets}), seed=0)
    save_lora(file, saved)
    targets = {"targets": MATRICES.targets} | options
    with pytest.raises(InputError, match=message):
        attach(network, LoRAConfig(init_from=file, **targets), seed=0)
