"""The VAE's start, its loss and its standardized latents."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from latentdiff import TextToImage
from latentdiff.data.order import Share
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.rng import keyed_normal
from training.autoencoder import VAEConfig, edges, latent_moments
from training.config import seeded
from training.encoder import encoder_digest

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(*channels: int, latents: int = 4) -> AutoencoderKL:
    config = VAEConfig(block_out_channels=channels, latent_channels=latents, norm_num_groups=1)
    with seeded(0):
        return config.build(32).requires_grad_(False)


# The start


def descend(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The encoder's features before its middle block, less those of a black picture: linear."""

    def features(values: Tensor) -> Tensor:
        values = vae.encoder.conv_in(values)
        for block in vae.encoder.down_blocks:
            values = block(values)
        return values

    return features(images) - features(torch.zeros_like(images))


def haar(images: Tensor, channels: tuple[int, ...]) -> Tensor:
    """The transform as a matrix, the Kronecker product of [[1, 1], [1, -1]] / sqrt 2 with itself.

    Of each level's coefficients as many go on as it and the next one have channels.
    """
    one = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    matrix = np.kron(one, one)
    values = images.double().numpy()
    for width, following in itertools.pairwise(channels):
        b, c, h, w = values.shape
        blocks = values.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5)
        bands = blocks.reshape(b, h // 2, w // 2, c, 4) @ matrix.T
        values = bands.transpose(0, 4, 3, 1, 2).reshape(b, 4 * c, h // 2, w // 2)
        values = values[:, : min(width, following)]
    return torch.from_numpy(values)


@pytest.mark.parametrize(
    "channels", [(3, 12), (12, 48, 48), (12, 48, 192, 192), (5, 13, 50), (16, 48, 200, 224)]
)
def test_the_encoder_begins_as_a_haar_transform(channels: tuple[int, ...]) -> None:
    images = random(2, 3, 32, 48)
    expected = haar(images, channels)
    found = descend(build(*channels), images).double()
    known = expected.shape[1]
    torch.testing.assert_close(found[:, :known], expected, atol=1e-4, rtol=1e-4)


def test_a_wide_encoder_loses_nothing() -> None:
    """192 coefficients of an 8x8 block: an orthonormal transform keeps lengths and angles."""
    vae = build(12, 48, 192, 192)
    images = random(4, 3, 32, 32)
    found = descend(vae, images).flatten(1)
    torch.testing.assert_close(found @ found.T, images.flatten(1) @ images.flatten(1).T)


@pytest.mark.parametrize("channels", [(32, 64, 128, 192), (32, 64, 128, 128), (64, 32, 16), (8, 4)])
def test_the_first_features_are_means(channels: tuple[int, ...]) -> None:
    """Also where a level is narrower than the one before it."""
    factor = 2 ** (len(channels) - 1)
    images = random(1, 3, 32, 32)
    means = torch.nn.functional.avg_pool2d(images, factor) * factor
    torch.testing.assert_close(
        descend(build(*channels), images)[:, :3], means, atol=1e-4, rtol=1e-4
    )


def test_the_posterior_begins_narrow_and_the_branches_at_zero() -> None:
    vae = build(8, 16, 16)
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            assert not parameter.any(), name
    assert vae.quant_conv.bias[4:].tolist() == [-4.0] * 4
    assert (vae.encode(random(2, 3, 32, 32)).latent_dist.std < 0.5).all()


# The loss


@pytest.mark.parametrize("pixels", ["l1", "l2"])
def test_the_loss_is_its_formula(tiny_chain: Any, pixels: str) -> None:
    weights = {"edge_weight": 0.7, "kl_weight": 0.3}
    program = tiny_chain.program("autoencoder", pixel_loss=pixels, **weights)
    (batch,) = next(program.batches(range(2, 3), Share()))
    assert batch.samples == [8, 9, 10, 11]
    losses = program.losses(program.network, batch, CPU)

    images = batch.data.double() / 255 * 2 - 1
    latent = program.network.vae.encode(images.float()).latent_dist
    noise = keyed_normal(0, "posterior", 0, batch.samples, (4, 4, 4))
    decoded = program.network.vae.decode(latent.mean + latent.std * noise).sample.double()
    error = (decoded - images).detach()
    l1 = error.abs().mean()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    kl = kl_divergence(Normal(latent.mean, latent.std), Normal(0.0, 1.0)).mean().double()
    mse = error.square().mean()
    psnr = 10 * torch.log10(2**2 / mse)
    expected = {
        "loss": (l1 if pixels == "l1" else mse) + 0.7 * (across + down) + 0.3 * kl,
        "l1": l1,
        "kl": kl,
        "psnr": psnr,
    }
    found = {"loss": losses.loss, **losses.figures}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-4)


def test_edges_are_finite_differences() -> None:
    ramp = torch.arange(4.0)[:, None] * 10 + torch.arange(5.0)
    across, down = edges(ramp)
    assert across.equal(torch.full((4, 4), 1.0))
    assert down.equal(torch.full((3, 5), 10.0))


# Latents that are means of pixels


def test_three_means_and_no_other_number(tiny_chain: Any) -> None:
    with pytest.raises(InputError, match="latent_channels must be 3 where"):
        tiny_chain.config("autoencoder", vae__encoder="means", vae__latent_channels=4)


@pytest.mark.parametrize(("channels", "side"), [("[8]", 64), ("[8, 16, 16]", 16)])
def test_pixels_and_small_pictures_go_the_whole_way(
    tiny_chain: Any, chain: Any, tmp_path: Path, channels: str, side: int
) -> None:
    """Trained, cached, learned from and drawn with as any other latents."""
    pooled = chain("tiny", tmp_path)
    few = {"max_steps": 2, "checkpoint_every": 2, "sample_every": 2}
    shape = {"vae__block_out_channels": channels, "vae__latent_channels": 3}
    pooled.run("autoencoder", vae__encoder="means", kl_weight=0, **shape, **few)
    text = {"text_encoder": tiny_chain.run_dir("clip") / "model"}
    pooled.run("cache_latents", source__count=8, shard_size=8, batch_size=4, **text)
    unet = {"unet__sample_size": side, "unet__in_channels": 3, "unet__out_channels": 3}
    pooled.run("diffusion", **unet, **text, **few)
    model = TextToImage.load(tmp_path / "diffusion" / "model")
    assert model.parts.autoencoder.scale_factor == 64 // side
    assert model.generate("a fox", seed=0, num_inference_steps=2).size == (64, 64)


# The decoder alone


def test_a_decoder_learns_and_its_latents_stay(tiny_chain: Any, chain: Any, tmp_path: Path) -> None:
    """Bit for bit, so that the model's U-Net draws for the new decoder, too."""
    few = {"max_steps": 2, "checkpoint_every": 1, "sample_every": 2}
    alone = {"vae": "null", "init_from": "emoji", "decoder_only": True, "pixel_loss": "l2"}
    chain("tiny", tmp_path).run("autoencoder", **alone, **few)
    emoji = TextToImage.load("emoji").parts.autoencoder
    model = TextToImage.load("emoji", vae=tmp_path / "autoencoder" / "model")
    trained = model.parts.autoencoder
    before = emoji.vae.state_dict()
    changed = {
        name for name, value in trained.vae.state_dict().items() if value.ne(before[name]).any()
    }
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    images = torch.from_numpy(tiny_chain.program("autoencoder").pictures.unseen(2)).permute(
        0, 3, 1, 2
    )
    one, other = (vae.encode(images / 127.5 - 1) for vae in (emoji, trained))
    assert torch.equal(one.mean, other.mean)
    assert encoder_digest(emoji) == encoder_digest(trained)  # and a cache of them stays
    assert model.generate("a fox", seed=0, num_inference_steps=2).size == (64, 64)


def test_another_encoder_than_before_is_refused(
    tiny_chain: Any, chain: Any, tmp_path: Path
) -> None:
    alone = {"vae": "null", "decoder_only": True, "checkpoint_every": 1, "sample_every": 2}
    made = chain("tiny", tmp_path)
    made.run("autoencoder", init_from="emoji", max_steps=1, **alone)
    with pytest.raises(InputError, match="encoder"):
        made.run("autoencoder", init_from=tiny_chain.run_dir("autoencoder") / "model", **alone)


@pytest.mark.parametrize("start", ["learned", "init_from", "decoder_only"])
def test_of_latents_that_are_means_the_decoder_learns(
    chain: Any, tmp_path: Path, start: str
) -> None:
    """Whether it begins with random weights or is trained further."""
    shape = {"vae__block_out_channels": "[8, 16, 16]", "vae__latent_channels": 3}
    made = chain("tiny", tmp_path)
    options: dict[str, Any] = {"vae__encoder": "means", **shape}
    if start != "learned":
        made.run("autoencoder", max_steps=1, checkpoint_every=1, sample_every=1, **options)
        options = {"vae": "null", "init_from": made.run_dir("autoencoder") / "model"}
        options["decoder_only"] = start == "decoder_only"
    network = made.program("autoencoder", **options).network
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    assert trained
    assert all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in trained)


def test_a_vae_that_cannot_be_standardized_is_refused(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = AutoencoderKL(use_quant_conv=False, use_post_quant_conv=False)
    monkeypatch.setattr("training.autoencoder.vae_to_train", lambda model: bare)
    with pytest.raises(InputError, match="no 1x1 convolutions beside its latents"):
        tiny_chain.program("autoencoder", vae="null", init_from="emoji")
    alone = tiny_chain.program("autoencoder", vae="null", init_from="emoji", decoder_only=True)
    assert alone.network.vae is bare


def test_all_of_a_trained_vae_learns_on(tiny_chain: Any) -> None:
    program = tiny_chain.program("autoencoder", vae="null", init_from="emoji")
    assert all(parameter.requires_grad for parameter in program.network.parameters())
    with torch.no_grad():
        before = TextToImage.load("emoji").parts.autoencoder.vae.state_dict()
        assert all(value.equal(before[n]) for n, value in program.network.vae.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vae": "null"}, "name either vae or init_from"),
        ({"init_from": "emoji"}, "name either vae or init_from"),
        ({"decoder_only": True}, "takes a trained one: name init_from"),
        ({"scenes": "null"}, "name either scenes or pictures"),
    ],
)
def test_one_start(tiny_chain: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_chain.config("autoencoder", **options)


@pytest.mark.parametrize(
    ("crop", "message"),
    [(72, "crop is 72, but the pictures have a side of 64"), (36, "make it a multiple of that")],
)
def test_crops_fit_pictures_and_latents(tiny_chain: Any, crop: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_chain.program("autoencoder", crop=crop)


# Pictures of files


def test_a_vae_learns_pictures_of_files(chain: Any, folder: Path, tmp_path: Path) -> None:
    """From nothing: cut, read around a damaged one, standardized, saved."""
    source = {"type": "folder", "path": str(folder)}
    pictures = json.dumps({"source": source, "held_out": source, "resolution": 32, "flip": True})
    few = {"max_steps": 3, "checkpoint_every": 3, "sample_every": 3, "crop": 24}
    made = chain("tiny", tmp_path)
    made.run("autoencoder", scenes="null", pictures=pictures, **few)
    directory = tmp_path / "autoencoder"
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert any("psnr" in line for line in lines)
    assert "damaged: picture 3 of" in (directory / "unreadable.jsonl").read_text()
    saved = Autoencoder(AutoencoderKL.from_pretrained(directory / "model" / "vae").eval())
    program = made.program("autoencoder", scenes="null", pictures=pictures, **few)
    mean, std = latent_moments(saved, program.pictures.whole(1024), CPU)
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(std, torch.ones(4), atol=1e-3, rtol=0)


# The end


def test_the_finished_latents_are_standard_and_reconstructions_as_they_were(
    tiny_chain: Any, tmp_path: Path
) -> None:
    program = tiny_chain.program("autoencoder")
    with seeded(1), torch.no_grad():
        for parameter in program.network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    program.network.eval()
    before = copy.deepcopy(program.network)
    mean, std = latent_moments(before, program.pictures.whole(1024), CPU)
    assert ((std - 1).abs() > 0.05).any()

    program.finish(tmp_path, CPU)
    saved = Autoencoder(AutoencoderKL.from_pretrained(tmp_path / "vae").eval())
    mean, std = latent_moments(saved, program.pictures.whole(1024), CPU)
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(std, torch.ones(4), atol=1e-3, rtol=0)

    images = torch.from_numpy(program.pictures.unseen(4)).permute(0, 3, 1, 2) / 127.5 - 1
    noise = random(4, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            saved(images, noise)[0], before(images, noise)[0], atol=1e-4, rtol=1e-3
        )
