"""The forms in which a model's weights may lie in its directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.checkpoint import ModelParts, load_model
from latentdiff.errors import InputError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def tensors(parts: ModelParts) -> dict[str, torch.Tensor]:
    networks = {"unet": parts.unet, "vae": parts.autoencoder, "text": parts.text_encoder}
    return {
        f"{part}.{name}": tensor
        for part, network in networks.items()
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]
    }


class TestFormsOfWeights:
    """A file, shards with an index, and both of the variant fp16."""

    @staticmethod
    def split(weights: Path, variant: str = "") -> Path:
        """Two shards in place of one file; returns the index."""
        state = load_file(weights)
        stem, names = weights.with_suffix(""), sorted(state)
        weights.unlink()
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard = stem.with_name(f"{stem.name}{variant}-{number:05}-of-00002.safetensors")
            save_file({name: state[name] for name in part}, shard)
            weight_map |= dict.fromkeys(part, shard.name)
        index = stem.with_name(f"{stem.name}.safetensors.index{variant}.json")
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index

    def test_shards_and_variants(self, copy: Path, tiny_parts: ModelParts) -> None:
        self.split(copy / WEIGHTS)
        self.split(copy / "text_encoder" / "model.safetensors", ".fp16")
        vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
        vae.rename(vae.with_suffix(".fp16.safetensors"))
        torch.testing.assert_close(tensors(load_model(copy)), tensors(tiny_parts), rtol=0, atol=0)

    def test_plain_weights_go_first(self, copy: Path, tiny_parts: ModelParts) -> None:
        zeros = {
            name: torch.zeros_like(tensor) for name, tensor in load_file(copy / WEIGHTS).items()
        }
        save_file(zeros, (copy / WEIGHTS).with_suffix(".fp16.safetensors"))
        torch.testing.assert_close(tensors(load_model(copy)), tensors(tiny_parts), rtol=0, atol=0)

    def test_a_missing_shard_is_named(self, copy: Path) -> None:
        index = self.split(copy / WEIGHTS)
        index.with_name("diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
        with pytest.raises(InputError, match=r"There is no file .*-00002-of-00002.safetensors"):
            load_model(copy)

    @pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "", 7])
    def test_an_index_names_files_beside_it(self, copy: Path, name: Any) -> None:
        self.split(copy / WEIGHTS).write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        with pytest.raises(InputError, match="does not name the files beside it"):
            load_model(copy)
