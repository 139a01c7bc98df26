"""LoRA files: the names in them, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff import lora_files
from latentdiff.errors import InputError
from latentdiff.lora import Adapters, LoRA, LoRALayer
from latentdiff.lora_files import read_lora, save_lora
from latentdiff.models.unet import UNet, UNetConfig


def names_of(path: Path, *stems: str, ends: tuple[str, str] = ("lora_down", "lora_up")) -> LoRA:
    keys = [f"{stem}.{end}.weight" for stem in stems for end in ends]
    save_file({key: torch.ones(1, 1) for key in keys}, path)
    return read_lora(path)


@pytest.mark.parametrize("attends", ["base", "refiner"])
def test_kohya_names_of_every_module_of_true_size(attends: str, tmp_path: Path) -> None:
    """SD 1.x and SDXL's base, the refiner: every matrix and convolution."""
    kinds = {
        "base": (("", "CrossAttn", "CrossAttn"), (320, 640, 1280), (1, 2, 10), 2048, 2816),
        "refiner": (("", "CrossAttn", "CrossAttn", ""), (384, 768, 1536, 1536), 4, 1280, 2560),
    }
    crossing, widths, depths, text, added = kinds[attends]
    with torch.device("meta"):
        unet = UNet(
            UNetConfig(
                sample_size=128,
                block_out_channels=widths,
                down_block_types=tuple(f"{kind}DownBlock2D" for kind in crossing),  # type: ignore
                up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(crossing)),  # type: ignore
                transformer_layers_per_block=depths,
                cross_attention_dim=text,
                attention_head_dim=tuple(width // 64 for width in widths),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=added,
            )
        )
    expected = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    stems = [f"lora_unet_{name.replace('.', '_')}" for name in expected]
    assert set(names_of(tmp_path / "a.safetensors", *stems)["unet"]) == expected


@pytest.mark.parametrize(
    ("stem", "part", "name"),
    [
        ("lora_unet_input_blocks_6_0_op", "unet", "down_blocks.1.downsamplers.0.conv"),
        ("lora_unet_output_blocks_2_1_conv", "unet", "up_blocks.0.upsamplers.0.conv"),
        (
            "lora_unet_output_blocks_11_0_emb_layers_1",
            "unet",
            "up_blocks.3.resnets.2.time_emb_proj",
        ),
        ("lora_unet_middle_block_1_proj_in", "unet", "mid_block.attentions.0.proj_in"),
        ("lora_unet_time_embedding_cond_proj", "unet", "time_embedding.cond_proj"),
        ("lora_te2_text_projection", "text_encoder_2", "text_projection"),
        (
            "lora_te1_text_model_encoder_layers_10_self_attn_out_proj",
            "text_encoder",
            "text_model.encoder.layers.10.self_attn.out_proj",
        ),
    ],
)
def test_names(stem: str, part: str, name: str, tmp_path: Path) -> None:
    lora = names_of(tmp_path / "a.safetensors", stem)
    assert {part: list(layers) for part, layers in lora.items()} == {part: [name]}


def test_names_without_the_parts(tmp_path: Path) -> None:
    """As UNet2DConditionModel.save_lora_adapter writes them."""
    names = ["conv_in", "down_blocks.0.resnets.0.conv1", "add_embedding.linear_2"]
    lora = names_of(tmp_path / "a.safetensors", *names, ends=("lora_A", "lora_B"))
    assert {part: set(layers) for part, layers in lora.items()} == {"unet": set(names)}


def test_each_module_has_its_own_alpha(tmp_path: Path) -> None:
    """As in kohya's programs; diffusers 0.42 takes the most frequent one for all."""
    state = {}
    for name, rank, alpha in (("to_q", 2, 3.0), ("to_k", 4, 0.5), ("to_v", 8, None)):
        state[f"lora_unet_mid_block_{name}.lora_down.weight"] = torch.ones(rank, 3)
        state[f"lora_unet_mid_block_{name}.lora_up.weight"] = torch.ones(5, rank)
        if alpha is not None:
            state[f"lora_unet_mid_block_{name}.alpha"] = torch.tensor(alpha).bfloat16()
    save_file(state, tmp_path / "a.safetensors")
    layers = read_lora(tmp_path / "a.safetensors")["unet"]
    assert {name: layer.alpha for name, layer in layers.items()} == {
        "mid_block.to_q": 3,
        "mid_block.to_k": 0.5,
        "mid_block.to_v": 8,
    }
    assert {layer.scale for layer in layers.values()} == {1.5, 0.125, 1.0}


def test_lora_mid_is_three_convolutions(tmp_path: Path) -> None:
    """LyCORIS' LoCon with use_tucker: 1 x 1, then the kernel with its stride, then 1 x 1."""
    network = nn.ModuleDict({"conv_in": nn.Conv2d(16, 12, 3, stride=2, padding=1)})
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (
        torch.randn(shape, generator=generator)
        for shape in ((3, 16, 1, 1), (3, 3, 3, 3), (12, 3, 1, 1))
    )
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    state = {f"lora_unet_conv_in.{key}": tensor for key, tensor in tensors.items()}
    state["lora_unet_conv_in.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "a.safetensors")
    x = torch.randn(2, 16, 9, 8, generator=generator)
    with torch.no_grad():
        h = nn.functional.conv2d(x, down)
        h = nn.functional.conv2d(h, mid, stride=2, padding=1)
        expected = network["conv_in"](x) + nn.functional.conv2d(h, up) / 3
        Adapters({"unet": network}).add("a", read_lora(tmp_path / "a.safetensors"))
        torch.testing.assert_close(network["conv_in"](x), expected, rtol=1e-4, atol=1e-4)


PAIR = {
    "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
    "unet.conv_in.lora_B.weight": torch.ones(16, 2, 1, 1),
}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"lora_te_x.hada_w1_a": torch.ones(1), "unet.conv_in.dora_scale": torch.ones(1)},
            "has 2 tensors .* 'lora_te_x.hada_w1_a' among them",
        ),
        (
            {"text_encoder.fc1.lora_C.weight": torch.ones(1)},
            "1 tensors .* 'text_encoder.fc1.lora_C",
        ),
        ({"transformer.x.lora_A.weight": torch.ones(1, 1)}, "1 tensors .* 'transformer.x.lora_A"),
        ({"bundle_emb.a.string_to_param.*": torch.ones(1)}, "1 tensors .* 'bundle_emb"),
        (
            {"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3)},
            "1 tensors .*twice, '(lora_unet_conv_in.lora_down|unet.conv_in.lora_A).weight' among",
        ),
    ],
)
def test_what_is_no_lora_is_refused_by_name(
    other: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    save_file({**PAIR, **other}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"unet.conv_in.lora_B.weight": None},
        {"unet.conv_in.lora_A.weight": None},
        {"unet.conv_in.lora_B.weight": torch.ones(16, 3, 1, 1)},
        {"unet.conv_in.lora_B.weight": torch.ones(16)},
        {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3, dtype=torch.int8)},
        {"unet.conv_in.alpha": torch.tensor(float("nan"))},
        {"unet.conv_in.alpha": torch.ones(3)},
        {"unet.conv_in.lora_mid.weight": torch.ones(2, 3, 3, 3)},
    ],
)
def test_what_does_not_fit_together_is_refused(
    changes: dict[str, Tensor | None], tmp_path: Path
) -> None:
    state = {key: value for key, value in {**PAIR, **changes}.items() if value is not None}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="damaged: what it has for conv_in in unet"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "lora_adapter_metadata is no JSON object"),
        ("[]", "lora_adapter_metadata is no JSON object"),
        ("[" * 100_000, "lora_adapter_metadata is no JSON object"),
        (json.dumps({"unet.lora_alpha": "much"}), "what it has for conv_in in unet"),
        (json.dumps({"unet.alpha_pattern": {"(a+)+": 1}}), "what it has for conv_in in unet"),
        (json.dumps({"unet.alpha_pattern": ["conv_in"]}), "what it has for conv_in in unet"),
    ],
)
def test_a_broken_header_is_refused(header: str, message: str, tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": header})
    with pytest.raises(InputError, match=message):
        read_lora(tmp_path / "a.safetensors")


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"There is no LoRA at .*a\.safetensors"):
        read_lora(file)
    with pytest.raises(InputError, match=r"There is no LoRA at .*lora_weights\.safetensors"):
        read_lora(tmp_path)
    save_file({}, file)
    with pytest.raises(InputError, match="is empty"):
        read_lora(file)
    save_file(PAIR, file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match="is damaged"):
        read_lora(file)
    monkeypatch.setattr(lora_files, "MAX_LORA_BYTES", 100)
    with pytest.raises(InputError, match="too large"):
        read_lora(file)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_pickles_are_not_opened(suffix: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "opened",))

    file = tmp_path / f"a{suffix}"
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="is a pickle, which can run code when opened; convert"):
        read_lora(file)
    assert not (tmp_path / "opened").exists()


def test_the_file_may_be_overwritten_after_reading(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(PAIR, file)
    lora = read_lora(file)
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(lora["unet"]["conv_in"].down, torch.ones(2, 4, 3, 3))
    assert torch.equal(lora["unet"]["conv_in"].up, torch.ones(16, 2))


def test_saving_that_fails_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora: LoRA = {"unet": {"conv_in": LoRALayer(torch.ones(2, 4, 3, 3), torch.ones(16, 2), 2.0)}}
    save_lora(lora, tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()

    def fails(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(lora_files, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        save_lora(lora, tmp_path)
    assert [file] == list(tmp_path.iterdir())
    assert file.read_bytes() == before
