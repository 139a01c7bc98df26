"""Where models are: on the disk, in the package, or on the Hugging Face hub by their name."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from latentdiff.errors import InputError
from latentdiff.model_files import (
    CONVERT,
    CONVERT_FILE,
    PICKLES,
    VARIANT,
    weights_name,
    whole_weights,
)

BUNDLED = "emoji"
"""Name of the model that comes with the package."""
SINGLE_FILE = ".safetensors"

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
"""owner/name, optionally @revision: a branch, a tag or a commit."""

FOLDERS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
CONFIGS = (
    "model_index.json",
    "README.md",
    "vocabulary.json",
    *(f"{folder}/*.json" for folder in FOLDERS),
    *(f"{folder}/*.txt" for folder in FOLDERS),
)
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def model_path(model: str | os.PathLike[str] | None = None, own_vae: bool = True) -> Path:
    """The directory or .safetensors file of a model: a path, a name on the Hugging Face hub as
    owner/name[@revision], which is downloaded where it is not in the hub's cache, or the bundled
    model's name (also None). What is on disk goes before the hub, from which its VAE's weights come
    only if `own_vae`.

    Raises InputError where there is none.
    """
    return found_path(model, functools.partial(download_model, own_vae=own_vae))


def found_path(
    model: str | os.PathLike[str] | None, download: Callable[[str], Path], what: str = "model"
) -> Path:
    """model_path, with `download` for names on the hub."""
    if not isinstance(model, str | os.PathLike | None):
        raise InputError(f"{what} must be a path or a name, not {model!r}.")
    if model is None or model == BUNDLED:
        return Path(__file__).parent / "pretrained" / BUNDLED
    path = Path(model).expanduser()
    if path.suffix in PICKLES and not path.is_dir():
        convert = CONVERT_FILE if path.suffix == ".ckpt" else CONVERT
        raise InputError(f"{path} is a pickle, which can run code when opened; {convert}")
    if path.is_dir() or (path.is_file() and path.suffix == SINGLE_FILE):
        return path
    if path.suffix == SINGLE_FILE:
        raise InputError(f"There is no file {path}; give the path of a {what}.")
    if not path.exists() and isinstance(model, str) and is_hub_name(model):
        return download(model)
    raise InputError(
        f"There is no {what} directory at {path}; give the path of one in diffusers' layout or of "
        f"a {SINGLE_FILE} file, a name on the Hugging Face hub (owner/name), or {BUNDLED!r} for "
        "the bundled model."
    )


def is_hub_name(model: str) -> bool:
    """Whether this could be a model on the hub: owner/name or owner/name@revision."""
    return NAME.fullmatch(model) is not None


def download_model(model: str, own_vae: bool = True) -> Path:
    """The snapshot directory of owner/name[@revision], with what load_model needs and no more.

    The plain weights where there are any, else those of the variant fp16. Files in the hub's cache
    are not loaded again; without a network, or with HF_HUB_OFFLINE=1, the cache is all there is.
    Raises InputError when the model is neither there nor within reach, or its weights are pickles.
    """
    networks = [name for name in NETWORKS if name != "vae" or own_vae]
    snapshot = _snapshot(model, CONFIGS)
    for variant in ("", VARIANT):
        missing = [name for name in networks if _lacks_weights(snapshot / name, weights_name(name))]
        patterns = [
            p for name in missing for p in _weights(f"{name}/{weights_name(name)}", variant)
        ]
        if patterns:
            snapshot = _snapshot(model, patterns)
    for name in networks:
        if _lacks_weights(snapshot / name, weights_name(name)):
            _refuse_pickles(model, f"{name}/")
    return snapshot


def download_autoencoder(model: str) -> Path:
    """The snapshot directory of a VAE, or of a model with one in vae/. Raises InputError."""
    snapshot = _snapshot(model, ["config.json", "vae/config.json"])
    folder = "" if (snapshot / "config.json").is_file() else "vae/"
    for variant in ("", VARIANT):
        if _lacks_weights(snapshot / folder, weights_name("vae")):
            snapshot = _snapshot(model, _weights(folder + weights_name("vae"), variant))
    if _lacks_weights(snapshot / folder, weights_name("vae")):
        _refuse_pickles(model, folder)
    return snapshot


def _lacks_weights(folder: Path, stem: str) -> bool:
    return (folder / "config.json").is_file() and not whole_weights(folder, stem)


def _refuse_pickles(model: str, folder: str) -> None:
    """Raises InputError when the hub lists a pickle, and nothing else to read, in `folder`."""
    from huggingface_hub import list_repo_files

    name, _, revision = model.partition("@")
    try:
        listed = list_repo_files(name, revision=revision or None)
    except Exception:  # out of reach: whatever looks for the file next says that it is not there
        return
    inside = [file for file in listed if file.rpartition("/")[0] == folder.rstrip("/")]
    pickles = sorted(file for file in inside if file.endswith(PICKLES))
    if pickles and not any(file.endswith(SINGLE_FILE) for file in inside):
        raise InputError(
            f"{model} has weights only as a pickle ({pickles[0]}), which can run code when opened "
            f"and is not downloaded; {CONVERT}"
        )


def _weights(stem: str, variant: str) -> list[str]:
    """One file, or an index and its shards."""
    return [
        f"{stem}{variant}.safetensors",
        f"{stem}.safetensors.index{variant}.json",
        f"{stem}{variant}-?????-of-?????.safetensors",
    ]


def _snapshot(model: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=[*patterns]))
    except LocalEntryNotFoundError as error:
        # Newer versions say where the rest of an incomplete snapshot lies: what it lacks may not
        # be needed, and what is needed and absent is named when it is looked for.
        if (found := getattr(error, "snapshot_path", None)) is not None:
            return Path(found)
        raise InputError(
            f"There is no model directory at {model}, nor is that model in the Hugging Face cache, "
            "and the hub is out of reach; give the path of a model, or connect once to download it "
            "(HF_HUB_OFFLINE must not be set)."
        ) from None
    except HfHubHTTPError as error:
        raise InputError(
            f"There is no model directory at {model}, and the Hugging Face hub does not give out "
            f"a model of that name ({type(error).__name__}); check the name, or log in if it is "
            "private or gated."
        ) from None
    except Exception as error:  # the hub's client raises errors of its HTTP library's, of any kind
        raise InputError(
            f"{model} cannot be had from the Hugging Face hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())})."
        ) from None
