"""The console command `latentdiff`. Only what a subcommand needs is imported, when it runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from latentdiff.errors import InputError, run_command

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; a user's mistake prints one line on stderr and exits with status 2."""
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    run_command(lambda: command(**arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="latentdiff", description="Pictures from prompts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    model.add_argument("--model", help="model directory (default: the bundled model)")

    generate = commands.add_parser(
        "generate",
        parents=[model],
        help="make pictures from a prompt",
        argument_default=argparse.SUPPRESS,
    )
    generate.set_defaults(command=_generate)
    generate.add_argument("prompt", help='for example "a fox on a blue background"')
    generate.add_argument(
        "--output",
        type=Path,
        default=Path("out.png"),
        help="where the picture goes: .png (which keeps prompt, seed and settings), .jpg or "
        ".webp; several go to out-1.png, out-2.png, ... (default: %(default)s)",
    )
    generate.add_argument("--seed", type=int, help="the same seed makes the same picture")
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    generate.add_argument("--height", type=int, metavar="PIXELS")
    generate.add_argument("--width", type=int, metavar="PIXELS")
    generate.add_argument("--steps", type=int, dest="num_inference_steps", metavar="N")
    generate.add_argument("--guidance-scale", type=float, metavar="W", help="1 is none")
    generate.add_argument("--sampler", metavar="NAME", help="`latentdiff info` lists them")
    generate.add_argument(
        "--num-images",
        type=int,
        dest="num_images_per_prompt",
        metavar="N",
        help="picture i has seed + i",
    )

    info = commands.add_parser("info", parents=[model], help="say what a model knows")
    info.set_defaults(command=_info)
    info.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return parser


def _generate(prompt: str, output: Path, **settings: Any) -> None:
    _check_output(output)
    from latentdiff.pipeline import TruncatedPromptWarning, UnknownWordWarning, generate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UnknownWordWarning)
        warnings.simplefilter("always", TruncatedPromptWarning)
        warnings.showwarning = _print_warning  # type: ignore[assignment]
        images = cast("list[Image.Image]", generate([prompt], **settings))
    for number, image in enumerate(images, start=1):
        path = output if len(images) == 1 else output.with_stem(f"{output.stem}-{number}")
        _write(image, path)
        print(path)


def _check_output(output: Path) -> None:
    if output.suffix.lower() not in FORMATS:
        raise InputError(f"--output {output} must end in {', '.join(FORMATS)}.")
    if output.is_dir():
        raise InputError(f"--output {output} is a directory; give a file name in it.")
    if not output.parent.is_dir():
        raise InputError(f"There is no directory {output.parent} for --output; make it first.")


def _print_warning(message: Warning | str, *_: Any) -> None:
    print(f"latentdiff: warning: {message}", file=sys.stderr)


def _write(image: Image.Image, path: Path) -> None:
    """The file appears whole or not at all; PNG keeps `image.info` as text."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    for key, value in image.info.items():
        text.add_itxt(str(key), str(value))
    image_format = FORMATS[path.suffix.lower()]
    options = {"pnginfo": text} if image_format == "PNG" else {"quality": 95}
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(staging, image_format, **options)
        staging.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}).") from None
    finally:
        staging.unlink(missing_ok=True)


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
    """What a model directory holds and knows, without loading it. Raises InputError."""
    from latentdiff.checkpoint import read_vocabulary
    from latentdiff.diffusion.samplers import SAMPLERS
    from latentdiff.model_files import (
        WEIGHTS,
        model_directory,
        read_json,
        weight_shapes,
        weights_file,
    )
    from latentdiff.vocabulary import Vocabulary

    directory = model_directory(model)
    shapes = {part: weight_shapes(weights_file(directory, part)) for part in WEIGHTS}
    unet = read_json(directory / "unet" / "config.json")
    vae = read_json(directory / "vae" / "config.json")
    side = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    scenes = read_vocabulary(directory)
    return {
        "model": str(directory),
        "license": _license(directory / "README.md"),
        "resolution": side,
        "parameters": {
            part: sum(math.prod(shape) for shape in of.values()) for part, of in shapes.items()
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
