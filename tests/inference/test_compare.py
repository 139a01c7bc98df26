"""Evaluations side by side: one id, or none of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from inference import compare
from latentdiff.errors import InputError

EVALUATION: dict[str, Any] = {
    "model": "a", "device": "cpu", "seed": 0, "prompts": 2, "num_inference_steps": 25,
    "guidance_scale": 4.0, "sampler": "ddim", "protocol": "p", "id": "0123456789ab",
    "fixed": {"count": 2, "size": 64.0}, "pictures": 4,
    "one": {"objects": 50.0, "intervals": {"objects": [9.45, 90.55]}},
    "features": {"clip": {"frechet": 1.23456, "frechet_interval": [1.0, 2.0]}},
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | changes))
    return folder


def test_figures_stand_beside_each_other_with_their_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"features": {"clip": {"frechet": 2.5}, "inception": {"frechet": 7.0}}}
    dirs = [write(tmp_path / "a"), write(tmp_path / "b", model="b", guidance_scale=7.5, **other)]
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, dirs)])
    compare.main()
    assert capsys.readouterr().out.splitlines() == [
        "| p 0123456789ab | a | b |",
        "| --- | --- | --- |",
        "| sampler | ddim | ddim |",
        "| num_inference_steps | 25 | 25 |",
        "| guidance_scale | 4.0 | 7.5 |",
        "| seed | 0 | 0 |",
        "| one.objects | 50 (9.45 to 90.55) | 50 (9.45 to 90.55) |",
        "| features.clip.frechet | 1.235 (1 to 2) | 2.5 |",
        "| features.inception.frechet |  | 7 |",
    ]


def test_another_protocol_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", id="ba9876543210", fixed={"count": 3, "size": 64.0})
    read = [compare.read_evaluation(tmp_path / name) for name in "ab"]
    with pytest.raises(InputError, match=r"differ in count: 2 and 3;"):
        compare.table(read)


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run inference\.evaluate first"):
        compare.read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"model": "a"}')
    with pytest.raises(InputError, match=r"no protocol's id; run inference\.evaluate again"):
        compare.read_evaluation(tmp_path)
