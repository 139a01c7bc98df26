"""Who may import whom, and what no file may call."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentdiff

ROOT = Path(__file__).parents[1]
FOLDERS = ("latentdiff", "training", "inference", "benchmarks", "tests")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
)

MUST_NOT_IMPORT = {
    "": ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    "latentdiff": ("training", "inference", "benchmarks", "tests"),
    "latentdiff.models": ("latentdiff.diffusion", "latentdiff.data", "latentdiff.pipeline"),
    "latentdiff.diffusion": ("latentdiff.models", "latentdiff.data", "latentdiff.pipeline"),
    "training": ("inference", "benchmarks", "tests"),
    "inference": ("training", "benchmarks", "tests"),
    "benchmarks": ("inference", "tests"),
}
MAY_IMPORT_DATASETS = ("latentdiff.data", "training", "inference", "benchmarks")
MAY_IMPORT_ACCELERATE = ("training", "inference", "benchmarks")
RUNS_CODE = {
    "allow_pickle",
    "eval",
    "exec",
    "pandas.read_pickle",
    "torch.load",
    "torch.hub.load",
    "yaml.full_load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
}


def within(module: str, package: str) -> bool:
    return not package or module == package or module.startswith(f"{package}.")


def modules_imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names, also of `from package import submodule` and import_module("name")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                parents = module.split(".")[: -up or None]
                base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value)


def functions_called(tree: ast.AST) -> Iterator[str]:
    """Full names, through `import torch as t` and `from torch import load`.

    The keyword allow_pickle counts as a function of that name, unless it is False. torch.load with
    weights_only=True builds tensors alone and does not count.
    """
    full: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            full |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            name = full.get(first, first) + dot + rest
            keywords = [ast.unparse(k) for k in node.keywords]
            if not (name == "torch.load" and "weights_only=True" in keywords):
                yield name
            allowing = [k for k in node.keywords if ast.unparse(k) != "allow_pickle=False"]
            yield from (k.arg for k in allowing if k.arg == "allow_pickle")


def violations(path: str, source: str) -> list[str]:
    """What one file, named by its path from the root, does against the rules."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tree = ast.parse(source)
    found = []
    if not within(module, "tests"):  # a test may make what the library must refuse
        for name in modules_imported(tree, module, path.endswith("/__init__.py")):
            forbidden = [
                banned
                for package, names in MUST_NOT_IMPORT.items()
                if within(module, package)
                for banned in names
            ]
            if not any(within(module, package) for package in MAY_IMPORT_DATASETS):
                forbidden.append("datasets")
            if not any(within(module, package) for package in MAY_IMPORT_ACCELERATE):
                forbidden.append("accelerate")
            found += [f"imports {name}" for banned in forbidden if within(name, banned)]
        found += [f"calls {name}" for name in functions_called(tree) if name in RUNS_CODE]
    return sorted(set(found))


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_rules(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_package_was_looked_at() -> None:
    packages = ("latentdiff/models", "latentdiff/diffusion", "latentdiff/data", "training")
    for package in (*packages, "inference"):
        assert any(path.startswith(f"{package}/") for path in FILES)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("latentdiff/models/unet.py", "from latentdiff.diffusion.schedule import Schedule"),
        ("latentdiff/models/unet.py", "from latentdiff import diffusion"),
        ("latentdiff/models/unet.py", "from ..diffusion import schedule"),
        ("latentdiff/models/__init__.py", "from ..data import sprites"),
        ("latentdiff/models/unet.py", "def f():\n    import latentdiff.data.scenes"),
        ("latentdiff/models/unet.py", "import accelerate"),
        ("latentdiff/models/unet.py", "if TYPE_CHECKING:\n    from accelerate import Accelerator"),
        ("latentdiff/diffusion/loss.py", "from latentdiff.models import unet"),
        ("latentdiff/diffusion/loss.py", "from latentdiff.data import scenes"),
        ("latentdiff/pipeline.py", "import accelerate.utils"),
        (
            "latentdiff/pipeline.py",
            "from importlib import import_module\nimport_module('training')",
        ),
        ("latentdiff/pipeline.py", "from training.loop import train"),
        ("latentdiff/pipeline.py", "import inference"),
        ("latentdiff/pipeline.py", "import datasets"),
        ("latentdiff/data/laion.py", "import training.data"),
        ("latentdiff/data/laion.py", "import accelerate"),
        ("training/loop.py", "from inference.evaluate import main"),
        ("inference/evaluate.py", "from training import pictures"),
        ("benchmarks/speed.py", "import inference.evaluate"),
        ("training/loop.py", "import pickle"),
        ("latentdiff/checkpoint.py", "from pickle import loads"),
        ("latentdiff/checkpoint.py", "import torch\ntorch.load('x')"),
        ("latentdiff/checkpoint.py", "import torch as t\nt.load('x')"),
        ("latentdiff/checkpoint.py", "from torch import load as read\nread('x')"),
        ("latentdiff/checkpoint.py", "import torch\ntorch.load('x', weights_only=False)"),
        ("latentdiff/config.py", "import yaml\nyaml.load(text, Loader=yaml.Loader)"),
        ("latentdiff/config.py", "from yaml import unsafe_load\nunsafe_load(text)"),
        ("training/cache_latents.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("inference/serve.py", "eval(text)"),
    ],
)
def test_violation_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("latentdiff/models/unet.py", "import torch\nfrom latentdiff.config import Config"),
        ("latentdiff/models/unet.py", "from .blocks import Block\nfrom . import blocks"),
        (
            "latentdiff/pipeline.py",
            "from latentdiff.models import unet\nimport latentdiff.diffusion",
        ),
        ("latentdiff/data/laion.py", "import datasets"),
        ("training/loop.py", "import accelerate\nimport datasets\nfrom training import ema"),
        ("training/loop.py", "from training.checkpoints import load\nload('x')\nmodel.eval()"),
        ("training/cache_latents.py", "import numpy as np\nnp.load('x', allow_pickle=False)"),
        ("latentdiff/checkpoint.py", "import torch\ntorch.load('x', weights_only=True)"),
        ("inference/evaluate.py", "import accelerate\nimport latentdiff\nimport inference.batch"),
        ("latentdiff/config.py", "import yaml\nyaml.safe_load(text)"),
        ("latentdiff/training_data.py", "from latentdiff.inference_only import name"),
        ("tests/test_checkpoint.py", "import pickle\nimport training.loop\nimport accelerate"),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, latentdiff; print(*{name.split('.')[0] for name in sys.modules})"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    loaded = set(printed.split())
    assert "latentdiff" in loaded
    heavy = {"torch", "numpy", "PIL", "pydantic", "yaml", "pyarrow", "transformers", "diffusers"}
    assert not loaded & heavy


def test_public_names() -> None:
    from latentdiff import pipeline

    assert latentdiff.generate is pipeline.generate
    assert latentdiff.TextToImage is pipeline.TextToImage
    assert set(latentdiff.__all__) <= set(dir(latentdiff))
    with pytest.raises(AttributeError, match="'generator'"):
        latentdiff.generator  # noqa: B018
