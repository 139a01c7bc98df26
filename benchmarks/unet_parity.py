"""How far the U-Net's output is from diffusers' at the families' published sizes.

    python -m benchmarks.unet_parity [--families sd1 sdxl ...] [--size 16]

Both networks are strictly loaded with the same random weights in float32. Tensors of as many inputs
are views of one drawn block, each from another place in it, so that SDXL fits in 2 GB. Prints a
row of a markdown table for each family, and fails when a difference reaches 1e-4 of the largest
value.
"""

from __future__ import annotations

import argparse
import gc
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from latentdiff.families import family_configs
from latentdiff.models.unet import UNet, UNetConfig

FAMILIES = {
    "sd1": "SD 1.5",
    "sd1_inpaint": "SD 1.5 inpainting",
    "sd2": "SD 2.1",
    "sdxl": "SDXL base",
    "sdxl_refiner": "SDXL refiner",
}
TOKENS = 77
STRIDE = 1009
"""Between the places of two tensors in one block; a multiple of no layer's inputs."""
POOLED = 1280
"""Width of SDXL's pooled text embedding."""
SIZES = [1024.0, 768.0, 16.0, 48.0, 512.0, 640.0]
"""SDXL's time_ids; the refiner has five of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    arguments = parser.parse_args()
    print(
        f"Latents {arguments.size} x {arguments.size}, float32, torch {torch.__version__}. "
        "Differences are relative to diffusers' largest value, distances to its norm.\n\n"
        "| family | parameters | output's std | largest difference | distance |\n"
        "|---|---|---|---|---|"
    )
    for family in arguments.families:
        print(f"| {FAMILIES[family]} | {compare(family, arguments.size)} |", flush=True)
        gc.collect()


@torch.no_grad()
def compare(family: str, size: int) -> str:
    values = family_configs(family, "v_prediction" if family == "sd2" else "epsilon")["unet"]
    config = UNetConfig.from_diffusers(values)
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel.from_config(values)
    weights = lively_weights(theirs.state_dict())
    for network in (ours, theirs):
        network.load_state_dict(weights, strict=True, assign=True)
    for name, parameter in ours.named_parameters():
        assert parameter.data_ptr() == theirs.get_parameter(name).data_ptr()

    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, config.in_channels, size, size, generator=generator)
    text = torch.randn(1, TOKENS, config.cross_attention_dim, generator=generator)
    timestep = torch.tensor([421.0])
    ours_besides: dict[str, Any] = {}
    theirs_besides: dict[str, Any] = {}
    width, whole = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
    if width is not None and whole is not None:
        pooled = torch.randn(1, POOLED, generator=generator)
        time_ids = torch.tensor([SIZES[: (whole - POOLED) // width]])
        ours_besides |= {"pooled": pooled, "time_ids": time_ids}
        theirs_besides["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    latents, extra = sample[:, : config.out_channels], sample[:, config.out_channels :]
    if extra.shape[1] > 0:
        ours_besides["extra"] = extra

    found = ours(latents, timestep, ours.condition(text, **ours_besides))
    expected = theirs(sample, timestep, text, **theirs_besides).sample
    largest = float((found - expected).abs().max() / expected.abs().max())
    distance = float((found - expected).norm() / expected.norm())
    if not largest < 1e-4:
        raise SystemExit(f"{FAMILIES[family]}: the outputs differ by {largest:.1e}.")
    count = sum(parameter.numel() for parameter in ours.parameters())
    return f"{count:,} | {expected.std():.2f} | {largest:.1e} | {distance:.1e}"


def lively_weights(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Uniform weights that keep activations' scale; vectors about 1 in norms, 0 in biases."""
    generator = torch.Generator().manual_seed(0)
    alike: dict[int, list[str]] = defaultdict(list)
    for name, like in shapes.items():
        alike[like[0].numel()].append(name)
    weights = {}
    for inputs, names in alike.items():
        longest = max(shapes[name].numel() for name in names)
        bound = 0.3 if inputs == 1 else (3 / inputs) ** 0.5
        block = torch.empty(longest + STRIDE * len(names))
        block.uniform_(-bound, bound, generator=generator)
        for number, name in enumerate(names):
            shape = shapes[name].shape
            weight = block[STRIDE * number :][: shape.numel()]
            if len(shape) == 4:
                weights[name] = weight.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
            elif len(shape) == 1 and name.endswith("weight"):
                weights[name] = weight + 1
            else:
                weights[name] = weight.view(shape)
    return weights


if __name__ == "__main__":
    main()
