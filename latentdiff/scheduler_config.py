"""scheduler_config.json: the noise schedule a model was trained with and what it predicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from latentdiff.config import Config
from latentdiff.errors import InputError
from latentdiff.model_files import validated

if TYPE_CHECKING:
    from latentdiff.diffusion.parameterization import Parameterization
    from latentdiff.diffusion.schedule import Schedule

Spacing = Literal["trailing", "leading", "linspace"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"timestep_spacing": "leading"},
    "DDPMScheduler": {"timestep_spacing": "leading"},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace"},
    "LMSDiscreteScheduler": {"timestep_spacing": "linspace"},
    "UniPCMultistepScheduler": {"timestep_spacing": "linspace"},
}
"""diffusers' schedulers that can be read, and what each means by a key it leaves out."""

NEUTRAL: dict[str, Any] = {
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}
"""Keys that would change what the model means, at the only values supported."""


class SchedulerConfig(Config):
    """The training noise schedule and the timesteps to sample at, in diffusers' names.

    The class a file names is only its author's favourite sampler; any sampler runs on any of them.
    """

    class_name: str = "DDIMScheduler"
    """diffusers' scheduler class, as StableDiffusionPipeline will use it."""
    num_train_timesteps: int = Field(default=1000, ge=1, le=100_000)
    """T of Ho et al. (2020)."""
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """Whether beta_t or its square root is linear in t."""
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    """beta of the first timestep."""
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    """beta of the last timestep."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the U-Net predicts."""
    timestep_spacing: Spacing = "trailing"
    """Which timesteps sampling visits (Lin et al. 2023, table 2)."""
    steps_offset: int = Field(default=1, ge=0)
    """Added to each timestep of the spacing "leading"; StableDiffusionPipeline insists on 1."""
    set_alpha_to_one: bool = True
    """Whether DDIM's last step ends without noise, or with that of the first timestep."""

    def schedule(self) -> Schedule:
        """alphas_cumprod [T] as trained."""
        from latentdiff.diffusion.schedule import Schedule

        make = Schedule.scaled_linear if self.beta_schedule == "scaled_linear" else Schedule.linear
        return make(self.beta_start, self.beta_end, self.num_train_timesteps)

    def parameterization(self) -> Parameterization:
        """What the U-Net predicts, as (c_skip, c_out, c_in)."""
        from latentdiff.diffusion.parameterization import PARAMETERIZATIONS

        return PARAMETERIZATIONS[self.prediction_type]

    def to_json(self) -> dict[str, Any]:
        """The values of scheduler_config.json."""
        values = self.model_dump(exclude={"class_name"})
        return {"_class_name": self.class_name, **values, **NEUTRAL}


def parse_scheduler(values: dict[str, Any], path: Path) -> SchedulerConfig:
    """The contents of a scheduler_config.json. Raises InputError for what is not supported."""
    name = values.get("_class_name")
    if name not in DEFAULTS:
        raise InputError(f"{path}: a {name} is not supported; use one of {', '.join(DEFAULTS)}.")
    for key, neutral in NEUTRAL.items():
        default = key == "clip_sample" and name in ("DDIMScheduler", "DDPMScheduler")
        if values.get(key, default or neutral) != neutral:
            raise InputError(f"{path}: {key} is not supported; only {neutral} is.")
    known = {key: value for key, value in values.items() if key in SchedulerConfig.model_fields}
    if missing := {"beta_start", "beta_end", "beta_schedule"} - known.keys():
        raise InputError(f"{path} does not say {', '.join(sorted(missing))}.")
    return validated(
        SchedulerConfig, {"steps_offset": 0, **DEFAULTS[name], **known, "class_name": name}, path
    )
