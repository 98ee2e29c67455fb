"""Runs go on from checkpoints that earlier versions have written."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.compatibility import write


def assert_ends(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12)  # other processors round differently


@pytest.mark.parametrize("rule", write.RULES)
@pytest.mark.parametrize("base", write.BASES)
def test_an_optimizer_goes_on_from_an_old_state(rule: str, base: str) -> None:
    saved = torch.load(write.FOLDER / f"{rule}-{base}.pt", weights_only=True)
    net = write.network()
    net.load_state_dict(saved["model"])
    optimizer = write.optimizer_of(net, base, rule)
    optimizer.load_state_dict(saved["optimizer"])
    write.train(net, optimizer, write.MORE_STEPS)
    assert_ends(write.weights(net), saved["end"])


@pytest.mark.parametrize("rule", write.RULES)
def test_a_trainer_goes_on_from_an_old_checkpoint(rule: str) -> None:
    module = write.Module()
    write.trainer(rule, 4).fit(module, ckpt_path=str(write.FOLDER / f"{rule}.ckpt"))
    assert_ends(write.weights(module), torch.load(write.FOLDER / f"{rule}-end.pt", weights_only=True))
