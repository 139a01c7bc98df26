"""Plain values: their digest, and where two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest_of(values: Any) -> str:
    """sha256 over canonical JSON: sorted keys, no spaces, no difference between 1 and 1.0, nor
    between a key that is null and one that is not there.
    """
    words = json.dumps(_plain(values), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(words.encode()).hexdigest()


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first value, by sorted dotted names, that two mappings do not share: "steps: 25, 50"."""
    for key in sorted({*a, *b}):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if (found := first_difference(one, other, f"{prefix}{key}.")) is not None:
                return found
        elif digest_of(one) != digest_of(other):
            return f"{prefix}{key}: {_short(one)} and {_short(other)}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _short(value: Any) -> str:
    text = json.dumps(_plain(value), ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
