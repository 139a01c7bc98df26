"""What an installation puts into site-packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import latentdiff

ROOT = Path(__file__).parents[1]
DIST_INFO = f"latentdiff-{latentdiff.__version__}.dist-info"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that what other builds left in the working tree plays no part."""
    copy = tmp_path_factory.mktemp("checkout")
    junk = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("latentdiff", "training", "inference", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=junk)
    for file in ROOT.iterdir():
        if file.suffix in (".toml", ".txt", ".md") or file.name == "LICENSE":
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> dict[str, bytes]:
    """Contents by path."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out"]
    built = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (checkout / "out").iterdir()
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_top_level_is_the_library_alone(wheel: dict[str, bytes]) -> None:
    assert {name.split("/")[0] for name in wheel} == {"latentdiff", DIST_INFO}


def test_holds_every_file_of_the_library(checkout: Path, wheel: dict[str, bytes]) -> None:
    library = {
        path.relative_to(checkout).as_posix(): path.read_bytes()
        for path in (checkout / "latentdiff").rglob("*")
        if path.is_file()
    }
    assert {"latentdiff/py.typed", "latentdiff/data/sprites.parquet"} <= library.keys()
    installed = {name: data for name, data in wheel.items() if name.startswith("latentdiff/")}
    assert installed.keys() == library.keys()
    assert installed == library


def test_metadata(wheel: dict[str, bytes]) -> None:
    metadata = wheel[f"{DIST_INFO}/METADATA"].decode()
    extras = {
        line.removeprefix("Provides-Extra: ")
        for line in metadata.splitlines()
        if line.startswith("Provides-Extra: ")
    }
    assert extras == {"8bit", "dev", "laion", "s3", "train"}
    assert "License-Expression: Apache-2.0" in metadata
    assert "latentdiff = latentdiff.cli:main" in wheel[f"{DIST_INFO}/entry_points.txt"].decode()
    assert f"{DIST_INFO}/licenses/LICENSE" in wheel
