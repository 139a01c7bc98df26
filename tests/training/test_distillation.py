"""Distillation: what the teacher says, at which noise levels, and a model that knows it is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from latentdiff.checkpoint import load_model
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import InputError
from latentdiff.pipeline import TextToImage
from latentdiff.recipe import Recipe, recipe_from_json
from latentdiff.scheduler_config import SchedulerConfig
from training.config import seeded
from training.diffusion import LORA_FILE
from training.distillation import Distillation, DistillationConfig
from training.network import Text

CPU = torch.device("cpu")
SCHEDULE = Schedule.scaled_linear(0.00085, 0.012, 1000)
STEPS = {"max_steps": 4, "checkpoint_every": 2, "sample_every": 4}


@pytest.fixture(scope="module")
def teacher(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model whose every weight shows in what it draws."""
    folder: Path = tmp_path_factory.mktemp("teacher") / "model"
    program = tiny_chain.program("diffusion")
    with seeded(0), torch.no_grad():
        for parameter in program.network.unet.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_uniform_(parameter)
    program.finish(folder, CPU)
    return folder


def student(tiny_chain: Any, teacher: Path, **options: Any) -> Any:
    made = {"init_from": teacher, "scheduler": "null", "text_encoder": "null"}
    made |= {"distillation__steps": 10, "objective__min_snr_gamma": "null"}
    return tiny_chain.program("diffusion", **(made | options))


def recipe_of(model: TextToImage) -> Recipe:
    image = model.generate("a fox", seed=1)
    assert isinstance(image, Image.Image)
    return recipe_from_json(image.info["latentdiff"])


@pytest.mark.parametrize("steps", [1, 4, 50, 1000])
def test_the_teachers_steps_are_those_of_diffusers_ddim(
    tiny_chain: Any, teacher: Path, steps: int
) -> None:
    """From its timesteps to the next ones, and at last to no noise; from all others as far."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    distillation = student(tiny_chain, teacher, distillation__steps=steps).distillation
    sigma, following = distillation.step_from(scheduler.timesteps)
    assert sigma.equal(SCHEDULE.sigmas[scheduler.timesteps])
    assert following.tolist() == [*sigma[1:].tolist(), 0.0]
    sigma, following = distillation.step_from(torch.arange(1000))
    assert (following < sigma).all()
    assert int((following == 0).sum()) == 1000 // steps


def test_the_teacher_is_the_model_under_guidance(tiny_chain: Any, teacher: Path) -> None:
    """By equation 6 of Ho & Salimans (2022), and not what the student becomes."""
    program = student(tiny_chain, teacher, distillation__guidance_scale=4.0)
    batch = program.latents.read(0, [3, 5])
    x, sigma = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.full((2,), 3.0),
    )
    text = Text(batch.ids, batch.sizes, torch.zeros(2, dtype=torch.bool))
    guided = program.distillation.teacher(x, sigma, text)

    unet, encoder = load_model(teacher).unet, program.parts.text_encoder
    c_in = (1 + 3.0**2) ** -0.5
    timestep = program.parts.schedule.timestep(sigma)
    empty = encoder.tokenize(["", ""])
    with torch.no_grad():
        velocities = [
            unet(c_in * x, timestep, encoder.encode_ids(ids)) for ids in (empty, batch.ids[:, 0])
        ]
    velocity = velocities[0] + 4 * (velocities[1] - velocities[0])
    assert_close(guided, c_in**2 * x - 3 * c_in * velocity, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        for parameter in program.network.unet.parameters():
            parameter.zero_()
    assert program.distillation.teacher(x, sigma, text).equal(guided)


def test_its_guidance_is_by_default_what_generate_takes(tiny_chain: Any, teacher: Path) -> None:
    assert student(tiny_chain, teacher).distillation.guidance_scale == 3.0


def test_nothing_is_drawn_that_was_not_drawn_ahead(tiny_chain: Any, teacher: Path) -> None:
    program = student(tiny_chain, teacher)
    batch = program.drawn(program.latents.read(0, [3, 5]))
    ahead = set(batch.drawn)
    program.losses(program.network, batch, CPU)
    assert set(batch.drawn) == ahead


def test_a_student_knows_that_it_draws_in_few_steps(
    tiny_chain: Any, teacher: Path, tmp_path: Path
) -> None:
    """generate takes lcm, four steps and no guidance unasked; diffusers finds its LCMScheduler."""
    program = student(tiny_chain, teacher, run_dir=tmp_path / "run", **STEPS)
    tiny_chain.train(program)
    model = TextToImage.load(tmp_path / "run" / "model")
    recipe = recipe_of(model)
    assert (recipe.sampler, recipe.num_inference_steps, recipe.guidance_scale) == ("lcm", 4, 1.0)
    assert recipe_of(TextToImage.load(teacher)).sampler == "ddpm"
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "model")
    assert type(theirs.scheduler).__name__ == "LCMScheduler"
    assert theirs.scheduler.config.prediction_type == "v_prediction"


def test_a_lora_of_few_steps(tiny_chain: Any, teacher: Path, tmp_path: Path) -> None:
    """LCM-LoRA (Luo et al. 2023b): adapters are trained, and the teacher is without them."""
    options = {"lora__rank": 2, "optimizer__learning_rate": 0.5, "run_dir": tmp_path / "run"}
    program = student(tiny_chain, teacher, **options, **STEPS)
    before = {name: value.clone() for name, value in program.distillation.unet.state_dict().items()}
    tiny_chain.train(program)
    after = program.distillation.unet.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())
    assert not any("lora" in name for name in after)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("*4")
    assert all("lora_" in name for name in load_file(checkpoint / "network.safetensors"))
    model = TextToImage.load(teacher)
    few = {"seed": 3, "sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1}
    plain = model.generate("a fox", **few)
    model.load_lora(tmp_path / "run" / "model" / LORA_FILE)
    adapted = model.generate("a fox", **few)
    assert adapted.tobytes() != plain.tobytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init_from": "null"}, "or a model in init_from"),
        (
            {"init_from": "null", "scheduler": "{}", "text_encoder": "clip"},
            "distillation needs the teacher in init_from",
        ),
        ({"train_text_encoder": True}, "distillation trains the U-Net"),
        ({"scheduler": "{prediction_type: epsilon}"}, "keeps its teacher's scheduler"),
        ({"objective__min_snr_gamma": 5}, "leave min_snr_gamma out"),
        ({"unet": "null", "distillation__steps": 1001}, "less than or equal to 1000"),
        ({"objective__offset_noise": 0.1}, "leave offset_noise out"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_chain: Any, teacher: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        student(tiny_chain, teacher, **options)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        ({"class_name": "LCMScheduler"}, "was distilled already; name its teacher"),
        (
            {
                "class_name": "UniPCMultistepScheduler",
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
            },
            "is a rectified flow",
        ),
    ],
)
def test_what_cannot_be_a_teacher_is_refused(
    tiny_chain: Any, teacher: Path, scheduler: dict[str, Any], says: str
) -> None:
    program = student(tiny_chain, teacher)
    parts = load_model(teacher)
    parts = dataclasses.replace(parts, scheduler_config=SchedulerConfig(**scheduler))
    with pytest.raises(InputError, match=says):
        Distillation(DistillationConfig(), parts, program.network, "no", compiled=False)
