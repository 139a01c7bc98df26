"""One .safetensors file in CompVis/A1111 layout: read as a model, or written from one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.compvis_names import (
    CLIP,
    CLIP_XL,
    OPEN_CLIP,
    OPEN_CLIP_REFINER,
    OPEN_CLIP_XL,
    UNET,
    VAE,
    Layout,
    open_clip_names,
    unet_names,
    vae_names,
)
from latentdiff.errors import InputError
from latentdiff.families import ARCHITECTURES, PIPELINES, family_configs, family_index
from latentdiff.model_files import read_weights, staged_file, weight_metadata, weight_shapes
from latentdiff.sources import Source, tokenizer_of
from latentdiff.tokenizer_files import pack_tokenizer, unpack_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

OWN = "latentdiff"
"""The metadata key with the configurations, in files that were written here."""
UNUSED = (".position_ids", ".logit_scale", ".attn_mask")
"""Tensors that other programs leave beside those of the text encoders."""
RESIDUAL_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
WIDTHS = ("block_out_channels", "cross_attention_dim")
FIRST_CONVOLUTION = UNET + "input_blocks.0.0.weight"


def find_kind(shapes: Mapping[str, list[int]], path: Path) -> str:
    """Which of sd1, sd2, sdxl and sdxl_refiner has a file's text encoders, by its names alone.

    Raises InputError for a file that holds no such model, or not all of one.
    """
    if FIRST_CONVOLUTION not in shapes:
        raise InputError(
            f"{path} holds no U-Net under CompVis's names; give a whole Stable Diffusion "
            "checkpoint, not a LoRA, a VAE or another kind of model."
        )
    present = {
        prefix: any(name.startswith(prefix) for name in shapes)
        for prefix in (CLIP, OPEN_CLIP, CLIP_XL, OPEN_CLIP_XL, OPEN_CLIP_REFINER)
    }
    if present[CLIP]:
        return "sd1"
    if present[OPEN_CLIP]:
        return "sd2"
    if present[CLIP_XL] and present[OPEN_CLIP_XL]:
        return "sdxl"
    if present[OPEN_CLIP_REFINER]:
        return "sdxl_refiner"
    raise InputError(
        f"{path} holds a U-Net but no text encoder of Stable Diffusion 1, 2 or XL; give a "
        "whole checkpoint."
    )


def find_family(shapes: Mapping[str, list[int]], path: Path) -> str:
    """Which of families.FAMILIES a file holds that does not say it, by its names and shapes.

    Raises InputError for a file that holds no such model, or not all of one.
    """
    family = find_kind(shapes, path)
    channels = shapes[FIRST_CONVOLUTION][1]
    if channels == 9 and family != "sdxl_refiner":
        return f"{family}_inpaint"
    if channels != 4 or "edm_mean" in shapes:
        kind = "scaled latents (EDM)" if "edm_mean" in shapes else f"{channels} channels"
        raise InputError(
            f"{path} holds a U-Net for {kind}; only the plain models and those for inpainting can "
            "be read."
        )
    return family


def layouts(family: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Layout]:
    """How each network of a family lies in the file, given the config.json of each."""
    found = {
        "unet": Layout(UNET, unet_names(configs["unet"])),
        "vae": Layout(VAE, vae_names(configs["vae"])),
    }
    if family.startswith("sd1"):
        return {**found, "text_encoder": Layout(CLIP)}
    if family.startswith("sd2"):
        names = open_clip_names(configs["text_encoder"])
        return {**found, "text_encoder": Layout(OPEN_CLIP, names, fused=True)}
    refiner = family == "sdxl_refiner"
    names = open_clip_names(configs["text_encoder_2"])
    second = Layout(OPEN_CLIP_REFINER if refiner else OPEN_CLIP_XL, names, fused=True)
    found["text_encoder_2"] = second
    return found if refiner else {**found, "text_encoder": Layout(CLIP_XL)}


class SingleFileSource(Source):
    """A checkpoint in CompVis layout: SD 1.x, SD 2.x, SDXL base or refiner, or for inpainting.

    What the tensors do not say comes from the family's published configurations. A file written
    here says it all in its metadata. What the model predicts is, in this order: what the caller
    says; the metadata's modelspec.prediction_type, or a tensor named v_pred; for SD 2.x without
    inpainting, v, as diffusers takes it; for the others epsilon. Averaged weights (model_ema.) are
    left out, as in diffusers and A1111.
    """

    def __init__(self, path: Path, prediction_type: str | None = None) -> None:
        self._shapes = weight_shapes(path)
        metadata = weight_metadata(path)
        self._own = _own_values(metadata, path)
        self.family = (find_kind if self._own else find_family)(self._shapes, path)
        if self._own:
            index, self._configs = self._own["index"], self._own["configs"]
        else:
            kind = prediction_type or self._prediction_type(metadata)
            index, self._configs = family_index(self.family), family_configs(self.family, kind)
            if "ztsnr" in self._shapes:
                self._configs["scheduler"]["rescale_betas_zero_snr"] = True
        super().__init__(path, index)
        try:
            self._layouts = layouts(self.family, self._configs)
            towers = {tower: self._configs[tower] for tower in self.towers}
            self._layers = {t: int(c["num_hidden_layers"]) for t, c in towers.items()}
            self._configs["scheduler"], self._layouts["vae"], *(self._layouts[t] for t in towers)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _damaged_metadata(path) from None

    def _prediction_type(self, metadata: Mapping[str, str]) -> str:
        said = metadata.get("modelspec.prediction_type", "")
        if "v_pred" in self._shapes or said.startswith("v"):
            return "v_prediction"
        epsilon = said == "epsilon" or metadata.get("modelspec.architecture", "").endswith("v2-512")
        return "v_prediction" if self.family == "sd2" and not epsilon else "epsilon"

    def config(self, component: str) -> dict[str, Any]:
        return dict(self._configs[component])

    def config_path(self, component: str) -> Path:
        return self.path

    def files(self, component: str) -> list[Path]:
        if not self.shapes(component):
            raise InputError(
                f"{self.path} holds no {component}; "
                + ("give one as vae=." if component == "vae" else "give a whole checkpoint.")
            )
        return [self.path]

    def shapes(self, component: str) -> dict[str, list[int]]:
        return {name: s for name, s in self._shapes.items() if self._wanted(name, component)}

    def tensors(self, component: str) -> dict[str, Tensor]:
        tensors = read_weights(self.path, lambda name: self._wanted(name, component))
        return self._layouts[component].read(tensors)

    def _wanted(self, name: str, component: str) -> bool:
        """Whether a tensor belongs to a network as its configuration has it."""
        prefix = self._layouts[component].prefix
        if not name.startswith(prefix) or name.endswith(UNUSED):
            return False
        rest = name.removeprefix(prefix)
        if component == "vae":
            return not rest.startswith("loss.")
        if component == "text_encoder" and rest in ("text_projection", "text_projection.weight"):
            return False
        layer = RESIDUAL_BLOCK.match(rest)  # SD 2.x's last one is there but not used
        return layer is None or int(layer[1]) < self._layers[component]

    def check_tokenizer(self, tower: str) -> None:
        if not isinstance(self._tokenizer_values(tower), dict):
            raise _damaged_metadata(self.path)

    def tokenizer(self, tower: str) -> PreTrainedTokenizerBase:
        return unpack_tokenizer(self._tokenizer_values(tower), self.class_name(tokenizer_of(tower)))

    def _tokenizer_values(self, tower: str) -> Any:
        return self._configs.get(tokenizer_of(tower))

    def vocabulary(self) -> dict[str, Any] | None:
        return self._own.get("vocabulary")


def _own_values(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What a file that was written here says of itself; nothing of any other."""
    if OWN not in metadata:
        return {}
    try:
        values = json.loads(metadata[OWN])
    except (ValueError, RecursionError):
        raise _damaged_metadata(path) from None
    kinds = {"index": dict, "configs": dict, "vocabulary": dict | None}
    if not isinstance(values, dict) or not all(
        isinstance(values.get(key), kind) for key, kind in kinds.items()
    ):
        raise _damaged_metadata(path)
    if not all(isinstance(config, dict) for config in values["configs"].values()):
        raise _damaged_metadata(path)
    return values


def _damaged_metadata(path: Path) -> InputError:
    return InputError(f"{path}: the metadata {OWN!r} is damaged; copy or save the model again.")


def family_to_write(
    pipeline: str, configs: Mapping[str, Mapping[str, Any]], classes: Mapping[str, str]
) -> str:
    """The family under whose names a model can be written.

    classes: those of the other networks than the U-Net. Raises InputError for one that no file in
    CompVis layout can hold.
    """
    wanted = {
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    for component, name in classes.items():
        if name != wanted[component]:
            raise InputError(
                f"A single file has no place for a {name} as {component}; save a directory instead."
            )
    families = [family for family, its in PIPELINES.items() if its == pipeline]
    if "text_encoder" not in classes:
        return "sdxl_refiner"
    if "text_encoder_2" in classes:
        return next(family for family in families if family != "sdxl_refiner")
    second = configs["text_encoder"].get("hidden_act") == "gelu"  # OpenCLIP's; CLIP-L's is another
    return families[1 if second else 0]


def write_single_file(
    path: Path,
    index: dict[str, Any],
    configs: dict[str, dict[str, Any]],
    tokenizers: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    vocabulary: dict[str, Any] | None,
) -> None:
    """Write the networks' `states` in CompVis layout, with all configurations in the metadata.

    OpenCLIP's text encoders are written with the layers that `configs` gives them: of SD 2.x's 24
    the 23 that are used, and no text_projection, which the directory does not have either.
    Raises InputError when the layout has no place for a part or something else lies at `path`.
    """
    from safetensors.torch import save_file

    classes = {name: index[name][1] for name in states if name != "unet"}
    family = family_to_write(index["_class_name"], configs, classes)
    if path.exists():
        _check_replaceable(path)
    tensors: dict[str, Tensor] = {}
    for component, layout in layouts(family, configs).items():
        try:
            tensors |= layout.write(states[component])
        except KeyError as error:
            raise InputError(
                f"A single file has no place for {component}'s {error.args[0]}; save a directory."
            ) from None
    packed = {name: pack_tokenizer(tokenizer) for name, tokenizer in tokenizers.items()}
    own = {"index": index, "configs": configs | packed, "vocabulary": vocabulary}
    metadata = {"format": "pt", OWN: json.dumps(own, sort_keys=True), **_modelspec(family, configs)}
    with staged_file(path) as staging:
        save_file(tensors, staging, metadata=metadata)
        _sort_metadata(staging)


def _modelspec(family: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Stability AI's ModelSpec, as far as it names this model."""
    prediction_type = configs["scheduler"].get("prediction_type")
    kind = "v" if prediction_type == "v_prediction" else str(prediction_type)
    values = {"modelspec.sai_model_spec": "1.0.0", "modelspec.prediction_type": kind}
    published = family_configs(family, str(prediction_type))["unet"]
    if all(configs["unet"].get(key) == published[key] for key in WIDTHS):
        v2 = family == "sd2" and kind == "v"
        name = "stable-diffusion-v2-768-v" if v2 else ARCHITECTURES[family]
        values["modelspec.architecture"] = name
    return values


def _check_replaceable(path: Path) -> None:
    try:
        if OWN not in weight_metadata(path):
            find_family(weight_shapes(path), path)
    except (InputError, OSError):
        raise InputError(f"{path} exists and is no model; choose another place.") from None


def _sort_metadata(path: Path) -> None:
    """Equal models make equal bytes: safetensors writes the metadata in any order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))
