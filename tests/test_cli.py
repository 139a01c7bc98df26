"""The console command: files, output, exit codes; nothing heavy until it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentdiff.checkpoint import ModelParts
from latentdiff.cli import main
from latentdiff.pipeline import TextToImage
from latentdiff.recipe import read_recipe
from latentdiff.vocabulary import Vocabulary


def generate(tiny_model: Path, *arguments: str) -> None:
    main(["generate", "--model", str(tiny_model), "--steps", "2", *arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("latentdiff: ")
    assert err.count("\n") == 1
    return err


def test_writes_the_picture_that_python_makes(
    tiny: TextToImage, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fox.png"
    options = [
        "--seed",
        "7",
        "--sampler",
        "euler",
        "--guidance-scale",
        "2.5",
        "--height",
        "32",
        "--width",
        "96",
    ]
    generate(tiny_model, "a fox", *options, "--negative-prompt", "apple", "--output", str(path))
    assert capsys.readouterr() == (f"{path}\n", "")
    expected = tiny.generate(
        "a fox",
        negative_prompt="apple",
        seed=7,
        sampler="euler",
        guidance_scale=2.5,
        height=32,
        width=96,
        num_inference_steps=2,
    )
    with Image.open(path) as image:
        assert isinstance(expected, Image.Image)
        assert image.tobytes() == expected.tobytes()
        text: dict[str, Any] = image.text  # type: ignore[attr-defined]
    assert text == {key: str(value) for key, value in expected.info.items()}


def test_several_pictures_are_numbered(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(
        tiny_model, "fox", "--seed", "5", "--num-images", "3", "--output", str(tmp_path / "a.png")
    )
    names = [f"a-{number}.png" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
    assert [read_recipe(tmp_path / name).seed for name in names] == [5, 6, 7]


def test_prompt_and_settings_stay_out_when_asked(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    generate(tiny_model, "fox", "--no-metadata", "--output", str(path))
    with Image.open(path) as image:
        assert image.info == {}


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("WEBP", "WEBP"), ("jpeg", "JPEG")])
def test_other_formats(tiny_model: Path, tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a.{suffix}"
    generate(tiny_model, "fox", "--output", str(path))
    with Image.open(path) as image:
        assert (image.format, image.size) == (kind, (64, 64))


def test_warnings_are_one_clean_line_each(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tiny_model, "a roket on a blu background", "--output", str(tmp_path / "a.png"))
    for line, word in zip(capsys.readouterr().err.splitlines(), ("roket", "blu"), strict=True):
        assert line.startswith(f"latentdiff: warning: This model never saw the word '{word}'; ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fox", "--output", "a.txt"], "a.txt must end in .png, .jpg, .jpeg, .webp."),
        (["fox", "--output", "a"], "a must end in .png"),
        (["fox", "--output", "no/a.png"], "There is no directory no; make it first"),
        (["fox", "--output", "folder.png"], "folder.png is a directory"),
        (["fox", "--model", "no"], "There is no model directory at no"),
        (["", "--output", "a.png"], "The prompt is empty"),
        (["fox", "--sampler", "dimm"], "did you mean 'ddim'"),
        (["fox", "--height", "65"], "height is 65; this model makes multiples of "),
        (["fox", "--seed", "-3"], "seed is -3"),
        (["fox", "--device", "foo"], "There is no device 'foo' here; PyTorch has cpu"),
        (["fox", "--device", "cuda:400"], "There is no device 'cuda:400' here"),
        (["fox", "--device", "meta"], "There is no device 'meta' here"),
        (["fox", "--prediction-type", "noise"], "prediction_type"),
        (["fox", "--lora", "no.safetensors:nan"], "no.safetensors"),
        (["fox", "--original-size", "64", "64"], "original_size conditions SDXL"),
        (["fox", "--crop", "0", "8"], "crops_coords_top_left conditions SDXL"),
        (["fox", "--target-size", "64", "64"], "target_size conditions SDXL"),
        (["fox", "--aesthetic-score", "6"], "aesthetic_score conditions SDXL's refiner"),
        (["fox", "--negative-aesthetic-score", "2"], "negative_aesthetic_score conditions SDXL's"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    assert message in fails(capsys, "generate", "--model", str(tiny_model), *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_where_there_is_none(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "fox", "--model", str(tiny_model), "--device", "cuda"]
    assert "There is no device 'cuda' here; PyTorch has cpu" in fails(capsys, *arguments)


class TestOutputsAreCheckedBeforeLoading:
    """The model named here does not exist, which would be said next."""

    def refused(self, capsys: pytest.CaptureFixture[str], path: Path, count: int = 3) -> str:
        options = ["--model", "no", "--num-images", str(count), "--output", str(path)]
        return fails(capsys, "generate", "fox", *options)

    def test_every_number(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a-2.png").mkdir()
        assert "a-2.png is a directory" in self.refused(capsys, tmp_path / "a.png")
        assert "There is no model directory at no" in self.refused(capsys, tmp_path / "a.png", 1)

    def test_only_what_is_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.png").mkdir()
        assert "There is no model directory at no" in self.refused(capsys, tmp_path / "a.png")
        assert "a.png is a directory" in self.refused(capsys, tmp_path / "a.png", 1)

    @pytest.mark.parametrize("name", ["..", "a", "a.txt"])
    def test_the_ending(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        assert "must end in .png" in self.refused(capsys, tmp_path / name)

    def test_the_directory_can_be_written_to(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def closed(path: Path, mode: int) -> bool:
            return not (Path(path) == tmp_path and mode & os.W_OK)

        monkeypatch.setattr(os, "access", closed)
        assert f"written to the directory {tmp_path};" in self.refused(capsys, tmp_path / "a.png")


def test_a_failed_write_leaves_the_old_picture(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(image: Image.Image, file: Path, *_: Any, **__: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    arguments = ["generate", "fox", "--model", str(tiny_model), "--steps", "1"]
    assert "No space left on device" in fails(capsys, *arguments, "--output", str(path))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


class TestInfo:
    def info(self, model: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
        main(["info", "--model", str(model), "--json"])
        values: dict[str, Any] = json.loads(capsys.readouterr().out)
        return values

    def test_json(
        self, tiny_parts: ModelParts, tiny_model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        values = self.info(tiny_model, capsys)
        assert values["model"] == str(tiny_model)
        assert values["license"] == "not stated"
        assert values["concepts"] == ["fox", "red apple", "rocket"]
        assert values["colours"] == ["blue", "dark green"]
        assert values["relations"]["left"][0] == "to the left of"
        assert values["resolution"] == 64
        assert {"ddpm", "ddim", "euler", "dpmpp_2m"} <= set(values["samplers"])
        networks = {
            "unet": tiny_parts.unet,
            "vae": tiny_parts.autoencoder,
            "text_encoder": tiny_parts.text_encoder,
        }
        assert values["parameters"] == {
            part: sum(parameter.numel() for parameter in network.parameters())
            for part, network in networks.items()
        }

    def test_licence_of_the_model_card(
        self, tiny_parts: ModelParts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        TextToImage(tiny_parts).save(tmp_path / "m")
        (tmp_path / "m" / "README.md").write_text(
            "---\ntags:\n- x\nlicense: apache-2.0\n---\n# M\n"
        )
        (tmp_path / "m" / "vocabulary.json").unlink()
        values = self.info(tmp_path / "m", capsys)
        assert values["license"] == "apache-2.0"
        assert values["resolution"] == 64
        assert "concepts" not in values

    def test_for_people(self, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(["info", "--model", str(tiny_model)])
        text = capsys.readouterr().out
        assert "concepts    fox, red apple, rocket" in text
        assert "resolution  64" in text

    def test_a_missing_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "There is no model directory at no;" in fails(capsys, "info", "--model", "no")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, latentdiff.cli\n"
        "try: latentdiff.cli.main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'PIL', 'pydantic'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--guidance-scale" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_vocabulary_knows_every_word_of_the_captions(tiny_parts: ModelParts) -> None:
    from latentdiff.data.scenes import EmojiScenes

    assert tiny_parts.vocabulary is not None
    scenes = EmojiScenes(tiny_parts.vocabulary)
    vocabulary = Vocabulary(tiny_parts.vocabulary)
    captions = {scenes.scene(index).caption for index in range(2000)}
    assert len(captions) > 500
    assert [caption for caption in captions if vocabulary.unknown(caption)] == []
