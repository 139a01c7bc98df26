"""Where a model's parts are read from, found and checked before any weights are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import InputError
from latentdiff.model_files import (
    read_json,
    read_shards,
    weight_shapes,
    weights_files,
    weights_name,
)
from latentdiff.tokenizer_files import CLASSES, check_tokenizer, read_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TOWERS = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionInpaintPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
    "StableDiffusionXLImg2ImgPipeline": ("text_encoder", "text_encoder_2"),
    "StableDiffusionXLInpaintPipeline": ("text_encoder", "text_encoder_2"),
}
"""The pipelines that can be read and their text encoders; SDXL may lack the first."""
TOWER_CLASSES = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "T5EncoderModel",
    "BertModel",
    "GPT2Model",
)


class Source(ABC):
    """One model's parts by the names of its model_index.json, whatever they lie in.

    `path` is the directory or file; `index` the contents of model_index.json. Raises InputError
    when the index names a pipeline or a class that cannot be read.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self.index = index
        if self.pipeline not in TOWERS:
            raise InputError(
                f"{path} holds a {self.pipeline}; only {' or '.join(TOWERS)} can be read."
            )
        towers = TOWERS[self.pipeline]
        missing_first = len(towers) == 2 and self._entry("text_encoder") in (None, [None, None])
        self.towers = towers[1:] if missing_first else towers
        """Names of its text encoders."""
        self._check("unet", ("UNet2DConditionModel",))
        for tower in self.towers:
            self._check(tower, TOWER_CLASSES)
            self._check(tokenizer_of(tower), CLASSES)

    def _entry(self, component: str) -> Any:
        return self.index.get(component)

    def _check(self, component: str, classes: tuple[str, ...]) -> None:
        found = self._entry(component)
        if not (isinstance(found, list) and len(found) == 2 and found[1] in classes):
            raise InputError(
                f"{self.path / 'model_index.json'} names {found} as its {component}; only "
                f"{' or '.join(classes)} can be read."
            )

    def check_vae(self) -> None:
        """Raises InputError when its VAE is of a class that cannot be read."""
        self._check("vae", ("AutoencoderKL", "PooledVAE"))

    @property
    def pipeline(self) -> str:
        """Class name of the diffusers pipeline."""
        return str(self.index.get("_class_name"))

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the parts that have weights."""
        return ("unet", "vae", *self.towers)

    def class_name(self, component: str) -> str:
        """Class of a component, as the index has it."""
        return str(self.index[component][1])

    def flag(self, name: str, default: bool) -> bool:
        """A true or false of the index. Raises InputError for anything else."""
        value = self.index.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.path}: {name} must be true or false, not {value!r}.")
        return value

    @abstractmethod
    def config(self, component: str) -> dict[str, Any]:
        """The contents of a component's config.json, or the scheduler's. Raises InputError."""

    @abstractmethod
    def config_path(self, component: str) -> Path:
        """Where config comes from, for messages."""

    @abstractmethod
    def files(self, component: str) -> list[Path]:
        """The safetensors files of a network. Raises InputError when there are none."""

    @abstractmethod
    def shapes(self, component: str) -> dict[str, list[int]]:
        """A network's stored tensors, as the file names and shapes them."""

    @abstractmethod
    def tensors(self, component: str) -> dict[str, Tensor]:
        """A network's tensors by diffusers' names. Raises InputError when a file is damaged."""

    @abstractmethod
    def check_tokenizer(self, tower: str) -> None:
        """Raises InputError when a tower's tokenizer is not there."""

    @abstractmethod
    def tokenizer(self, tower: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a text encoder. Raises InputError when it cannot be read."""

    @abstractmethod
    def vocabulary(self) -> dict[str, Any] | None:
        """The scenes that the model was trained on, where it was trained on scenes."""


class DirectorySource(Source):
    """A model directory in diffusers' layout."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_json(path / "model_index.json"))

    def config(self, component: str) -> dict[str, Any]:
        return read_json(self.config_path(component))

    def config_path(self, component: str) -> Path:
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return self.path / component / name

    def files(self, component: str) -> list[Path]:
        return weights_files(self.path / component, weights_name(component))

    def shapes(self, component: str) -> dict[str, list[int]]:
        return {n: s for file in self.files(component) for n, s in weight_shapes(file).items()}

    def tensors(self, component: str) -> dict[str, Tensor]:
        return read_shards(self.files(component))

    def check_tokenizer(self, tower: str) -> None:
        check_tokenizer(self.path / tokenizer_of(tower))

    def tokenizer(self, tower: str) -> PreTrainedTokenizerBase:
        name = tokenizer_of(tower)
        return read_tokenizer(self.path / name, self.class_name(name))

    def vocabulary(self) -> dict[str, Any] | None:
        path = self.path / "vocabulary.json"
        return read_json(path) if path.exists() else None


def tokenizer_of(tower: str) -> str:
    """The tokenizer's name beside a text encoder's."""
    return tower.replace("text_encoder", "tokenizer")
