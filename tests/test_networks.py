"""A VAE in place of a model's own, and text encoders other than CLIP's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from latentdiff import model_files
from latentdiff.checkpoint import ModelParts, load_model, save_model
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import TextEncoder


def tensors(parts: ModelParts) -> dict[str, torch.Tensor]:
    networks = {"unet": parts.unet, "vae": parts.autoencoder, "text": parts.text_encoder}
    return {
        f"{part}.{name}": tensor
        for part, network in networks.items()
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]
    }


class TestOtherVae:
    @pytest.fixture
    def other(self, tiny_parts: ModelParts) -> AutoencoderKL:
        config = {**tiny_parts.autoencoder.vae.config, "scaling_factor": 0.3}
        generator = torch.Generator().manual_seed(5)
        vae = AutoencoderKL.from_config(config)
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return vae

    def check(self, loaded: ModelParts, other: AutoencoderKL, scaling: float) -> None:
        expected = dict(other.state_dict())
        torch.testing.assert_close(dict(loaded.autoencoder.vae.state_dict()), expected)
        assert loaded.autoencoder.scaling == scaling

    def test_directories_have_a_scale_of_their_own(
        self, other: AutoencoderKL, tiny_model: Path, tiny_parts: ModelParts, tmp_path: Path
    ) -> None:
        other.save_pretrained(tmp_path / "alone")
        self.check(load_model(tiny_model, vae=tmp_path / "alone"), other, 0.3)
        parts = replace(tiny_parts, autoencoder=Autoencoder(other))
        for target in ("whole", "whole.safetensors"):
            save_model(parts, tmp_path / target)
            self.check(load_model(tiny_model, vae=tmp_path / target), other, 0.3)

    def test_files_take_the_scale_of_the_models_own(
        self, other: AutoencoderKL, tiny_model: Path, tiny_parts: ModelParts, tmp_path: Path
    ) -> None:
        """Under CompVis's names, with a prefix or without, with matrices or kernels; or ours."""
        save_model(replace(tiny_parts, autoencoder=Autoencoder(other)), tmp_path / "a.safetensors")
        prefix = "first_stage_model."
        named = {
            name: tensor
            for name, tensor in load_file(tmp_path / "a.safetensors").items()
            if name.startswith(prefix)
        }
        matrices = {
            name.removeprefix(prefix): t[:, :, 0, 0] if "attn_1" in name and t.dim() == 4 else t
            for name, t in named.items()
        }
        extra = {"loss.logvar": torch.zeros(())}
        forms = [named, matrices | extra, dict(other.state_dict())]
        for number, state in enumerate(forms):
            save_file(state, tmp_path / f"{number}.safetensors")
            loaded = load_model(tiny_model, vae=tmp_path / f"{number}.safetensors")
            self.check(loaded, other, 0.7)

    def test_refuses_what_is_none(self, tiny_model: Path, tmp_path: Path) -> None:
        save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=r"x.safetensors does not fit its model's structure"):
            load_model(tiny_model, vae=tmp_path / "x.safetensors")

    def test_is_missed_before_any_weights_are_read(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> NoReturn:
            raise AssertionError("weights were read")

        monkeypatch.setattr(model_files, "read_weights", refuse)
        (tmp_path / "vae").mkdir()
        with pytest.raises(InputError, match=r"vae.pt is a pickle"):
            load_model(tiny_model, vae="vae.pt")
        with pytest.raises(InputError, match=r"There is no file .*config.json"):
            load_model(tiny_model, vae=tmp_path)
        with pytest.raises(InputError, match=r"There is no file gone.safetensors; .* of a VAE"):
            load_model(tiny_model, vae="gone.safetensors")
        shutil.copy(tiny_model / "vae" / "config.json", tmp_path / "vae")
        with pytest.raises(InputError, match=r"There is no file .*model.safetensors; .*incomplete"):
            load_model(tiny_model, vae=tmp_path)
        with pytest.raises(AssertionError, match="weights were read"):
            load_model(tiny_model)


def other_tower(name: str) -> PreTrainedModel:
    """48 wide, for 514 tokens."""
    if name == "T5EncoderModel":
        sizes = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
        return T5EncoderModel(T5Config(vocab_size=514, **sizes))
    if name == "BertModel":
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
        return BertModel(BertConfig(vocab_size=514, hidden_size=48, **sizes))
    sizes = {"n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 3}
    return GPT2Model(GPT2Config(vocab_size=514, bos_token_id=512, eos_token_id=513, **sizes))


@pytest.mark.parametrize("name", ["T5EncoderModel", "BertModel", "GPT2Model"])
def test_other_text_encoders_come_back(name: str, tiny_parts: ModelParts, tmp_path: Path) -> None:
    encoder = TextEncoder(tiny_parts.text_encoder.tokenizer, other_tower(name).eval())
    parts = replace(tiny_parts, text_encoder=encoder)
    save_model(parts, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    torch.testing.assert_close(tensors(loaded), tensors(parts), rtol=0, atol=0)
    assert type(loaded.text_encoder.model).__name__ == name
    texts = ["a fox", ""]
    with torch.no_grad():
        theirs = getattr(transformers, name).from_pretrained(tmp_path / "model" / "text_encoder")
        hidden = TextEncoder(encoder.tokenizer, theirs).encode(texts).hidden
        torch.testing.assert_close(loaded.text_encoder.encode(texts).hidden, hidden)
    with pytest.raises(InputError, match=f"no place for a {name} as text_encoder; save a dir"):
        save_model(parts, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
