"""The console command `latentdiff`. Only what a subcommand needs is imported, when it runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import InputError, run_command
from latentdiff.request import MAX_PICTURES, SPACINGS, is_sdxl

if TYPE_CHECKING:
    from latentdiff.pipeline import TextToImage
    from latentdiff.recipe import Recipe

MODEL_OPTIONS = ("model", "vae", "loras", "prediction_type", "dtype", "device", "offload")
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; a user's mistake prints one line on stderr and exits with status 2."""
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    run_command(lambda: command(**arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="latentdiff", description="Pictures from prompts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    model.add_argument(
        "--model",
        help="directory, .safetensors file or owner/name on the Hugging Face hub "
        "(default: the bundled model)",
    )
    model.add_argument("--vae", metavar="MODEL", help="another VAE")
    model.add_argument(
        "--lora",
        action="append",
        dest="loras",
        metavar="FILE[:WEIGHT]",
        help="a LoRA; any number of them",
    )
    model.add_argument(
        "--prediction-type",
        metavar="TYPE",
        help="what the U-Net predicts, where the model says otherwise or nothing: epsilon, "
        "v_prediction, ...",
    )
    model.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32)")
    model.add_argument("--device", help="for example cuda (default: cpu)")
    model.add_argument("--offload", action="store_true", help="keep on the device what computes")

    generate = commands.add_parser(
        "generate",
        parents=[model],
        help="make pictures from a prompt",
        argument_default=argparse.SUPPRESS,
    )
    generate.set_defaults(command=_generate)
    generate.add_argument("prompt", help='for example "a fox on a blue background"')
    _add_output(generate)
    generate.add_argument("--seed", type=int, help="the same seed makes the same picture")
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    generate.add_argument("--height", type=int, metavar="PIXELS")
    generate.add_argument("--width", type=int, metavar="PIXELS")
    generate.add_argument("--steps", type=int, dest="num_inference_steps", metavar="N")
    generate.add_argument("--sampler", metavar="NAME", help="`latentdiff info` lists them")
    generate.add_argument("--eta", type=float, metavar="ETA", help="stochasticity of ddim")
    generate.add_argument("--spacing", metavar="NAME", help="noise levels: " + ", ".join(SPACINGS))
    generate.add_argument("--guidance-scale", type=float, metavar="W", help="1 is none")
    generate.add_argument("--guidance", metavar="RULE", help="cfg, or apg: adaptive projected")
    generate.add_argument("--guidance-rescale", type=float, metavar="PHI", help="from 0 to 1")
    generate.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="sigmas to guide"
    )
    generate.add_argument("--clip-skip", type=int, metavar="N", help="1: CLIP's penultimate layer")
    generate.add_argument(
        "--literal",
        action="store_false",
        dest="weighted",
        help="take brackets literally, not as weights: (word:1.3)",
    )
    generate.add_argument("--image", type=Path, metavar="FILE", help="start from this picture")
    generate.add_argument("--strength", type=float, help="how far to change it, up to 1")
    generate.add_argument("--mask", type=Path, metavar="FILE", help="white is painted anew")
    generate.add_argument(
        "--num-images",
        type=int,
        dest="num_images_per_prompt",
        metavar="N",
        help="picture i has seed + i",
    )
    for name, metavar, text in (
        ("original-size", ("H", "W"), "of the picture that SDXL takes this one to be cropped from"),
        ("crop", ("Y", "X"), "the top left corner of that crop, for SDXL"),
        ("target-size", ("H", "W"), "of the picture that SDXL takes this one to be"),
    ):
        generate.add_argument(
            f"--{name}",
            type=int,
            nargs=2,
            dest="crops_coords_top_left" if name == "crop" else name.replace("-", "_"),
            metavar=metavar,
            help=text,
        )
    for name in ("aesthetic-score", "negative-aesthetic-score"):
        generate.add_argument(
            f"--{name}", type=float, metavar="SCORE", help="for SDXL's refiner, up to 10"
        )
    generate.add_argument("--tile", type=int, metavar="ROWS", help="decode in strips: less memory")

    replay = commands.add_parser(
        "replay",
        parents=[model],
        help="make a picture again from the recipe in its PNG",
        argument_default=argparse.SUPPRESS,
    )
    replay.set_defaults(command=_replay)
    replay.add_argument("picture", type=Path, help="a PNG made by latentdiff, or by A1111")
    _add_output(replay)
    replay.add_argument("--image", type=Path, metavar="FILE", help="what it started from")
    replay.add_argument("--mask", type=Path, metavar="FILE", help="where it was painted")

    info = commands.add_parser("info", help="say what a model knows")
    info.set_defaults(command=_info)
    info.add_argument("--model", help="as for generate")
    info.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out.png"),
        help="where the picture goes: .png (which keeps the recipe), .jpg or .webp; several go to "
        "out-1.png, out-2.png, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--no-metadata",
        action="store_false",
        dest="metadata",
        default=True,
        help="keep prompt and settings out of the PNG",
    )


def _load(
    model: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    dtype: str = "float32",
    device: str = "cpu",
    **options: Any,
) -> TextToImage:
    import torch

    _check_device(device)
    from latentdiff.pipeline import TextToImage

    loaded = TextToImage.load(model, getattr(torch, dtype), device, **options)
    for path, weight in loras:
        loaded.load_lora(path, weight)
    return loaded


def _check_device(name: str) -> None:
    """Raises InputError for a device that PyTorch does not have here."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 1 if found is None else torch.accelerator.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None:
        if device.type == "cpu" and not device.index:
            return
        if found is not None and device.type == found.type and (device.index or 0) < count:
            return
    known = ["cpu"] if found is None else ["cpu", *(f"{found.type}:{i}" for i in range(count))]
    raise InputError(f"There is no device {name!r} here; PyTorch has {', '.join(known)}.")


def _lora(text: str, weight: float = 1.0) -> tuple[str, float]:
    """FILE or FILE:WEIGHT, and the weight where none is given. The file may have a colon."""
    path, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, weight
    try:
        return path, float(number)
    except ValueError:
        return text, weight


def _generate(prompt: str, output: Path, metadata: bool, **options: Any) -> None:
    options["loras"] = [_lora(text) for text in options.get("loras", ())]
    _make(output, metadata, [prompt], options)


def _replay(picture: Path, output: Path, metadata: bool, **options: Any) -> None:
    from latentdiff.pictures import read_image
    from latentdiff.recipe import read_recipe

    with warnings.catch_warnings(record=True) as unread:
        warnings.simplefilter("always")
        recipe = read_recipe(picture)
    for warning in unread:
        _print_warning(warning.message)
    for kind in ("image", "mask"):
        if (named := getattr(recipe, kind)) is None:
            continue
        if kind not in options:
            raise InputError(f"The picture started from {named.name!r}; give it with --{kind}.")
        _warn(named.check(read_image(options[kind], kind)))
    loras = options.get("loras", ())
    if len(loras) != len(recipe.loras):
        names = ", ".join(f"{lora.file}:{lora.weight:g}" for lora in recipe.loras) or "none"
        raise InputError(f"The picture was made with these LoRAs: {names}; name each with --lora.")
    if recipe.vae_sha256 is not None and "vae" not in options:
        raise InputError(f"{recipe.check_vae(None)} Give it with --vae.")
    attached = [_lora(text, lora.weight) for text, lora in zip(loras, recipe.loras, strict=True)]
    arguments = {key: value for key, value in recipe.arguments().items() if key != "prompt"}
    arguments |= {"dtype": recipe.dtype, "prediction_type": recipe.prediction_type}
    arguments |= options | {"loras": attached}

    def check(loaded: TextToImage, options: dict[str, Any]) -> None:
        _check_files(recipe, loaded, [Path(path) for path, _ in attached])
        from_a1111 = recipe.version is None
        if from_a1111 and is_sdxl(loaded.parts) and options.pop("clip_skip", None) is not None:
            _warn("A1111 ignores its Clip skip for SDXL by default; it is left out here too.")

    _make(output, metadata, [recipe.prompt], arguments, check)


def _check_files(recipe: Recipe, loaded: TextToImage, loras: Sequence[Path]) -> None:
    """Warns of files that are not the recipe's."""
    from latentdiff.recipe import model_hash

    parts = loaded.parts
    if parts.directory is not None:
        _warn(recipe.check_model(model_hash(parts.directory)))
    _warn(recipe.check_vae(None if parts.other_vae is None else model_hash(parts.other_vae)))
    for path, lora in zip(loras, recipe.loras, strict=True):
        _warn(lora.check(model_hash(path)))


def _make(
    output: Path,
    metadata: bool,
    prompts: list[str],
    options: dict[str, Any],
    check: Callable[[TextToImage, dict[str, Any]], None] = lambda loaded, options: None,
) -> None:
    """Check, load and make the pictures; `check` may change the options that are left then."""
    from latentdiff.pictures import save_picture

    _check_outputs(_paths(output, min(options.get("num_images_per_prompt", 1), MAX_PICTURES)))
    from latentdiff.pipeline import TruncatedPromptWarning, UnknownWordWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UnknownWordWarning)
        warnings.simplefilter("always", TruncatedPromptWarning)
        warnings.showwarning = _print_warning  # type: ignore[assignment]
        loaded = _load(**{key: options.pop(key) for key in MODEL_OPTIONS if key in options})
        check(loaded, options)
        images = loaded.generate(prompts, progress=sys.stderr.isatty(), **options)
    assert isinstance(images, list)
    for image, path in zip(images, _paths(output, len(images)), strict=True):
        save_picture(image, path, metadata)
        print(path)


def _paths(output: Path, count: int) -> list[Path]:
    """Where `count` pictures go."""
    if count <= 1 or not output.suffix:
        return [output]
    return [output.with_stem(f"{output.stem}-{number}") for number in range(1, count + 1)]


def _check_outputs(paths: Sequence[Path]) -> None:
    """Raises InputError for a path that could not be written to."""
    from latentdiff.pictures import check_output

    for path in paths:
        check_output(path)
    folder = paths[0].parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"Nothing can be written to the directory {folder}; choose another.")


def _warn(message: str | None) -> None:
    if message is not None:
        _print_warning(message)


def _print_warning(message: Warning | str, *_: Any) -> None:
    print(f"latentdiff: warning: {message}", file=sys.stderr)


def _info(as_json: bool, model: str | None = None) -> None:
    values = describe(model)
    if as_json:
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return
    for key, value in values.items():
        text = _plain(value)
        print(textwrap.fill(text, 96, initial_indent=f"{key:<12}", subsequent_indent=" " * 12))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def describe(model: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """What a model holds and knows, without loading it. Raises InputError."""
    from latentdiff.checkpoint import open_source, read_scenes
    from latentdiff.diffusion.samplers import SAMPLERS
    from latentdiff.vocabulary import Vocabulary

    source = open_source(model)
    side = source.config("unet").get("sample_size")
    levels = len(source.config("vae").get("block_out_channels", ()))
    known = isinstance(side, int) and levels > 0
    scenes = read_scenes(source)
    return {
        "model": str(source.path),
        "pipeline": source.pipeline,
        "license": _license(source.path / "README.md"),
        "resolution": side * 2 ** (levels - 1) if known else "not stated",
        "parameters": {
            part: sum(math.prod(shape) for shape in source.shapes(part).values())
            for part in source.networks
        },
        "samplers": list(SAMPLERS),
        **(Vocabulary(scenes).describe() if scenes else {}),
    }


def _license(card: Path) -> str:
    """The `license` in the front matter of a model card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    _, *front = text.split("---")
    for line in front[0].splitlines() if front else ():
        key, _, value = line.partition(":")
        if key.strip() == "license":
            return value.strip()
    return "not stated"


if __name__ == "__main__":
    main()
