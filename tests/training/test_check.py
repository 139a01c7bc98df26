"""What training.check says of good runs and of runs with one thing wrong."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.training.checked import context, run_config
from training import check as module
from training.check import Finding, check
from training.diffusion import DiffusionProgram
from training.ema import EMA
from training.optimizers import OptimizerConfig


def optimizer(**values: Any) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=0.5, **values)


# One check at a time


def test_the_horizon_is_told_in_samples() -> None:
    config = run_config(optimizer=optimizer(warmup_steps=10, cooldown_steps=90))
    (finding,) = module.check_learning_rate(context(config))
    assert finding.level == "ok"
    for words in ("0.5 over 10 steps (40 samples)", "90 steps (360", "100 steps (400 samples)"):
        assert words in finding.sentence


def test_a_run_that_ends_before_its_warm_up_is_told_the_rate_it_reaches() -> None:
    config = run_config(optimizer=optimizer(warmup_steps=400))
    first, second = module.check_learning_rate(context(config))
    assert (first.level, second.level) == ("warning", "warning")
    assert "0.125 at most" in second.sentence


# A whole run


@pytest.fixture
def look(tiny_chain: Any, tmp_path: Path) -> Callable[..., dict[str, list[Finding]]]:
    """Every finding about a tiny run, by the check that made it."""

    def findings(**overrides: Any) -> dict[str, list[Finding]]:
        config = tiny_chain.config("diffusion", run_dir=tmp_path / "run", **overrides)
        found: dict[str, list[Finding]] = {}
        with pytest.MonkeyPatch.context() as patch:
            for group in ("OF_DIFFUSION", "OF_ALL"):
                named = [recorded(one, found) for one in getattr(module, group)]
                patch.setattr(module, group, tuple(named))
            list(check(config, DiffusionProgram))
        assert not (tmp_path / "run").exists()
        return found

    return findings


def recorded(one: module.Check, found: dict[str, list[Finding]]) -> module.Check:
    def wrapped(context: module.Context) -> Iterator[Finding]:
        for finding in one(context):
            found.setdefault(one.__name__, []).append(finding)
            yield finding

    return wrapped


def test_a_good_run_passes_and_nothing_of_it_is_written(look: Any) -> None:
    found = look(micro_batch_size=2)
    assert set(found) == {one.__name__ for one in module.OF_DIFFUSION + module.OF_ALL}
    assert [f for findings in found.values() for f in findings if f.level == "FAIL"] == []
    assert "4 distinct samples and drew 4 distinct noises" in found["check_noise"][0].sentence
    assert "has moved" in found["check_ema"][0].sentence
    assert "After 3 steps the loss is" in found["check_step"][0].sentence
    assert "s in all" in found["check_step"][1].sentence
    assert "optimizer" in found["check_memory"][0].sentence


def test_an_average_that_stands_still_fails(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EMA, "update", lambda self, step: None)
    assert look()["check_ema"][0].level == "FAIL"


def test_a_field_that_does_not_arrive_fails(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = module.Run.__init__.__globals__["make_optimizer"]

    def forgetful(network: Any, config: OptimizerConfig) -> Any:
        made = make(network, config)
        for group in made.param_groups:
            group["betas"] = (0.9, 0.999)
        return made

    monkeypatch.setitem(module.Run.__init__.__globals__, "make_optimizer", forgetful)
    found = look()["check_optimizer"]
    assert [finding.level for finding in found] == ["ok", "FAIL"]
    assert found[1].sentence.endswith("it has another betas.")


def test_gradients_that_are_lost_fail(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = module.Run.__init__.__globals__["make_optimizer"]

    def cut(network: Any, config: OptimizerConfig) -> Any:
        for name, value in network.named_parameters():
            if value.requires_grad and "up_blocks" not in name:
                value.register_hook(torch.zeros_like)
        return make(network, config)

    monkeypatch.setitem(module.Run.__init__.__globals__, "make_optimizer", cut)
    found = look()
    assert "No gradient reaches" in found["check_step"][0].sentence
    assert found["check_step"][0].level == "FAIL"


def test_what_is_not_finite_fails(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = DiffusionProgram.losses

    def broken(self: Any, *args: Any) -> Any:
        taken = losses(self, *args)
        return replace(taken, loss=taken.loss * float("nan"))

    monkeypatch.setattr(DiffusionProgram, "losses", broken)
    found = look()
    assert [finding.level for finding in found["check_step"]] == ["FAIL"]
    assert "not finite at step 0" in found["check_step"][0].sentence
    assert "check_ema" not in found


def test_a_full_disk_fails(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    assert [finding.level for finding in look()["check_disk"]] == ["FAIL"]


def test_the_command_prints_a_sentence_a_line_and_exits_with_one_on_a_fail(
    tiny_chain: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, file, *words = tiny_chain.arguments("diffusion", run_dir=tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["check", file, *words])

    def failing(context: module.Context) -> Iterator[Finding]:
        assert isinstance(context.accelerator, Accelerator)
        yield Finding("FAIL", "It does not work.")

    for checks, status in ((module.OF_ALL[:1], 0), ((failing,), 1)):
        monkeypatch.setattr(module, "OF_ALL", checks)
        monkeypatch.setattr(module, "OF_DIFFUSION", ())
        with pytest.raises(SystemExit) as caught:
            module.main()
        assert caught.value.code == status
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("     ok  The learning rate rises")
    assert second == "   FAIL  It does not work."
