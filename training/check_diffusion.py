"""What training.check looks at of a run of training.diffusion alone: what it learns from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from latentdiff.rng import keyed_uniform
from training.config import DTYPES
from training.findings import Check, Context, Finding, judged

LATENTS = 64
"""At least so many samples' latents are looked at."""


def check_order(context: Context) -> Iterator[Finding]:
    """What each epoch takes of every bucket."""
    config, plan = context.config, context.program.plan
    total, taken = sum(plan.counts), plan.steps_per_epoch * config.batch_size
    epochs = config.max_steps / plan.steps_per_epoch
    yield judged(
        taken < 0.9 * total,
        f"An epoch of {plan.steps_per_epoch:,} steps takes {taken:,} of {total:,} samples, other "
        f"ones each time; max_steps are {epochs:.3g} epochs.",
        "warning",
    )
    for bucket, count in enumerate(plan.counts):
        if bucket not in plan.filled and count:
            yield Finding(
                "warning",
                f"Bucket {bucket} holds {count} samples, fewer than batch_size: none is ever seen.",
            )


def check_noise(context: Context) -> Iterator[Finding]:
    """No two samples of a batch, on whatever process, have the same number or noise."""
    with closing(context.program.batches(range(1), context.share)) as steps:
        batches = next(steps)
    device = context.accelerator.device
    samples = torch.tensor([number for batch in batches for number in batch.samples])
    noise = torch.cat([batch.draw("noise", (4,)) for batch in batches])
    samples, noise = context.accelerator.gather((samples.to(device), noise.to(device)))
    distinct, drawn = len(samples.unique()), len(noise.unique(dim=0))
    count, processes = len(samples), context.accelerator.num_processes
    yield judged(
        distinct < count or drawn < count,
        f"{processes} process{'es' * (processes > 1)} took {distinct} distinct samples and drew "
        f"{drawn} distinct noises for a batch of {count}.",
    )


def check_captions(context: Context) -> Iterator[Finding]:
    """Captions that the tokenizer's limit cuts; captions dropped for guidance."""
    config, objective = context.config, context.program.config.objective
    share, tokens = context.program.latents.cut
    yield judged(
        share > 0.05,
        f"{share:.1%} of the captions are longer than the {tokens} tokens that the text encoder "
        "reads; their ends are not learned from.",
        "warning",
    )
    count, asked = 4096, objective.caption_dropout

    def draw(stream: str, shape: tuple[int, ...] | None) -> Tensor:
        return keyed_uniform(config.seed, stream, 0, range(count))

    share = float(objective.dropped(draw).float().mean())
    spread = 5 * (asked * (1 - asked) / count) ** 0.5
    yield judged(
        abs(share - asked) > spread,
        f"caption_dropout is {asked:g}; of the first {count} captions {share:.1%} are dropped.",
    )
    if asked == 0 and context.program.config.distillation is None:
        yield Finding("warning", "No caption is dropped: classifier-free guidance will not work.")


def check_loss_weights(context: Context) -> Iterator[Finding]:
    """Finite and positive at each timestep; a student's loss has others."""
    if context.program.config.distillation is not None:
        return
    parts, objective = context.program.parts, context.program.config.objective
    weights = objective.weights(parts.schedule, parts.parameterization)
    wrong = (~(weights.isfinite() & (weights > 0))).nonzero().flatten().tolist()
    if wrong:
        yield Finding(
            "FAIL",
            f"The loss weighs {weights[wrong[0]]:g} at timestep {wrong[0]}, and is not finite and "
            f"positive at {len(wrong)} of {len(weights)} timesteps.",
        )
    else:
        yield Finding(
            "ok",
            f"The loss weighs between {weights.min():.3g} and {weights.max():.3g} at each of "
            f"{len(weights)} timesteps.",
        )


@torch.no_grad()
def check_latents(context: Context) -> Iterator[Finding]:
    """Latents near N(0, 1) in every channel, and a VAE that is finite in the run's arithmetic."""
    program, device = context.program, context.accelerator.device
    autoencoder, size = program.parts.autoencoder.to(device), context.config.batch_size
    steps = range(min(-(-LATENTS // size), program.plan.steps_per_epoch))
    with closing(program.batches(steps, context.share)) as batches:
        taken = [
            batch.x0(autoencoder, device).float()
            for micro_batches in batches
            for batch in micro_batches
        ]
    values = torch.cat([x0.transpose(0, 1).flatten(1) for x0 in taken], dim=1)
    if not values.isfinite().all():
        yield Finding("FAIL", "Some latents are not finite; make the cache again in fp32.")
        return
    mean, std = values.mean(dim=1), values.std(dim=1)
    yield judged(
        bool((mean.abs() > 1).any() or (std < 0.5).any() or (std > 2).any()),
        f"Latents have means from {mean.min():.2f} to {mean.max():.2f} and standard deviations "
        f"from {std.min():.2f} to {std.max():.2f} over {len(mean)} channels; the noise schedule "
        "is made for 0 and 1.",
        "warning",
    )
    dtype = DTYPES[context.config.mixed_precision]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        picture = autoencoder.decode(taken[0][:1])
        posterior = autoencoder.encode(picture.float())
    finite = picture.isfinite().all() and posterior.mean.isfinite().all()
    yield judged(
        not bool(finite),
        f"The VAE decodes and encodes {'finite' if finite else 'infinite'} values in "
        f"{str(dtype).removeprefix('torch.')}.",
        "warning",
    )


OF_DIFFUSION: tuple[Check, ...] = (
    check_order,
    check_captions,
    check_loss_weights,
    check_noise,
    check_latents,
)
