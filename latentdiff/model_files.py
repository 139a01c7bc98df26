"""Files of models: found, checked and read without running anything in them, and written whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from latentdiff.config import Config
from latentdiff.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

C = TypeVar("C", bound=Config)

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
VARIANT = ".fp16"
"""Of the weights, taken where there are no plain ones."""

MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 32 << 20

CONVERT = (
    "convert it once, where you trust its source, with diffusers' "
    "StableDiffusionPipeline.save_pretrained(directory, safe_serialization=True)."
)
CONVERT_FILE = (
    "convert it once with diffusers' StableDiffusionPipeline.from_single_file(path)"
    ".save_pretrained(directory), which reads it with torch.load(weights_only=True)."
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


def weights_name(component: str) -> str:
    """What the weights of a component are called, without the ending."""
    return "diffusion_pytorch_model" if component in ("unet", "vae") else "model"


def weights_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one network: a file or its shards, plain or of the variant fp16.

    Raises InputError when there are only pickles, or none whole.
    """
    found = whole_weights(folder, stem)
    if not found:
        pickles = sorted(file for file in folder.glob("*") if file.suffix in PICKLES)
        if pickles:
            raise InputError(
                f"{folder} has its weights only as a pickle ({pickles[0].name}), which can "
                f"run code when opened; {CONVERT}"
            )
        for index in sorted(folder.glob(f"{stem}.safetensors.index*.json")):
            for shard in _shards(index):
                check_file(shard)
        check_file(folder / f"{stem}.safetensors")
    return found


def whole_weights(folder: Path, stem: str) -> list[Path]:
    """The files of weights_files, none where none are complete."""
    for variant in ("", VARIANT):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = folder / f"{stem}.safetensors.index{variant}.json"
        shards = _shards(index) if index.is_file() else []
        if shards and all(shard.is_file() for shard in shards):
            return shards
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each beside it."""
    weight_map = read_json(index, MAX_TOKENIZER_BYTES).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [""]
    if not all(isinstance(name, str) and Path(name).name == name != "" for name in names):
        raise InputError(f"{index} does not name the files beside it; copy the model again.")
    return [index.with_name(name) for name in sorted(set(names))]


def read_weights(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The wanted tensors of a safetensors file. Raises InputError when the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def read_shards(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of all the files of one network. Raises InputError when one is damaged."""
    return {name: tensor for file in files for name, tensor in read_weights(file).items()}


def weight_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by name, read from the file's header alone. Raises InputError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def weight_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises InputError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged ({one_line(error)}); copy or download it again.")


def one_line(error: Exception) -> str:
    """What a library says, for the middle of a sentence."""
    return " ".join(str(error).split())


def write_json(values: dict[str, Any], path: Path) -> None:
    """Sorted, so that equal values make equal bytes."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Force a file, or a directory's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged_directory(target: Path, known_by: str = "model_index.json") -> Iterator[Path]:
    """A new empty directory that becomes `target` when the block ends well, and else vanishes.

    Everything in it is on disk before the rename, so `target` is never half-written. An earlier
    one at `target`, which has a file `known_by`, gives way whole, and is back in its place if the
    new one cannot take it; see restore_directory. Raises InputError when something else is there.
    """
    if target.exists() and not (target / known_by).is_file():
        if not target.is_dir() or any(target.iterdir()):
            raise InputError(f"{target} exists and is no model directory; choose another place.")
    staging = _beside(target)
    staging.mkdir()
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            sync(path)
        if target.exists():
            earlier = staging.with_name(f"{staging.name}.earlier")
            target.rename(earlier)
            try:
                staging.rename(target)
            except BaseException:
                earlier.rename(target)
                raise
            shutil.rmtree(earlier)
        else:
            staging.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def restore_directory(target: Path) -> None:
    """Undo what a kill in staged_directory left: an earlier directory that had given way is back in
    its place, and what was staged is gone. For where no other process is at it.
    """
    for earlier in target.parent.glob(f".{target.name}.*.earlier"):
        if not target.exists():
            earlier.rename(target)
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path that becomes `target` when the block ends well: on disk first, then renamed."""
    staging = _beside(target)
    try:
        yield staging
        sync(staging)
        staging.replace(target)
        sync(target.parent)
    finally:
        staging.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f".{target.name}.{uuid.uuid4().hex}"


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
