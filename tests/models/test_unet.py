"""The U-Net against diffusers' UNet2DConditionModel with the same weights, drawn at random."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentdiff.config import Config
from latentdiff.errors import InputError
from latentdiff.families import family_configs
from latentdiff.models.blocks import Attention, Transformer2DModel, attend
from latentdiff.models.unet import UNet, UNetConfig

ATTENDING = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
LOWER_ONLY = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 24),
    "cross_attention_dim": 20,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "attention on both levels": SMALL | ATTENDING | {"layers_per_block": 2},
    "attention on the lower level": SMALL | LOWER_ONLY | {"layers_per_block": 1, "in_channels": 9},
    "attention on the way up only": SMALL
    | ATTENDING
    | {"down_block_types": ("DownBlock2D", "DownBlock2D"), "layers_per_block": 1},
    "three levels like SD 2": SMALL
    | {
        "block_out_channels": (16, 24, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4, 8),
        "use_linear_projection": True,
    },
    "depths of the levels": SMALL
    | LOWER_ONLY
    | {"transformer_layers_per_block": (1, 3), "attention_head_dim": (1, 3)},
    "rare numbers": SMALL
    | LOWER_ONLY
    | {
        "layers_per_block": 1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
        "downsample_padding": 0,
        "out_channels": 3,
    },
    "one level": SMALL
    | {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
}
SD_1_5: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
SD_2_1: dict[str, Any] = SD_1_5 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SD_INPAINTING = SD_1_5 | {"in_channels": 9}
LCM = SD_1_5 | {"time_cond_proj_dim": 256}
SDXL: dict[str, Any] = SD_1_5 | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "attention_type": "default",
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
SDXL_REFINER: dict[str, Any] = SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
}
PUBLISHED = {
    "SD 1.5": (SD_1_5, 859_520_964),
    "SD 1.5 inpainting": (SD_INPAINTING, 859_535_364),
    "SD 2.1": (SD_2_1, 865_910_724),
    "SDXL base": (SDXL, 2_567_463_684),
    "SDXL refiner": (SDXL_REFINER, 2_259_526_660),
    "LCM": (LCM, 859_602_884),
}
"""Each family's config.json and number of parameters."""


def narrow(published: dict[str, Any]) -> dict[str, Any]:
    """Everything as it is but the widths; the heads keep their number."""
    values = published | {"norm_num_groups": 4}
    divisor = 8 if published["attention_head_dim"] == 8 else 16
    values["block_out_channels"] = [width // divisor for width in values["block_out_channels"]]
    for name in (
        "cross_attention_dim",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
        "time_cond_proj_dim",
    ):
        if values.get(name) is not None:
            values[name] //= 16
    return values


def randomize(network: nn.Module) -> None:
    """Weights under which every parameter shows in the output, norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            drawn *= parameter[0].numel() ** -0.5
        else:
            drawn = 0.3 * drawn + parameter.detach()
        parameter.data.copy_(drawn)


def pair(values: dict[str, Any]) -> tuple[UNet, UNet2DConditionModel]:
    """Ours and diffusers', its weights loaded into ours."""
    theirs = UNet2DConditionModel(**values)
    randomize(theirs)
    ours = UNet(UNetConfig.from_diffusers(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(memory_format=torch.channels_last), theirs  # type: ignore[call-overload]


def inputs(config: UNetConfig, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Three latents, their timesteps, one of them a fraction, and five text tokens each."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(3, config.in_channels, height, width, generator=generator)
    text = torch.randn(3, 5, config.cross_attention_dim, generator=generator)
    return sample, torch.tensor([0.0, 421.37, 999.0]), text


def further(config: UNetConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What SDXL and distilled models take besides, as ours is given it and as diffusers' is."""
    generator = torch.Generator().manual_seed(2)
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    width, whole = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
    if width is not None and whole is not None:
        pooled = torch.randn(3, 5 * width, generator=generator)
        time_ids = 1024 * torch.rand(3, whole // width - 5, generator=generator)
        ours |= {"pooled": pooled, "time_ids": time_ids}
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    if config.time_cond_proj_dim is not None:
        ours["guidance_scale"] = 7.5
        theirs["timestep_cond"] = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, torch.full((3,), 7.5 - 1), config.time_cond_proj_dim
        )
    return ours, theirs


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def attentions(network: UNet) -> list[Attention]:
    """Every cross-attention."""
    return [module for name, module in network.named_modules() if name.endswith("attn2")]  # type: ignore[misc]


@pytest.mark.parametrize("size", [(8, 8), (12, 10), (9, 11)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(CONFIGS[name])
    sample, timestep, text = inputs(ours.config, *size)
    expected = theirs(sample, timestep, text).sample
    assert_equal(ours(sample, timestep, text), expected)
    assert_equal(ours(sample, timestep, ours.condition(text)), expected)


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_narrow_families_equal_diffusers(name: str) -> None:
    ours, theirs = pair(narrow(PUBLISHED[name][0]))
    sample, timestep, text = inputs(ours.config, 16, 24)
    our_further, their_further = further(ours.config)
    expected = theirs(sample, timestep, text, **their_further).sample
    latents, extra = sample[:, :4], sample[:, 4:] if sample.shape[1] > 4 else None
    cond = ours.condition(text, extra=extra, **our_further)
    assert_equal(ours(latents, timestep, cond), expected)
    assert_equal(ours(latents[1:], timestep[1:], cond[1:]), expected[1:])


def test_slices_of_the_conditioning_are_views() -> None:
    ours, _ = pair(narrow(LCM | SDXL_REFINER | {"time_cond_proj_dim": 256}))
    _, _, text = inputs(ours.config)
    cond = ours.condition(text, extra=torch.randn(3, 5, 8, 8), **further(ours.config)[0])
    whole, part = (
        [*(t for pair in c.text for t in pair), c.added, c.extra, c.guidance]
        for c in (cond, cond[1:])
    )
    assert len(whole) == len(part) == 2 * len(attentions(ours)) + 3
    for one, other in zip(whole, part, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(other, one[1:], atol=0, rtol=0)
        assert other.data_ptr() == one[1:].data_ptr()


@pytest.mark.parametrize(
    ("published", "given", "message"),
    [
        (SDXL, {}, "needs pooled"),
        (SDXL, {"pooled": torch.ones(3, 80)}, "needs time_ids"),
        (SDXL, {"time_ids": torch.ones(3, 6)}, "needs pooled"),
        (
            SDXL,
            {"pooled": torch.ones(3, 80), "time_ids": torch.ones(3, 5)},
            "of width 80 and 5 time_ids of 16 each do not make 176",
        ),
        (
            SDXL,
            {"pooled": torch.ones(3, 64), "time_ids": torch.ones(3, 6)},
            "of width 64 and 6 time_ids",
        ),
        (SD_1_5, {"pooled": torch.ones(3, 80)}, "takes no pooled"),
        (SD_1_5, {"time_ids": torch.ones(3, 6)}, "takes no time_ids"),
        (SD_1_5, {"guidance_scale": 7.5}, "takes no guidance_scale"),
        (LCM, {}, "needs guidance_scale"),
    ],
)
def test_refuses_conditions_it_lacks_or_has_no_use_for(
    published: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    ours = UNet(UNetConfig.from_diffusers(narrow(published)))
    with pytest.raises(InputError, match=message):
        ours.condition(torch.zeros(3, 5, ours.config.cross_attention_dim), **given)


@pytest.mark.parametrize(("published", "extra"), [(SD_INPAINTING, None), (SD_1_5, 5)])
def test_refuses_channels_that_are_not_its_own(
    published: dict[str, Any], extra: int | None
) -> None:
    ours = UNet(UNetConfig.from_diffusers(narrow(published)))
    text = torch.zeros(1, 5, ours.config.cross_attention_dim)
    cond = ours.condition(text, extra=None if extra is None else torch.zeros(1, extra, 8, 8))
    with pytest.raises(InputError, match="inpainting models need the mask"):
        ours(torch.zeros(1, 4, 8, 8), torch.zeros(1), cond)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
def test_attention_scores_may_exceed_half_precision(backend: SDPBackend) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (x * torch.randn(2, 3, 16, 64, generator=generator).half() for x in (150, 150, 1))
    assert (q @ k.transpose(-1, -2)).isinf().any()
    assert (q * 64**-0.5 @ k.transpose(-1, -2)).isinf().any()
    scores = q.double() @ k.double().transpose(-1, -2) / 8
    expected = scores.softmax(-1) @ v.double()
    with sdpa_kernel(backend):
        torch.testing.assert_close(attend(q, k, v).double(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", [*CONFIGS, *PUBLISHED])
@torch.no_grad()
def test_diffusers_opens_ours(name: str) -> None:
    config = UNetConfig.from_diffusers(
        CONFIGS[name] if name in CONFIGS else narrow(PUBLISHED[name][0])
    )
    ours = UNet(config)
    randomize(ours)
    theirs = UNet2DConditionModel.from_config(json.loads(json.dumps(config.to_diffusers())))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert UNetConfig.from_diffusers(dict(theirs.config)) == config
    sample, timestep, text = inputs(config)
    our_further, their_further = further(config)
    found = ours(sample, timestep, ours.condition(text, **our_further))
    assert_equal(found, theirs(sample, timestep, text, **their_further).sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_diffusers(name: str) -> None:
    ours, theirs = (network.double() for network in pair(CONFIGS[name]))
    target = torch.randn(3, ours.config.out_channels, 8, 8, dtype=torch.float64)
    found, expected = [], []
    for network, gradients in ((ours, found), (theirs, expected)):
        sample, timestep, text = inputs(ours.config)
        sample, text = sample.double().requires_grad_(), text.double().requires_grad_()
        output = network(sample, timestep, text)
        output = output if isinstance(output, Tensor) else output.sample
        names = [name for name, _ in network.named_parameters()]
        loss = (output - target).square().mean()
        leaves = [sample, text, *network.parameters()]
        gradients += zip(["sample", "text", *names], torch.autograd.grad(loss, leaves), strict=True)
    ours_by_name = dict(found)
    assert ours_by_name.keys() == dict(expected).keys()
    for name, gradient in expected:
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours_by_name[name], gradient, atol=1e-12, rtol=1e-7)


@torch.no_grad()
def test_text_is_projected_once() -> None:
    ours, _ = pair(CONFIGS["attention on both levels"])
    sample, timestep, text = inputs(ours.config)
    calls: list[nn.Module] = []
    for attention in attentions(ours):
        for layer in (attention.to_k, attention.to_v):
            layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    projected = ours.condition(text)
    assert len(calls) == len(set(calls)) == 2 * len(attentions(ours)) == 2 * len(projected.text)
    for _ in range(2):
        ours(sample, timestep, projected)
    assert len(calls) == 2 * len(projected.text)


@torch.no_grad()
def test_every_map_stays_channels_last() -> None:
    ours, _ = pair(CONFIGS["three levels like SD 2"])
    sample, timestep, text = inputs(ours.config)
    seen = []

    def look(layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        for value in (arguments[0], output):
            if value.dim() == 4:
                assert value.is_contiguous(memory_format=torch.channels_last), layer
        seen.append(layer)

    layers = [m for m in ours.modules() if isinstance(m, nn.Conv2d | nn.GroupNorm)]
    for layer in layers:
        layer.register_forward_hook(look)
    sample = sample.contiguous(memory_format=torch.channels_last)
    output = ours(sample, timestep, text)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert set(seen) == set(layers)


@torch.no_grad()
def test_tokens_are_a_view_of_the_map() -> None:
    ours, _ = pair(CONFIGS["attention on both levels"])
    sample, timestep, text = inputs(ours.config)
    maps, tokens = [], []
    for transformer in ours.modules():
        if isinstance(transformer, Transformer2DModel):
            transformer.proj_in.register_forward_hook(lambda *given: maps.append(given[2]))
            first = transformer.transformer_blocks[0]
            first.register_forward_pre_hook(lambda _, given: tokens.append(given[0]))
    ours(sample.contiguous(memory_format=torch.channels_last), timestep, text)
    assert len(maps) == len(attentions(ours))
    assert [x.data_ptr() for x in maps] == [x.data_ptr() for x in tokens]


@torch.no_grad()
def test_compiles_without_a_break() -> None:
    ours, _ = pair(CONFIGS["attention on the lower level"])
    sample, timestep, text = inputs(ours.config)
    expected = ours(sample, timestep, text)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(sample, timestep, text), expected)
    projected = ours.condition(text)
    torch.testing.assert_close(compiled(sample, timestep, projected), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = ours(sample, timestep, text)
        torch.testing.assert_close(compiled(sample, timestep, text), expected)


def test_trains_under_bfloat16_autocast() -> None:
    ours, theirs = pair(CONFIGS["three levels like SD 2"])
    sample, timestep, text = inputs(ours.config)
    exact = ours(sample, timestep, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ours(sample, timestep, text)
        theirs_output = theirs(sample, timestep, text).sample
    error = (output.float() - exact).std()
    assert 0 < error < 1.25 * (theirs_output.float() - exact).std()
    output.float().square().mean().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_runs_in_bfloat16() -> None:
    ours, theirs = (network.bfloat16() for network in pair(CONFIGS["three levels like SD 2"]))
    sample, timestep, text = inputs(ours.config)
    output = ours(sample.bfloat16(), timestep, text.bfloat16())
    expected = theirs(sample.bfloat16(), timestep, text.bfloat16()).sample
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_parameters(name: str) -> None:
    values, parameters = PUBLISHED[name]
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_diffusers(values))
        theirs = UNet2DConditionModel.from_config(values)
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters


@pytest.mark.parametrize(
    ("family", "prediction_type", "published"),
    [
        ("sd1", "epsilon", SD_1_5),
        ("sd1_inpaint", "epsilon", SD_INPAINTING),
        ("sd2", "v_prediction", SD_2_1),
        ("sd2", "epsilon", SD_2_1 | {"sample_size": 64}),
        ("sdxl", "epsilon", SDXL),
        ("sdxl_inpaint", "epsilon", SDXL | {"in_channels": 9}),
        ("sdxl_refiner", "epsilon", SDXL_REFINER),
    ],
)
def test_single_files_get_the_published_sizes(
    family: str, prediction_type: str, published: dict[str, Any]
) -> None:
    values = family_configs(family, prediction_type)["unet"]
    assert UNetConfig.from_diffusers(values) == UNetConfig.from_diffusers(published)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "gelu"),
        ("center_input_sample", True),
        ("class_embed_type", "timestep"),
        ("conv_in_kernel", 1),
        ("dual_cross_attention", True),
        ("encoder_hid_dim", 128),
        ("mid_block_scale_factor", 2),
        ("mid_block_type", None),
        ("num_class_embeds", 10),
        ("only_cross_attention", [True, False]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("encoder_hid_dim_type", "text_proj"),
        ("a_key_of_tomorrow", "yes"),
    ],
)
def test_refuses_what_it_lacks(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{key}: {value!r}".replace("[", r"\[")):
        UNetConfig.from_diffusers(SD_1_5 | {key: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types names 1 levels"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim names 2 levels"),
        ({"attention_head_dim": 7}, "320 channels do not divide into 32 groups and 7 heads"),
        ({"attention_head_dim": 0}, "attention_head_dim"),
        ({"norm_num_groups": 48}, "320 channels do not divide into 48 groups"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [5, 10, 10, 10], "norm_num_groups": 5}, "must be even"),
        ({"cross_attention_dim": [768] * 4}, "cross_attention_dim"),
        ({"layers_per_block": [2, 2, 2, 2]}, "layers_per_block"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type: Input should be 'text_time'"),
        ({"addition_embed_type": "text_time"}, "come together or not at all"),
        ({"projection_class_embeddings_input_dim": 2816}, "come together or not at all"),
        ({"time_cond_proj_dim": 255}, "time_cond_proj_dim must be even"),
    ],
)
def test_refuses_sizes_that_cannot_be(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNetConfig.from_diffusers(SD_1_5 | changed)


def test_every_field_is_described() -> None:
    assert issubclass(UNetConfig, Config)
    assert all(field.description for field in UNetConfig.model_fields.values())
