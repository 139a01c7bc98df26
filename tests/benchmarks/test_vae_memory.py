"""What the memory benchmark counts, and that strips keep what they promise."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from benchmarks.vae_memory import MIB, Alive, measure


def test_counts_what_is_alive_at_once() -> None:
    before = torch.zeros(MIB, dtype=torch.uint8)
    with Alive() as alive:
        first = before + 1
        second = first.reshape(2, -1)[1:]
        assert alive.now == MIB
        third = second.float()
        assert alive.now == 3 * MIB
        del first, second
        assert alive.now == 2 * MIB
        third += 1
        before.add_(1)
        assert alive.now == 2 * MIB
    assert alive.peak == 3 * MIB


@pytest.mark.parametrize(("work", "share"), [("decode", 0.5), ("encode", 0.5)])
def test_strips_need_less_than_half(work: str, share: float) -> None:
    arguments = Namespace(side=512, dtype="float32", run=False)
    whole = measure(work, None, arguments)["tensors_mib"]
    assert measure(work, 4, arguments)["tensors_mib"] < share * whole
