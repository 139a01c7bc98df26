"""Prompts to pictures, against diffusers.StableDiffusionPipeline on the same model directory."""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image

import latentdiff
from latentdiff.checkpoint import ModelParts
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.errors import InputError
from latentdiff.models.unet import UNet
from latentdiff.pipeline import TextToImage, UnknownWordWarning
from latentdiff.recipe import Recipe, model_hash, recipe_from_json
from latentdiff.rng import picture_noise
from latentdiff.scheduler_config import SchedulerConfig

PROMPT = "a fox above a rocket"
OTHERS = ["red apple on blue", "a rocket", "spaceship on dark green", "an apple", "fox", "a fox"]


def pixels(image: Image.Image | list[Image.Image]) -> np.ndarray:
    """int [..., H, W, 3]"""
    images = image if isinstance(image, list) else [image]
    return np.stack([np.asarray(one, dtype=int) for one in images])


def assert_same(ours: Any, theirs: Any, within: int) -> None:
    a, b = pixels(ours), pixels(theirs)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= within


def recipe_of(image: Any) -> Recipe:
    return recipe_from_json(image.info["latentdiff"])


def diffusers_pipeline(model: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> StableDiffusionPipeline:
    return diffusers_pipeline(tiny_model)


class TestAgainstDiffusers:
    """With numbers of steps that divide 1000; else diffusers' DDIM steps past its own timesteps."""

    SCHEDULERS = (
        ("ddim", DDIMScheduler, {}),
        ("euler", EulerDiscreteScheduler, {}),
        ("dpmpp_2m", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    )

    @pytest.mark.parametrize(("sampler", "scheduler", "options"), SCHEDULERS)
    @pytest.mark.parametrize(("guidance_scale", "size"), [(1.0, (64, 64)), (3.5, (56, 72))])
    def test_same_noise_same_picture(
        self,
        tiny: TextToImage,
        oracle: StableDiffusionPipeline,
        sampler: str,
        scheduler: Any,
        options: dict[str, Any],
        guidance_scale: float,
        size: tuple[int, int],
    ) -> None:
        height, width = size
        settings = {"guidance_scale": guidance_scale, "num_inference_steps": 8}
        ours = tiny.generate(
            [PROMPT, OTHERS[0]],
            negative_prompt="dark",
            height=height,
            width=width,
            seed=[5, 2**32 - 1],
            sampler=sampler,
            **settings,  # type: ignore[arg-type]
        )
        oracle.scheduler = scheduler.from_config(oracle.scheduler.config, **options)
        oracle.scheduler.set_timesteps(8)
        start = math.sqrt(1 + float(tiny.parts.schedule.sampling_sigmas(8)[0]) ** 2)
        noise = picture_noise([5, 2**32 - 1], (4, height // 8, width // 8))
        if sampler == "euler":  # whose trailing timesteps start from sigma_max, not at variance 1
            noise = noise * start / oracle.scheduler.init_noise_sigma
        theirs = oracle(
            [PROMPT, OTHERS[0]],
            negative_prompt=["dark"] * 2,
            latents=noise,
            height=height,
            width=width,
            **settings,
        ).images
        assert pixels(ours).std() > 10
        assert_same(ours, theirs, within=2)

    def test_seeds_are_diffusers_generators(
        self, tiny: TextToImage, oracle: StableDiffusionPipeline
    ) -> None:
        settings: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 4}
        oracle.scheduler = DDIMScheduler.from_config(oracle.scheduler.config)
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        theirs = oracle([PROMPT] * 2, generator=generators, **settings).images
        ours = tiny.generate(PROMPT, seed=7, num_images_per_prompt=2, sampler="ddim", **settings)
        assert_same(ours, theirs, within=2)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_weights_stored_in_half_the_space(
        self, tiny: TextToImage, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        tiny.save(tmp_path / "half", dtype)
        settings: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 4}
        generator = torch.Generator().manual_seed(9)
        theirs = diffusers_pipeline(tmp_path / "half")(PROMPT, generator=generator, **settings)
        half = TextToImage.load(tmp_path / "half")
        ours = half.generate(PROMPT, seed=9, sampler="ddim", **settings)
        assert_same(ours, theirs.images, within=2)

    def test_stable_diffusion_1s_timesteps_and_last_step(
        self, tiny_parts: ModelParts, tmp_path: Path
    ) -> None:
        """Epsilon, leading timesteps from 1, and a last step that keeps the first noise level."""
        config = SchedulerConfig(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
        parts = ModelParts(tiny_parts.unet, tiny_parts.autoencoder, tiny_parts.text_encoder, config)
        TextToImage(parts).save(tmp_path / "sd1")
        oracle = diffusers_pipeline(tmp_path / "sd1")
        settings: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 5}
        theirs = oracle(PROMPT, generator=torch.Generator().manual_seed(3), **settings).images
        ours = TextToImage(parts).generate(PROMPT, seed=3, sampler="ddim", **settings)
        assert_same(ours, theirs, within=2)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
class TestSeeds:
    def settings(self, sampler: str) -> dict[str, Any]:
        return {"num_inference_steps": 4, "sampler": sampler}

    def test_alone_and_at_any_place_of_a_batch(self, tiny: TextToImage, sampler: str) -> None:
        settings = self.settings(sampler)
        alone = tiny.generate(PROMPT, seed=11, **settings)
        prompts = [OTHERS[0], PROMPT, *OTHERS[1:], PROMPT, OTHERS[0], PROMPT]
        seeds = [1, 11, 3, 4, 5, 6, 7, 11, 2, 11]  # the last two in a second batch
        crowd = tiny.generate(prompts, seed=seeds, **settings)
        assert isinstance(crowd, list)
        for place in (1, 7, 9):
            assert_same(alone, crowd[place], within=1)

    def test_same_seed_same_picture_and_another_another(
        self, tiny: TextToImage, sampler: str
    ) -> None:
        settings = self.settings(sampler)
        first = tiny.generate(PROMPT, seed=0, **settings)
        assert_same(first, tiny.generate(PROMPT, seed=0, **settings), within=0)
        second = tiny.generate(PROMPT, seed=1, **settings)
        assert np.abs(pixels(first) - pixels(second)).max() > 10
        assert_same(
            [first, second],
            tiny.generate(PROMPT, seed=0, num_images_per_prompt=2, **settings),
            within=1,
        )


def test_seeds_count_up_over_all_pictures(tiny: TextToImage) -> None:
    images = tiny.generate([PROMPT, "fox"], seed=5, num_images_per_prompt=2, num_inference_steps=1)
    recipes = [recipe_of(image) for image in images]
    assert [(recipe.prompt, recipe.seed) for recipe in recipes] == [
        (PROMPT, 5),
        (PROMPT, 6),
        ("fox", 7),
        ("fox", 8),
    ]


def test_no_seed_draws_one_and_says_which(tiny: TextToImage) -> None:
    image = tiny.generate("fox", num_inference_steps=2)
    seed = recipe_of(image).seed
    assert 0 <= seed < 2**32
    assert_same(image, tiny.generate("fox", num_inference_steps=2, seed=seed), within=0)
    assert recipe_of(tiny.generate("fox", num_inference_steps=1)).seed != seed


def test_info_holds_everything_that_made_it(tiny: TextToImage, tiny_model: Path) -> None:
    image = tiny.generate(
        "fox", negative_prompt="apple", seed=3, num_inference_steps=2, height=32, sampler="euler"
    )
    assert recipe_of(image) == Recipe(
        prompt="fox",
        negative_prompt="apple",
        seed=3,
        height=32,
        width=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        sampler="euler",
        model=tiny_model.name,
        model_sha256=model_hash(tiny_model),
    )
    assert isinstance(image, Image.Image)
    assert "Negative prompt: apple" in image.info["parameters"]


def test_models_of_emoji_scenes_have_a_sampler_and_a_scale_of_their_own(
    tiny_parts: ModelParts,
) -> None:
    plain = dataclasses.replace(tiny_parts, vocabulary=None)
    for parts, expected in ((tiny_parts, ("ddpm", 3.0)), (plain, ("ddim", 7.5))):
        image = TextToImage(parts).generate("fox", seed=3, num_inference_steps=2)
        recipe = recipe_of(image)
        assert (recipe.sampler, recipe.guidance_scale) == expected
        sampler, scale = expected
        again = TextToImage(parts).generate(
            "fox", seed=3, num_inference_steps=2, sampler=sampler, guidance_scale=scale
        )
        assert_same(image, again, within=0)


def test_a_recipe_makes_the_third_of_a_batch_again(tiny: TextToImage) -> None:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "sampler": "ddim",
        "eta": 0.5,
        "spacing": "karras",
        "guidance": "apg",
        "guidance_scale": 3.0,
        "guidance_interval": (0.1, 9.0),
        "clip_skip": 1,
    }
    third = tiny.generate([PROMPT, "fox", "(a rocket:1.4)", "a fox"], seed=20, **settings)[2]
    recipe = recipe_of(third)
    assert recipe.seed == 22
    assert_same(third, tiny.generate(**recipe.arguments()), within=1)


def test_a_string_makes_a_picture_and_a_list_a_list(tiny: TextToImage) -> None:
    one = tiny.generate("fox", num_inference_steps=1)
    assert isinstance(one, Image.Image)
    assert (one.size, one.mode) == ((64, 64), "RGB")
    for images, count in (
        (tiny.generate(["fox"], num_inference_steps=1), 1),
        (tiny.generate(("fox", "apple"), num_inference_steps=1), 2),
        (tiny.generate("fox", num_inference_steps=1, num_images_per_prompt=3), 3),
    ):
        assert isinstance(images, list)
        assert len(images) == count


def test_width_and_height(tiny: TextToImage) -> None:
    assert tiny.generate("fox", height=32, width=96, num_inference_steps=1).size == (96, 32)


def test_negative_prompt_counts_only_with_guidance(tiny: TextToImage) -> None:
    def picture(negative: str, scale: float) -> Image.Image | list[Image.Image]:
        return tiny.generate(
            "fox", negative_prompt=negative, guidance_scale=scale, seed=1, num_inference_steps=3
        )

    assert_same(picture("", 1), picture("rocket", 1), within=0)
    assert np.abs(pixels(picture("", 4)) - pixels(picture("rocket", 4))).max() > 3


def test_no_unconditional_half_without_guidance(
    tiny: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, forward = [], tiny.parts.unet.forward

    def spy(sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batches.append(len(sample))
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(tiny.parts.unet, "forward", spy)
    for scale in (1.0, 2.0):
        tiny.generate("fox", guidance_scale=scale, num_inference_steps=2, sampler="ddim")
    assert batches == [1, 1, 2, 2]


def test_the_size_of_batches_changes_no_picture(tiny: TextToImage) -> None:
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 3}
    prompts = [PROMPT, "fox", "a " * 40 + "rocket", "fox", "red apple"]  # one in two chunks
    whole = tiny.generate(prompts, **settings)
    for batch_size in (1, 2, 5):
        assert_same(whole, tiny.generate(prompts, batch_size=batch_size, **settings), within=1)


def test_a_model_distilled_with_its_guidance_runs_once_a_step(tiny_parts: ModelParts) -> None:
    """Latent consistency models read the scale (Luo et al. 2023) and no negative prompt."""
    config = tiny_parts.unet.config.model_copy(update={"time_cond_proj_dim": 32})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(config).eval()
    own = tiny_parts.unet.state_dict()
    unet.load_state_dict({**unet.state_dict(), **own})
    with torch.no_grad():
        unet.get_parameter("time_embedding.cond_proj.weight").mul_(20)
    model = TextToImage(dataclasses.replace(tiny_parts, unet=unet))
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "sampler": "lcm"}
    pictures = [model.generate("fox", guidance_scale=scale, **settings) for scale in (1, 8)]
    assert np.abs(pixels(pictures[0]) - pixels(pictures[1])).max() > 3
    with pytest.raises(InputError, match="leave negative_prompt out"):
        model.generate("fox", negative_prompt="dark", **settings)
    with pytest.raises(InputError, match="it has a guidance_scale alone"):
        model.generate("fox", guidance="apg", **settings)


@pytest.fixture
def consistency_parts(tiny_parts: ModelParts) -> ModelParts:
    """As a latent consistency model with one scale of guidance in its weights."""
    named = {"class_name": "LCMScheduler", "timestep_spacing": "trailing"}
    config = tiny_parts.scheduler_config.model_copy(update=named)
    return dataclasses.replace(tiny_parts, scheduler_config=config)


def test_a_latent_consistency_model_draws_in_four_steps_unasked(
    consistency_parts: ModelParts,
) -> None:
    model = TextToImage(consistency_parts)
    recipe = recipe_of(model.generate("fox", seed=1))
    assert (recipe.sampler, recipe.num_inference_steps) == ("lcm", 4)
    assert recipe.guidance_scale == 1
    start = Image.new("RGB", (64, 64), "red")
    for strength, steps in ((1.0, 4), (0.6, 7), (0.3, 14), (0.004, 1000), (0.001, 1000)):
        recipe = recipe_of(model.generate("fox", seed=1, image=start, strength=strength))
        assert recipe.num_inference_steps == steps
    for options in ({"negative_prompt": "dark"}, {"guidance": "apg"}, {"guidance_rescale": 0.5}):
        with pytest.raises(InputError, match="distilled with its guidance"):
            model.generate("fox", **options)
        model.generate("fox", guidance_scale=1.5, **options)


def test_one_that_reads_the_scale_keeps_its_models_default(consistency_parts: ModelParts) -> None:
    config = consistency_parts.unet.config.model_copy(update={"time_cond_proj_dim": 32})
    with torch.random.fork_rng():
        unet = UNet(config).eval()
    parts = dataclasses.replace(consistency_parts, unet=unet, vocabulary=None)
    recipe = recipe_of(TextToImage(parts).generate("fox", seed=1))
    assert (recipe.num_inference_steps, recipe.guidance_scale) == (4, 7.5)


def test_touches_nothing_global(tiny: TextToImage) -> None:
    before = torch.get_rng_state()
    tiny.generate("fox", num_inference_steps=2, sampler="ddpm")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in tiny.parts.unet.parameters())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "The prompt is empty; say what the picture shows"),
    ({"prompt": ["fox", " \n"]}, "The prompt is empty"),
    ({"prompt": []}, "list of prompts is empty"),
    ({"prompt": 3}, "prompt must be a string or a list of strings"),
    ({"prompt": ["fox", None]}, "prompt must be a string or a list of strings"),
    ({"prompt": "fox" * 10_000}, "longer than 10000 characters"),
    ({"prompt": "fox \ud83d"}, "half a character"),
    ({"negative_prompt": None}, "negative_prompt must be a string or a list"),
    ({"prompt": ["fox"] * 3, "negative_prompt": ["a", "b"]}, "2 negative prompts for 3 prompts"),
    ({"height": 60}, "height is 60; this model makes multiples of 8, for example 56 or 64"),
    ({"width": 20}, "width is 20; this model makes multiples of 8, for example 16 or 24"),
    ({"width": 0}, "width is 0; it must be a whole number from 8 to 8192"),
    ({"height": 64.0}, "height is 64.0; it must be a whole number"),
    ({"height": 16384}, "height is 16384"),
    ({"num_inference_steps": 0}, "num_inference_steps is 0; .* from 1 to 1000"),
    ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
    ({"num_inference_steps": True}, "num_inference_steps is True"),
    ({"guidance_scale": -1}, "guidance_scale is -1; it must be a finite number, 0 or more"),
    ({"guidance_scale": math.nan}, "guidance_scale is nan"),
    ({"guidance_scale": math.inf}, "guidance_scale is inf"),
    ({"guidance_scale": "strong"}, "guidance_scale is 'strong'"),
    ({"sampler": "dimm"}, "no sampler 'dimm'; did you mean 'ddim'. There are ddpm, ddim, euler"),
    ({"sampler": "zzz"}, "no sampler 'zzz'; There are"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**32}, "seed is"),
    ({"seed": 2**32 - 1, "num_images_per_prompt": 2}, "seed is"),
    ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
    ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
    ({"seed": [-1]}, "seed is -1"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"eta": 0.5, "sampler": "euler"}, "The sampler euler has no eta"),
    ({"eta": -1}, "eta is -1"),
    ({"spacing": "karas"}, "no spacing 'karas'; did you mean 'karras'"),
    ({"guidance": "cgf"}, "no guidance 'cgf'; did you mean 'cfg'"),
    ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; .* from 0 to 1"),
    ({"guidance_rescale": 0.5, "guidance": "apg"}, "guidance_rescale belongs to the guidance cfg"),
    ({"guidance_interval": (5, 1)}, "the first level must be the lower one"),
    ({"guidance_interval": 3}, "give two noise levels"),
    ({"clip_skip": -1}, "clip_skip is -1"),
    ({"strength": 0.5}, "give image= too"),
    ({"mask": Image.new("L", (64, 64))}, "give image= too"),
    ({"image": Image.new("RGB", (64, 64)), "strength": 1.5}, "strength is 1.5"),
    ({"image": Image.new("RGB", (64, 64)), "strength": 0.01}, "leaves none to take"),
    ({"image": Image.new("RGB", (64, 64)), "height": 32}, "The image sets height and width"),
    ({"image": Image.new("RGB", (7, 64))}, "7 x 64 pixels; this model needs 8"),
    ({"image": 3}, "image is a int; give a PIL image or a path"),
    ({"tile": 0}, "tile is 0"),
    ({"tile": 2.5}, "tile is 2.5; it must be a whole number"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"clip_skip": 2}, "clip_skip must be from 0 to 1 for this model"),
    ({"image": "nowhere.png"}, "There is no image nowhere.png"),
    (
        {"image": Image.new("RGB", (64, 64)), "mask": Image.new("L", (32, 64))},
        "The mask is 32 x 64 pixels but the image is 64 x 64",
    ),
    (
        {"image": Image.new("RGB", (64, 64)), "mask": Image.new("L", (64, 64))},
        "The mask is black everywhere",
    ),
    ({"original_size": (64, 64)}, "original_size conditions SDXL"),
    ({"aesthetic_score": 6}, "aesthetic_score conditions SDXL's refiner"),
    ({"prompt": ["fox"] * 600, "num_images_per_prompt": 2}, "1200 pictures in one call"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_refuses_before_any_work(
    tiny: TextToImage,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(tiny, "_run", lambda *_: pytest.fail("worked before checking"))
    with pytest.raises(InputError, match=message) as caught:
        tiny.generate(**{"prompt": "fox", **arguments})
    assert "\n" not in str(caught.value)


class TestWarnings:
    def test_a_word_never_seen_names_the_nearest(self, tiny: TextToImage) -> None:
        with pytest.warns(UnknownWordWarning, match="'roket'.*: rocket,"):
            image = tiny.generate("A roket", num_inference_steps=1)
        assert isinstance(image, Image.Image)
        with pytest.warns(UnknownWordWarning, match="'appel'.*: apple,"):
            tiny.generate("fox", negative_prompt="appel", num_inference_steps=1)

    def test_known_words_pass_in_silence(self, tiny: TextToImage) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.generate(["A Red apple", "fox, dark green background"], num_inference_steps=1)

    def test_a_model_of_other_data_knows_no_words(self, tiny_parts: ModelParts) -> None:
        parts = ModelParts(
            tiny_parts.unet,
            tiny_parts.autoencoder,
            tiny_parts.text_encoder,
            tiny_parts.scheduler_config,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            TextToImage(parts).generate("a photograph", num_inference_steps=1)


def test_networks_can_run_in_half_precision(tiny: TextToImage, tiny_model: Path) -> None:
    """The sampler's arithmetic stays in float32, so little is lost."""
    half = TextToImage.load(tiny_model, dtype=torch.bfloat16)
    assert half.parts.unet.conv_in.weight.dtype == torch.bfloat16
    settings: dict[str, Any] = {"seed": 2, "num_inference_steps": 4}
    difference = pixels(half.generate("fox", **settings)) - pixels(tiny.generate("fox", **settings))
    assert np.abs(difference).mean() < 5


def test_weights_that_overflow_are_reported(tiny_model: Path) -> None:
    model = TextToImage.load(tiny_model)
    with torch.no_grad():
        model.parts.unet.get_parameter("conv_out.bias").fill_(math.nan)
    with pytest.raises(InputError, match="values that are not finite"):
        model.generate("fox", num_inference_steps=1)


class TestModule:
    def test_generate_takes_the_same_arguments(self, tiny: TextToImage, tiny_model: Path) -> None:
        settings: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "sampler": "euler"}
        ours = latentdiff.generate("fox", model=tiny_model, **settings)
        assert_same(ours, tiny.generate("fox", **settings), within=0)

    def test_a_model_is_loaded_once(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loads, load = [], TextToImage.load
        monkeypatch.setattr(TextToImage, "load", lambda path: loads.append(path) or load(path))
        copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
        monkeypatch.chdir(tmp_path)
        for model in (copy, str(copy), "copy", copy):
            latentdiff.generate("fox", model=model, num_inference_steps=1)
        assert loads == [copy.resolve()]

    def test_a_saved_model_makes_the_same_pictures(self, tiny: TextToImage, tmp_path: Path) -> None:
        tiny.save(tmp_path / "saved")
        again = TextToImage.load(tmp_path / "saved")
        settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 3}
        assert_same(tiny.generate(PROMPT, **settings), again.generate(PROMPT, **settings), within=0)
