"""Whole pipelines against diffusers' on the same weights: every sampler, every family, narrow."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentdiff.checkpoint import ModelParts
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import TextEncoder, TextEncoders
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.pipeline import TextToImage
from latentdiff.rng import keyed_normal, picture_noise
from latentdiff.scheduler_config import SchedulerConfig

PROMPTS = ["a fox above a rocket", "(red) apple"]
SEEDS = [5, 2**32 - 1]
STEPS = 20

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("ddpm.DDPMScheduler", {"variance_type": "fixed_small"}),
    "ddim": ("ddim.DDIMScheduler", {}),
    "euler": ("euler_discrete.EulerDiscreteScheduler", {}),
    "euler_ancestral": ("euler_ancestral_discrete.EulerAncestralDiscreteScheduler", {}),
    "heun": ("heun_discrete.HeunDiscreteScheduler", {}),
    "dpm2": ("k_dpm_2_discrete.KDPM2DiscreteScheduler", {}),
    "dpmpp_2m": (
        "dpmsolver_multistep.DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"},
    ),
    "dpmpp_2m_sde": (
        "dpmsolver_multistep.DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"},
    ),
    "dpmpp_sde": ("dpmsolver_sde.DPMSolverSDEScheduler", {}),
    "unipc": ("unipc_multistep.UniPCMultistepScheduler", {"final_sigmas_type": "zero"}),
    "lcm": ("lcm.LCMScheduler", {}),
}
"""diffusers' counterpart of each sampler."""


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(one, dtype=int) for one in images])


def fresh_noise(seeds: list[int], index: int, shape: tuple[int, ...]) -> Tensor:
    return torch.cat([keyed_normal(seed, "sampler", index, [0], shape) for seed in seeds])


def inject_noise(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, shape: tuple[int, ...]
) -> None:
    """Let diffusers' stochastic schedulers draw what ours are given."""
    calls = iter(range(10**6))

    def half_steps(sigma: Tensor, following: Tensor) -> Tensor:
        """Of DPMSolverSDEScheduler, whose second half's noise holds the first's."""
        index = next(calls)
        noise = fresh_noise(SEEDS, index, shape)
        if index % 2 == 0:
            return noise
        first = (following / sigma) / (1 + following / sigma)
        return first.sqrt() * fresh_noise(SEEDS, index - 1, shape) + (1 - first).sqrt() * noise

    if hasattr(module, "BrownianTreeNoiseSampler"):
        monkeypatch.setattr(module, "BrownianTreeNoiseSampler", lambda *_, **__: half_steps)
    elif hasattr(module, "randn_tensor"):
        draw = lambda *_, **__: fresh_noise(SEEDS, next(calls), shape)  # noqa: E731
        monkeypatch.setattr(module, "randn_tensor", draw)


@pytest.mark.parametrize("sampler", list(SCHEDULERS))
def test_every_sampler_makes_diffusers_picture(
    tiny: TextToImage, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    name, options = SCHEDULERS[sampler]
    file, _, class_name = name.partition(".")
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
    oracle = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    oracle.set_progress_bar_config(disable=True)
    scheduler = getattr(module, class_name)
    oracle.scheduler = scheduler.from_config(oracle.scheduler.config, **options)
    steps = 10 if sampler == "lcm" else STEPS  # of which 50 is a multiple
    inject_noise(monkeypatch, module, (4, 8, 8))

    noise = picture_noise(SEEDS, (4, 8, 8))
    oracle.scheduler.set_timesteps(steps)
    if float(oracle.scheduler.init_noise_sigma) != 1:  # which begins at sigma_max, not variance 1
        sigma = tiny.parts.schedule.sampling_sigmas(steps)[0]
        noise = noise * torch.sqrt(1 + sigma**2) / oracle.scheduler.init_noise_sigma
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 3.0}
    theirs = oracle(PROMPTS, negative_prompt=["dark"] * 2, latents=noise, **settings).images
    ours = tiny.generate(
        PROMPTS, negative_prompt="dark", seed=SEEDS, sampler=sampler, weighted=False, **settings
    )
    assert pixels(ours).std() > 10
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 2


# The families


def tower(
    projected: bool, width: int, activation: str, layers: int = 3
) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=24,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def unet(**changes: Any) -> UNet:
    values: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet(UNetConfig(**(values | changes)))


@pytest.fixture(scope="module")
def family(
    tiny_parts: ModelParts,
    tokenizer_of: Callable[[int], Any],
    enliven: Callable[[Any], Any],
) -> Callable[[str], ModelParts]:
    """A family's structure, narrow, with random weights large enough to show in the picture."""

    def encoder(*arguments: Any) -> TextEncoder:
        return TextEncoder(tokenizer_of(77), enliven(tower(*arguments)))

    sd: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 1}
    added: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
    }

    def make(name: str) -> ModelParts:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            if name == "sd1":
                network, text = unet(), encoder(False, 32, "quick_gelu")
                config = SchedulerConfig(set_alpha_to_one=False, **sd)
            elif name == "sd2":
                network = unet(use_linear_projection=True, attention_head_dim=(4, 8))
                text = encoder(False, 32, "gelu")
                config = SchedulerConfig(
                    set_alpha_to_one=False, prediction_type="v_prediction", **sd
                )
            elif name == "sdxl":
                wide = added | {
                    "cross_attention_dim": 56,
                    "projection_class_embeddings_input_dim": 24 + 6 * 8,
                }
                network = unet(**wide)
                towers = [encoder(False, 32, "quick_gelu"), encoder(True, 24, "gelu")]
                config = SchedulerConfig(**sd)
                text = TextEncoders(towers)
            else:
                wide = added | {
                    "cross_attention_dim": 24,
                    "projection_class_embeddings_input_dim": 24 + 5 * 8,
                }
                network, text = unet(**wide), TextEncoders([encoder(True, 24, "gelu")])
                config = SchedulerConfig(**sd)
            pipelines = {
                "sdxl": "StableDiffusionXLPipeline",
                "refiner": "StableDiffusionXLImg2ImgPipeline",
            }
            return ModelParts(
                enliven(network),
                Autoencoder(tiny_parts.autoencoder.vae),
                text,
                config,
                pipeline=pipelines.get(name, "StableDiffusionPipeline"),
                force_zeros_for_empty_prompt=name == "sdxl",
                requires_aesthetics_score=name == "refiner",
            )

    return make


def opened(parts: ModelParts, path: Path, cls: type[DiffusionPipeline]) -> Any:
    TextToImage(parts).save(path)
    pipeline = cls.from_pretrained(path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("negative", ["", "dark"])
@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_stable_diffusion(
    family: Callable[[str], ModelParts],
    tmp_path: Path,
    name: str,
    clip_skip: int | None,
    negative: str,
) -> None:
    """With clip_skip unguided: diffusers skips the layers of the prompt alone, we as A1111 of the
    negative prompt too.
    """
    parts = family(name)
    oracle = opened(parts, tmp_path / name, StableDiffusionPipeline)
    # Where diffusers looks for the layers, and transformers 5 has them no longer.
    object.__setattr__(oracle.text_encoder, "text_model", oracle.text_encoder)
    settings: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0 if clip_skip is None else 1.0,
        "guidance_rescale": 0.7 if name == "sd2" else 0.0,
        "clip_skip": clip_skip,
    }
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = oracle(PROMPTS, negative_prompt=[negative] * 2, generator=generators, **settings)
    model = TextToImage.load(tmp_path / name)
    ours = model.generate(PROMPTS, negative_prompt=negative, seed=SEEDS, weighted=False, **settings)
    assert pixels(ours).std() > 10
    assert np.abs(pixels(ours) - pixels(theirs.images)).max() <= 2


SIZES: list[dict[str, Any]] = [
    {},
    {"original_size": (48, 90), "crops_coords_top_left": (3, 9), "target_size": (64, 32)},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("negative", [None, "dark"])
def test_sdxl(
    family: Callable[[str], ModelParts], tmp_path: Path, negative: str | None, sizes: dict[str, Any]
) -> None:
    """diffusers gives the negative prompt sizes of its own, by default those of the picture."""
    parts = family("sdxl")
    oracle = opened(parts, tmp_path / "xl", StableDiffusionXLPipeline)
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
    theirs = oracle(
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        **{f"negative_{key}": value for key, value in sizes.items()},
        **sizes,
        **settings,
    ).images
    model = TextToImage.load(tmp_path / "xl")
    ours = model.generate(
        PROMPTS, negative_prompt=negative or "", seed=SEEDS, weighted=False, **sizes, **settings
    )
    assert pixels(ours).std() > 10
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 2


def test_sdxls_refiner(
    family: Callable[[str], ModelParts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    mean = lambda self, generator=None: self.mean  # noqa: E731
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", mean)
    parts = family("refiner")
    oracle = opened(parts, tmp_path / "refiner", StableDiffusionXLImg2ImgPipeline)
    photo = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    settings: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "strength": 0.4,
        "aesthetic_score": 7.0,
        "negative_aesthetic_score": 1.5,
    }
    theirs = oracle(
        PROMPTS,
        image=[photo] * 2,
        negative_prompt=["dark"] * 2,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        **settings,
    ).images
    model = TextToImage.load(tmp_path / "refiner")
    ours = model.generate(
        PROMPTS, image=photo, negative_prompt="dark", seed=SEEDS, weighted=False, **settings
    )
    assert pixels(ours).std() > 10
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 2


# LoRA


def diffusers_naming(part: str, module: str) -> tuple[str, str]:
    return f"{part}.{module}.lora_A.weight", f"{part}.{module}.lora_B.weight"


def kohya_naming(part: str, module: str) -> tuple[str, str]:
    stem = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("naming", [diffusers_naming, kohya_naming])
def test_a_lora_makes_diffusers_picture(
    tiny_model: Path, tmp_path: Path, naming: Callable[[str, str], tuple[str, str]], fused: bool
) -> None:
    model = TextToImage.load(tiny_model)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for part, network in (
        ("unet", model.parts.unet),
        ("text_encoder", model.parts.towers["text_encoder"].model),
    ):
        for name, module in network.named_modules():
            if name.endswith(("to_q", "to_v", "to_out.0", "q_proj", "v_proj", "out_proj")):
                published = name if part == "unet" else f"text_model.{name}"
                down, up = naming(part, published)
                out, into = module.weight.shape
                state[down] = torch.randn(4, into, generator=generator) / into**0.5
                state[up] = torch.randn(out, 4, generator=generator) / 4
                if naming is kohya_naming:
                    state[down.partition(".")[0] + ".alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "style.safetensors")

    oracle = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    oracle.set_progress_bar_config(disable=True)
    oracle.load_lora_weights(str(tmp_path / "style.safetensors"), adapter_name="style")
    oracle.set_adapters(["style"], [0.8])
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = oracle(PROMPTS, generator=generators, **settings).images

    def made() -> np.ndarray:
        return pixels(
            model.generate(PROMPTS, seed=SEEDS, weighted=False, sampler="ddim", **settings)
        )

    before = made()
    assert model.load_lora(tmp_path / "style.safetensors", 0.8) == "style"
    if fused:
        model.adapters.fuse()
    assert np.abs(made() - pixels(theirs)).max() <= 2
    assert np.abs(made() - before).max() > 10
    if fused:
        model.adapters.unfuse()
    model.adapters.remove("style")
    assert (made() == before).all()
