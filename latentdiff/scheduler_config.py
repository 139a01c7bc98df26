"""scheduler_config.json: the noise schedule a model was trained with and what it predicts."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from latentdiff.config import Config
from latentdiff.errors import InputError
from latentdiff.model_files import validated

if TYPE_CHECKING:
    from latentdiff.diffusion.parameterization import Parameterization
    from latentdiff.diffusion.schedule import Schedule, Spacing

LCM = "LCMScheduler"
"""What latent consistency models name, which draw in a few steps (Luo et al. 2023)."""

TimestepSpacing = Literal["trailing", "leading", "linspace"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "DDPMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    LCM: {"timestep_spacing": "trailing"},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace"},
    "HeunDiscreteScheduler": {"timestep_spacing": "linspace"},
    "KDPM2DiscreteScheduler": {"timestep_spacing": "linspace"},
    "KDPM2AncestralDiscreteScheduler": {"timestep_spacing": "linspace"},
    "LMSDiscreteScheduler": {"timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace"},
    "DPMSolverSinglestepScheduler": {"timestep_spacing": "linspace"},
    "DPMSolverSDEScheduler": {"timestep_spacing": "linspace"},
    "DEISMultistepScheduler": {"timestep_spacing": "linspace"},
    "UniPCMultistepScheduler": {"timestep_spacing": "linspace"},
}
"""diffusers' schedulers that can be read, and what each means by a key it leaves out."""

FLOW = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""Those of them that know flow_prediction."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,),
    "thresholding": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (-inf,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
"""Keys that would change what the model means or the levels it visits, at the values supported.

What only chooses among samplers, algorithm_type or solver_order for example, is not read.
"""


class SchedulerConfig(Config):
    """The training noise schedule and the timesteps to sample at, in diffusers' names.

    The class a file names is only its author's favourite sampler; any sampler runs on any of them.
    But LCM's says that the model was distilled for it, and so decides what `generate` does unasked.
    """

    class_name: str = "DDIMScheduler"
    """diffusers' scheduler class, as StableDiffusionPipeline will use it."""
    num_train_timesteps: int = Field(default=1000, ge=1, le=100_000)
    """T of Ho et al. (2020)."""
    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    """Whether the square root of beta_t is linear in t, beta_t is, or alphas_cumprod is a squared
    cosine (Nichol & Dhariwal 2021), which has no beta_start and beta_end."""
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    """beta of the first timestep."""
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    """beta of the last timestep."""
    trained_betas: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Every beta, T of them, in place of the three above."""
    rescale_betas_zero_snr: bool = False
    """Whether the last timestep is pure noise (Lin et al. 2023, Algorithm 1)."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    """What the U-Net predicts."""
    timestep_spacing: TimestepSpacing = "trailing"
    """Which timesteps sampling visits (Lin et al. 2023, table 2)."""
    steps_offset: int = Field(default=1, ge=0)
    """Added to each timestep of the spacing "leading"; StableDiffusionPipeline insists on 1."""
    set_alpha_to_one: bool = True
    """Whether DDIM's last step ends without noise, or with that of the first timestep."""
    use_karras_sigmas: bool = False
    """Whether sampling visits the noise levels of Karras et al. (2022) instead."""
    use_exponential_sigmas: bool = False
    """Whether it visits noise levels even in log sigma instead."""
    use_flow_sigmas: bool = False
    """Whether the schedule is that of a rectified flow, with flow_prediction; no betas then."""
    flow_shift: float = Field(default=1.0, gt=0)
    """shift of the flow's schedule (Esser et al. 2024, equation 23)."""

    @model_validator(mode="after")
    def _fits_together(self) -> SchedulerConfig:
        if self.use_karras_sigmas and self.use_exponential_sigmas:
            raise ValueError("set use_karras_sigmas or use_exponential_sigmas, not both")
        betas = self.trained_betas
        if betas is not None and len(betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas has {len(betas)} values for {self.num_train_timesteps} timesteps"
            )
        if self.use_flow_sigmas != (self.prediction_type == "flow_prediction"):
            raise ValueError("prediction_type flow_prediction and use_flow_sigmas go together")
        if self.use_flow_sigmas and self.num_train_timesteps != 1000:
            raise ValueError("a flow has num_train_timesteps 1000")
        if self.use_flow_sigmas and self.class_name not in FLOW:
            raise ValueError(f"for flow_prediction class_name must be one of {', '.join(FLOW)}")
        return self

    def schedule(self) -> Schedule:
        """alphas_cumprod [T] as trained. Raises InputError where they do not fall strictly."""
        import torch

        from latentdiff.diffusion.schedule import Schedule

        steps = self.num_train_timesteps
        if self.use_flow_sigmas:
            return Schedule.flow(self.flow_shift, steps)
        if self.trained_betas is not None:
            schedule = Schedule.from_betas(torch.tensor(self.trained_betas, dtype=torch.float64))
        elif self.beta_schedule == "squaredcos_cap_v2":
            schedule = Schedule.squared_cosine(steps)
        elif self.beta_schedule == "scaled_linear":
            schedule = Schedule.scaled_linear(self.beta_start, self.beta_end, steps)
        else:
            schedule = Schedule.linear(self.beta_start, self.beta_end, steps)
        return schedule.zero_terminal_snr() if self.rescale_betas_zero_snr else schedule

    def parameterization(self) -> Parameterization:
        """What the U-Net predicts, as (c_skip, c_out, c_in, c_noise)."""
        from latentdiff.diffusion.parameterization import PARAMETERIZATIONS

        return PARAMETERIZATIONS[self.prediction_type]

    @property
    def spacing(self) -> Spacing:
        """The noise levels that sampling visits; a flow's are those of evenly spaced times."""
        if self.use_karras_sigmas:
            return "karras"
        if self.use_exponential_sigmas:
            return "exponential"
        return "trailing" if self.use_flow_sigmas else self.timestep_spacing

    def to_json(self) -> dict[str, Any]:
        """The values of scheduler_config.json.

        A key that only some of diffusers' schedulers know is left out where it says nothing.
        """
        seldom = {"use_karras_sigmas", "use_exponential_sigmas", "use_flow_sigmas", "flow_shift"}
        said = self.model_dump(include=seldom, exclude_defaults=True)
        values = self.model_dump(mode="json", exclude={"class_name", *seldom})
        neutral = {"clip_sample": False, "thresholding": False}
        return {"_class_name": self.class_name, **values, **said, **neutral}


def parse_scheduler(values: dict[str, Any], path: Path) -> SchedulerConfig:
    """The contents of a scheduler_config.json. Raises InputError for what is not supported."""
    name = values.get("_class_name")
    if name not in DEFAULTS:
        raise InputError(f"{path}: a {name} is not supported; use one of {', '.join(DEFAULTS)}.")
    values = {**DEFAULTS[name], **{key: v for key, v in values.items() if v is not None}}
    if name == LCM:  # whatever it says of timestep_spacing, it visits these
        values |= DEFAULTS[name]
    for key, neutral in NEUTRAL.items():
        if values.get(key) not in (None, *neutral):
            value, only = json.dumps(values[key]), json.dumps(neutral[0])
            raise InputError(f"{path}: {key} is not supported as {value}, only as {only}.")
    known = {key: value for key, value in values.items() if key in SchedulerConfig.model_fields}
    if missing := _needed(known) - known.keys():
        raise InputError(f"{path} does not say {', '.join(sorted(missing))}.")
    return validated(SchedulerConfig, {"steps_offset": 0, **known, "class_name": name}, path)


def _needed(known: dict[str, Any]) -> set[str]:
    """The keys without which the schedule is not known."""
    if "trained_betas" in known or known.get("use_flow_sigmas"):
        return set()
    if known.get("beta_schedule") == "squaredcos_cap_v2":
        return {"beta_schedule"}
    return {"beta_start", "beta_end", "beta_schedule"}
