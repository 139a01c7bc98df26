"""The rot report counts what the pictures that were laid out say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.laion_dedup import jpeg, lay_out
from latentdiff.errors import InputError
from tests.training.laion.lock_of import lock, row
from training.laion.dedup import DedupConfig, dedup
from training.laion.download import REASONS
from training.laion.outcomes import GONE, HAD
from training.laion.report import report


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return jpeg(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BOX), 95)


def of(url: str, width: int | None, **values: Any) -> dict[str, Any]:
    return {"url": url, "meta_width": width, "meta_height": 3000, **values}


SAMPLES: list[tuple[bytes | None, dict[str, Any]]] = [
    (picture(0), of("https://a.example/1.jpg", 127)),
    (picture(1), of("https://a.example:8080/2.jpg", 128)),
    (picture(0), of("https://A.example/copy.jpg", 128)),
    (None, of("https://a.example/3.jpg", 128, error_message="404", http_status=404)),
    (None, of("https://b.example/4.jpg", 2048, error_message="404", http_status=404)),
    (None, of("https://b.example/5.jpg", 5000, error_message="hash mismatch", http_status=200)),
    (None, of("no address", None, error_message="scheme")),
    (None, of("https://c.example/\x1b[2J.jpg", 600, error_message="timeout")),
]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("benchmarks.laion_dedup.SHARD", 3)
    lay_out(tmp_path, SAMPLES)
    return tmp_path


def test_everything_is_counted(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = dedup(DedupConfig(), "rotten", directory)
    capsys.readouterr()
    values = report(directory)
    assert values == json.loads((directory / "report" / "rot.json").read_text())
    assert (values["name"], values["lockfile"]) == ("rotten", info.digest)
    assert (values["samples"], values["gone"], values["hash_mismatches"]) == (8, 3, 1)
    gone, refused = {"404": 2, "timeout": 1}, {"hash mismatch": 1, "scheme": 1}
    assert (values["gone_by_reason"], values["refused_by_reason"]) == (gone, refused)
    assert values["status"] == {"kept": 2, "duplicate: exact": 1, **gone, **refused}
    assert values["http_status"] == {"200": 4, "404": 2}
    assert values["by_domain"] == {
        "a.example": {"samples": 4, "gone": 1},
        "b.example": {"samples": 2, "gone": 1},
        "c.example": {"samples": 1, "gone": 1},
        "unknown": {"samples": 1, "gone": 0},
    }
    assert values["by_shorter_side"] == {
        "below 128": {"samples": 1, "gone": 0},
        "128 to 255": {"samples": 3, "gone": 1},
        "512 to 1023": {"samples": 1, "gone": 1},
        "from 2048": {"samples": 2, "gone": 1},
        "unknown": {"samples": 1, "gone": 0},
    }
    text = (directory / "report" / "rot.txt").read_text()
    assert capsys.readouterr().out == text
    assert text.startswith("3 of 8 samples (37.5%) are gone. 2 were refused, 1 of them because")
    assert "\x1b" not in text


def test_the_same_lockfile_makes_the_same_bytes(directory: Path) -> None:
    dedup(DedupConfig(), "rotten", directory)
    files = [directory / "report" / name for name in ("rot.json", "rot.txt")]
    report(directory)
    before = [path.read_bytes() for path in files]
    report(directory)
    assert [path.read_bytes() for path in files] == before


def test_it_needs_the_lockfile_of_these_pictures(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(InputError, match="no lockfile"):
        report(directory)
    other = tmp_path_factory.mktemp("other")
    lay_out(other, SAMPLES[:3])
    dedup(DedupConfig(), "another", other)
    (other / "lock.parquet").rename(directory / "lock.parquet")
    with pytest.raises(InputError, match="lacks samples of 00001; run the step dedup"):
        report(directory)
    lock(directory, [row(n, "404", key=f"{n // 3:05d}{n % 3}") for n in range(1, 8)])
    with pytest.raises(InputError, match="lacks samples of 00000"):
        report(directory)


def test_every_reason_is_gone_refused_or_had() -> None:
    assert set(GONE) <= set(REASONS)
    assert not set(HAD) & set(REASONS)
