"""configs/laion/: each takes two steps from its cache, with a narrow model of its family."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from latentdiff.checkpoint import ModelParts, load_model, save_model
from latentdiff.config import load_yaml, read_yaml
from latentdiff.data.cache import LatentCache
from latentdiff.data.order import Share
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import TextEncoder, TextEncoders
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.scheduler_config import SchedulerConfig
from training import cache_latents, diffusion
from training.cache_latents import CacheConfig
from training.diffusion import LORA_FILE, DiffusionConfig, DiffusionProgram
from training.laion.config import LaionConfig
from training.network import Text

ROOT = Path(__file__).parents[3] / "configs" / "laion"
FINE_TUNES = {
    "sd15_finetune": "sd1",
    "sd21_finetune": "sd2",
    "sdxl_finetune": "sdxl",
    "sd15_lora": "sd1",
}
SIDES = {"sd15_finetune": 512, "sd21_finetune": 768, "sdxl_finetune": 1024, "sd15_lora": 512}
SHAPES = [(160, 120), (120, 160)]
PICTURES = 8


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


def tower(projected: bool, width: int, activation: str) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=24,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


@pytest.fixture(scope="module")
def models(
    tiny_parts: ModelParts,
    tokenizer_of: Callable[[int], Any],
    enliven: Callable[[Any], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Directories sd1, sd2 and sdxl: each family's structure, narrow."""

    def encoder(*arguments: Any) -> TextEncoder:
        return TextEncoder(tokenizer_of(77), enliven(tower(*arguments)))

    with torch.random.fork_rng():
        torch.manual_seed(2)
        made = {
            "sd1": (unet(), encoder(False, 32, "quick_gelu"), "epsilon"),
            "sd2": (
                unet(use_linear_projection=True, attention_head_dim=(4, 8)),
                encoder(False, 32, "gelu"),
                "v_prediction",
            ),
            "sdxl": (
                unet(
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    use_linear_projection=True,
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                    transformer_layers_per_block=(1, 2),
                    cross_attention_dim=56,
                    projection_class_embeddings_input_dim=24 + 6 * 8,
                ),
                TextEncoders([encoder(False, 32, "quick_gelu"), encoder(True, 24, "gelu")]),
                "epsilon",
            ),
        }
        directory = tmp_path_factory.mktemp("narrow")
        for name, (network, text, kind) in made.items():
            parts = ModelParts(
                enliven(network),
                Autoencoder(tiny_parts.autoencoder.vae),
                text,
                SchedulerConfig(prediction_type=kind),
                pipeline=f"StableDiffusion{'XL' if name == 'sdxl' else ''}Pipeline",
                force_zeros_for_empty_prompt=name == "sdxl",
            )
            save_model(parts, directory / name)
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of each shape, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(PICTURES * len(SHAPES)):
        width, height = SHAPES[number % len(SHAPES)]
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}")
    return folder


def run(program: Any, file: Path, **overrides: Any) -> None:
    """The program's own main; `a__b=1` means `--a.b 1`."""
    words = ["--config", str(file)]
    for name, value in overrides.items():
        words += ["--" + name.replace("__", "."), str(value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.__name__, *words])
        program.main()


@pytest.mark.parametrize("name", FINE_TUNES)
def test_a_fine_tune_takes_two_steps_in_narrow_form(
    name: str,
    models: Path,
    pictures: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    model = models / FINE_TUNES[name]
    run(
        cache_latents,
        ROOT / name / "cache_latents.yaml",
        run_dir=tmp_path / "latents",
        source=f"{{type: folder, path: {pictures}}}",
        sizes__resolution=128,
        sizes__step=32,
        model=model,
        workers=0,
    )
    cache = LatentCache(tmp_path / "latents")
    assert sorted(filter(None, cache.counts)) == [PICTURES, PICTURES]
    run(
        diffusion,
        ROOT / name / "diffusion.yaml",
        run_dir=tmp_path / "run",
        max_steps=2,
        batch_size=4,
        micro_batch_size=2,
        checkpoint_every=2,
        sample_every=2,
        optimizer__warmup_steps=0,
        init_from=model,
        cache=tmp_path / "latents",
        sample_prompts="[a fox]",
    )
    made = tmp_path / "run" / "model"
    if "lora" in name:
        with safe_open(made / LORA_FILE, framework="pt") as file:
            sizes = {min(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert sizes == {16}
        return
    before, after = load_model(str(model)), load_model(str(made))
    assert after.unet.config == before.unet.config
    assert after.scheduler_config.prediction_type == before.scheduler_config.prediction_type
    changed = [
        not old.equal(new)
        for old, new in zip(before.unet.parameters(), after.unet.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) / 2
    for name_of, tower_before in before.towers.items():
        for old, new in zip(
            tower_before.model.parameters(), after.towers[name_of].model.parameters(), strict=True
        ):
            assert new.equal(old.half().float())  # as it was saved


@pytest.mark.parametrize(("precision", "close"), [("no", 1e-4), ("bf16", 0.05)])
def test_a_student_of_sdxl_hears_what_its_teacher_hears(
    models: Path, pictures: Path, tmp_path: Path, precision: str, close: float
) -> None:
    """Two text encoders, zeros for the empty caption, sizes that bf16 cannot tell apart."""
    config = DiffusionConfig.model_validate(
        {
            "run_dir": tmp_path,
            "seed": 0,
            "max_steps": 1,
            "batch_size": 2,
            "checkpoint_every": 1,
            "sample_every": 1,
            "mixed_precision": precision,
            "init_from": str(models / "sdxl"),
            "images": {
                "source": {"type": "folder", "path": pictures},
                "sizes": {"resolution": 128, "step": 32},
            },
            "optimizer": {"learning_rate": 1e-3},
            "sample_prompts": ["a fox"],
            "distillation": {"guidance_scale": 4.0},
        }
    )
    program = DiffusionProgram(config)
    assert program.distillation is not None
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.8, 5.0])
    sizes_of = torch.tensor([[1365, 1023, 0, 259, 1365, 1023], [771, 1365, 3, 0, 1365, 771]])
    ids = torch.stack([program.network.tokenize(text) for text in ("a fox", "a red fox")])
    said = Text(ids, sizes_of, torch.zeros(2, dtype=torch.bool))
    nothing = Text(program.empty.expand_as(ids), sizes_of, torch.ones(2, dtype=torch.bool))
    denoiser = Denoiser(program.network, program.parts.schedule, program.parts.parameterization)
    with torch.no_grad():
        empty, full = denoiser(x, sigma, nothing), denoiser(x, sigma, said)
        guided = program.distillation.teacher(x, sigma, said)
    expected = empty + 4 * (full - empty)
    assert (full - empty).abs().max() > 0.1
    assert (guided - expected).norm() < close * (expected - x).norm()


@pytest.mark.parametrize("name", FINE_TUNES)
def test_the_three_files_of_a_fine_tune_agree(name: str) -> None:
    laion = load_yaml(LaionConfig, ROOT / name / "laion.yaml")
    cache = load_yaml(CacheConfig, ROOT / name / "cache_latents.yaml")
    trained = load_yaml(DiffusionConfig, ROOT / name / "diffusion.yaml")
    assert laion.select.family == "relaion2b_en_research_safe"
    assert not laion.select.acknowledge_withdrawn
    assert laion.download.local_hosts == ()
    assert cache.source.path == laion.directory / "lock.parquet"
    assert laion.dedup.sizes == cache.sizes
    assert cache.sizes.resolution == SIDES[name] == laion.select.filters.min_side
    assert laion.dedup.min_side == SIDES[name]
    assert trained.cache == cache.run_dir
    assert trained.init_from == cache.model
    assert trained.objective.min_snr_gamma == 5


@pytest.mark.parametrize("name", FINE_TUNES)
@pytest.mark.parametrize("processes", [1, 8, 32])
def test_one_gpu_eight_and_four_machines_share_a_batch_evenly(name: str, processes: int) -> None:
    config = load_yaml(DiffusionConfig, ROOT / name / "diffusion.yaml")
    assert config.micro_batch_size is not None
    Share(0, processes, config.micro_batch_size).check(config.batch_size)


@pytest.mark.parametrize("name", ["openclipart", "sprites"])
def test_the_whole_runs_files_agree(name: str) -> None:
    laion = load_yaml(LaionConfig, ROOT / name / "laion.yaml")
    values = {path.stem: read_yaml(path) for path in (ROOT / name).glob("*.yaml")}
    lock = str(laion.directory / "lock.parquet")
    sources = [
        values["cache_latents"]["source"],
        *(values["clip"]["pictures"][side] for side in ("source", "held_out")),
        values["retrieval"]["source"],
    ]
    assert {source["path"] for source in sources} == {lock}
    splits = [source.get("split", "train") for source in sources]
    assert splits == ["train", "train", "validation", "validation"]
    assert values["retrieval"]["clip"] == f"{values['clip']['run_dir']}/model"
    assert values["retrieval"]["models"]["after"] == f"{values['diffusion']['run_dir']}/model"
    assert laion.dedup.sizes.resolution == values["cache_latents"]["sizes"]["resolution"]
