"""Single files: what they say of themselves, how they are written, and which are refused."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff import single_file
from latentdiff.checkpoint import ModelParts, load_model, open_source, save_model
from latentdiff.compvis_names import UNET, VAE
from latentdiff.errors import InputError
from latentdiff.families import family_index


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def stored(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def sd2_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes files of which the names alone are those of SD 2.x."""
    names = [single_file.FIRST_CONVOLUTION, "cond_stage_model.model.ln_final.weight"]

    def write(*extra: str, channels: int = 4, **metadata: str) -> Path:
        path = tmp_path_factory.mktemp("sd2") / "model.safetensors"
        tensors = {name: torch.zeros(2, channels, 3, 3) for name in (*names, *extra)}
        save_file(tensors, path, metadata={"modelspec." + k: v for k, v in metadata.items()})
        return path

    return write


class TestPrediction:
    """From keys one cannot tell v from epsilon."""

    @pytest.mark.parametrize(
        ("metadata", "expected"),
        [
            ({}, ("v_prediction", 96)),
            ({"prediction_type": "v"}, ("v_prediction", 96)),
            ({"prediction_type": "epsilon"}, ("epsilon", 64)),
            ({"architecture": "stable-diffusion-v2-512"}, ("epsilon", 64)),
            ({"architecture": "stable-diffusion-v2-768-v"}, ("v_prediction", 96)),
        ],
    )
    def test_of_metadata(
        self, sd2_file: Callable[..., Path], metadata: dict[str, str], expected: tuple[str, int]
    ) -> None:
        source = open_source(sd2_file(**metadata))
        size = source.config("unet")["sample_size"]
        assert (source.config("scheduler")["prediction_type"], size) == expected

    def test_of_the_caller(self, sd2_file: Callable[..., Path]) -> None:
        source = open_source(sd2_file(prediction_type="v"), "epsilon")
        assert source.config("scheduler")["prediction_type"] == "epsilon"
        assert source.config("unet")["sample_size"] == 64

    def test_of_a_marker(self, sd2_file: Callable[..., Path]) -> None:
        scheduler = open_source(sd2_file("v_pred", "ztsnr", prediction_type="epsilon")).config(
            "scheduler"
        )
        assert scheduler["prediction_type"] == "v_prediction"
        assert scheduler["rescale_betas_zero_snr"] is True

    def test_inpainting_learns_the_noise(self, sd2_file: Callable[..., Path]) -> None:
        source = open_source(sd2_file(channels=9))
        assert source.pipeline == "StableDiffusionInpaintPipeline"
        assert source.config("scheduler")["prediction_type"] == "epsilon"

    def test_of_a_loaded_model(self, tiny_model: Path) -> None:
        assert load_model(tiny_model).scheduler_config.prediction_type == "v_prediction"
        loaded = load_model(tiny_model, prediction_type="epsilon")
        assert loaded.scheduler_config.prediction_type == "epsilon"


@pytest.fixture
def tiny_file(tiny_parts: ModelParts, tmp_path: Path) -> Path:
    save_model(tiny_parts, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_a_model_with_sizes_and_a_tokenizer_of_its_own(
    tiny_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    loaded = load_model(tiny_file)
    save_model(loaded, tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tiny_model)
    with safe_open(tiny_file, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.prediction_type"] == "v"
    assert "modelspec.architecture" not in metadata


def test_the_bundled_models_16_latent_channels(tmp_path: Path) -> None:
    """Neither the channels of any published family nor their sizes."""
    bundled = load_model()
    file = tmp_path / "emoji.safetensors"
    for _ in range(2):  # what was written is a model that may be replaced
        save_model(bundled, file)
    loaded = load_model(file)
    assert loaded.unet.config == bundled.unet.config
    assert loaded.scheduler_config == bundled.scheduler_config
    assert loaded.vocabulary == bundled.vocabulary
    for target, parts in (("from", bundled), ("to", loaded)):
        save_model(parts, tmp_path / target)
    assert stored(tmp_path / "to") == stored(tmp_path / "from")
    for ours, theirs in (
        (loaded.unet, bundled.unet),
        (loaded.autoencoder.vae, bundled.autoencoder.vae),
        *((tower.model, bundled.towers[name].model) for name, tower in loaded.towers.items()),
    ):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


class TestSaving:
    def test_a_failure_leaves_what_was_there(
        self, tiny_parts: ModelParts, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = tiny_file.read_bytes()

        def fail(path: Path) -> None:
            assert path.stat().st_size > 0
            raise OSError("disk full")

        monkeypatch.setattr(single_file, "_sort_metadata", fail)
        for target in (tiny_file, tiny_file.with_stem("new")):
            with pytest.raises(OSError, match="disk full"):
                save_model(tiny_parts, target)
        assert [path.name for path in tiny_file.parent.iterdir()] == [tiny_file.name]
        assert tiny_file.read_bytes() == before

    def test_replaces_a_model_and_nothing_else(
        self, tiny_parts: ModelParts, tiny_file: Path
    ) -> None:
        before = tiny_file.read_bytes()
        save_model(tiny_parts, tiny_file)
        assert tiny_file.read_bytes() == before
        other = tiny_file.with_stem("thesis")
        save_file({"chapter": torch.ones(1)}, other)
        with pytest.raises(InputError, match="is no model; choose another place"):
            save_model(tiny_parts, other)
        assert load_file(other).keys() == {"chapter"}


def change(path: Path, metadata: dict[str, str] | None, **tensors: Tensor | None) -> None:
    with safe_open(path, framework="pt") as file:
        own = file.metadata()
    state = {**load_file(path), **{name.replace("__", "."): t for name, t in tensors.items()}}
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, path, metadata={**own, **metadata} if metadata is not None else None)


def lora(path: Path) -> None:
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(1)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lora, "holds no U-Net under CompVis's names; give a whole .* not a LoRA"),
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "is damaged .*copy or download it again"),
        (lambda p: p.write_bytes(b"{}"), "is damaged"),
        (lambda p: change(p, {"latentdiff": "{"}), "metadata 'latentdiff' is damaged"),
        (lambda p: change(p, {"latentdiff": "[]"}), "metadata 'latentdiff' is damaged"),
        (lambda p: change(p, {"latentdiff": '{"index": {}, "configs": {}}'}), "holds a None; only"),
        (
            lambda p: change(
                p, {"latentdiff": json.dumps({"index": family_index("sd1"), "configs": {}})}
            ),
            "metadata 'latentdiff' is damaged",
        ),
        (lambda p: change(p, None), "does not fit its model's structure"),
        (lambda p: change(p, {}, first_stage_model__x=torch.ones(1)), "does not fit .*1 tensors"),
        (
            lambda p: change(
                p, {}, model__diffusion_model__input_blocks__0__0__weight=torch.ones(2, 8, 3, 3)
            ),
            "does not fit its model's structure: 1 tensors",
        ),
    ],
)
def test_refuses_what_cannot_be_used(
    tiny_file: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(tiny_file)
    with pytest.raises(InputError, match=message) as caught:
        load_model(tiny_file)
    assert str(tiny_file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_other_kinds_of_unet(sd2_file: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="holds a U-Net for 8 channels; only"):
        open_source(sd2_file(channels=8))
    with pytest.raises(InputError, match=r"holds a U-Net for scaled latents \(EDM\); only"):
        open_source(sd2_file("edm_mean"))


def test_a_file_without_text_encoder_or_vae(tiny_file: Path, tiny_model: Path) -> None:
    tensors = load_file(tiny_file)
    with safe_open(tiny_file, framework="pt") as file:
        metadata = file.metadata()
    bare = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    save_file(bare, tiny_file, metadata)
    with pytest.raises(InputError, match="no text encoder of Stable Diffusion 1, 2 or XL"):
        load_model(tiny_file)
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith(VAE)}
    save_file(bare, tiny_file, metadata)
    with pytest.raises(InputError, match="holds no vae; give one as vae="):
        load_model(tiny_file)
    assert load_model(tiny_file, vae=tiny_model).autoencoder.scaling == 0.7
