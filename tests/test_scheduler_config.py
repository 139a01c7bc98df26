"""scheduler_config.json as repositories of the Stable Diffusion family have it, and diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch.testing import assert_close

from latentdiff.config import parse
from latentdiff.errors import InputError
from latentdiff.scheduler_config import DEFAULTS, SchedulerConfig, parse_scheduler

FILE = Path("scheduler_config.json")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# The values of the published files, as they are.
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    **SD,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    **SD,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    **SD,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
TURBO = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    **SD,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
CONVERTED = {
    "_class_name": "DPMSolverMultistepScheduler",
    **SD,
    "algorithm_type": "sde-dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": True,
    "use_lu_lambdas": False,
    "variance_type": None,
}
FAMILY = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "turbo": TURBO, "converted": CONVERTED}


def read(values: dict[str, Any]) -> SchedulerConfig:
    """Through JSON text, as from a file."""
    return parse_scheduler(json.loads(json.dumps(values)), FILE)


def scheduler_class(name: str) -> Any:
    return getattr(diffusers, name)


@pytest.mark.parametrize("values", FAMILY.values(), ids=FAMILY)
def test_published_files_mean_what_they_mean_to_diffusers(values: dict[str, Any]) -> None:
    theirs = scheduler_class(str(values["_class_name"])).from_config(values)
    ours = read(values)
    assert ours.class_name == values["_class_name"]
    assert ours.prediction_type == theirs.config.prediction_type
    assert ours.timestep_spacing == theirs.config.timestep_spacing
    assert ours.steps_offset == theirs.config.steps_offset
    alphas_cumprod = ours.schedule().alphas_cumprod.float()
    assert_close(alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=0)


def test_stable_diffusion_1_s_file_in_full() -> None:
    assert read(SD15) == SchedulerConfig(
        class_name="PNDMScheduler",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
    )


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_a_scheduler_that_clips_unless_its_file_says_no(name: str) -> None:
    """x0 to [-1, 1], which latents leave."""
    assert scheduler_class(name)(**SD).config.clip_sample is True
    with pytest.raises(InputError, match="clip_sample is not supported"):
        read({"_class_name": name, **SD})


def test_the_spacing_that_is_meant() -> None:
    spacings = {name: read(values).spacing for name, values in FAMILY.items()}
    assert spacings == {
        "sd15": "leading",
        "sd21": "leading",
        "sdxl": "leading",
        "turbo": "trailing",
        "converted": "karras",
    }
    assert read({**SDXL, "use_exponential_sigmas": True}).spacing == "exponential"
    assert read({**SDXL, "timestep_spacing": "linspace"}).spacing == "linspace"


@pytest.mark.parametrize("name", sorted(set(DEFAULTS) - {"DPMSolverSDEScheduler"}))
def test_what_a_file_leaves_out_is_diffusers_default(name: str) -> None:
    """DPMSolverSDEScheduler needs torchsde; LCM's spacing is not read (below)."""
    theirs = scheduler_class(name)(**SD).config
    ours = read({"_class_name": name, **SD, "clip_sample": False})
    assert ours.prediction_type == theirs.prediction_type
    assert ours.steps_offset == theirs.get("steps_offset", 0)
    assert ours.num_train_timesteps == theirs.num_train_timesteps
    assert ours.use_karras_sigmas == theirs.get("use_karras_sigmas", False)
    if "set_alpha_to_one" in theirs:
        assert ours.set_alpha_to_one == theirs.set_alpha_to_one
    if "timestep_spacing" in theirs and name != "LCMScheduler":
        assert ours.timestep_spacing == theirs.timestep_spacing


def test_lcm_visits_trailing_timesteps_whatever_its_file_says() -> None:
    """As diffusers' LCMScheduler, which does not read its timestep_spacing."""
    values = {"_class_name": "LCMScheduler", **SD, "timestep_spacing": "leading"}
    scheduler = diffusers.LCMScheduler.from_config(values)
    scheduler.set_timesteps(5)
    config = read(values)
    assert config.spacing == "trailing"
    timesteps = config.schedule().sampling_timesteps(5, "trailing")
    assert timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"trained_betas": torch.linspace(1e-4, 3e-2, 1000).tolist()},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample", "beta_schedule": "linear"},
    ],
    ids=["cosine", "linear", "trained", "zero_snr", "zero_snr_linear"],
)
def test_every_schedule_is_diffusers(changes: dict[str, Any]) -> None:
    """But for alphas_cumprod of 0, which the last timestep alone may have."""
    values = {"_class_name": "DDIMScheduler", **SD, "clip_sample": False, **changes}
    theirs = diffusers.DDIMScheduler.from_config(values)
    ours = read(values)
    alphas_cumprod = theirs.alphas_cumprod.clamp(min=1e-9)
    assert_close(ours.schedule().alphas_cumprod.float(), alphas_cumprod, rtol=1e-3, atol=0)
    assert read(ours.to_json()) == ours


def test_a_flow_is_diffusers_flow() -> None:
    values = {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    }
    config = read(values)
    assert config.spacing == "trailing"
    theirs = diffusers.UniPCMultistepScheduler.from_config(values)
    theirs.set_timesteps(10)
    sigmas = config.schedule().sampling_sigmas(10, config.spacing)
    # diffusers spaces times from 1 to 1 / 1000 evenly, we from 1 to 0.
    assert_close(sigmas / (1 + sigmas), theirs.sigmas, rtol=0, atol=3e-3)
    assert config.parameterization().c_noise is not None
    assert read(config.to_json()) == config


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_parameterization_is_the_prediction_type_s(prediction: str) -> None:
    """By what each makes of a network that says 0 at sigma 2: x, x / 5, and 0."""
    parameterization = read({**SD21, "prediction_type": prediction}).parameterization()
    kept = {"epsilon": 1.0, "v_prediction": 0.2, "sample": 0.0}[prediction]
    assert_close(parameterization.c_skip(torch.tensor(2.0)), torch.tensor(kept))
    assert parameterization.c_noise is None


CONFIGS = [
    SchedulerConfig(),
    SchedulerConfig(class_name="PNDMScheduler", set_alpha_to_one=False, prediction_type="sample"),
    SchedulerConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True, steps_offset=3),
    SchedulerConfig(class_name="EulerDiscreteScheduler", use_karras_sigmas=True),
    SchedulerConfig(class_name="HeunDiscreteScheduler", use_exponential_sigmas=True),
    SchedulerConfig(beta_schedule="squaredcos_cap_v2", timestep_spacing="linspace"),
    SchedulerConfig(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
    SchedulerConfig(
        class_name="DPMSolverMultistepScheduler",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=2.0,
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_written_and_read_again(config: SchedulerConfig) -> None:
    assert read(config.to_json()) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_reads_what_is_written(config: SchedulerConfig) -> None:
    """With every value that its class has a name for."""
    values = json.loads(json.dumps(config.to_json()))
    theirs = scheduler_class(config.class_name).from_config(values).config
    for key in values.keys() & theirs.keys() - {"_class_name"}:
        assert theirs[key] == values[key], key
    assert theirs["prediction_type"] == config.prediction_type


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is not supported; use one of"),
        ({"_class_name": None}, "is not supported; use one of"),
        ({"prediction_type": "x0"}, "prediction_type .* 'sample' or 'flow_prediction'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule .* 'squaredcos_cap_v2'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"clip_sample": True}, "clip_sample is not supported as true, only as false"),
        ({"thresholding": True}, "thresholding is not supported"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas is not supported"),
        ({"use_lu_lambdas": True}, "use_lu_lambdas is not supported"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting is not supported"),
        ({"shift_terminal": 0.1}, "shift_terminal is not supported as 0.1, only as null"),
        ({"sigma_max": 80.0}, "sigma_max is not supported"),
        ({"sigma_min": 0.002}, "sigma_min is not supported"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped is not supported as -5.1"),
        ({"interpolation_type": "log_linear"}, 'not supported as "log_linear", only as "linear"'),
        ({"timestep_type": "continuous"}, "timestep_type is not supported"),
        ({"variance_type": "learned_range"}, "variance_type is not supported"),
        ({"beta_end": None}, "does not say beta_end"),
        ({"beta_schedule": None, "beta_start": None}, "does not say beta_schedule, beta_start"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values for 1000 timesteps"),
        ({"trained_betas": [0.0] * 1000}, "trained_betas.0"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "not both"),
        ({"prediction_type": "flow_prediction"}, "go together"),
        ({"use_flow_sigmas": True}, "go together"),
        (
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            "class_name must be one of DPMSolverMultistepScheduler",
        ),
    ],
)
def test_what_would_change_the_meaning_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read({**SD21, **changes})


def test_betas_that_leave_nothing_too_early_are_refused() -> None:
    config = read({**SD21, "trained_betas": [0.5] * 1000})
    with pytest.raises(InputError, match="must fall at each timestep"):
        config.schedule()


def test_a_run_s_yaml_can_say_all_of_it() -> None:
    values = {
        "class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3,
    }
    assert parse(SchedulerConfig, values, "run.yaml").flow_shift == 3.0
    with pytest.raises(InputError, match="go together"):
        parse(SchedulerConfig, {"prediction_type": "flow_prediction"}, "run.yaml")
