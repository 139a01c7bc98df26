"""Training the U-Net: a loss for each sample whatever its batch, and parts that must fit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from latentdiff.checkpoint import load_model
from latentdiff.data.cache import LatentCache
from latentdiff.data.order import Share
from latentdiff.errors import InputError
from latentdiff.models.blocks import BasicTransformerBlock
from latentdiff.pipeline import TextToImage
from latentdiff.rng import keyed_normal, keyed_uniform
from training.assemble import TEXT_GAIN
from training.config import seeded
from training.diffusion import LORA_FILE
from training.network import Text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def program(tiny_chain: Any) -> Any:
    """Every weight random, so that noise, timestep and caption all show in the loss."""
    program = tiny_chain.program("diffusion", objective__caption_dropout=0.5)
    randomize(program.network)
    return program


def randomize(network: nn.Module) -> None:
    """The prediction's weights too, which start at zero."""
    with seeded(0), torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_uniform_(parameter)


def batch(program: Any, epoch: int, samples: list[int]) -> Any:
    return program.latents.read(epoch, samples)


def loss(program: Any, epoch: int, samples: list[int]) -> float:
    with torch.no_grad():
        losses = program.losses(program.network, batch(program, epoch, samples), CPU)
    assert losses.per_sample.mean().item() == pytest.approx(losses.loss.item())
    return losses.loss.item()


# The loss


def test_a_samples_loss_does_not_depend_on_its_batch(program: Any) -> None:
    samples = [5, 0, 31, 17, 8]
    alone = {sample: loss(program, 2, [sample]) for sample in samples}
    assert len(set(alone.values())) == len(samples)
    for together in (samples, samples[::-1], [31, 5], [17, 0, 8]):
        expected = sum(alone[sample] for sample in together) / len(together)
        assert loss(program, 2, together) == pytest.approx(expected, rel=1e-5)


def test_a_samples_loss_depends_on_seed_and_epoch(tiny_chain: Any, program: Any) -> None:
    other = tiny_chain.program("diffusion", objective__caption_dropout=0.5, seed=1)
    other.network.load_state_dict(program.network.state_dict())
    losses = {
        loss(program, 0, [3]),
        loss(program, 1, [3]),
        loss(other, 0, [3]),
        loss(other, 1, [3]),
    }
    assert len(losses) == 4
    assert loss(program, 1, [3]) in losses


@pytest.mark.parametrize("gamma", ["null", 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_diffusers_training_example(
    tiny_chain: Any, program: Any, prediction_type: str, gamma: Any
) -> None:
    """add_noise, predict, compare with the target, weigh by min-SNR: as diffusers' script does."""
    mine = tiny_chain.program(
        "diffusion",
        objective__caption_dropout=0,
        objective__min_snr_gamma=gamma,
        scheduler__prediction_type=prediction_type,
    )
    mine.network.load_state_dict(program.network.state_dict())
    samples = [1, 2, 3, 4]
    records = batch(mine, 7, samples)
    mean, logvar = records.moments.mean, records.moments.logvar
    shape = tuple(mean.shape[1:])
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )
    x0 = mean + (logvar / 2).exp() * keyed_normal(0, "posterior", 7, samples, shape)
    noise = keyed_normal(0, "noise", 7, samples, shape)
    t = (keyed_uniform(0, "timestep", 7, samples) * 1000).long()
    with torch.no_grad():
        text = mine.parts.text_encoder.encode_ids(records.ids[:, 0])
        predicted = mine.parts.unet(scheduler.add_noise(x0, noise, t), t.float(), text)
    velocity = prediction_type == "v_prediction"
    target = scheduler.get_velocity(x0, noise, t) if velocity else noise
    errors = (predicted - target).square().mean(dim=(1, 2, 3))
    if gamma != "null":
        snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
        errors *= snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
    assert loss(mine, 7, samples) == pytest.approx(errors.mean().item(), rel=2e-3)


def test_every_timestep_is_drawn_alike(program: Any) -> None:
    seen: list[Tensor] = []
    network = spy(lambda x, t, text: seen.append(t))
    for epoch in range(100):
        program.losses(network, batch(program, epoch, list(range(32))), CPU)
    t = torch.cat(seen)
    torch.testing.assert_close(t, t.round(), atol=1e-2, rtol=0)
    t = t.round()
    assert (t.min().item(), t.max().item()) == pytest.approx((0, 999), abs=5)
    counts = torch.bincount((t / 100).long())
    assert len(counts) == 10
    assert (counts - 320.0).square().sum() / 320 < 9 + 5 * math.sqrt(18)  # chi-squared


def spy(look: Callable[[Tensor, Tensor, Text], None]) -> Callable[..., Tensor]:
    """A network that predicts zero and shows what it was given."""

    def network(x: Tensor, timestep: Tensor, text: Text) -> Tensor:
        look(x, timestep, text)
        return torch.zeros_like(x)

    return network


# Captions


def dropped(program: Any, epoch: int) -> Tensor:
    """[32] bool: whose caption became the empty one."""
    found: list[Tensor] = []
    network = spy(lambda x, t, text: found.append((text.ids == program.empty).all(dim=(1, 2))))
    program.losses(network, batch(program, epoch, list(range(32))), CPU)
    return found[0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_in_their_share(tiny_chain: Any, share: float) -> None:
    program = tiny_chain.program("diffusion", objective__caption_dropout=share)
    drops = torch.stack([dropped(program, epoch) for epoch in range(60)])
    count = drops.numel()
    spread = 5 * math.sqrt(share * (1 - share) / count)
    assert drops.float().mean().item() == pytest.approx(share, abs=spread)
    if 0 < share < 1:
        assert not drops[0].equal(drops[1])
        # A sample keeps its caption in some epochs and loses it in others.
        assert ((drops.any(dim=0)) & (~drops.all(dim=0))).float().mean() > 0.9
    assert dropped(program, 0).equal(drops[0])


def test_the_text_tower_stays_as_it_is(program: Any) -> None:
    text_encoder, unet = program.parts.text_encoder, program.parts.unet
    program.network.train()
    assert not any(p.requires_grad for p in text_encoder.parameters())
    assert not text_encoder.model.training
    assert unet.training
    program.losses(program.network, batch(program, 0, [0, 1]), CPU).loss.backward()
    assert all(p.grad is None for p in text_encoder.parameters())
    assert all(p.grad is not None for p in unet.parameters())
    program.network.zero_grad()


# The start


def test_it_starts_from_zero_and_by_the_seed(tiny_chain: Any) -> None:
    first, second = (tiny_chain.program("diffusion").parts.unet for _ in range(2))
    other = tiny_chain.program("diffusion", seed=1).parts.unet
    for name, value in first.state_dict().items():
        assert value.equal(second.state_dict()[name])
    assert not first.conv_in.weight.equal(other.conv_in.weight)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 32, 32)
    with torch.no_grad():
        zero = first(x, torch.tensor([500.0]), text) - first.conv_out.bias[:, None, None]
    assert not zero.any()
    for module in first.modules():
        if isinstance(module, BasicTransformerBlock):
            values = module.attn2.to_v.weight
            singular = torch.linalg.svdvals(values)
            torch.testing.assert_close(singular, torch.full_like(singular, TEXT_GAIN))


def test_it_can_start_from_a_finished_model(tiny_chain: Any, tmp_path: Path) -> None:
    first = tiny_chain.program("diffusion")
    with seeded(3), torch.no_grad():
        for parameter in first.parts.unet.parameters():
            parameter += torch.randn_like(parameter)
    first.finish(tmp_path / "model", CPU)
    program = tiny_chain.program("diffusion", init_from=tmp_path / "model", seed=9)
    saved = load_model(tmp_path / "model").unet.state_dict()
    for name, value in program.parts.unet.state_dict().items():
        assert value.equal(saved[name].float())
        trained = first.parts.unet.state_dict()[name]
        torch.testing.assert_close(value, trained, atol=1e-3, rtol=1e-3)
        assert value.dtype == torch.float32


def test_a_text_encoder_that_the_start_did_not_learn_with_is_told(
    tiny_chain: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    first = tiny_chain.program("diffusion")
    first.finish(tmp_path / "model", CPU)
    tiny_chain.program("diffusion", init_from=tmp_path / "model")
    assert not [told for told in recwarn if "replaces" in str(told.message)]
    with torch.no_grad():
        next(first.parts.text_encoder.parameters()).add_(0.5)
    first.finish(tmp_path / "trained", CPU)
    with pytest.warns(UserWarning, match=r"replaces that of .*trained.*leave text_encoder out"):
        tiny_chain.program("diffusion", init_from=tmp_path / "trained")


# Parts that do not fit


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"unet__cross_attention_dim": 48},
            "unet.cross_attention_dim is 48, but the text encoder is 32 wide; make them equal",
        ),
        (
            {"unet__in_channels": 8},
            "unet.in_channels is 8, but the autoencoder's latents have 4 channels",
        ),
        (
            {"unet__out_channels": 8},
            "unet.out_channels is 8, but the autoencoder's latents have 4 channels",
        ),
        ({"batch_size": 33}, "batch_size is 33, but no bucket holds more than 32 samples"),
        ({"cache": "absent"}, "absent holds no finished latent cache"),
        ({"autoencoder": "absent"}, "absent/vae is missing; train it first"),
        ({"text_encoder": "absent"}, "absent/text_encoder is missing; train it first"),
        ({"init_from": "absent"}, "no model directory at absent"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_chain: Any, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tiny_chain.program("diffusion", **overrides)


def test_a_start_of_another_shape_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    tiny_chain.program("diffusion").finish(tmp_path / "model", CPU)
    with pytest.raises(InputError, match=r"init_from.* another U-Net"):
        tiny_chain.program(
            "diffusion", init_from=tmp_path / "model", unet__block_out_channels="[16, 48]"
        )


def test_another_autoencoder_than_the_caches_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_chain.run_dir("autoencoder") / "model" / "vae")
    with torch.no_grad():
        vae.quant_conv.bias += 1
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match="was not made with this autoencoder"):
        tiny_chain.program("diffusion", autoencoder=tmp_path)


def test_another_tokenizer_than_the_caches_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_chain.run_dir("clip") / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer" / "tokenizer.json"
    values = json.loads(path.read_text())
    words = values["model"]["vocab"]
    words["fox</w>"], words["red</w>"] = words["red</w>"], words["fox</w>"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="was not made with this text encoder's tokenizer"):
        tiny_chain.program("diffusion", text_encoder=tmp_path / "model")


# The order


def test_batches_are_records_of_the_cache_whatever_the_processes(program: Any) -> None:
    latents = LatentCache(program.config.cache)
    whole = [batch for (batch,) in program.batches(range(10), Share(0, 1))]
    assert [batch.epoch for batch in whole] == [0] * 8 + [1] * 2
    for batch, *shares in zip(
        whole, *(program.batches(range(10), Share(rank, 2, 1)) for rank in range(2)), strict=True
    ):
        records = latents.read(batch.samples)
        assert batch.moments.mean.equal(records.mean)
        assert batch.ids.equal(records.ids)
        parts = [part for share in shares for part in share]
        assert {part.epoch for part in parts} == {batch.epoch}
        assert sorted(part.samples[0] for part in parts) == sorted(batch.samples)
        noise = dict(zip(batch.samples, batch.draw("noise", (2, 2)), strict=True))
        for part in parts:
            assert part.draw("noise", (2, 2))[0].equal(noise[part.samples[0]])


# Other text encoders


def test_it_conditions_on_bert_as_well(tiny_chain: Any, tmp_path: Path) -> None:
    """Any tower of transformers that models.text_encoder reads, with its own tokenizer."""
    words = "a an the on in front of background red green blue and left right above below to"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    tokenizer.model_max_length = 24
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with seeded(0):
        BertModel(config).save_pretrained(tmp_path / "bert" / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "bert" / "tokenizer")
    text = {"text_encoder": tmp_path / "bert"}
    cache = tmp_path / "latents"
    tiny_chain.run(
        "cache_latents", run_dir=cache, source__count=16, shard_size=8, batch_size=4, **text
    )
    options = few(batch_size=4, run_dir=tmp_path / "run", cache=cache, train_text_encoder=True)
    program = tiny_chain.program("diffusion", **options, **text)
    bert = program.parts.text_encoder.model
    unseen = {name for name, parameter in bert.named_parameters() if not parameter.requires_grad}
    assert unseen == {"pooler.dense.weight", "pooler.dense.bias"}
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    tiny_chain.train(program)
    layer = "encoder.layer.0.output.dense.weight"
    assert not bert.state_dict()[layer].equal(before[layer])
    model = TextToImage.load(tmp_path / "run" / "model")
    assert type(model.parts.text_encoder.model).__name__ == "BertModel"
    assert model.generate("a red fox", num_inference_steps=1).size == (64, 64)


def few(**more: Any) -> dict[str, Any]:
    return {"max_steps": 2, "checkpoint_every": 2, "sample_every": 2} | more


# A LoRA


def test_a_lora_of_unet_and_text_encoder(tiny_chain: Any, tmp_path: Path) -> None:
    """Trained on a finished model, resumed, and loaded onto it by the pipeline."""
    base = tmp_path / "base"
    whole = tiny_chain.program("diffusion")
    randomize(whole.network.unet)
    whole.finish(base, CPU)
    options = few(
        run_dir=tmp_path / "lora",
        init_from=base,
        train_text_encoder=True,
        lora__rank=2,
        optimizer__learning_rate=0.5,
        optimizer__text_encoder_learning_rate=0.1,
    )
    tiny_chain.run("diffusion", **options)
    (checkpoint,) = (tmp_path / "lora" / "checkpoints").iterdir()
    assert all("lora_" in name for name in load_file(checkpoint / "network.safetensors"))
    tiny_chain.run("diffusion", **(options | {"max_steps": 4}))
    program = tiny_chain.program("diffusion", **options)
    ema = load_file(tmp_path / "lora" / "checkpoints" / "step-000004" / "ema.safetensors")
    weights = {name.partition("/")[2]: value for name, value in ema.items()}
    program.network.load_state_dict(weights, strict=False)
    (picture,) = program.draw(["a fox"], [3], CPU)
    model = TextToImage.load(base)
    settings = {"seed": 3, "guidance_scale": 3.0}
    plain = model.generate("a fox", **settings)
    model.load_lora(tmp_path / "lora" / "model" / LORA_FILE)
    adapted = model.generate("a fox", **settings)
    assert np.abs(np.asarray(adapted, int) - np.asarray(plain, int)).max() > 4
    assert np.abs(np.asarray(adapted, int) - np.asarray(picture, int)).max() <= 2


def test_a_lora_on_another_base_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        base = tiny_chain.program("diffusion", seed=seed)
        randomize(base.network.unet)
        with torch.no_grad():
            base.network.unet.conv_in.bias.fill_(seed)
        base.finish(tmp_path / name, CPU)
    options = few(run_dir=tmp_path / "lora", lora__rank=2)
    tiny_chain.run("diffusion", init_from=tmp_path / "a", **options)
    with pytest.raises(InputError, match="learned from another U-Net"):
        tiny_chain.train(
            tiny_chain.program(
                "diffusion", init_from=tmp_path / "b", **(options | {"max_steps": 4})
            )
        )


# Without a cache


def test_it_trains_straight_from_pictures(tiny_chain: Any, tmp_path: Path) -> None:
    """In buckets, with one picture that is cut off in the middle."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(16):
        size = (64, 64) if number % 2 else (48, 96)
        pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("a red fox")
    broken = folder / "05.png"
    broken.write_bytes(broken.read_bytes()[:1000])
    options = few(max_steps=8, log_every=2, batch_size=4, cache="null")
    options |= {
        "run_dir": tmp_path / "run",
        "images__source__type": "folder",
        "images__source__path": folder,
        "images__sizes__resolution": 64,
        "images__sizes__buckets": True,
        "images__sizes__step": 16,
        "images__flip": True,
    }
    tiny_chain.run("diffusion", **options)
    listed = [json.loads(line) for line in (tmp_path / "run" / "unreadable.jsonl").open()]
    assert len(listed) == 1
    assert "damaged" in listed[0]["reason"]
    assert TextToImage.load(tmp_path / "run" / "model").generate("a fox").size == (64, 64)
