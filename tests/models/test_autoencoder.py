"""The autoencoder against diffusers' own, and its posterior against torch.distributions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.distributions import Normal, kl_divergence

from latentdiff.errors import InputError
from latentdiff.hub import model_path
from latentdiff.models.autoencoder import Autoencoder, Posterior

SCALES = pytest.mark.parametrize(
    ("scaling", "shift"), [(1.0, None), (0.18215, None), (0.3611, 0.1159), (2.0, -0.75)]
)


def make(
    scaling: float = 1.0, shift: float | None = None, convolutions: bool = True
) -> Autoencoder:
    """Random weights, latents 3 x H/4 x W/4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            latent_channels=3,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=scaling,
            shift_factor=shift,
            use_quant_conv=convolutions,
            use_post_quant_conv=convolutions,
        )
    return Autoencoder(vae.eval().requires_grad_(False))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGES = random(2, 3, 16, 24).clamp(-1, 1)


def test_sizes() -> None:
    autoencoder = make()
    assert (autoencoder.scale_factor, autoencoder.latent_channels) == (4, 3)
    assert autoencoder.encode(IMAGES).mean.shape == (2, 3, 4, 6)
    assert autoencoder.decode(random(2, 3, 4, 6)).shape == (2, 3, 16, 24)


@SCALES
@pytest.mark.parametrize("convolutions", [True, False])
def test_encodes_as_diffusers_does(scaling: float, shift: float | None, convolutions: bool) -> None:
    autoencoder = make(scaling, shift, convolutions)
    theirs = autoencoder.vae.encode(IMAGES).latent_dist
    posterior = autoencoder.encode(IMAGES)
    offset = shift or 0.0
    torch.testing.assert_close(posterior.mean, (theirs.mean - offset) * scaling)
    torch.testing.assert_close(posterior.logvar.div(2).exp(), theirs.std * scaling)

    noise = random(2, 3, 4, 6, seed=1)
    sample = (theirs.mean + theirs.std * noise - offset) * scaling
    torch.testing.assert_close(posterior.sample(noise), sample)


@SCALES
@pytest.mark.parametrize("convolutions", [True, False])
def test_decodes_as_stable_diffusion_pipelines_do(
    scaling: float, shift: float | None, convolutions: bool
) -> None:
    autoencoder, latents = make(scaling, shift, convolutions), random(2, 3, 4, 6)
    theirs = autoencoder.vae.decode(latents / scaling + (shift or 0.0)).sample
    torch.testing.assert_close(autoencoder.decode(latents), theirs)


@SCALES
def test_scale_and_shift_cancel_in_a_reconstruction(scaling: float, shift: float | None) -> None:
    noise = random(2, 3, 4, 6)
    plain, _ = make()(IMAGES, noise)
    scaled, posterior = make(scaling, shift)(IMAGES, noise)
    torch.testing.assert_close(scaled, plain)
    torch.testing.assert_close(scaled, make(scaling, shift).decode(posterior.sample(noise)))


def test_log_variance_is_bounded_as_diffusers_bounds_it() -> None:
    autoencoder = make(scaling=0.5)
    autoencoder.vae.quant_conv.bias[3:] = torch.tensor([-1000.0, 0.0, 1000.0])
    theirs = autoencoder.vae.encode(IMAGES).latent_dist
    logvar = autoencoder.encode(IMAGES).logvar
    torch.testing.assert_close(logvar, theirs.logvar + 2 * math.log(0.5))
    assert logvar.isfinite().all()


def test_half_precision_weights_give_single_precision_moments() -> None:
    autoencoder = make().to(torch.bfloat16)
    posterior = autoencoder.encode(IMAGES.bfloat16())
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32


def test_kl_is_that_of_torch_distributions() -> None:
    mean, logvar = 3 * random(2, 3, 4, 5), 3 * random(2, 3, 4, 5, seed=1)
    oracle = kl_divergence(Normal(mean, logvar.div(2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(Posterior(mean, logvar).kl(), oracle)


def test_samples_have_the_posteriors_distribution() -> None:
    mean, logvar = torch.tensor([-2.0, 0.0, 5.0]), torch.tensor([-4.0, 0.0, 2.0])
    posterior = Posterior(mean[:, None].double(), logvar[:, None].double())
    samples = posterior.sample(random(3, 20_000).double())
    z = (samples - mean[:, None]) / logvar[:, None].div(2).exp()
    # Five standard errors of a mean and of a variance.
    assert z.mean(dim=1).abs().max() < 5 / math.sqrt(20_000)
    assert (z.var(dim=1) - 1).abs().max() < 5 * math.sqrt(2 / 20_000)
    assert posterior.sample(torch.zeros(3, 1).double()).equal(posterior.mean)


@SCALES
def test_standardized_latents_have_mean_0_and_variance_1(
    scaling: float, shift: float | None
) -> None:
    images, noise = random(8, 3, 16, 16).clamp(-1, 1), random(8, 3, 4, 4, seed=1)
    before = make(scaling, shift)
    latents = before.encode(images).sample(noise)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    assert (mean.abs() > 1e-3).any()
    assert ((std - 1).abs() > 1e-2).all()

    after = copy.deepcopy(before)
    after.standardize(mean, std)
    standard = after.encode(images).sample(noise)
    torch.testing.assert_close(standard.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        after(images, noise)[0], before(images, noise)[0], atol=1e-5, rtol=1e-4
    )


STRIPS = pytest.mark.parametrize("tile", [1, 2, 3, 5, 100])


@STRIPS
@pytest.mark.parametrize("channels_last", [False, True])
def test_strips_decode_to_the_same_picture(tile: int, channels_last: bool) -> None:
    autoencoder, latents = make(0.18215), random(2, 3, 5, 4)
    if channels_last:
        autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        latents = latents.contiguous(memory_format=torch.channels_last)
    kept = latents.clone()
    picture = autoencoder.decode(latents, tile=tile)
    torch.testing.assert_close(picture, autoencoder.decode(latents), atol=1e-5, rtol=1e-5)
    assert latents.equal(kept)


def test_strips_of_the_bundled_vae_leave_no_seam() -> None:
    """Measured: at most 0.0006 of 255 levels. diffusers' own tiles, each normalized by itself, are
    off by 3 to 5 levels on average and up to 98.
    """
    directory = model_path() / "vae"
    autoencoder = Autoencoder(AutoencoderKL.from_pretrained(directory).eval())
    latents = random(1, autoencoder.latent_channels, 12, 16)
    with torch.no_grad():
        whole, strips = autoencoder.decode(latents), autoencoder.decode(latents, tile=4)
    assert (strips - whole).abs().max() * 127.5 < 0.01


@STRIPS
@pytest.mark.parametrize("size", [(20, 16), (22, 19)])
def test_strips_encode_to_the_same_latents(tile: int, size: tuple[int, int]) -> None:
    autoencoder, images = make(0.18215), random(2, 3, *size).clamp(-1, 1)
    kept = images.clone()
    posterior, whole = autoencoder.encode(images, tile=tile), autoencoder.encode(images)
    torch.testing.assert_close(posterior.mean, whole.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.logvar, whole.logvar, atol=1e-5, rtol=1e-5)
    assert images.equal(kept)


@pytest.mark.parametrize("tile", [0, -1])
def test_a_strip_has_a_row(tile: int) -> None:
    with pytest.raises(InputError, match="must be a number of rows"):
        make().decode(random(1, 3, 4, 4), tile=tile)


def test_a_vae_with_attention_at_every_level_has_no_strips() -> None:
    vae = AutoencoderKL(
        down_block_types=("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
    )
    with pytest.raises(InputError, match="AttnUpDecoderBlock2D cannot run in strips"):
        Autoencoder(vae).decode(random(1, 4, 4, 4), tile=2)
    with pytest.raises(InputError, match="AttnDownEncoderBlock2D cannot run in strips"):
        Autoencoder(vae).encode(random(1, 3, 4, 4), tile=2)


def overflowing(force_upcast: bool) -> Autoencoder:
    """fp16 weights whose convolutions leave fp16's range before a normalization brings it back."""
    autoencoder = make(0.18215)
    vae = autoencoder.vae
    vae.register_to_config(force_upcast=force_upcast)
    for convolution in (vae.encoder.conv_in, vae.decoder.conv_in):
        convolution.weight.mul_(3e5)
        convolution.bias.mul_(3e5)
    for block in (vae.encoder.mid_block, vae.decoder.mid_block):
        for resnet in block.resnets:
            resnet.conv2.weight.mul_(1e2)
    return autoencoder.half()


@pytest.mark.parametrize("tile", [None, 2])
def test_fp16_weights_that_overflow_compute_in_fp32(tile: int | None) -> None:
    autoencoder = overflowing(force_upcast=True)
    assert autoencoder.upcast
    latents = random(2, 3, 5, 4)
    picture = autoencoder.decode(latents, tile)
    posterior = autoencoder.encode(IMAGES, tile)

    assert {weight.dtype for weight in autoencoder.parameters()} == {torch.float16}
    precise = copy.deepcopy(autoencoder).float()
    assert not precise.upcast
    assert picture.dtype == torch.float32
    assert picture.isfinite().all()
    torch.testing.assert_close(picture, precise.decode(latents, tile))
    torch.testing.assert_close(posterior.mean, precise.encode(IMAGES, tile).mean)


def test_without_force_upcast_fp16_stays_fp16() -> None:
    autoencoder = overflowing(force_upcast=False)
    assert not autoencoder.upcast
    picture = autoencoder.decode(random(1, 3, 5, 4))
    assert picture.dtype == torch.float16
    assert not picture.isfinite().all()


@pytest.mark.parametrize("tile", [None, 2])
def test_bfloat16_has_the_range_and_is_left_alone(tile: int | None) -> None:
    autoencoder = make().to(torch.bfloat16)
    autoencoder.vae.register_to_config(force_upcast=True)
    assert not autoencoder.upcast
    latents = random(1, 3, 5, 4)
    picture = autoencoder.decode(latents, tile)
    assert picture.dtype == torch.bfloat16
    torch.testing.assert_close(picture.float(), make().decode(latents), atol=0.05, rtol=0.05)
