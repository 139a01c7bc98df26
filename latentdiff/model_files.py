"""The files of a model directory: found, checked and read without running anything in them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from latentdiff.config import Config
from latentdiff.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

C = TypeVar("C", bound=Config)

BUNDLED = "emoji"
"""Name of the model that comes with the package."""

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""The components of a StableDiffusionPipeline and the classes that can be read."""
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 32 << 20


def model_directory(model: str | os.PathLike[str] | None = None) -> Path:
    """The directory of a model: a path, or the bundled model's name (also None).

    Raises InputError where there is no such directory or it holds no pipeline that can be read.
    """
    if not isinstance(model, str | os.PathLike | None):
        raise InputError(f"model must be a path or a name, not {model!r}.")
    if model is None or model == BUNDLED:
        path = Path(__file__).parent / "pretrained" / BUNDLED
    else:
        path = Path(model).expanduser()
    if path.suffix in PICKLES and not path.is_dir():
        raise InputError(f"{path} is a pickle, which can run code when opened; {_CONVERT}")
    if not path.is_dir():
        raise InputError(
            f"There is no model directory at {path}; give the path of one in diffusers' layout, "
            f"or {BUNDLED!r} for the bundled model."
        )
    index = read_json(path / "model_index.json")
    name = index.get("_class_name")
    if name != "StableDiffusionPipeline":
        raise InputError(f"{path} holds a {name}; only a StableDiffusionPipeline can be read.")
    for component, classes in CLASSES.items():
        found = index.get(component)
        if not (isinstance(found, list) and len(found) == 2 and found[1] in classes):
            raise InputError(
                f"{path / 'model_index.json'} names {found} as its {component}; only "
                f"{' or '.join(classes)} can be read."
            )
    return path


_CONVERT = (
    "convert it once, where you trust its source, with diffusers' "
    "StableDiffusionPipeline.save_pretrained(directory, safe_serialization=True)."
)


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """One JSON object. Raises InputError when it is absent, too large or something else."""
    check_file(path, max_bytes)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not readable JSON; copy the model again.") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object.")
    return values


def validated(cls: type[C], values: dict[str, Any], path: Path) -> C:
    """`values` as a `cls`. Raises InputError naming `path` and the first key that is wrong."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"{path}: {key} is not usable: {first['msg']}.") from None


def check_file(path: Path, max_bytes: int | None = None) -> None:
    """Raises InputError when there is no such file or it is larger than `max_bytes`."""
    if not path.is_file():
        raise InputError(f"There is no file {path}; the model directory is incomplete.")
    if max_bytes is not None and path.stat().st_size > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes >> 20} MiB, too large to be genuine.")


def weights_file(directory: Path, component: str) -> Path:
    """The safetensors file of one component. Raises InputError when there are only pickles."""
    path = directory / component / WEIGHTS[component]
    if not path.is_file():
        pickles = [file for file in path.parent.glob("*") if file.suffix in PICKLES]
        if pickles:
            raise InputError(
                f"{path.parent} has its weights only as a pickle ({pickles[0].name}), which can "
                f"run code when opened; {_CONVERT}"
            )
    check_file(path)
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises InputError when the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def weight_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by name, read from the file's header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged ({one_line(error)}); copy or download it again.")


def one_line(error: Exception) -> str:
    """What a library says, for the middle of a sentence."""
    return " ".join(str(error).split())


def write_json(values: dict[str, Any], path: Path) -> None:
    """Sorted, so that equal values make equal bytes."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A new empty directory that becomes `target` when the block ends well, and else vanishes.

    Everything in it is on disk before the rename, so `target` is never half-written. An earlier
    model at `target` gives way whole. Raises InputError when something else is there.
    """
    if target.exists() and not (target / "model_index.json").is_file():
        if not target.is_dir() or any(target.iterdir()):
            raise InputError(f"{target} exists and is no model directory; choose another place.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        yield staging
        _sync(staging)
        if target.exists():
            earlier = staging.with_name(f"{staging.name}.earlier")
            target.rename(earlier)
            staging.rename(target)
            shutil.rmtree(earlier)
        else:
            staging.rename(target)
        _sync_one(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
