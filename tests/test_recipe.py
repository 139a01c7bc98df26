"""Recipes: what goes out comes back, as JSON, in a PNG and as A1111 reads it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentdiff import __version__
from latentdiff.errors import InputError
from latentdiff.parameters_text import (
    SAMPLERS,
    SPACINGS,
    UnreadParametersWarning,
    from_parameters,
)
from latentdiff.recipe import (
    InputPicture,
    Lora,
    Recipe,
    model_hash,
    picture_hash,
    read_recipe,
    recipe_from_json,
)

HASH = hashlib.sha256(b"model").hexdigest()
PLAIN: dict[str, Any] = {
    "prompt": "a fox",
    "seed": 7,
    "height": 512,
    "width": 768,
    "num_inference_steps": 20,
    "guidance_scale": 7.0,
    "sampler": "dpmpp_2m",
}

texts = st.text(max_size=60) | st.text(alphabet='a,:"\\\n<>() é猫\u2028\x00\r', max_size=40)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
pictures = st.builds(InputPicture, name=texts, sha256=hashes)
sizes = st.none() | st.tuples(*[st.integers(0, 4096)] * 2)
scores = st.none() | st.floats(0, 10)
in_text = {
    "prompt": texts,
    "negative_prompt": texts,
    "seed": st.integers(0, 2**32 - 1),
    "height": st.integers(8, 4096),
    "width": st.integers(8, 4096),
    "num_inference_steps": st.integers(1, 1000),
    "guidance_scale": st.floats(0, 1e6),
    "sampler": st.sampled_from(sorted(SAMPLERS)),
    "guidance": st.sampled_from(["cfg", "apg"]),
    "guidance_rescale": st.floats(0, 1),
    "guidance_interval": st.none() | st.tuples(st.floats(0, 1), st.floats(1, 1e3)),
    "eta": st.none() | st.floats(0, 2),
    "spacing": st.none() | st.sampled_from(sorted(SPACINGS)),
    "clip_skip": st.none() | st.integers(1, 11),
    "weighted": st.booleans(),
    "strength": st.none() | st.floats(0, 1),
}
recipes = st.builds(
    Recipe,
    **in_text,
    image=st.none() | pictures,
    mask=st.none() | pictures,
    original_size=sizes,
    crops_coords_top_left=sizes,
    target_size=sizes,
    aesthetic_score=scores,
    negative_aesthetic_score=scores,
    model=texts,
    model_sha256=st.none() | hashes,
    loras=st.lists(st.builds(Lora, file=texts, sha256=hashes, weight=st.floats(-2, 2)), max_size=3),
    vae_sha256=st.none() | hashes,
    prediction_type=st.none() | texts,
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)


def like_a1111(text: str) -> dict[str, str]:
    """What A1111's paste button reads, after the description of its format."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    parts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    part = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            part, line = "Negative prompt", line.removeprefix("Negative prompt:").strip()
        parts[part].append(line)
    values = {key: json.loads(v) if v[0] == '"' == v[-1] else v for key, v in pairs}
    return values | {key: "\n".join(found) for key, found in parts.items()}


def save(path: Path, text: dict[str, str], compress: bool = False) -> Path:
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value, zip=compress)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


@given(recipe=recipes)
@settings(max_examples=60, deadline=None)
def test_json_brings_everything_back(recipe: Recipe) -> None:
    text = recipe.to_json()
    assert text.isascii()
    assert "\n" not in text
    assert recipe_from_json(text) == recipe


@given(recipe=recipes, itxt=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_png_brings_everything_back(
    recipe: Recipe, itxt: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    info = PngInfo()
    for key, value in recipe.to_png_text().items():
        (info.add_itxt if itxt else info.add_text)(key, value)
    path = tmp_path_factory.getbasetemp() / "recipe.png"
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    assert read_recipe(path) == recipe


def speaks_for_itself(prompt: str) -> bool:
    """Whether a prompt holds none of the marks that A1111's format cannot escape."""
    return "<lora:" not in prompt and not re.search("^Negative prompt:", prompt, re.MULTILINE)


prompts = texts.filter(speaks_for_itself)


@given(recipe=st.builds(Recipe, **in_text | {"prompt": prompts, "negative_prompt": prompts}))
@settings(max_examples=100, deadline=None)
def test_parameters_bring_back_what_they_say(recipe: Recipe) -> None:
    assert from_parameters(recipe.to_parameters()) == recipe


@given(recipe=st.builds(Recipe, **in_text | {"prompt": prompts, "negative_prompt": prompts}))
@settings(max_examples=100, deadline=None)
def test_a1111_reads_the_parameters(recipe: Recipe) -> None:
    found = like_a1111(recipe.to_parameters())

    def lines(prompt: str) -> str:
        return "\n".join(line.strip() for line in prompt.split("\n")).strip()

    assert found["Prompt"].strip() == lines(recipe.prompt)
    assert found["Negative prompt"].strip() == lines(recipe.negative_prompt)
    assert found["Steps"] == str(recipe.num_inference_steps)
    assert found["Sampler"] == SAMPLERS[recipe.sampler]
    assert found["Seed"] == str(recipe.seed)
    assert found["Size"] == f"{recipe.width}x{recipe.height}"
    assert float(found["CFG scale"]) == recipe.guidance_scale
    assert found["Version"] == f"latentdiff {__version__}"


@pytest.mark.parametrize(
    "name", ["a, b: c", 'the "best"', '"', "two\nlines", " spaces ", "sdxl-1.0", "猫", "\\", "a\\"]
)
def test_names_with_commas_and_quotes_are_quoted(name: str) -> None:
    recipe = Recipe(**PLAIN, model=name, model_sha256=HASH)
    back = from_parameters(recipe.to_parameters())
    assert like_a1111(recipe.to_parameters()).get("Model", "") == back.model
    assert back.model == name.rstrip("\\")
    assert back.seed == 7
    assert back.version == __version__


def test_the_text_is_what_a1111_writes() -> None:
    recipe = Recipe(
        **PLAIN | {"seed": 1, "width": 512, "guidance_scale": 7.5},
        negative_prompt="blurry",
        spacing="karras",
        model="models/cats v1.5.safetensors",
        model_sha256=HASH,
        strength=0.75,
        clip_skip=1,
        loras=(Lora(file="ink.safetensors", sha256=HASH, weight=0.8),),
        vae_sha256=HASH,
    )
    assert recipe.to_parameters() == (
        "a fox <lora:ink:0.8>\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1, "
        f"Size: 512x512, Model hash: {HASH[:10]}, Model: cats v1.5, VAE hash: {HASH[:10]}, "
        "Denoising strength: 0.75, Clip skip: 2, RNG: CPU, "
        f'Lora hashes: "ink: {HASH[:10]}", Version: latentdiff {__version__}'
    )
    back = from_parameters(recipe.to_parameters())
    assert back == recipe.model_copy(
        update={
            "model": "cats v1.5",
            "model_sha256": HASH[:10],
            "vae_sha256": HASH[:10],
            "loras": (Lora(file="ink.safetensors", sha256=HASH[:10], weight=0.8),),
        }
    )
    assert back.check_model(HASH) is None


def test_reads_what_a1111_wrote() -> None:
    text = (
        "masterpiece, (fox:1.2),\nsnow <lora:detail:0.6>\r\n"
        "Negative prompt: lowres, bad hands\n"
        "Steps: 28, Sampler: DPM++ 2M SDE Karras, CFG scale: 6.5, Seed: 12345, Size: 832x1216, "
        'Model hash: 6ce0161689, Model: v1-5, Clip skip: 2, Lora hashes: "detail: 1a2b3c4d5e6f", '
        "RNG: CPU, Version: v1.6.0\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = from_parameters(text)
    assert recipe == Recipe(
        prompt="masterpiece, (fox:1.2),\nsnow\r",
        negative_prompt="lowres, bad hands",
        seed=12345,
        height=1216,
        width=832,
        num_inference_steps=28,
        guidance_scale=6.5,
        sampler="dpmpp_2m_sde",
        spacing="karras",
        clip_skip=1,
        model="v1-5",
        model_sha256="6ce0161689",
        loras=(Lora(file="detail.safetensors", weight=0.6),),
        version=None,
    )


@pytest.mark.parametrize(
    ("sampler", "schedule", "ours", "spacing"),
    [
        ("Euler a", "", "euler_ancestral", "linspace"),
        ("Euler", ", Schedule type: Automatic", "euler", "linspace"),
        ("DPM++ 2M", "", "dpmpp_2m", "linspace"),
        ("DPM++ 2M", ", Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("DPM++ SDE Exponential", "", "dpmpp_sde", "exponential"),
        ("DDIM", ", Schedule type: Automatic", "ddim", "leading"),
        ("LCM", ", Schedule type: SGM Uniform", "lcm", "trailing"),
        ("Heun", ", Schedule type: Normal", "heun", "linspace"),
    ],
)
def test_samplers_of_a1111(sampler: str, schedule: str, ours: str, spacing: str) -> None:
    line = f"Steps: 5, Sampler: {sampler}{schedule}, CFG scale: 7, Seed: 1, Size: 64x64, RNG: CPU"
    recipe = from_parameters(f"a fox\n{line}")
    assert (recipe.sampler, recipe.spacing) == (ours, spacing)


LINE = "Steps: 5, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (", Hires upscale: 2, Denoising strength: 0.4", "Hires upscale, noise from a GPU"),
        (", RNG: CPU, Variation seed: 3, ENSD: 31337", "(ENSD, Variation seed)"),
        ("", "noise from a GPU"),
    ],
)
def test_warns_of_what_it_leaves_out(more: str, named: str) -> None:
    with pytest.warns(UnreadParametersWarning, match=re.escape(named)):
        recipe = from_parameters(f"a fox\n{LINE}{more}")
    assert recipe.strength is None


def test_hashes_of_8_digits_are_of_another_kind() -> None:
    recipe = from_parameters(f"a fox\n{LINE}, RNG: CPU, Model hash: 45dee52b")
    assert recipe.model_sha256 is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a fox", "does not say the picture's Steps, Sampler, CFG scale, Seed, Size"),
        ("", "does not say the picture's Steps"),
        (f"a fox\n{LINE}".replace(", Seed: 1", ""), "does not say the picture's Seed"),
        (f"a fox\n{LINE}".replace("Euler", "LMS"), "sampler 'LMS', which is not here"),
        (f"a fox\n{LINE}, Schedule type: Beta", "schedule 'Beta', which is not here"),
        (f"a fox\n{LINE}".replace("Seed: 1", "Seed: -1"), "seed: "),
        (f"a fox\n{LINE}".replace("64x64", "64"), "height: "),
        (f"a fox\n{LINE}, Clip skip: no", "clip_skip: "),
        (f"a fox\n{LINE}, Denoising strength: nan", "strength: "),
        (f'a fox\n{LINE}, Model: "\\ud800"', "model: "),
        ("x" * 10_001 + f"\n{LINE}", "prompt: "),
    ],
)
@pytest.mark.filterwarnings("ignore::latentdiff.parameters_text.UnreadParametersWarning")
def test_a_text_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        from_parameters(text)


@pytest.mark.parametrize(
    "line",
    [
        *(LINE.replace(value, "9" * 5000) for value in ("5", "7", "1", "64x64")),
        LINE.replace("64x64", f"64x{'9' * 5000}"),
        *(
            f"{LINE}, {key}: {'9' * 5000}"
            for key in ("Clip skip", "Denoising strength", "Eta", "Guidance rescale")
        ),
        f"{LINE}, Clip skip: 99999",
        f"{LINE}, Guidance interval: 1 to {'9' * 5000}",
        f"<lora:a:{'9' * 5000}>\n{LINE}",
    ],
)
@pytest.mark.filterwarnings("ignore::latentdiff.parameters_text.UnreadParametersWarning")
def test_numbers_of_thousands_of_digits_are_refused(line: str) -> None:
    with pytest.raises(InputError, match="is not a valid Recipe"):
        from_parameters(f"a fox\n{line}")


@given(text=st.text(alphabet='aS: ,"\\\n=x0', max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_text_breaks_the_parser(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from_parameters(f"{text}\n{LINE}, {text}")
        except InputError:
            pass


@pytest.mark.parametrize(
    "text", ["a" * 10**6, "a " * 10**5, " " * 10**6, "a: " * 300_000, 'a: "\\' * 200_000]
)
def test_a_long_line_is_read_in_linear_time(text: str) -> None:
    """Backtracking over a megabyte would take hours."""
    with pytest.raises(InputError):
        from_parameters(text)


def test_unknown_keys_name_the_version() -> None:
    values = json.loads(Recipe(**PLAIN).to_json()) | {"version": "9.1.0", "flow_shift": 3}
    message = r"latentdiff 9\.1\.0 in recipe format 1 and has keys \('flow_shift'\).*update"
    with pytest.raises(InputError, match=message):
        recipe_from_json(json.dumps(values))


def test_a_newer_format_names_the_version() -> None:
    values = json.loads(Recipe(**PLAIN).to_json()) | {"version": "9.1.0", "format": 2}
    with pytest.raises(InputError, match=r"latentdiff 9\.1\.0 in recipe format 2, which"):
        recipe_from_json(json.dumps(values))


def test_a_recipe_with_the_first_keys_alone_is_read() -> None:
    assert recipe_from_json(json.dumps(PLAIN)) == Recipe(**PLAIN)


@pytest.mark.parametrize(
    "text",
    [
        *["", "[]", "null", "{", "[" * 100_000, "{}", json.dumps(PLAIN | {"seed": -1})],
        *[json.dumps(PLAIN | {"guidance_scale": value}) for value in (float("nan"), 1e400)],
        json.dumps(PLAIN | {"prompt": "\ud800"}),
        json.dumps(PLAIN | {"height": 10**30}),
        json.dumps(PLAIN | {"model_sha256": "0123456789\n"}),
        json.dumps(PLAIN) + " " * (1 << 20),
    ],
)
def test_json_that_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        recipe_from_json(text)


def test_a_png_of_a1111_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", {"parameters": f"a fox\n{LINE}, RNG: CPU"})
    assert read_recipe(path).sampler == "euler"


def test_text_behind_the_pixels_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", {"latentdiff": Recipe(**PLAIN).to_json()})
    data = path.read_bytes()
    start = data.index(b"tEXt") - 4
    stop = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    path.write_bytes(data[:start] + data[stop:-12] + data[start:stop] + data[-12:])
    assert read_recipe(path) == Recipe(**PLAIN)


def test_a_picture_without_a_recipe(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", {"comment": "hello", "prompt": "{}"})
    with pytest.raises(InputError, match="holds no recipe"):
        read_recipe(path)


@pytest.mark.parametrize("compress", [False, True])
def test_text_of_megabytes_is_refused(tmp_path: Path, compress: bool) -> None:
    path = save(tmp_path / "a.png", {"latentdiff": "{" + " " * (5 << 20)}, compress)
    with pytest.raises(InputError, match=r"larger than 1 MiB|too large"):
        read_recipe(path)


def test_a_picture_too_large_for_pillow_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)
    with pytest.raises(InputError, match="decompression bomb"):
        read_recipe(path)


def test_files_that_are_no_png_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no picture"):
        read_recipe(tmp_path / "absent.png")
    with pytest.raises(InputError, match="There is no picture"):
        read_recipe(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="is no PNG"):
        read_recipe(tmp_path / "a.jpg")


@given(cut=st.integers(0, 400), at=st.integers(0, 399), byte=st.integers(0, 255))
@settings(max_examples=80, deadline=None)
def test_a_damaged_png_gets_a_sentence(
    cut: int, at: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("latentdiff", Recipe(**PLAIN).to_json(), zip=True)
    Image.new("RGB", (4, 4)).save(buffer, "PNG", pnginfo=info)
    data = bytearray(buffer.getvalue())
    data[at % len(data)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(data[: max(len(data) - cut, 0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            recipe = read_recipe(path)
        except InputError:
            return
    assert recipe == Recipe(**PLAIN)


def test_arguments_are_those_of_generate() -> None:
    recipe = Recipe(
        **PLAIN,
        strength=0.5,
        image=InputPicture(name="a.png", sha256=HASH),
        model="emoji",
        model_sha256=HASH,
        loras=(Lora(file="ink.safetensors", sha256=HASH),),
        target_size=(512, 768),
    )
    assert recipe.arguments() == PLAIN | {
        "negative_prompt": "",
        "guidance": "cfg",
        "guidance_rescale": 0.0,
        "weighted": True,
        "strength": 0.5,
        "target_size": (512, 768),
    }


def test_says_when_the_model_is_another() -> None:
    recipe = Recipe(**PLAIN, model="cats", model_sha256=HASH)
    other = hashlib.sha256(b"other").hexdigest()
    assert recipe.check_model(HASH) is None
    sentence = recipe.check_model(other)
    assert sentence is not None
    assert "cats" in sentence
    assert HASH[:10] in sentence
    assert other[:10] in sentence
    assert "no hash" in str(Recipe(**PLAIN).check_model(HASH))


def test_input_pictures_are_known_by_their_pixels(tmp_path: Path) -> None:
    image = Image.linear_gradient("L").convert("RGB")
    image.save(tmp_path / "a.png", compress_level=1)
    image.save(tmp_path / "b.png", compress_level=9)
    source = InputPicture(name="a.png", sha256=picture_hash(image))
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as same:
            assert source.check(same) is None
    others = [image.convert("L"), image.rotate(90), image.resize((128, 512))]
    assert len({picture_hash(other) for other in (image, *others)}) == 4
    assert all("'a.png'" in str(source.check(other)) for other in others)


def test_a_files_model_hash_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"model")
    assert model_hash(path) == HASH
    path.write_bytes(b"another")
    assert model_hash(path) == hashlib.sha256(b"another").hexdigest()


def test_a_directorys_model_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    weights, config = model / "unet" / "a.safetensors", model / "unet" / "config.json"
    weights.write_bytes(b"weights")
    config.write_text("{}")
    before = model_hash(model)
    expected = "".join(
        f"unet/{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n"
        for file in (weights, config)
    )
    assert before == hashlib.sha256(expected.encode()).hexdigest()

    (model / "README.md").write_text("a card")
    copied = tmp_path / "copied"
    model.rename(copied)
    assert model_hash(copied) == before
    (copied / "unet" / "config.json").write_text('{"a": 1}')
    changed = model_hash(copied)
    (copied / "unet").rename(copied / "vae")
    assert len({before, changed, model_hash(copied)}) == 3


def model_directory(path: Path) -> Path:
    """Files as a small Stable Diffusion has them."""
    index = {name: ["library", "Class"] for name in ("unet", "vae", "scheduler", "tokenizer")}
    files = {
        "model_index.json": json.dumps(index | {"text_encoder_2": [None, None]}),
        "vocabulary.json": "{}",
        "unet/config.json": '{"a": 1}',
        "unet/diffusion_pytorch_model.safetensors": "u",
        "vae/config.json": "{}",
        "vae/diffusion_pytorch_model.safetensors": "v",
        "scheduler/scheduler_config.json": "{}",
        "tokenizer/merges.txt": "a b",
        "tokenizer/vocab.json": "{}",
    }
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "safety_checker/model.safetensors",
        "safety_checker/config.json",
        "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "v1-5-pruned.safetensors",
        ".cache/huggingface/a.json",
        "README.md",
    ],
)
def test_what_is_not_read_is_not_in_a_models_hash(tmp_path: Path, name: str) -> None:
    model = model_directory(tmp_path)
    before = model_hash(model)
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_text("more")
    assert model_hash(model) == before


def test_everything_that_is_read_is_in_a_models_hash(tmp_path: Path) -> None:
    model = model_directory(tmp_path)
    files = [path for path in model.rglob("*") if path.is_file()]
    assert len(files) == 9
    hashes = {model_hash(model)}
    for path in files:
        path.write_text(path.read_text() + " ")
        hashes.add(model_hash(model))
    assert len(hashes) == 10


def test_a_variant_is_hashed_where_it_is_alone(tmp_path: Path) -> None:
    """The second directory is one of a VAE, without an index."""
    for folder in (model_directory(tmp_path / "model") / "unet", tmp_path / "vae"):
        folder.mkdir(exist_ok=True)
        root = folder.parent if folder.name == "unet" else folder
        plain = folder / "diffusion_pytorch_model.safetensors"
        variant = folder / "diffusion_pytorch_model.fp16.safetensors"
        plain.write_text("plain")
        both = model_hash(root)
        variant.write_text("half")
        assert model_hash(root) == both
        plain.unlink()
        alone = model_hash(root)
        variant.write_text("another half")
        assert len({both, alone, model_hash(root)}) == 3


def test_a_directory_without_weights_has_no_model_hash(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="no safetensors"):
            model_hash(path)
