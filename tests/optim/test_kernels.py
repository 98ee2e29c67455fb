"""What is compiled is kept by function, and slow imports wait until they are needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightning_ecopt
from lightning_ecopt.kernels.compiled import CompiledKernels

#: Imports a part of the package without the package itself, and prints which slow packages that has imported.
IMPORT = """
import importlib, sys, types
import torch
package = types.ModuleType("lightning_ecopt")
package.__path__ = [sys.argv[1]]
sys.modules["lightning_ecopt"] = package
before = set(sys.modules)
importlib.import_module(sys.argv[2])
print(*sorted({"torch._dynamo", "triton", "torchmetrics", "lightning"} & (set(sys.modules) - before)))
"""


@pytest.mark.full
@pytest.mark.parametrize("part", ["kernels", "metrics"])
def test_slow_packages_are_imported_on_demand_only(part: str) -> None:
    (folder,) = lightning_ecopt.__path__
    command = [sys.executable, "-c", IMPORT, str(Path(folder)), f"lightning_ecopt.{part}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == []


def doubled() -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        return 2 * x

    return apply


def squared() -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        return x * x

    return apply


def test_functions_of_one_name_are_compiled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    kernels, x = CompiledKernels(), torch.tensor([3.0])
    first, second = doubled(), squared()
    for _ in range(2):
        assert kernels.run(first, x).item() == 6
        assert kernels.run(second, x).item() == 9
    assert len(compiled) == 2


def test_metrics_are_found_where_they_were() -> None:
    from lightning_ecopt import metrics

    assert set(metrics.__all__) <= set(dir(metrics))
    assert all(getattr(metrics, name).__name__ == name for name in metrics.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        metrics.Unknown  # noqa: B018
