"""Single files in CompVis layout, for each family in narrow form, with the network cut off.

diffusers' own converters and its from_single_file are the oracle.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff import single_file
from latentdiff.checkpoint import ModelParts, load_model, open_source, save_model
from latentdiff.compvis_names import VAE
from latentdiff.families import FAMILIES, family_configs, family_index
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import TextEncoder, TextEncoders
from latentdiff.networks import build_tower, build_unet, build_vae
from latentdiff.scheduler_config import parse_scheduler
from latentdiff.single_file import find_family, layouts
from latentdiff.sources import tokenizer_of
from latentdiff.tokenizer_files import clip_tokenizer
from latentdiff.weights import stored_tensors

TYPES = {
    "sd1": "v1",
    "sd1_inpaint": "inpainting",
    "sd2": "v2",
    "sd2_inpaint": "inpainting_v2",
    "sdxl": "xl_base",
    "sdxl_inpaint": "xl_inpaint",
    "sdxl_refiner": "xl_refiner",
}
"""diffusers' names for the families."""
KINDS = {family: "v_prediction" if family == "sd2" else "epsilon" for family in FAMILIES}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def narrow_configs(family: str, prediction_type: str) -> dict[str, dict[str, Any]]:
    """A family's configurations with the same structure and few channels."""
    configs = family_configs(family, prediction_type)
    for name in ("text_encoder", "text_encoder_2"):
        if name in configs:
            width = 16 if name == "text_encoder" else 24
            configs[name] |= {
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": 3 if configs[name]["num_hidden_layers"] == 23 else 2,
                "num_attention_heads": 2,
                "projection_dim": width,
            }
    unet = configs["unet"]
    levels = len(unet["block_out_channels"])
    unet |= {
        "block_out_channels": [16, 32, 32, 48][:levels],
        "norm_num_groups": 4,
        "attention_head_dim": 4 if unet["attention_head_dim"] == 8 else [2, 4, 4, 8][:levels],
        "cross_attention_dim": sum(c["hidden_size"] for c in configs.values() if "vocab_size" in c),
    }
    if "addition_embed_type" in unet:
        numbers = 5 if family == "sdxl_refiner" else 6
        unet["addition_time_embed_dim"] = 8
        unet["projection_class_embeddings_input_dim"] = 24 + 8 * numbers
        depth = unet["transformer_layers_per_block"]
        unet["transformer_layers_per_block"] = 2 if isinstance(depth, int) else [1, 2, 3]
    configs["vae"] |= {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
    return configs


@dataclass(frozen=True)
class Narrow:
    """A model of one family in narrow form, in fp16, as directory and as single file."""

    family: str
    parts: ModelParts
    directory: Path
    file: Path

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.file)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {pad: clip_tokenizer(pad) for pad in ("<|endoftext|>", "!")}


@pytest.fixture(scope="module", params=FAMILIES)
def narrow(
    request: pytest.FixtureRequest,
    tokenizers: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Narrow:
    family = request.param
    configs, index = narrow_configs(family, KINDS[family]), family_index(family)
    modules = {"unet": build_unet(configs["unet"]), "vae": build_vae(configs["vae"])}
    for name in ("text_encoder", "text_encoder_2"):
        if name in configs:
            modules[name] = build_tower(index[name][1])(configs[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.half().eval().parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    towers = [
        TextEncoder(tokenizers[configs[tokenizer_of(name)]["pad_token"]], module)
        for name, module in modules.items()
        if name.startswith("text")
    ]
    parts = ModelParts(
        modules["unet"],
        Autoencoder(modules["vae"]),
        TextEncoders(towers) if "sdxl" in family else towers[0],
        parse_scheduler(configs["scheduler"], Path("scheduler_config.json")),
        pipeline=index["_class_name"],
        force_zeros_for_empty_prompt=index["force_zeros_for_empty_prompt"],
        requires_aesthetics_score=index["requires_aesthetics_score"],
    )
    folder = tmp_path_factory.mktemp(family)
    save_model(parts, folder / "directory", torch.float16)
    save_model(parts, folder / "model.safetensors", torch.float16)
    return Narrow(family, parts, folder / "directory", folder / "model.safetensors")


def stored(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def weights(directory: Path, component: str) -> dict[str, Tensor]:
    (file,) = (directory / component).glob("*.safetensors")
    return load_file(file)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


class TestRoundTrip:
    def test_directory_file_directory(self, narrow: Narrow, tmp_path: Path) -> None:
        """Every byte: tensors, configurations, tokenizers."""
        from_directory = load_model(narrow.directory, torch.float16)
        save_model(from_directory, tmp_path / "file.safetensors", torch.float16)
        from_file = load_model(tmp_path / "file.safetensors", torch.float16)
        save_model(from_file, tmp_path / "again", torch.float16)
        assert stored(tmp_path / "again") == stored(narrow.directory)
        assert (tmp_path / "file.safetensors").read_bytes() == narrow.file.read_bytes()
        assert from_file.pipeline == narrow.parts.pipeline
        assert from_file.directory == tmp_path / "file.safetensors"

    def test_a_file_from_elsewhere(
        self, narrow: Narrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without metadata, and with all that published files have besides."""
        monkeypatch.setattr(single_file, "family_configs", narrow_configs)
        save_file(narrow.tensors() | junk(narrow), tmp_path / "file.safetensors")
        loaded = load_model(tmp_path / "file.safetensors", torch.float16)
        save_model(loaded, tmp_path / "again", torch.float16)
        assert stored(tmp_path / "again") == stored(narrow.directory)


def junk(narrow: Narrow) -> dict[str, Tensor]:
    """Names that occur in published checkpoints and mean nothing."""
    extra = {
        "alphas_cumprod": torch.ones(1000),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(3),
        "first_stage_model.loss.logvar": torch.zeros(1),
    }
    for prefix in ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1."):
        for kind, names in {
            "transformer.": ("text_model.embeddings.position_ids", "text_projection.weight"),
            "model.": ("logit_scale", "attn_mask"),
        }.items():
            if any(name.startswith(prefix + kind) for name in narrow.tensors()):
                extra |= {prefix + kind + name: torch.ones(2, 2) for name in names}
    if narrow.family.startswith("sd2"):
        blocks = "cond_stage_model.model.transformer.resblocks."
        last, unused = f"{blocks}2.", f"{blocks}3."
        extra |= {
            name.replace(last, unused): torch.zeros_like(tensor)
            for name, tensor in narrow.tensors().items()
            if name.startswith(last)
        }
        extra["cond_stage_model.model.text_projection"] = torch.ones(16, 16)
    return extra


class TestLikeDiffusers:
    def test_its_converters_find_the_same_tensors(self, narrow: Narrow) -> None:
        file, directory = narrow.tensors(), narrow.directory
        config = json.loads((directory / "unet" / "config.json").read_text())
        same(theirs.convert_ldm_unet_checkpoint(dict(file), config), weights(directory, "unet"))
        config = json.loads((directory / "vae" / "config.json").read_text())
        same(theirs.convert_ldm_vae_checkpoint(dict(file), config), weights(directory, "vae"))
        assert all(
            tensor.shape[2:] == (1, 1)
            for name, tensor in file.items()
            if name.startswith(VAE) and name.endswith(("q.weight", "proj_out.weight"))
        )

    def test_its_pipeline_opens_the_file(self, narrow: Narrow) -> None:
        pipeline = getattr(diffusers, narrow.parts.pipeline).from_single_file(
            str(narrow.file),
            config=str(narrow.directory),
            local_files_only=True,
            torch_dtype=torch.float16,
        )
        for name in open_source(narrow.directory).networks:
            module = getattr(pipeline, name)
            assert module.dtype == torch.float16
            same(stored_tensors(module, torch.float16), weights(narrow.directory, name))


PARAMETERS = {
    "unet": {
        "sd1": 859_520_964,
        "sd1_inpaint": 859_535_364,
        "sd2": 865_910_724,
        "sd2_inpaint": 865_925_124,
        "sdxl": 2_567_463_684,
    },
    "vae": dict.fromkeys(FAMILIES, 83_653_863),
    "text_encoder": {
        **dict.fromkeys(("sd1", "sd1_inpaint", "sdxl", "sdxl_inpaint"), 123_060_480),
        **dict.fromkeys(("sd2", "sd2_inpaint"), 340_387_840),
    },
    "text_encoder_2": dict.fromkeys(("sdxl", "sdxl_inpaint", "sdxl_refiner"), 694_659_840),
}
"""Of the published models."""


@pytest.mark.parametrize("family", FAMILIES)
def test_at_true_size(family: str) -> None:
    """Names and shapes alone: diffusers sees the same family and converts it alike."""
    configs, index = family_configs(family, KINDS[family]), family_index(family)
    builds: dict[str, Callable[..., Any]] = {"unet": build_unet, "vae": build_vae}
    file: dict[str, Tensor] = {}
    states = {}
    for component, layout in layouts(family, configs).items():
        build = builds.get(component) or build_tower(index[component][1])
        with torch.device("meta"):
            module = build(configs[component])
        count = sum(parameter.numel() for parameter in module.parameters())
        assert count == PARAMETERS[component].get(family, count)
        prefix = "text_model." if index[component][1] == "CLIPTextModel" else ""
        states[component] = {
            prefix + name.removeprefix(prefix): tensor
            for name, tensor in module.state_dict().items()
        }
        file |= layout.write(states[component])
    assert theirs.infer_diffusers_model_type(file) == TYPES[family]
    assert find_family({name: list(t.shape) for name, t in file.items()}, Path("file")) == family
    assert len(file) >= 1000
    config = {"layers_per_block": 2, **configs["unet"]}
    shapes = {n: t.shape for n, t in theirs.convert_ldm_unet_checkpoint(file, config).items()}
    assert shapes == {name: tensor.shape for name, tensor in states["unet"].items()}
    for component, layout in layouts(family, configs).items():
        its = {name: t for name, t in file.items() if name.startswith(layout.prefix)}
        back = {name: tensor.shape for name, tensor in layout.read(its).items()}
        assert back == {name: tensor.shape for name, tensor in states[component].items()}
