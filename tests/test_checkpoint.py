"""Model directories: what is saved comes back, and what cannot be used is refused in a sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff import checkpoint
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


def file_bytes(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A model directory to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


class TestRoundTrip:
    def test_everything_comes_back(self, tiny_parts: ModelParts, tiny_model: Path) -> None:
        loaded = load_model(tiny_model)
        torch.testing.assert_close(tensors(loaded), tensors(tiny_parts), rtol=0, atol=0)
        assert loaded.scheduler_config == tiny_parts.scheduler_config
        assert loaded.vocabulary == tiny_parts.vocabulary
        assert loaded.directory == tiny_model
        texts = ["a fox on a blue background", "Ünï 42"]
        ids = loaded.text_encoder.tokenize(texts)
        assert torch.equal(ids, tiny_parts.text_encoder.tokenize(texts))
        assert not any(network.training for network in (loaded.unet, loaded.text_encoder.model))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_stored_in_half_the_space_and_run_in_float32(
        self, tiny_parts: ModelParts, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        save_model(tiny_parts, tmp_path / "half", dtype)
        stored = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
        loaded = dict(load_model(tmp_path / "half").unet.named_parameters())
        expected = {
            name: value.to(dtype).float() for name, value in tiny_parts.unet.named_parameters()
        }
        assert expected.keys() == loaded.keys()
        for name, value in expected.items():
            torch.testing.assert_close(loaded[name], value, rtol=0, atol=0, check_dtype=True)

    def test_equal_parts_make_equal_bytes(
        self, tiny_parts: ModelParts, tiny_model: Path, tmp_path: Path
    ) -> None:
        tiny_parts.unet.to(memory_format=torch.channels_last)
        save_model(tiny_parts, tmp_path / "again")
        save_model(load_model(tiny_model), tmp_path / "reloaded")
        assert file_bytes(tmp_path / "again") == file_bytes(tiny_model)
        assert file_bytes(tmp_path / "reloaded") == file_bytes(tiny_model)

    def test_loading_draws_no_random_numbers(self, tiny_model: Path) -> None:
        before = torch.get_rng_state()
        load_model(tiny_model)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_model_without_vocabulary(self, copy: Path) -> None:
        (copy / "vocabulary.json").unlink()
        assert load_model(copy).vocabulary is None

    def test_a_tokenizer_of_two_files(self, copy: Path, tiny_parts: ModelParts) -> None:
        (copy / "tokenizer" / "tokenizer.json").unlink()
        texts = ["a fox", "Ünï 42"]
        ids = load_model(copy).text_encoder.tokenize(texts)
        assert torch.equal(ids, tiny_parts.text_encoder.tokenize(texts))

    def test_names_of_older_files(self, copy: Path, tiny_parts: ModelParts) -> None:
        """The VAE's attention before diffusers 0.12, and the position ids of transformers 4."""
        vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = load_file(vae)
        for new, name in old.items():
            state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
        assert any("proj_attn" in key for key in state)
        save_file(state, vae)
        clip = copy / "text_encoder" / "model.safetensors"
        state = load_file(clip)
        assert all(key.startswith("text_model.") for key in state)
        state["text_model.embeddings.position_ids"] = torch.arange(32)[None]
        save_file(state, clip)
        loaded = tensors(load_model(copy))
        torch.testing.assert_close(loaded, tensors(tiny_parts), rtol=0, atol=0)


class TestSaving:
    def test_no_file_says_where_its_parts_came_from(
        self, tiny_parts: ModelParts, tiny_model: Path, tmp_path: Path
    ) -> None:
        parts = ModelParts(
            tiny_parts.unet,
            Autoencoder(AutoencoderKL.from_pretrained(tiny_model / "vae")),
            TextEncoder(
                CLIPTokenizer.from_pretrained(tiny_model / "tokenizer"),
                CLIPTextModel.from_pretrained(tiny_model / "text_encoder"),
            ),
            tiny_parts.scheduler_config,
            tiny_parts.vocabulary,
        )
        save_model(parts, tmp_path / "saved")
        assert file_bytes(tmp_path / "saved") == file_bytes(tiny_model)

    def test_replaces_a_model_whole(self, tiny_parts: ModelParts, copy: Path) -> None:
        (copy / "README.md").write_text("of the model before")
        before = file_bytes(copy)
        del before["README.md"]
        save_model(tiny_parts, copy)
        assert file_bytes(copy) == before
        assert [path.name for path in copy.parent.iterdir()] == ["copy"]

    def test_a_failure_leaves_nothing_and_what_was_there(
        self, tiny_parts: ModelParts, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = file_bytes(copy)

        def fail(values: dict[str, Any], path: Path) -> None:
            if path.name == "model_index.json":
                raise OSError("disk full")

        monkeypatch.setattr(checkpoint, "write_json", fail)
        for target in (copy, copy.with_name("new")):
            with pytest.raises(OSError, match="disk full"):
                save_model(tiny_parts, target)
        assert file_bytes(copy) == before
        assert [path.name for path in copy.parent.iterdir()] == ["copy"]

    def test_refuses_to_replace_anything_else(self, tiny_parts: ModelParts, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("irreplaceable")
        with pytest.raises(InputError, match="is no model directory; choose another place"):
            save_model(tiny_parts, tmp_path)
        with pytest.raises(InputError, match="is no model directory; choose another place"):
            save_model(tiny_parts, tmp_path / "thesis.txt")
        assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"


def test_an_earlier_model_comes_back_if_the_new_one_cannot_take_its_place(
    tiny_parts: ModelParts, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = file_bytes(copy), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target == copy and not path.name.endswith(".earlier"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        save_model(tiny_parts, copy)
    assert file_bytes(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


class Payload:
    """Runs code when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def without_merges(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "merges.txt").unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(path: Path) -> None:
    state = load_file(path)
    state.pop(min(state))
    save_file(state, path)


def reshape_a_tensor(path: Path) -> None:
    state = load_file(path)
    name = min(state)
    save_file({**state, name: state[name][None]}, path)


def add_a_tensor(path: Path) -> None:
    save_file({**load_file(path), "extra": torch.zeros(3)}, path)


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("model_index.json", Path.unlink, "There is no file .*model_index.json"),
    ("model_index.json", lambda p: p.write_text("{"), "is not readable JSON"),
    ("model_index.json", lambda p: p.write_text("[1]"), "must hold a JSON object"),
    ("model_index.json", lambda p: p.write_bytes(b"\xff\xfe"), "is not readable JSON"),
    ("model_index.json", lambda p: p.write_text("[" * 900_000), "is not readable JSON"),
    (
        "model_index.json",
        lambda p: edit(p, _class_name="FluxPipeline"),
        "holds a FluxPipeline; only StableDiffusionPipeline or .* can be read",
    ),
    (
        "model_index.json",
        lambda p: edit(p, unet=["my_code", "MyNet"]),
        "as its unet; only UNet2DConditionModel can be read",
    ),
    ("vae", shutil.rmtree, "There is no file .*vae"),
    ("unet/config.json", lambda p: p.write_text(" " * (1 << 20) + "{}"), "larger than 1 MiB"),
    ("unet/config.json", lambda p: edit(p, block_out_channels="wide"), "unet.config.json"),
    ("unet/config.json", lambda p: edit(p, class_embed_type="timestep"), "class_embed_type"),
    ("vae/config.json", lambda p: edit(p, down_block_types=["X"]), "describes no network"),
    ("vae/config.json", lambda p: edit(p, layers_per_block=10**9), "more layers than there are"),
    (
        "model_index.json",
        lambda p: edit(p, text_encoder=["transformers", "AutoModel"]),
        "as its text_encoder; only CLIPTextModel or",
    ),
    (
        "model_index.json",
        lambda p: edit(p, tokenizer=["my_code", "MyTokenizer"]),
        "as its tokenizer; only CLIPTokenizer or",
    ),
    ("text_encoder/config.json", lambda p: edit(p, hidden_size="x"), "describes no network"),
    ("text_encoder/config.json", lambda p: edit(p, use_attention_mask=True), "not supported"),
    ("tokenizer/tokenizer_config.json", Path.unlink, "There is no file .*tokenizer_config"),
    ("tokenizer", without_merges, "There is no file .*merges.txt"),
    (
        "tokenizer/tokenizer.json",
        lambda p: p.write_text("{}"),
        "holds no CLIPTokenizer that can",
    ),
    ("scheduler/scheduler_config.json", Path.unlink, "There is no file .*scheduler_config"),
    (
        "scheduler/scheduler_config.json",
        lambda p: edit(p, prediction_type="noise"),
        "scheduler_config.json: prediction_type",
    ),
    ("vocabulary.json", lambda p: edit(p, concepts=[]), "vocabulary.json: concepts"),
    (WEIGHTS, Path.unlink, "There is no file .*unet"),
    (WEIGHTS, truncate, "is damaged .*copy or download it again"),
    (WEIGHTS, lambda p: p.write_bytes(b""), "is damaged"),
    (WEIGHTS, lambda p: p.write_bytes(b"\xff" * 64), "is damaged"),
    (WEIGHTS, drop_a_tensor, "does not fit .* 1 tensors"),
    (WEIGHTS, add_a_tensor, "does not fit .* 1 tensors .* extra"),
    (WEIGHTS, reshape_a_tensor, "does not fit .* 1 tensors"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGE)
def test_refuses_what_is_damaged(
    copy: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy / file)
    with pytest.raises(InputError, match=message) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "There is no model directory at nowhere; give .* 'emoji' for the bundled"),
        ("weights.ckpt", "weights.ckpt is a pickle, which can run code when opened; convert it"),
        (7, "model must be a path or a name"),
    ],
)
def test_refuses_what_is_no_directory(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(model)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_never_opens_a_pickle(copy: Path, tmp_path: Path, suffix: str) -> None:
    marker = tmp_path / "ran"
    (copy / WEIGHTS).unlink()
    weights = (copy / WEIGHTS).with_suffix(suffix)
    weights.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(InputError, match=r"only as a pickle .*convert it once.*safe_serialization"):
        load_model(copy)
    assert not marker.exists()


def with_channels(directory: Path, taken: int, given: int) -> None:
    """A U-Net that takes and gives so many."""
    edit(directory / "unet" / "config.json", in_channels=taken, out_channels=given)
    weights = load_file(directory / WEIGHTS)
    weights["conv_in.weight"] = torch.zeros(32, taken, 3, 3)
    weights["conv_out.weight"], weights["conv_out.bias"] = (
        torch.zeros(given, 32, 3, 3),
        torch.zeros(given),
    )
    save_file(weights, directory / WEIGHTS)


@pytest.mark.parametrize(
    ("pipeline", "taken", "given", "message"),
    [
        ("StableDiffusionPipeline", 5, 4, "takes 5 channels but the latents have 4"),
        ("StableDiffusionInpaintPipeline", 8, 4, "takes 8 channels but the latents have 4"),
        ("StableDiffusionPipeline", 9, 4, "9 channels, as for inpainting, but the model is a Stab"),
        ("StableDiffusionPipeline", 4, 8, "gives 8 channels but the latents have 4"),
        ("StableDiffusionInpaintPipeline", 9, 8, "gives 8 channels but the latents have 4"),
    ],
)
def test_refuses_parts_of_different_models(
    copy: Path, pipeline: str, taken: int, given: int, message: str
) -> None:
    with_channels(copy, taken, given)
    edit(copy / "model_index.json", _class_name=pipeline)
    with pytest.raises(InputError, match=message):
        load_model(copy)


@pytest.mark.parametrize(("taken", "inpaints"), [(4, False), (9, True)])
def test_channels_tell_a_unet_trained_to_fill_in(copy: Path, taken: int, inpaints: bool) -> None:
    with_channels(copy, taken, 4)
    edit(copy / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    assert load_model(copy).inpaints is inpaints


def test_a_model_keeps_the_name_that_it_was_given(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tiny_parts: ModelParts
) -> None:
    monkeypatch.chdir(copy.parent)
    assert load_model("copy/").name == "copy/"
    assert load_model(copy).name == str(copy)
    assert load_model().name == load_model("emoji").name == "emoji"
    assert tiny_parts.name == ""
