"""Tokenizers: read from a directory, written to one, and CLIP's own, which is bundled."""

from __future__ import annotations

import functools
import gzip
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import InputError
from latentdiff.model_files import MAX_TOKENIZER_BYTES, check_file, one_line, read_json, write_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedTokenizerBase

CLASSES = (
    *(f"{name}Tokenizer" for name in ("CLIP", "T5", "Bert", "GPT2")),
    *(f"{name}TokenizerFast" for name in ("CLIP", "T5", "Bert", "GPT2", "PreTrained")),
)
"""transformers' classes that can be read."""

MERGES = Path(__file__).parent / "pretrained" / "clip_tokenizer" / "merges.txt.gz"
CLIP_LENGTH = 77
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")


def check_tokenizer(directory: Path) -> None:
    """Raises InputError when a tokenizer's files are absent or too large."""
    read_json(directory / "tokenizer_config.json")
    if (directory / "tokenizer.json").is_file():
        read_json(directory / "tokenizer.json", MAX_TOKENIZER_BYTES)
    elif (directory / "vocab.txt").is_file():
        check_file(directory / "vocab.txt", MAX_TOKENIZER_BYTES)
    else:
        read_json(directory / "vocab.json", MAX_TOKENIZER_BYTES)
        check_file(directory / "merges.txt", MAX_TOKENIZER_BYTES)


def read_tokenizer(directory: Path, class_name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `class_name` in a directory. Raises InputError when it cannot be read."""
    import transformers

    try:
        cls = getattr(transformers, class_name)
        return cls.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(
            f"{directory} holds no {class_name} that can be read ({one_line(error)})."
        ) from None


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """tokenizer.json for transformers 5, and the vocabulary's own files for those before."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # the last call's, which would be stored and differ from run to run
    backend.no_padding()
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    backend.model.save(str(directory))
    tokens = {name: getattr(tokenizer, name) for name in SPECIAL}
    config = {
        "tokenizer_class": type(tokenizer).__name__,
        "model_max_length": tokenizer.model_max_length,
    }
    config |= {name: str(token) for name, token in tokens.items() if token is not None}
    write_json(config, directory / "tokenizer_config.json")


@functools.cache
def _clip_merges() -> list[tuple[str, str]]:
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    return [(first, second) for first, second in map(str.split, lines)]


@functools.cache
def _clip_vocabulary() -> dict[str, int]:
    """Token ids in the order of openai/CLIP's simple_tokenizer.py."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in plain] + [chr(0x100 + n) for n in range(256 - len(plain))]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [first + second for first, second in _clip_merges()]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """The tokenizer of openai/clip-vit-large-patch14, which all Stable Diffusion models share.

    They differ in what they pad with: "<|endoftext|>" or, where the tower is OpenCLIP's, "!".
    """
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    return CLIPTokenizer(
        vocab=dict(_clip_vocabulary()),
        merges=list(_clip_merges()),
        model_max_length=CLIP_LENGTH,
        pad_token=pad_token,
    )


def pack_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer as values for JSON: one word for CLIP's own, and else the text of its files."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    if (
        type(tokenizer).__name__ == "CLIPTokenizer"
        and model["vocab"] == _clip_vocabulary()
        and merges == [" ".join(pair) for pair in _clip_merges()]
        and (len(tokenizer), tokenizer.model_max_length) == (len(_clip_vocabulary()), CLIP_LENGTH)
    ):
        return {"pad_token": str(tokenizer.pad_token)}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "tokenizer"
        write_tokenizer(tokenizer, written)
        names = ("tokenizer.json", "tokenizer_config.json")
        return {name: (written / name).read_text(encoding="utf-8") for name in names}


def unpack_tokenizer(values: dict[str, Any], class_name: str) -> PreTrainedTokenizerBase:
    """The inverse of pack_tokenizer. Raises InputError when the values describe no tokenizer."""
    if "tokenizer.json" not in values:
        return clip_tokenizer(str(values.get("pad_token", "<|endoftext|>")))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_text(str(values.get(name)), encoding="utf-8")
        return read_tokenizer(Path(folder), class_name)
