"""Models by name: the hub's cache in the layout that huggingface_hub gives it, the network cut."""

from __future__ import annotations

import fnmatch
import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from latentdiff import hub
from latentdiff.checkpoint import load_model
from latentdiff.errors import InputError
from latentdiff.hub import model_path

NAME = "someone/tiny-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of tiny_model: links to blobs, as huggingface_hub lays them out."""
    folder = tmp_path / "hub" / "models--someone--tiny-model"
    for number, file in enumerate(sorted(tiny_model.rglob("*.*"))):
        link = folder / "snapshots" / COMMIT / file.relative_to(tiny_model)
        blob = folder / "blobs" / f"{number:064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "refs" / "v2").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder / "snapshots" / COMMIT


@pytest.fixture(params=["offline", "unreachable"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE=1, and with a network that does not answer."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")


@pytest.mark.usefixtures("cut")
class TestWithoutNetwork:
    @pytest.mark.parametrize("name", [NAME, f"{NAME}@main", f"{NAME}@v2", f"{NAME}@{COMMIT}"])
    def test_finds_what_is_in_the_cache(self, cache: Path, name: str) -> None:
        assert model_path(name) == cache

    def test_says_what_is_nowhere(self, cache: Path) -> None:
        for name in ("someone/else", f"{NAME}@v3"):
            with pytest.raises(
                InputError,
                match=f"There is no model directory at {name}, nor is that .* out of reach; give",
            ) as caught:
                model_path(name)
            assert "\n" not in str(caught.value)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
class TestOffline:
    def test_loads_a_whole_model(self, cache: Path) -> None:
        loaded = load_model(NAME, vae=NAME)
        assert loaded.directory == loaded.other_vae == cache
        assert loaded.name == NAME
        assert loaded.autoencoder.scaling == 0.7

    def test_an_incomplete_snapshot_is_named(self, cache: Path) -> None:
        (cache / UNET).unlink()
        with pytest.raises(InputError, match=f"There is no file {cache / UNET}; .* incomplete"):
            load_model(NAME)

    def test_a_directory_of_that_name_wins(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / NAME).mkdir(parents=True)
        assert model_path(NAME) == Path(NAME)

    @pytest.mark.parametrize("name", ["one", "a/b/c", "/a/b", "../b", "a/b@", "a b/c", "a/.b"])
    def test_what_is_no_name_is_a_path(self, name: str) -> None:
        with pytest.raises(InputError, match=r"There is no model directory at .*; give the path"):
            model_path(name)


PLAIN = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "unet/config.json",
    UNET,
    "vae/config.json",
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model.safetensors.index.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
]
SUPERFLUOUS = [
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
]


@pytest.fixture
def listing() -> list[str]:
    """What lies on the hub."""
    return [*PLAIN, *SUPERFLUOUS]


@pytest.fixture
def remote(tmp_path: Path, listing: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub with one model; downloads what is asked for into the folder."""

    def list_files(name: str, revision: str | None) -> list[str]:
        assert (name, revision) == (NAME, "v2")
        return listing

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == (NAME, "v2")
        for file in listing:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                weight_map = '{"weight_map": {"x": "' + Path(PLAIN[6]).name + '"}}'
                (tmp_path / file).write_text(weight_map if "index.json" in file else "{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_files)
    return tmp_path


def downloaded(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_downloads_what_is_needed_and_no_more(remote: Path) -> None:
    assert hub.download_model(f"{NAME}@v2") == remote
    assert downloaded(remote) == sorted(PLAIN)


def test_downloads_a_vae_alone(remote: Path) -> None:
    assert hub.download_autoencoder(f"{NAME}@v2") == remote
    assert downloaded(remote) == sorted(file for file in PLAIN if file.startswith("vae/"))


class TestPicklesOnTheHub:
    @pytest.fixture
    def listing(self) -> list[str]:
        return [
            "model_index.json",
            "unet/config.json",
            UNET,
            "vae/config.json",
            "vae/diffusion_pytorch_model.bin",
            "model.ckpt",
        ]

    def test_are_named_and_stay_there(self, remote: Path, listing: list[str]) -> None:
        message = (
            f"{NAME}@v2 has weights only as a pickle .vae/diffusion_pytorch_model.bin., which can "
            "run code .*; convert it once, .*safe_serialization"
        )
        for download in (hub.download_model, hub.download_autoencoder):
            with pytest.raises(InputError, match=message) as caught:
                download(f"{NAME}@v2")
            assert "\n" not in str(caught.value)
        assert downloaded(remote) == sorted(set(listing) - {listing[4], "model.ckpt"})

    def test_do_not_matter_where_another_vae_is_given(self, remote: Path) -> None:
        assert model_path(f"{NAME}@v2", own_vae=False) == remote

    def test_beside_safetensors_are_not_blamed(self, remote: Path, listing: list[str]) -> None:
        listing.append("vae/diffusion_pytorch_model.non_ema.safetensors")
        assert hub.download_model(f"{NAME}@v2") == remote


def test_another_vae_spares_the_download_of_its_own(remote: Path) -> None:
    assert hub.download_model(f"{NAME}@v2", own_vae=False) == remote
    weights = [file for file in PLAIN if file.startswith("vae/") and file.endswith(".safetensors")]
    assert downloaded(remote) == sorted(set(PLAIN) - set(weights))


def test_what_the_hub_refuses_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(RepositoryNotFoundError):
        def __init__(self) -> None:
            OSError.__init__(self, "404 Client Error.\n\nRepository Not Found")

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise Refused

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=r"does not give out a model of that name .*; check") as e:
        model_path(NAME)
    assert "\n" not in str(e.value)
