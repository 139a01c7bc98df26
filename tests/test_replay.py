"""The command `latentdiff replay`, and the settings that only some models read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from latentdiff.checkpoint import ModelParts
from latentdiff.cli import main
from latentdiff.lora import LoRALayer
from latentdiff.lora_files import save_lora
from latentdiff.models.text_encoder import TextEncoder, TextEncoders
from latentdiff.models.unet import UNet
from latentdiff.pipeline import TextToImage
from latentdiff.recipe import Recipe, model_hash, read_recipe
from latentdiff.scheduler_config import SchedulerConfig


def generate(model: Path, *arguments: str) -> None:
    main(["generate", "--model", str(model), "--steps", "2", *arguments])


def replay(model: Path, picture: Path, *arguments: str) -> Image.Image:
    """The picture made again, beside `picture`."""
    again = picture.with_name("again.png")
    main(["replay", str(picture), "--model", str(model), *arguments, "--output", str(again)])
    with Image.open(again) as image:
        image.load()
        return image


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def assert_same(first: Path, again: Image.Image) -> None:
    with Image.open(first) as image:
        assert image.tobytes() == again.tobytes()
        assert image.info == again.info


def assert_other(first: Path, again: Image.Image) -> None:
    with Image.open(first) as image:
        assert np.abs(np.asarray(image, int) - np.asarray(again, int)).max() > 3


def test_makes_the_third_of_a_batch_again(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-images", "3", "--seed", "5", "--sampler", "dpmpp_sde", "--spacing", "karras"]
    generate(tiny_model, "(fox:1.2)", *options, "--output", str(tmp_path / "a.png"))
    third, again = tmp_path / "a-3.png", tmp_path / "again.png"
    main(["replay", str(third), "--model", str(tiny_model), "--output", str(again)])
    assert capsys.readouterr().err == ""
    with Image.open(third) as first, Image.open(again) as second:
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
        assert first.info == second.info


def test_with_another_model_warns(
    tiny: TextToImage, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tiny_model, "fox", "--output", str(tmp_path / "a.png"))
    tiny.save(tmp_path / "half", torch.float16)
    out = str(tmp_path / "b.png")
    main(["replay", str(tmp_path / "a.png"), "--model", str(tmp_path / "half"), "--output", out])
    assert "warning: The picture was made with another model" in capsys.readouterr().err


def test_asks_for_what_is_not_in_the_file(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, made = tmp_path / "photo.png", tmp_path / "made.png"
    Image.new("RGB", (64, 64), "red").save(photo)
    generate(tiny_model, "fox", "--image", str(photo), "--strength", "1", "--output", str(made))
    capsys.readouterr()
    replay = ["replay", str(made), "--model", str(tiny_model), "--output", str(tmp_path / "b.png")]
    assert "started from 'photo.png'; give it with --image" in fails(capsys, *replay)
    main([*replay, "--image", str(photo)])
    with Image.open(made) as first, Image.open(tmp_path / "b.png") as second:
        assert first.tobytes() == second.tobytes()
    capsys.readouterr()
    assert "holds no recipe" in fails(capsys, "replay", str(photo))


def lora_file(path: Path, seed: int) -> Path:
    """A LoRA of one layer of the tiny U-Net that shows in its pictures."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 48), (32, 2)))
    save_lora({"unet": {layer: LoRALayer(down, up, 2.0)}}, path)
    return path


class TestLoras:
    @pytest.fixture
    def loras(self, tmp_path: Path) -> tuple[Path, Path]:
        """Two files; the second has a colon and a number in its path, like a weight."""
        first = lora_file(tmp_path / "ink.safetensors", 1)
        second = tmp_path / "snow:2"
        second.mkdir()
        return first, lora_file(second / "pytorch_lora_weights.safetensors", 2).parent

    @pytest.fixture
    def made(
        self,
        tiny_model: Path,
        tmp_path: Path,
        loras: tuple[Path, Path],
        capsys: pytest.CaptureFixture[str],
    ) -> Path:
        path = tmp_path / "made.png"
        options = ["--lora", f"{loras[0]}:0.5", "--lora", f"{loras[1]}:-0.75"]
        generate(tiny_model, "fox", "--seed", "1", *options, "--output", str(path))
        assert capsys.readouterr().err == ""
        assert [lora.weight for lora in read_recipe(path).loras] == [0.5, -0.75]
        return path

    def test_weights_are_the_recipes(
        self,
        made: Path,
        loras: tuple[Path, Path],
        tiny_model: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        names = ["--lora", str(loras[0]), "--lora", str(loras[1])]
        assert_same(made, replay(tiny_model, made, *names))
        names = ["--lora", f"{loras[0]}:0.5", "--lora", f"{loras[1]}:3"]
        assert_other(made, replay(tiny_model, made, *names))
        assert capsys.readouterr().err == ""

    def test_another_file_warns(
        self,
        made: Path,
        loras: tuple[Path, Path],
        tiny_model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        other = lora_file(tmp_path / "b" / "ink.safetensors", 3)
        names = ["--lora", str(other), "--lora", str(loras[1])]
        assert_other(made, replay(tiny_model, made, *names))
        (line,) = capsys.readouterr().err.splitlines()
        assert "warning: The picture was made with another LoRA (ink.safetensors), of" in line
        assert model_hash(loras[0])[:10] in line
        assert model_hash(other)[:10] in line

    def test_each_must_be_named(
        self, made: Path, loras: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = fails(capsys, "replay", str(made), "--lora", str(loras[0]))
        assert "these LoRAs: ink.safetensors:0.5, snow:2:-0.75; name each" in message


class TestVae:
    @pytest.fixture
    def vae(self, tiny_parts: ModelParts, tmp_path: Path) -> Path:
        return self.another(tiny_parts, tmp_path / "vae", 0.9)

    def another(self, parts: ModelParts, path: Path, factor: float) -> Path:
        vae = AutoencoderKL.from_config(parts.autoencoder.vae.config)
        state = {name: factor * value for name, value in parts.autoencoder.vae.state_dict().items()}
        vae.load_state_dict(state)
        vae.save_pretrained(path)
        return path

    def test_it_is_asked_for_and_compared(
        self,
        vae: Path,
        tiny_parts: ModelParts,
        tiny_model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        made = tmp_path / "made.png"
        generate(tiny_model, "fox", "--seed", "1", "--vae", str(vae), "--output", str(made))
        capsys.readouterr()
        message = fails(capsys, "replay", str(made), "--model", "no")
        assert f"another VAE than the model's own, of hash {model_hash(vae)[:10]}." in message
        assert "Give it with --vae." in message
        assert_same(made, replay(tiny_model, made, "--vae", str(vae)))
        assert capsys.readouterr().err == ""
        other = self.another(tiny_parts, tmp_path / "other", 0.8)
        assert_other(made, replay(tiny_model, made, "--vae", str(other)))
        assert "warning: The picture was made with another VAE, of" in capsys.readouterr().err

    def test_one_that_the_recipe_has_not_warns(
        self, vae: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = tmp_path / "made.png"
        generate(tiny_model, "fox", "--seed", "1", "--output", str(made))
        assert_other(made, replay(tiny_model, made, "--vae", str(vae)))
        assert "warning: The picture was made with the model's own VAE;" in capsys.readouterr().err


def written(path: Path, recipe: Recipe) -> Path:
    """A picture that holds `recipe`."""
    info = PngInfo()
    info.add_itxt("latentdiff", recipe.to_json())
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_prediction_type_is_the_recipes(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made.png"
    generate(
        tiny_model, "fox", "--seed", "1", "--prediction-type", "epsilon", "--output", str(made)
    )
    recipe = read_recipe(made).model_copy(update={"prediction_type": "epsilon"})
    again = replay(tiny_model, written(tmp_path / "told.png", recipe))
    with Image.open(made) as image:
        assert image.tobytes() == again.tobytes()
    recipe = recipe.model_copy(update={"prediction_type": None})
    assert_other(made, replay(tiny_model, written(tmp_path / "untold.png", recipe)))
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def refiner(
    tiny_parts: ModelParts,
    tokenizer_of: Callable[[int], Any],
    enliven: Callable[[Any], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """SDXL's refiner, tiny: sizes and a score beside the text."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        text = CLIPTextConfig(
            vocab_size=514,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=24,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
        config = tiny_parts.unet.config.model_copy(
            update={
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 24 + 5 * 8,
            }
        )
        tower = enliven(CLIPTextModelWithProjection(text))
        parts = replace(
            tiny_parts,
            unet=enliven(UNet(config)),
            text_encoder=TextEncoders([TextEncoder(tokenizer_of(77), tower)]),
            scheduler_config=SchedulerConfig(),
            vocabulary=None,
            pipeline="StableDiffusionXLImg2ImgPipeline",
            requires_aesthetics_score=True,
        )
    path = tmp_path_factory.mktemp("models") / "refiner"
    TextToImage(parts).save(path)
    return path


class TestSdxl:
    def test_sizes_and_scores_are_options(self, refiner: Path, tmp_path: Path) -> None:
        made = tmp_path / "made.png"
        options = (
            "--seed 1 --original-size 90 80 --crop 7 5 --target-size 64 48 "
            "--aesthetic-score 7.5 --negative-aesthetic-score 1.5"
        )
        generate(refiner, "fox", *options.split(), "--output", str(made))
        recipe = read_recipe(made)
        assert recipe.original_size == (90, 80)
        assert recipe.crops_coords_top_left == (7, 5)
        assert recipe.target_size == (64, 48)
        assert (recipe.aesthetic_score, recipe.negative_aesthetic_score) == (7.5, 1.5)
        assert_same(made, replay(refiner, made))
        plain = tmp_path / "plain.png"
        generate(refiner, "fox", "--seed", "1", "--output", str(plain))
        with Image.open(plain) as image:
            assert_other(made, image)

    def test_clip_skip_of_a1111_is_left_out(
        self, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = "Steps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, RNG: CPU"
        pictures = {}
        for more in ("", ", Clip skip: 2"):
            info = PngInfo()
            info.add_text("parameters", f"fox\n{line}{more}")
            path = tmp_path / "a1111.png"
            Image.new("RGB", (8, 8)).save(path, pnginfo=info)
            pictures[more] = replay(refiner, path)
            err = capsys.readouterr().err
            assert ("A1111 ignores its Clip skip for SDXL" in err) == bool(more)
        assert pictures[""].tobytes() == pictures[", Clip skip: 2"].tobytes()

    def test_clip_skip_of_our_own_counts(self, refiner: Path, tmp_path: Path) -> None:
        made, plain = tmp_path / "made.png", tmp_path / "plain.png"
        generate(refiner, "fox", "--seed", "1", "--clip-skip", "1", "--output", str(made))
        generate(refiner, "fox", "--seed", "1", "--output", str(plain))
        assert_same(made, replay(refiner, made))
        with Image.open(plain) as image:
            assert_other(made, image)


def test_clip_skip_of_a1111_counts_elsewhere(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "Steps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, RNG: CPU, Clip skip: 2"
    info = PngInfo()
    info.add_text("parameters", f"fox\n{line}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a1111.png", pnginfo=info)
    again = replay(tiny_model, tmp_path / "a1111.png")
    assert "Clip skip" not in capsys.readouterr().err
    assert '"clip_skip": 1' in again.info["latentdiff"]
