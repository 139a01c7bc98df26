"""Configurations: YAML into frozen models that refuse unknown keys."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from latentdiff.errors import InputError

MAX_YAML_BYTES = 1 << 20


class Config(BaseModel):
    """Base of every configuration; each subclass stands directly above the class it configures."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


C = TypeVar("C", bound=Config)


def parse(cls: type[C], values: Any, source: str) -> C:
    """Validate plain values; raises InputError naming `source` and each offending key."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc'])) or '(top level)'}: {item['msg']}"
            for item in error.errors()
        ]
        raise InputError(f"{source} is not a valid {cls.__name__}:\n" + "\n".join(lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML file of plain values. Raises InputError when it is absent, huge or no mapping."""
    if not path.is_file():
        raise InputError(f"There is no configuration file at {path}.")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise InputError(f"{path} is larger than 1 MiB; that is no configuration file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML raises errors of any kind: dates, depth, tags
        raise InputError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping of option names to values.")
    return values


def load_yaml(cls: type[C], path: str | Path) -> C:
    """Read and validate one YAML file."""
    return parse(cls, read_yaml(Path(path)), str(path))


def save_yaml(config: Config, path: str | Path) -> None:
    """Write every value of `config`, defaults included."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def load_config(cls: type[C], argv: Sequence[str] | None = None) -> C:
    """The configuration of one program run: `--config FILE.yaml` and dotted overrides.

    Overrides follow as `--optimizer.learning_rate 1e-4` or `--max_steps=100`; each value is read
    as YAML. Raises InputError for an unknown option, a missing value or an invalid one.
    """
    parser = argparse.ArgumentParser(
        description=cls.__doc__,
        epilog="Any value of the file can be overridden: --max_steps 100 "
        "--optimizer.learning_rate 1e-4",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml")
    known, rest = parser.parse_known_args(argv)
    values = read_yaml(known.config)
    for name, text in _pairs(rest):
        _override(values, name, text)
    return parse(cls, values, str(known.config))


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    pairs, words = [], iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise InputError(f"Unexpected argument {word!r}; overrides look like --max_steps 100.")
        name, equals, text = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise InputError(f"--{name} needs a value.")
            text = following
        pairs.append((name, text))
    return pairs


def _override(values: dict[str, Any], name: str, text: str) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"--{name}: {parent!r} holds a value, not a group of options.")
    try:
        values[last] = yaml.safe_load(text)
    except Exception:  # as above
        raise InputError(f"--{name}: {text!r} is not a readable value.") from None
