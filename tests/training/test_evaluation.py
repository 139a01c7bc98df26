"""Evaluations inside training: figures of the averaged weights, and the best model kept whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from latentdiff import model_files
from latentdiff.config import load_yaml
from latentdiff.data.order import Share
from latentdiff.errors import InputError
from latentdiff.metrics.evaluation import evaluate_protocol, main_figures
from latentdiff.metrics.protocol import Protocol
from latentdiff.pipeline import TextToImage
from training.diffusion import LORA_FILE
from training.evaluation import BEST, BestConfig, Evaluations
from training.parallel import Wrapped

STEPS = 4
FIGURE = "features.clip.frechet"


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 pictures of one step, which are two pieces."""
    path = tmp_path_factory.mktemp("protocol") / "quick.yaml"
    path.write_text(
        "{name: quick, count: 17, num_inference_steps: 1, features: [{type: clip}], "
        "prompts: {type: scenes, kinds: [one, two_held_out]}, "
        "reference: {type: renders, count: 6}}"
    )
    return path


def options(run_dir: Path, protocol: Path | None, **more: Any) -> dict[str, Any]:
    """Four steps, two evaluations."""
    plain = {"run_dir": run_dir, "max_steps": STEPS, "checkpoint_every": 1, "sample_every": STEPS}
    if protocol is not None:
        plain |= {"evaluation": protocol, "evaluate_every": 2}
    return plain | {"checkpoints_kept": STEPS, "optimizer__learning_rate": 0.01} | more


KEEP = {"best__figure": FIGURE, "best__lower": True}


@pytest.fixture(scope="module")
def whole(tiny_chain: Any, protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped; to be read, never changed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    tiny_chain.run("diffusion", **options(run_dir, protocol, **KEEP))
    return run_dir


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every figure of evaluations, in the order of lines."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name.startswith("evaluation/"):
                found.setdefault(name, []).append((row["step"], value))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def best_of(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "best" / BEST).read_text())
    return found


# What is measured


def test_an_evaluation_leaves_the_training_as_it_was(
    tiny_chain: Any, whole: Path, tmp_path: Path
) -> None:
    tiny_chain.run("diffusion", **options(tmp_path, None))
    for step in range(1, STEPS + 1):
        name = Path("checkpoints", f"step-{step:06d}")
        assert files(whole / name) == files(tmp_path / name)
    assert files(whole / "model") == files(tmp_path / "model")


def test_figures_are_those_of_the_averaged_weights(
    tiny_chain: Any, whole: Path, protocol: Path, tmp_path: Path
) -> None:
    found = curves(whole)
    assert {"evaluation/one.objects_in_place", f"evaluation/{FIGURE}"} <= found.keys()
    program = tiny_chain.program("diffusion")
    for number, step in enumerate((2, STEPS)):
        averages = load_file(whole / "checkpoints" / f"step-{step:06d}" / "ema.safetensors")
        weights = {name.partition("/")[2]: value for name, value in averages.items()}
        program.network.load_state_dict(weights, strict=False)
        model = TextToImage(program.parts)
        expected = evaluate_protocol(
            model, load_yaml(Protocol, protocol), tmp_path / str(step), weights="of this step"
        )
        assert expected is not None
        values = {name: curve[number] for name, curve in found.items()}
        assert {name for name, _ in values.values()} == {step}
        for name, value in main_figures(expected).items():
            assert values[f"evaluation/{name}"][1] == pytest.approx(value, rel=1e-6), name
        results = json.loads((whole / f"evaluations/step-{step:06d}/evaluation.json").read_text())
        assert results["model"] == f"run, step {step}"
        assert results["fixed"] == expected["fixed"]
    assert len(list((whole / "evaluations" / "real").iterdir())) == 1
    assert (whole / "evaluations" / "step-000004" / "two_held_out.png").is_file()


# Killed and resumed


def stopped(program: Any, at: int) -> Any:
    """The program, which is killed before it takes step `at`."""
    batches = program.batches

    def mortal(steps: range, share: Share) -> Iterator[Any]:
        for step, batch in zip(steps, batches(steps, share), strict=True):
            if step == at:
                raise KeyboardInterrupt
            yield batch

    program.batches = mortal
    return program


def test_a_run_that_is_killed_in_an_evaluation_continues_it(
    tiny_chain: Any,
    whole: Path,
    protocol: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In its second piece: the first is not drawn again, nor is what is finished."""
    generate, drawn = TextToImage.generate, list[int]()

    def counted(self: TextToImage, prompts: list[str], **settings: Any) -> Any:
        if len(drawn) == 5:
            drawn.append(0)
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return generate(self, prompts, **settings)

    program = tiny_chain.program("diffusion", **options(tmp_path, protocol, **KEEP))
    with monkeypatch.context() as patch:
        patch.setattr(TextToImage, "generate", counted)
        with pytest.raises(KeyboardInterrupt):
            tiny_chain.train(program)
        assert drawn == [8, 8, 1, 8, 7, 0]
        assert curves(tmp_path) == {}
        with pytest.raises(KeyboardInterrupt):
            tiny_chain.train(
                stopped(
                    tiny_chain.program("diffusion", **options(tmp_path, protocol, **KEEP)), at=3
                )
            )
        assert drawn[6:] == [2]
    assert best_of(tmp_path)["step"] == 2
    tiny_chain.run("diffusion", **options(tmp_path, protocol, **KEEP))
    assert curves(tmp_path) == curves(whole)
    assert files(tmp_path / "best") == files(whole / "best")


def test_rows_of_other_weights_are_drawn_anew(
    tiny_chain: Any, whole: Path, protocol: Path, tmp_path: Path
) -> None:
    """Left by a run that went on from here in another way."""
    folder = Path("evaluations", "step-000002")
    shutil.copytree(whole / folder, tmp_path / "other" / folder)
    for name in ("one", "other"):
        made = options(tmp_path / name, protocol, seed=5)
        tiny_chain.run("diffusion", **made | {"max_steps": 2})
    assert curves(tmp_path / "other") == curves(tmp_path / "one") != curves(whole)
    left = {path.name for path in (tmp_path / "other" / "evaluations").iterdir()}
    assert left == {"real", "step-000002"}
    rows = [
        np.load(run_dir / folder / "drawn" / "clip.npy")
        for run_dir in (whole, tmp_path / "one", tmp_path / "other")
    ]
    assert np.array_equal(rows[1], rows[2])
    assert not np.allclose(rows[0], rows[2])


# The best model


def test_the_best_model_is_that_of_its_step(whole: Path) -> None:
    curve = dict(curves(whole)[f"evaluation/{FIGURE}"])
    best = best_of(whole)
    assert best["step"] == min(curve, key=lambda step: curve[step])
    assert best["value"] == curve[best["step"]]
    averages = load_file(whole / f"checkpoints/step-{best['step']:06d}/ema.safetensors")
    unet = TextToImage.load(whole / "best").parts.unet.state_dict()
    for name, value in unet.items():
        assert value.equal(averages[f"0.9/unet.{name}"].half().float()), name


def test_the_best_of_a_lora_is_its_file(tiny_chain: Any, protocol: Path, tmp_path: Path) -> None:
    base = tiny_chain.program("diffusion")
    nn.init.ones_(base.parts.unet.conv_out.weight)  # which starts at zero: no gradient passes
    base.finish(tmp_path / "base", torch.device("cpu"))
    made = options(tmp_path / "run", protocol, init_from=tmp_path / "base", lora__rank=2, **KEEP)
    tiny_chain.run("diffusion", **made | {"max_steps": 2})
    assert files(tmp_path / "run" / "best").keys() == {BEST, LORA_FILE}
    mine, finished = (load_file(tmp_path / "run" / n / LORA_FILE) for n in ("best", "model"))
    assert mine.keys() == finished.keys()
    assert all(value.equal(finished[name]) for name, value in mine.items())


class Kept:
    """Values of one figure one after another, each of a model that is its step's number."""

    def __init__(self, run_dir: Path, lower: bool = False, figure: str = "one.right") -> None:
        network, accelerator = nn.Linear(1, 1), Accelerator(cpu=True)
        self.best = BestConfig(figure=figure, lower=lower)
        self.wrapped = Wrapped(network, network, accelerator)
        protocol = Protocol.model_construct()
        self.evaluations = Evaluations(run_dir, protocol, self.best, self.finish)
        self.folder, self.step = run_dir / "best", 0

    def finish(self, directory: Path, device: torch.device) -> None:
        for name in "ab":
            (directory / name).write_text(str(self.step))

    def __call__(self, step: int, value: float, protocol: str = "id") -> int:
        """The step of the model that is kept after one of this value."""
        self.step = step
        results = {"id": protocol, "one": {"right": value, "left": 0.0}}
        self.evaluations.keep_best(self.best, step, results, self.wrapped)
        return self.kept()

    def kept(self) -> int:
        """The step that the files in best/ agree on."""
        assert sorted(os.listdir(self.folder)) == ["a", "b", BEST]
        step: int = json.loads((self.folder / BEST).read_text())["step"]
        assert {(self.folder / name).read_text() for name in "ab"} == {str(step)}
        return step


@pytest.mark.parametrize(
    ("lower", "kept"), [(False, [1, 1, 3, 3, 3]), (True, [1, 2, 2, 2, 5])], ids=["high", "low"]
)
def test_what_is_not_better_is_not_kept(tmp_path: Path, lower: bool, kept: list[int]) -> None:
    values = {1: 2.0, 2: 1.0, 3: 3.0, 4: 3.0, 5: 0.5}
    assert [Kept(tmp_path, lower)(step, value) for step, value in values.items()] == kept


def test_figures_of_another_protocol_or_name_do_not_compare(tmp_path: Path) -> None:
    assert Kept(tmp_path)(1, 9.0) == 1
    assert Kept(tmp_path)(2, 5.0, "another") == 2
    assert Kept(tmp_path, figure="one.left")(3, 5.0, "another") == 3
    with pytest.raises(InputError, match=r"one\.wrong, is none of one\.right, one\.left; name"):
        Kept(tmp_path, figure="one.wrong")(4, 9.0)
    assert Kept(tmp_path).kept() == 3


def test_killed_at_any_moment_the_old_or_the_new_best_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that ends before one of its renames, syncs and removals, whichever it is."""

    def ends_at(fatal: int) -> bool:
        """Whether a process of its own came so far while it kept step 2."""
        kept = Kept(tmp_path / str(fatal))
        kept(1, 1.0)
        child = os.fork()
        if child == 0:
            done = iter(range(1000))
            for owner, name in ((Path, "rename"), (model_files, "sync"), (shutil, "rmtree")):
                real = getattr(owner, name)

                def counted(*args: Any, real: Any = real, **options: Any) -> Any:
                    if next(done) == fatal:
                        os._exit(9)
                    return real(*args, **options)

                monkeypatch.setattr(owner, name, counted)
            kept(2, 2.0)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    steps, fatal = [], 0
    while ends_at(fatal):
        run_dir = tmp_path / str(fatal)
        steps.append(Kept(run_dir)(3, 0.0))
        assert os.listdir(run_dir) == ["best"]
        fatal += 1
    assert len(steps) > 6
    assert steps == sorted(steps)
    assert {*steps} == {1, 2}


# What is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"evaluation": "null"}, "evaluate_every needs a protocol in evaluation"),
        ({"evaluate_every": "null", **KEEP}, "best is of evaluations; set evaluate_every"),
        ({"evaluation": "absent.yaml"}, "no configuration file at absent.yaml"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    tiny_chain: Any, protocol: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tiny_chain.program("diffusion", **options(tmp_path, protocol) | more)


def test_features_that_are_missing_are_missed_before_the_first_step(
    tiny_chain: Any, tmp_path: Path
) -> None:
    path = tmp_path / "protocol.yaml"
    path.write_text(
        "{name: x, count: 1, prompts: {type: scenes}, "
        f"features: [{{type: clip, directory: {tmp_path}}}]}}"
    )
    with pytest.raises(InputError, match="clip is missing; train it"):
        tiny_chain.program("diffusion", **options(tmp_path / "run", path))
