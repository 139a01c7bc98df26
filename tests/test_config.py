"""Configurations: what is refused, what overrides, and every YAML of the repository."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from latentdiff.config import Config, load_config, load_yaml, parse, read_yaml, save_yaml
from latentdiff.data.scenes import ScenesConfig
from latentdiff.errors import InputError
from latentdiff.metrics.protocol import Protocol
from training.diffusion import DiffusionConfig

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for package in ("latentdiff", "training", "inference")
    for path in sorted((ROOT / package).rglob("*.py"))
]
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
YAMLS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(LAUNCHERS))


class Inner(Config):
    """A group of options."""

    rate: float = Field(default=0.1, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    name: str | None = None


class Outer(Config):
    """A run."""

    run_dir: Path
    steps: int = 10
    fast: bool = False
    inner: Inner = Inner()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: runs/a\nsteps: 20\ninner: {rate: 0.5, name: größe}\n", "utf-8")
    return path


def load(file: Path, *overrides: str) -> Outer:
    return load_config(Outer, ["--config", str(file), *overrides])


# Files


def test_a_file_is_read_and_defaults_fill_the_rest(file: Path) -> None:
    expected = Outer(run_dir=Path("runs/a"), steps=20, inner=Inner(rate=0.5, name="größe"))
    assert load_yaml(Outer, file) == load(file) == expected
    assert (expected.fast, expected.inner.betas) == (False, (0.9, 0.99))


@settings(deadline=None)
@given(
    st.builds(
        Outer,
        run_dir=st.from_regex(r"[a-zé0-9_ :#-]{1,9}(/[a-z.]{1,5}x)?", fullmatch=True).map(Path),
        steps=st.integers(),
        fast=st.booleans(),
        inner=st.builds(
            Inner,
            rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
            betas=st.tuples(*2 * [st.floats(allow_nan=False, allow_infinity=False)]),
            name=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
        ),
    )
)
def test_what_is_saved_loads_again(tmp_path_factory: pytest.TempPathFactory, config: Outer) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    save_yaml(config, path)
    assert load_yaml(Outer, path) == config
    values = yaml.safe_load(path.read_text("utf-8"))
    assert list(values) == ["run_dir", "steps", "fast", "inner"]
    assert list(values["inner"]) == ["rate", "betas", "name"]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match=f"no configuration file at {re.escape(str(path))}"):
            load(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "steps", "3", "null"])
def test_yaml_that_is_no_mapping_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(InputError, match="must hold a mapping of option names to values"):
        load(file)


@pytest.mark.parametrize(
    "content", [b"a: [", b"a: b: c", b"\xff\xfe\x00", b"a: \x00", b"[" * 9999, b"a: 2001-99-99"]
)
def test_what_is_no_yaml_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(InputError, match="is not readable YAML"):
        load(file)


def test_a_huge_file_is_refused_unread(file: Path) -> None:
    file.write_text("run_dir: a\n" + "#" * (1 << 20))
    with pytest.raises(InputError, match="larger than 1 MiB"):
        load(file)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [PATH]",
        "!!python/object/apply:os.mkdir [PATH]",
        "!!python/object/new:pathlib.PosixPath [PATH]",
        "!!python/name:os.system",
        "!!python/tuple [1, 2]",
    ],
)
def test_yaml_makes_no_objects(file: Path, tag: str) -> None:
    trace = file.with_name("trace")
    text = tag.replace("PATH", str(trace))
    file.write_text(f"run_dir: {text}\n")
    with pytest.raises(InputError, match="is not readable YAML"):
        load(file)
    file.write_text("run_dir: a\n")
    with pytest.raises(InputError, match=r"--run_dir: .* is not a readable value"):
        load(file, "--run_dir", text)
    assert not trace.exists()


# Values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run_dir": "a", "stepz": 1}, "stepz: Extra inputs are not permitted"),
        ({"run_dir": "a", "inner": {"rat": 1}}, r"inner\.rat: Extra inputs are not permitted"),
        ({}, "run_dir: Field required"),
        ({"run_dir": "a", "steps": "many"}, "steps: Input should be a valid integer"),
        ({"run_dir": "a", "steps": 1.5}, "steps: Input should be a valid integer"),
        ({"run_dir": "a", "inner": {"rate": 0}}, r"inner\.rate: .* greater than 0"),
        ({"run_dir": "a", "inner": {"rate": float("inf")}}, r"inner\.rate: .* finite"),
        ({"run_dir": "a", "inner": {"betas": [0, float("nan")]}}, r"inner\.betas\.1: .* finite"),
        ({"run_dir": "a", "inner": None}, "inner: Input should be"),
        ([], r"\(top level\): Input should be"),
    ],
)
def test_bad_values_are_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse(Outer, values, "some.yaml")
    assert str(error.value).startswith("some.yaml is not a valid Outer:\n")


def test_every_bad_value_is_named_at_once() -> None:
    with pytest.raises(InputError) as error:
        parse(Outer, {"stepz": 1, "inner": {"rate": -1}}, "some.yaml")
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "run_dir",
        "inner.rate",
        "stepz",
    ]


def test_a_config_is_frozen(file: Path) -> None:
    config = load(file)
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.inner.rate = 1.0  # type: ignore[misc]


# Overrides


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--steps", "7"], {"steps": 7}),
        (["--steps=-7"], {"steps": -7}),
        (["--steps", "-7"], {"steps": -7}),
        (["--fast", "true", "--run_dir", "b c"], {"fast": True, "run_dir": Path("b c")}),
        (["--steps", "1", "--steps", "2"], {"steps": 2}),
        (["--inner.rate", "1e-4"], {"inner": Inner(rate=1e-4, name="größe")}),
        (["--inner.betas", "[0, 1]"], {"inner": Inner(rate=0.5, betas=(0, 1), name="größe")}),
        (["--inner.name=null"], {"inner": Inner(rate=0.5)}),
        (["--inner.name", "a=b"], {"inner": Inner(rate=0.5, name="a=b")}),
        (["--inner", "{rate: 2}"], {"inner": Inner(rate=2)}),
    ],
)
def test_the_command_line_overrides(
    file: Path, overrides: list[str], expected: dict[str, Any]
) -> None:
    before = load(file)
    after = load(file, *overrides)
    assert after == before.model_copy(update=expected)
    assert load_config(Outer, [*overrides, "--config", str(file)]) == after


def test_a_group_that_the_file_lacks_can_be_overridden(file: Path) -> None:
    file.write_text("run_dir: a")
    assert load(file, "--inner.rate", "3").inner == Inner(rate=3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--stepz", "1"], "stepz: Extra inputs are not permitted"),
        (["--inner.rat", "1"], r"inner\.rat: Extra inputs are not permitted"),
        (["--step", "1"], "step: Extra inputs are not permitted"),
        (["--steps", "many"], "steps: Input should be a valid integer"),
        (["--steps"], "--steps needs a value"),
        (["steps=3"], "Unexpected argument 'steps=3'; overrides look like --max_steps 100"),
        (["-s", "3"], "Unexpected argument '-s'"),
        (["--steps.of", "1"], "--steps.of: 'steps' holds a value, not a group"),
        (["--steps", "[1"], r"--steps: '\[1' is not a readable value"),
        (["--steps", "2001-99-99"], "--steps: '2001-99-99' is not a readable value"),
        (["--fast", "!!bool maybe"], "--fast: '!!bool maybe' is not a readable value"),
    ],
)
def test_bad_overrides_are_refused(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(file, *overrides)


def test_a_config_file_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_config(Outer, [])
    assert end.value.code == 2
    assert "--config" in capsys.readouterr().err


# The repository's own


def config_class(path: Path) -> type[Config]:
    """The class that the program of a YAML's name gives to load_config."""
    if path.stem == "scenes":
        return ScenesConfig
    if path.parent.name == "protocols":
        return Protocol
    for module in (
        f"training.{path.stem}",
        f"inference.{path.stem}",
        f"training.{path.stem}.__main__",
    ):
        source = ROOT / f"{module.replace('.', '/')}.py"
        text = source.read_text("utf-8") if source.is_file() else ""
        if classes := re.findall(r"load_config\((\w+)", text):
            (name,) = classes
            found: type[Config] = getattr(importlib.import_module(module), name)
            return found
    raise AssertionError(f"{path} is named after no program")


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_configs() -> None:
    assert {names(path.parent) for path in YAMLS} >= {"configs/emoji"}
    assert len(YAMLS) >= 6


@pytest.mark.parametrize("path", LAUNCHERS, ids=names)
def test_accelerate_reads_what_is_for_its_launcher(path: Path) -> None:
    launcher = load_config_from_file(str(path))
    assert launcher.num_processes >= launcher.num_machines >= 1
    assert launcher.mixed_precision == "no"  # the training configuration says it
    if launcher.distributed_type == DistributedType.FSDP:
        assert launcher.fsdp_config["fsdp_version"] == 2


def test_the_readme_shows_a_whole_configuration() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    config = parse(DiffusionConfig, yaml.safe_load(text), "README.md")
    assert config.lora is not None
    assert config.images is not None
    assert config.images.sizes.buckets


def test_there_is_a_launcher_for_every_size() -> None:
    kinds = {path.stem: load_config_from_file(str(path)).distributed_type for path in LAUNCHERS}
    assert kinds == {
        "single": DistributedType.NO,
        "multi_gpu": DistributedType.MULTI_GPU,
        "multi_node": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
    }


@pytest.mark.parametrize("path", YAMLS, ids=names)
def test_every_yaml_loads_and_survives_saving(path: Path, tmp_path: Path) -> None:
    cls = config_class(path)
    config = load_yaml(cls, path)
    save_yaml(config, tmp_path / "config.yaml")
    assert load_yaml(cls, tmp_path / "config.yaml") == config
    with pytest.raises(InputError, match="no_such_option: Extra inputs are not permitted"):
        load_config(cls, ["--config", str(path), "--no_such_option", "1"])


@pytest.mark.parametrize("path", YAMLS, ids=names)
def test_every_yaml_names_configs_that_exist(path: Path) -> None:
    for key, value in read_yaml(path).items():
        if isinstance(value, str) and value.startswith("configs/"):
            assert (ROOT / value).is_file(), (key, value)


@pytest.mark.parametrize("trained", sorted((ROOT / "configs").rglob("diffusion.yaml")), ids=names)
def test_what_one_program_makes_the_next_one_finds(trained: Path) -> None:
    sets = [read_yaml(path) for path in trained.parent.glob("*.yaml")]
    keys = ("run_dir", "directory", "reference_dir")
    made = [values[key] for values in sets for key in keys if key in values]
    assert len(set(made)) == len(made)
    for values in sets:
        for key, value in values.items():
            if isinstance(value, str) and value.startswith("runs/"):
                assert value.removesuffix("/model") in made, (key, value)


def config_bodies() -> list[tuple[str, ast.ClassDef]]:
    """Every class below Config, found in the sources."""
    classes = [
        (names(path), node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    known, found = {"Config"}, dict[str, tuple[str, ast.ClassDef]]()
    while True:
        new = {
            node.name: (file, node)
            for file, node in classes
            if node.name not in found
            and any(isinstance(base, ast.Name) and base.id in known for base in node.bases)
        }
        if not new:
            return list(found.values())
        found |= new
        known |= set(new)


def test_every_field_of_every_config_has_a_docstring() -> None:
    bodies = config_bodies()
    assert {node.name for _, node in bodies} >= {"ScenesConfig", "UNetConfig", "OptimizerConfig"}
    bare = []
    for file, node in bodies:
        assert ast.get_docstring(node), f"{file}: {node.name}"
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                text = following.value if isinstance(following, ast.Expr) else None
                if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                    bare.append(f"{file}: {node.name}.{ast.unparse(statement.target)}")
    assert bare == []


def test_docstrings_become_descriptions() -> None:
    assert ScenesConfig.model_fields["resolution"].description == "Width and height in pixels."
