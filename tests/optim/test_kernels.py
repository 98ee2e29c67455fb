"""What is compiled is kept by function, and slow imports wait until they are needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_ecopt
from lightning_ecopt.kernels import EagerKernels
from lightning_ecopt.kernels.compiled import CompiledKernels
from lightning_ecopt.kernels.foreach import ForeachKernels

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


#: Sizes of tensors, shapes of places, and views of parts of them.
BLOCKS: list[tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor], Tensor]]] = [
    ((7,), (7,), lambda base: base),
    ((1, 1), (1, 1), lambda base: base),
    ((8, 1), (8, 1), lambda base: base),
    ((5, 27), (5, 1), lambda base: base),
    ((4, 3, 3, 3), (4, 1, 1, 1), lambda base: base),
    ((5, 40), (5, 1), lambda base: base[:, 8:35]),
    ((11, 6), (1, 6), lambda base: base),
    ((33, 7), (1, 1), lambda base: base),
    ((4, 3, 10), (4, 3, 1), lambda base: base),
    ((6, 9), (6, 1), lambda base: base.T.contiguous().T),
]
COEFFICIENTS = {
    "sgd_": ("fade", "gain", "shift", "decay", "keep", "move", "pull", "push"),
    "adam_": ("gain", "shift", "decay", "first", "second", "keep", "move", "root", "eps"),
}


@given(
    numbers=st.lists(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=8),
    name=st.sampled_from(list(COEFFICIENTS)),
    vectors=st.integers(0, 2**9 - 1),
    left_out=st.integers(0, 2**9 - 1),
    has_state=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_small_networks_are_worked_on_together_as_block_by_block(
    numbers: list[int], name: str, vectors: int, left_out: int, has_state: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(len(numbers) + vectors)

    def random(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=dtype) + 0.1

    shapes = tuple(BLOCKS[number][1] for number in numbers)
    count = sum(map(prod, shapes))
    given_: dict[str, Any] = {}
    for bit, coefficient in enumerate(COEFFICIENTS[name]):
        is_vector = coefficient in ("gain", "move", "pull", "decay", "shift") or vectors >> bit & 1
        if left_out >> bit & 1 and coefficient in ("shift", "decay", "keep", "pull", "push"):
            continue
        given_[coefficient] = 0.5 * random(count) if is_vector else 0.3 + 0.05 * bit
    entries = 3 if name == "sgd_" else 5
    lists = [[BLOCKS[number][2](random(*BLOCKS[number][0])) for number in numbers] for _ in range(entries)]
    state: list[Any] = [*lists]
    if not has_state:
        state[-1] = None
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    kernels = ForeachKernels()
    for _ in range(2):  # the second time with what is kept
        results = []
        for kind in (EagerKernels(), kernels):
            own = [None if views is None else [view.clone() for view in views] for views in state]
            sums = kind.sums_and_squares(own[1], shapes, dtype), kind.products(own[0], own[1], shapes, dtype)
            getattr(kind, name)(*own, shapes=shapes, **given_)
            results.append([*sums, *(view for views in own if views is not None for view in views)])
        torch.testing.assert_close(results[1], results[0], rtol=10 * tolerance, atol=tolerance)
        assert all(torch.equal(g, before) for g, before in zip(own[1], lists[1], strict=True))  # gradients are read
        given_ = {key: value * 0.9 for key, value in given_.items()}


def test_metrics_are_found_where_they_were() -> None:
    from lightning_ecopt import metrics

    assert set(metrics.__all__) <= set(dir(metrics))
    assert all(getattr(metrics, name).__name__ == name for name in metrics.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        metrics.Unknown  # noqa: B018
