"""How fast training is, and how much memory it takes, beside diffusers' text-to-image example.

    python -m benchmarks.trainer_vs_diffusers
    python -m benchmarks.trainer_vs_diffusers --model sd1 --resolution 256 --batch_size 2 --steps 4

Both train the same U-Net on the same picture files in batches of the same size and precision, each
in processes of its own, in turns. The other side is the loop of diffusers' train_text_to_image.py
(0.42) with use_ema, its default optimizer and accelerate: VAE and CLIP run in every step. Ours is
training.cache_latents once and then training.diffusion as it stands, with checkpoints, samples and
validation left out as there. `emoji` has the bundled model's VAE, CLIP and U-Net; `sd1` has those
of Stable Diffusion 1.5 at their true sizes with random weights. Prints one JSON object: medians of
seconds a step, images per second, the peak memory of each process, ours / diffusers; and what the
cache took to make.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.generate import machine
from latentdiff.config import load_yaml, parse, read_yaml
from latentdiff.data.order import Share
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.families import family_configs
from latentdiff.models.unet import UNetConfig
from latentdiff.networks import build_tower, build_vae
from latentdiff.tokenizer_files import clip_tokenizer, write_tokenizer
from training.diffusion import DiffusionConfig, DiffusionProgram
from training.loop import make_accelerator, train
from training.monitor import peak_memory

BUNDLED = Path("latentdiff/pretrained/emoji")
EMOJI = Path("configs/emoji/diffusion.yaml")
SIDES = ("ours", "diffusers")
SCHEDULE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type")
WARM_UP = 2
"""Steps that are not counted: the first compiles and reads ahead."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["emoji", "sd1"], default="emoji")
    parser.add_argument("--resolution", type=int, default=64, help="pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="counted in each process")
    parser.add_argument("--turns", type=int, default=2, help="processes of each side")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--compile", action="store_true", help="ours; the example has no such flag")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="both")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, folder = arguments.side
        print(json.dumps(MEASURES[side](Path(folder), arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments)
        started = time.perf_counter()
        measured(["training.cache_latents", "--config", f"{folder}/cache.yaml"])
        cached = time.perf_counter() - started
        turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for turn in range(arguments.turns):
            for side in SIDES if turn % 2 else SIDES[::-1]:
                command = ["benchmarks.trainer_vs_diffusers", *sys.argv[1:], "--side", side, folder]
                turns[side].append(json.loads(measured(command).splitlines()[-1]))
    results: dict[str, Any] = {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        **{name: value for name, value in vars(arguments).items() if name != "side"},
        "cache_seconds": round(cached, 1),
    }
    for side, figures in turns.items():
        seconds = statistics.median(turn["seconds"] for turn in figures)
        results[side] = {
            "seconds_a_step": round(seconds, 4),
            "images_per_second": round(arguments.batch_size / seconds, 2),
            "peak_memory_GiB": round(max(turn["peak"] for turn in figures) / 2**30, 3),
        }
    ours, theirs = (results[side] for side in SIDES)
    results["speed_ours_over_diffusers"] = round(
        ours["images_per_second"] / theirs["images_per_second"], 3
    )
    results["memory_ours_over_diffusers"] = round(
        ours["peak_memory_GiB"] / theirs["peak_memory_GiB"], 3
    )
    print(json.dumps(results, indent=2))


def measured(command: list[str]) -> str:
    """What a module prints in a process of its own."""
    run = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"{command[0]} failed")
    return run.stdout


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """pictures/, vae/, text_encoder/, tokenizer/ and the two configurations of our side."""
    scenes = EmojiScenes(load_yaml(ScenesConfig, "configs/emoji/scenes.yaml"))
    pictures, side = folder / "pictures", arguments.resolution
    pictures.mkdir()
    captions = []
    for index in range(2 * arguments.batch_size):
        scene = scenes[index]
        image = Image.fromarray(scene["image"]).resize((side, side), Image.Resampling.BICUBIC)
        image.save(pictures / f"{index:05d}.png")
        captions.append({"file_name": f"{index:05d}.png", "text": scene["caption"]})
    lines = "\n".join(map(json.dumps, captions))
    (pictures / "metadata.jsonl").write_text(lines + "\n")
    if arguments.model == "emoji":
        for part in ("vae", "text_encoder", "tokenizer"):
            (folder / part).symlink_to((BUNDLED / part).resolve())
        values = read_yaml(EMOJI)
        unet, scheduler = values["unet"], values["scheduler"]
    else:
        configs = family_configs("sd1", "epsilon")
        networks = {
            "vae": build_vae(configs["vae"]),
            "text_encoder": build_tower("CLIPTextModel")(configs["text_encoder"]),
        }
        for name, network in networks.items():
            network.save_pretrained(folder / name)
        write_tokenizer(clip_tokenizer(**configs["tokenizer"]), folder / "tokenizer")
        unet = UNetConfig.from_diffusers(configs["unet"]).model_dump(mode="json")
        scheduler = {key: configs["scheduler"][key] for key in SCHEDULE}
    parts = {"autoencoder": str(folder), "text_encoder": str(folder)}
    cache = parts | {
        "run_dir": str(folder / "latents"),
        "source": {"type": "folder", "path": str(pictures)},
        "sizes": {"resolution": side},
        "batch_size": min(arguments.batch_size, 8),
        "mixed_precision": arguments.mixed_precision,
    }
    (folder / "cache.yaml").write_text(yaml.safe_dump(cache))
    training = parts | {
        "run_dir": str(folder / "run"),
        "seed": 0,
        "max_steps": 10**6,
        "batch_size": arguments.batch_size,
        "checkpoint_every": 10**6,
        "sample_every": 10**6,
        "sample_prompts": ["a fox"],
        "mixed_precision": arguments.mixed_precision,
        "compile": arguments.compile,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "ema_decays": [0.9999],
        "optimizer": {"learning_rate": 1e-5, "betas": [0.9, 0.999], "weight_decay": 0.01},
        "cache": str(folder / "latents"),
        "unet": unet,
        "scheduler": scheduler,
    }
    (folder / "training.yaml").write_text(yaml.safe_dump(training))


class Enough(Exception):
    """All steps to be counted are taken."""


class Clock:
    """Seconds between ticks, from the one that ends the warm-up on."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ticks: list[float] = []

    def tick(self) -> None:
        """Between two steps. Raises Enough after the last."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())
        if len(self.ticks) > WARM_UP + self.steps:
            raise Enough

    def figures(self) -> dict[str, float]:
        counted = self.ticks[WARM_UP:]
        seconds = [after - before for before, after in itertools.pairwise(counted)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        peak = peak_memory(torch.device(device))
        return {"seconds": statistics.median(seconds), "peak": peak}


def ours(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """training.diffusion, stopped by its own batches."""
    config = load_yaml(DiffusionConfig, folder / "training.yaml")
    config = config.model_copy(update={"run_dir": Path(tempfile.mkdtemp(dir=folder))})
    program, clock = DiffusionProgram(config), Clock(arguments.steps)
    batches = program.batches

    def timed(steps: range, share: Share) -> Generator[list[Any], None, None]:
        for micro_batches in batches(steps, share):
            clock.tick()
            yield micro_batches

    program.batches = timed  # type: ignore[method-assign]
    with contextlib.suppress(Enough):
        train(program, config, make_accelerator(config))
    return clock.figures()


def diffusers(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """The loop of examples/text_to_image/train_text_to_image.py, with its defaults and use_ema."""
    values = read_yaml(folder / "training.yaml")
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    weight_dtype = dtypes[arguments.mixed_precision]
    noise_scheduler = DDPMScheduler(**values["scheduler"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    unet_config = parse(UNetConfig, values["unet"], "unet").to_diffusers()
    unet = UNet2DConditionModel.from_config(unet_config).train()
    ema_unet = EMAModel(
        UNet2DConditionModel.from_config(unet_config).parameters(),
        model_cls=UNet2DConditionModel,
        model_config=unet.config,
    )
    if arguments.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2, eps=1e-8)
    transform = transforms.Compose(
        [
            transforms.Resize(arguments.resolution, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(arguments.resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def preprocess(examples: dict[str, list[Any]]) -> dict[str, Any]:
        ids = tokenizer(
            examples["text"],
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        images = [transform(image.convert("RGB")) for image in examples["image"]]
        return {"pixel_values": images, "input_ids": ids}

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.stack([e[name] for e in examples]) for name in examples[0]}

    data = load_dataset("imagefolder", data_dir=str(folder / "pictures"), split="train")
    loader = DataLoader(
        data.with_transform(preprocess),
        shuffle=True,
        collate_fn=collate,
        batch_size=arguments.batch_size,
    )
    lr_scheduler = get_scheduler("constant", optimizer)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(
        unet, optimizer, loader, lr_scheduler
    )
    ema_unet.to(accelerator.device)
    text_encoder.to(accelerator.device, dtype=weight_dtype)
    vae.to(accelerator.device, dtype=weight_dtype)
    clock = Clock(arguments.steps)
    with contextlib.suppress(Enough):
        while True:
            for batch in loader:
                clock.tick()
                with accelerator.accumulate(unet):
                    latents = vae.encode(
                        batch["pixel_values"].to(weight_dtype)
                    ).latent_dist.sample()
                    latents = latents * vae.config.scaling_factor
                    noise = torch.randn_like(latents)
                    timesteps = torch.randint(
                        0,
                        noise_scheduler.config.num_train_timesteps,
                        (latents.shape[0],),
                        device=latents.device,
                    ).long()
                    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                    hidden = text_encoder(batch["input_ids"], return_dict=False)[0]
                    if noise_scheduler.config.prediction_type == "epsilon":
                        target = noise
                    else:
                        target = noise_scheduler.get_velocity(latents, noise, timesteps)
                    predicted = unet(noisy, timesteps, hidden, return_dict=False)[0]
                    loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
                    accelerator.gather(loss.repeat(arguments.batch_size)).mean()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    ema_unet.step(unet.parameters())
    return clock.figures()


MEASURES = {"ours": ours, "diffusers": diffusers}


if __name__ == "__main__":
    main()
