"""LoRA files in every naming, against diffusers' own loader (with peft) on the same networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentdiff.lora import Adapters, LoRA, LoRALayer
from latentdiff.lora_files import read_lora, save_lora
from latentdiff.models.unet import UNet, UNetConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:The following alpha_pattern keys did not match"
)

Entry = tuple[str, str, Tensor, Tensor]
"""Part, module by its published name, down, up."""
Naming = Callable[[str, str], tuple[str, str]]
"""Part and module to the keys of down and up."""


@dataclass
class Family:
    """Networks of one kind of model, diffusers' and ours with equal weights."""

    pipeline: Any
    parts: dict[str, nn.Module]

    def theirs(self) -> dict[str, Tensor]:
        """Outputs of diffusers' networks."""
        return _outputs({name: getattr(self.pipeline, name) for name in self.parts}, _their_unet)

    def ours(self) -> dict[str, Tensor]:
        return _outputs(self.parts, _our_unet)


def _their_unet(unet: Any, x: Tensor, t: Tensor, hidden: Tensor, added: Any) -> Tensor:
    return unet(x, t, hidden, added_cond_kwargs=added).sample


def _our_unet(unet: UNet, x: Tensor, t: Tensor, hidden: Tensor, added: Any) -> Tensor:
    pooled, sizes = added.get("text_embeds"), added.get("time_ids")
    return unet(x, t, unet.condition(hidden, pooled, sizes))


@torch.no_grad()
def _outputs(parts: dict[str, nn.Module], run: Callable[..., Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, hidden, added = noise(2, 4, 8, 8), noise(2, 5, 32), {}
    if "text_encoder_2" in parts:
        sizes = torch.tensor([[64.0, 64, 0, 8, 64, 64]]).repeat(2, 1)
        added = {"text_embeds": noise(2, 16), "time_ids": sizes}
    outputs = {"unet": run(parts["unet"], x, torch.tensor([7, 700]), hidden, added)}
    ids = torch.tensor([[1, 5, 9, 2], [1, 4, 2, 2]])
    for name in parts.keys() - {"unet"}:
        outputs[name], pooled = parts[name](input_ids=ids)[:2]
        outputs[f"pooled {name}"] = pooled
    return outputs


def family(unet: dict[str, Any], pair: bool) -> Family:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        their_unet = UNet2DConditionModel(
            sample_size=8, norm_num_groups=8, cross_attention_dim=32, layers_per_block=2, **unet
        )
        towers = {"text_encoder": CLIPTextModel(_clip())}
        if pair:
            towers["text_encoder_2"] = CLIPTextModelWithProjection(_clip())
    our_unet = UNet(UNetConfig.from_diffusers(dict(their_unet.config)))
    our_unet.load_state_dict(their_unet.state_dict())
    parts = {"unet": our_unet, **copy.deepcopy(towers)}
    empty = dict.fromkeys(["vae", "tokenizer", "feature_extractor"])
    networks = {
        "unet": their_unet,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        **towers,
        **empty,
    }
    if pair:
        pipeline = StableDiffusionXLPipeline(tokenizer_2=None, add_watermarker=False, **networks)
    else:
        pipeline = StableDiffusionPipeline(
            safety_checker=None, requires_safety_checker=False, **networks
        )
    for network in (*parts.values(), their_unet, *towers.values()):
        network.eval()
    return Family(pipeline, parts)


def _clip() -> CLIPTextConfig:
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


@pytest.fixture(scope="module")
def sd() -> Family:
    """Narrow SD 1.x."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "attention_head_dim": 2,
    }
    return family(blocks, pair=False)


@pytest.fixture(scope="module")
def sdxl() -> Family:
    """Narrow SDXL, its structure as published but for the number of transformer blocks."""
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 32),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 4 * 6 + 16,
    }
    return family(blocks, pair=True)


ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
LINEAR = (*ATTENTION, ".proj_in", ".proj_out", ".ff.net.0.proj", ".ff.net.2", ".fc1", ".fc2")
CONVOLUTIONS = (".conv1", ".conv2", ".conv_shortcut", ".conv", ".time_emb_proj")


def entries(family: Family, endings: tuple[str, ...], rank: int = 4, seed: int = 0) -> list[Entry]:
    """Random matrices for every module of diffusers' networks with such a name."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in family.parts:
        for name, module in getattr(family.pipeline, part).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and f".{name}".endswith(endings):
                if part == "text_encoder":  # published names, not those of transformers 5
                    name = f"text_model.{name}"
                out, into, *kernel = module.weight.shape
                down = torch.randn(rank, into, *kernel, generator=generator) / into**0.5
                up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator) / 4
                found.append((part, name, down, up))
    return found


def peft_naming(part: str, module: str) -> tuple[str, str]:
    return f"{part}.{module}.lora_A.weight", f"{part}.{module}.lora_B.weight"


def diffusers_naming(part: str, module: str) -> tuple[str, str]:
    layer = "lora" if part == "unet" else "lora_linear_layer"
    return f"{part}.{module}.{layer}.down.weight", f"{part}.{module}.{layer}.up.weight"


def old_naming(part: str, module: str) -> tuple[str, str]:
    """Attention processors with LoRA, before diffusers 0.18."""
    attention, _, name = module.removesuffix(".0").rpartition(".")
    if part == "unet":
        stem = f"{part}.{attention}.processor.{name}_lora"
    else:
        stem = f"{part}.{attention}.to_{name.removesuffix('_proj')}_lora"
    return f"{stem}.down.weight", f"{stem}.up.weight"


def kohya_naming(part: str, module: str) -> tuple[str, str]:
    stem = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


def kohya_xl_naming(part: str, module: str) -> tuple[str, str]:
    """With the U-Net named as in Stability's repository, as sd-scripts trains it."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    if part == "unet":
        for ours, original in ORIGINAL.items():
            if f"{module}.".startswith(ours):
                module = f"{original}{module}.".replace(ours, "").removesuffix(".")
        for ours, original in ORIGINAL_LAYERS.items():
            module = module.replace(f".{ours}", f".{original}")
    stem = prefixes[part] + module.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


def _original_blocks() -> Iterator[tuple[str, str]]:
    """The list of Stability's blocks, in order, by diffusers' names."""
    yield "conv_in.", "input_blocks.0.0."
    for number, (level, place) in enumerate((a, b) for a in range(3) for b in range(3)):
        if place < 2:
            yield f"down_blocks.{level}.resnets.{place}.", f"input_blocks.{number + 1}.0."
            yield f"down_blocks.{level}.attentions.{place}.", f"input_blocks.{number + 1}.1."
        elif level < 2:
            yield f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{number + 1}.0.op."
        yield f"up_blocks.{level}.resnets.{place}.", f"output_blocks.{number}.0."
        yield f"up_blocks.{level}.attentions.{place}.", f"output_blocks.{number}.1."
        if place == 2 and level < 2:
            yield f"up_blocks.{level}.upsamplers.0.", f"output_blocks.{number}.2."
    for name, number in (("resnets.0.", 0), ("attentions.0.", 1), ("resnets.1.", 2)):
        yield f"mid_block.{name}", f"middle_block.{number}."
    yield "conv_out.", "out.2."
    yield "time_embedding.linear_1.", "time_embed.0."
    yield "time_embedding.linear_2.", "time_embed.2."
    yield "add_embedding.linear_1.", "label_emb.0.0."
    yield "add_embedding.linear_2.", "label_emb.0.2."


ORIGINAL = dict(_original_blocks())
ORIGINAL_LAYERS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def write(
    path: Path, found: list[Entry], naming: Naming, alpha: float | None = None, **other: Tensor
) -> Path:
    state = dict(other)
    for part, module, down, up in found:
        down_key, up_key = naming(part, module)
        state |= {down_key: down.contiguous(), up_key: up.contiguous()}
        if alpha is not None:
            state[down_key.partition(".")[0] + ".alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return path


def check(family: Family, path: Path) -> None:
    """Same outputs as diffusers makes of the file, other than without it, and these back again."""
    before = family.ours()
    torch.testing.assert_close(before, family.theirs(), rtol=1e-5, atol=1e-5)
    adapters = Adapters(family.parts)
    adapters.add("a", read_lora(path))
    family.pipeline.load_lora_weights(str(path), adapter_name="a")
    try:
        theirs = family.theirs()
    finally:
        family.pipeline.unload_lora_weights()
    ours = family.ours()
    adapters.remove("a")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all((ours[name] - before[name]).abs().max() > 0.01 for name in before)
    torch.testing.assert_close(family.ours(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("naming", "endings", "alpha"),
    [
        (peft_naming, LINEAR, None),
        (diffusers_naming, LINEAR, None),
        (old_naming, ATTENTION, None),
        (kohya_naming, LINEAR, None),
        (kohya_naming, LINEAR, 2.5),
        (kohya_naming, LINEAR + CONVOLUTIONS, 2.5),
    ],
)
def test_sd_equals_diffusers(
    sd: Family, tmp_path: Path, naming: Naming, endings: tuple[str, ...], alpha: float | None
) -> None:
    check(sd, write(tmp_path / "a.safetensors", entries(sd, endings), naming, alpha))


ENDS = (".conv_in", ".conv_out", ".linear_1", ".linear_2")


@pytest.mark.parametrize(
    ("naming", "endings", "alpha"),
    [
        (peft_naming, LINEAR, None),
        (diffusers_naming, LINEAR, None),
        (kohya_xl_naming, LINEAR, 3.0),
        (kohya_xl_naming, LINEAR + CONVOLUTIONS + ENDS, 3.0),
    ],
)
def test_sdxl_equals_diffusers(
    sdxl: Family, tmp_path: Path, naming: Naming, endings: tuple[str, ...], alpha: float | None
) -> None:
    check(sdxl, write(tmp_path / "a.safetensors", entries(sdxl, endings), naming, alpha))


def test_two_with_weights_equal_diffusers(sd: Family, tmp_path: Path) -> None:
    one = write(tmp_path / "1.safetensors", entries(sd, LINEAR, 4, 1), peft_naming)
    two = write(tmp_path / "2.safetensors", entries(sd, ATTENTION, 3, 2), kohya_naming, 2.0)
    before = sd.ours()
    adapters = Adapters(sd.parts)
    adapters.add("one", read_lora(one), 0.7)
    adapters.add("two", read_lora(two), 0.4)
    attached = sd.ours()
    adapters.fuse()
    fused = sd.ours()
    adapters.unfuse()
    adapters.remove("one")
    adapters.remove("two")
    sd.pipeline.load_lora_weights(str(one), adapter_name="one")
    sd.pipeline.load_lora_weights(str(two), adapter_name="two")
    try:
        sd.pipeline.set_adapters(["one", "two"], [0.7, 0.4])
        expected = sd.theirs()
    finally:
        sd.pipeline.unload_lora_weights()
    torch.testing.assert_close(attached, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
    assert all((attached[name] - before[name]).abs().max() > 0.01 for name in before)
    torch.testing.assert_close(sd.ours(), before, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_k": 9}}])
def test_what_diffusers_training_writes(
    sd: Family, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Alpha is in the file's header alone."""
    layers, configs = {}, {}
    for part, targets in (("unet", ["to_q", "to_k", "conv1"]), ("text_encoder", ["q_proj", "fc1"])):
        network = copy.deepcopy(getattr(sd.pipeline, part))
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings)
        network.add_adapter(config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(network)
        configs[f"{part}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **configs)
    check(sd, tmp_path)


def random_lora(family: Family, ranks: tuple[int, ...], alphas: tuple[float, ...]) -> LoRA:
    """Ranks and alphas taken in turn."""
    lora: LoRA = {}
    for rank in dict.fromkeys(ranks):
        for number, entry in enumerate(entries(family, LINEAR + CONVOLUTIONS, rank)):
            part, name, down, up = entry
            if ranks[number % len(ranks)] == rank:
                layer = LoRALayer(down, up.flatten(1), alphas[number % len(alphas)])
                lora.setdefault(part, {})[name] = layer
    return lora


def assert_equal(lora: LoRA, other: LoRA) -> None:
    assert {part: set(layers) for part, layers in lora.items()} == {
        part: set(layers) for part, layers in other.items()
    }
    for part, layers in lora.items():
        for name, layer in layers.items():
            torch.testing.assert_close(layer.down, other[part][name].down, rtol=0, atol=0)
            torch.testing.assert_close(layer.up, other[part][name].up, rtol=0, atol=0)
            assert layer.alpha == other[part][name].alpha


@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [((4,), (4.0,)), ((4,), (2.5,)), ((4, 4, 3, 7), (1.0, 2.5, 2.5, 4.0, 2.5))],
)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_saved_comes_back_and_diffusers_reads_it(
    kind: str,
    ranks: tuple[int, ...],
    alphas: tuple[float, ...],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    family = request.getfixturevalue(kind)
    lora = random_lora(family, ranks, alphas)
    save_lora(lora, tmp_path / "new" / "a.safetensors")
    assert_equal(read_lora(tmp_path / "new" / "a.safetensors"), lora)
    check(family, tmp_path / "new" / "a.safetensors")


def test_saved_into_a_directory_in_its_own_dtype(sd: Family, tmp_path: Path) -> None:
    half = {
        part: {
            name: LoRALayer(layer.down.half(), layer.up.half().requires_grad_(), layer.alpha)
            for name, layer in layers.items()
        }
        for part, layers in random_lora(sd, (4,), (4.0,)).items()
    }
    for _ in range(2):
        save_lora(half, tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == "pytorch_lora_weights.safetensors"
    stored = load_file(file)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.equal(stored[f"unet.{name}.lora_A.weight"], half["unet"][name].down)
    assert_equal(read_lora(tmp_path), half)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
