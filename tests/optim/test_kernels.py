"""The passes in C are those of tensor operations, where there is a compiler; and slow imports wait until needed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_ecopt
from lightning_ecopt.kernels import EagerKernels, Elements, choose_kernels, library
from lightning_ecopt.kernels.clipping import ClippedRows, RowGradients
from lightning_ecopt.kernels.compiled import CompiledKernels
from tests.selection import full

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


#: Uses threads, and then again in a child that is a fork, with kernels from before and with new ones.
FORK = """
import os, torch
from lightning_ecopt.kernels.compiled import CompiledKernels
torch.set_num_threads(2)
kernels, views = CompiledKernels(), [torch.ones(1000, 1000)]
def add(kernels):
    return float(kernels.sums_and_squares(views, ((1000, 1),), torch.float32)[0].sum())
assert add(kernels) == 1e6
child = os.fork()
if child == 0:
    assert add(kernels) == add(CompiledKernels()) == 1e6
    print("child", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent")
"""


@full
@pytest.mark.parametrize("part", ["kernels", "metrics"])
def test_slow_packages_are_imported_on_demand_only(part: str) -> None:
    (folder,) = lightning_ecopt.__path__
    command = [sys.executable, "-c", IMPORT, str(Path(folder)), f"lightning_ecopt.{part}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == []


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
    ((3, 700), (3, 1), lambda base: base),
    ((2, 1500), (1, 1500), lambda base: base),
    ((4, 6, 2, 2), (1, 6, 1, 1), lambda base: base),
    ((6, 5, 2, 2), (6, 1, 1, 1), lambda base: base.contiguous(memory_format=torch.channels_last)),
    ((4, 3, 5), (1, 3, 1), lambda base: base[:, :, ::2]),
    ((0, 3), (0, 1), lambda base: base),
]
COEFFICIENTS = {
    "sgd_": ("fade", "gain", "shift", "decay", "keep", "move", "pull", "push"),
    "adam_": ("gain", "shift", "decay", "first", "second", "keep", "move", "root", "eps"),
}


@pytest.mark.compiler
@given(
    numbers=st.lists(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=8),
    name=st.sampled_from(list(COEFFICIENTS)),
    vectors=st.integers(0, 2**9 - 1),
    left_out=st.integers(0, 2**9 - 1),
    has_state=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_passes_in_c_are_those_of_tensor_operations(
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
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14  # sums of some hundred numbers of one sign
    kernels = CompiledKernels()
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


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_other_types_and_forms_are_those_of_tensor_operations(dtype: torch.dtype) -> None:
    """Narrower tensors are added up in the type that is asked for; what makes no lines is left to operations."""
    torch.manual_seed(0)
    views = [torch.randn(4, 6), torch.randn(4, 6).bfloat16(), torch.randn(4, 1).expand(4, 6), torch.randn(3, 4, 5)[::2]]
    shapes = ((4, 1), (4, 1), (4, 1), (1, 4, 1))
    expected, found = (k.sums_and_squares(views, shapes, dtype) for k in (EagerKernels(), CompiledKernels()))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.compiler
def test_wider_tensors_are_added_up_in_narrower_vectors() -> None:
    """A gradient may be wider than all weights: ``grad_dtype`` lets it."""
    views, shapes = [torch.ones(500, 2), torch.ones(500, 2, dtype=torch.float64)], ((500, 1), (500, 1))
    kernels = CompiledKernels()
    for found in (
        kernels.sums_and_squares(views, shapes, torch.float32),
        kernels.products(views, views, shapes, torch.float32),
    ):
        assert found.dtype == torch.float32
        assert bool((found == 2).all())


@pytest.mark.compiler
@pytest.mark.parametrize("size", [(6, 4), (60, 4), (4, 40)])
def test_tensors_of_other_sizes_than_before_are_not_addressed(size: tuple[int, ...]) -> None:
    """Tensor operations complain where weights or state were replaced by others."""
    kernels, shapes, ones = CompiledKernels(), ((40, 1),), torch.ones(40)

    def step(weight: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        kernels.sgd_([weight], [gradient], [momentum], shapes=shapes, gain=ones, move=ones)

    fitting, other = torch.ones(40, 4), torch.ones(size)
    step(fitting, fitting, fitting.clone())  # a plan is kept
    for tensors in ((fitting, fitting, other), (fitting, other, fitting), (other, other, other)):
        with pytest.raises((RuntimeError, IndexError)):
            step(*tensors)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_elements_are_those_of_tensor_operations(dtype: torch.dtype, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=4))
    counts = [data.draw(st.integers(0, size)) for size in sizes]
    missing = [data.draw(st.booleans()) for _ in sizes]
    at = [torch.randperm(size)[:count] for size, count in zip(sizes, counts, strict=True)]
    length = sum(counts) + 2
    slots = torch.randperm(length)[: sum(counts)].to(dtype)
    elements = Elements(counts, torch.cat([torch.zeros(0), *at]).to(dtype), slots, length)
    tensors = [None if left_out else torch.randn(size) for size, left_out in zip(sizes, missing, strict=True)]
    values, found = torch.randn(length), []
    for kernels in (EagerKernels(), CompiledKernels()):
        own = [None if tensor is None else tensor.clone() for tensor in tensors]
        gathered = kernels.gather(own, elements, torch.float32)
        kernels.scatter_(own, elements, values)
        found.append([gathered, *(tensor for tensor in own if tensor is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.compiler
def test_elements_outside_of_their_tensors_are_not_addressed() -> None:
    kernels, places = CompiledKernels(), torch.tensor([1, 7])
    elements, tensor = Elements([2], places, torch.arange(2), 2), torch.zeros(7)
    with pytest.raises(IndexError, match="1 of the elements"):
        kernels.gather([tensor], elements, torch.float32)
    with pytest.raises(IndexError, match="1 of the elements"):
        kernels.scatter_([tensor], elements, torch.ones(2))


@pytest.mark.compiler
def test_what_is_not_a_number_goes_where_tensor_operations_take_it() -> None:
    """An infinite weight without decay does not reach the momentum; AMSGrad keeps what is not a number."""
    inf, nan = float("inf"), float("nan")
    w, g = torch.tensor([[inf, 1.0], [2.0, nan]]), torch.tensor([[1.0, 2.0], [inf, 3.0]])
    ones = torch.ones(2)
    results = []
    for kernels in (EagerKernels(), CompiledKernels()):
        sgd = [[w.clone()], [g], [torch.ones(2, 2)]]
        kernels.sgd_(*sgd, shapes=((2, 1),), fade=0.9, gain=ones, move=-ones)
        adam = [[w.clone()], [g], [torch.ones(2, 2)], [torch.ones(2, 2)], [torch.tensor([[nan, 1.0], [2.0, 9.0]])]]
        given_ = {"first": 0.1, "second": 0.001, "root": 1.0, "eps": 1e-8}
        kernels.adam_(*adam, shapes=((2, 1),), gain=ones, move=-ones, **given_)
        results.append([view for views in (*sgd, *adam) for view in views])
    torch.testing.assert_close(results[1], results[0], equal_nan=True)
    assert results[1][2].isfinite().sum() == 3  # the momentum of the infinite gradient alone


@pytest.mark.compiler
@given(
    seed=st.integers(0, 1000),
    broken=st.sampled_from([None, float("inf"), -float("inf"), float("nan"), 0.0]),
    has_rho=st.booleans(),
    has_present=st.booleans(),
    is_first=st.booleans(),
    to_step=st.sampled_from(["number", "vector"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=100, deadline=None)
def test_clipping_in_c_is_that_of_tensor_operations(
    seed: int, broken: float | None, has_rho: bool, has_present: bool, is_first: bool, to_step: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        return torch.rand(9, generator=generator, dtype=dtype) + 0.1

    size = torch.tensor([1.0, 4, 4, 7, 7, 7, 100, 1, 1], dtype=dtype)
    sums, squares = size * (random() - 0.5), size * 3 * random()
    if broken is not None:
        sums[3], squares[3] = broken, abs(broken)
    whole = torch.arange(9) == 6
    rows = ClippedRows.of(size, torch.arange(9) % 4 == 0, whole if seed % 2 else None, 1e-20)
    second = torch.zeros(9, dtype=dtype) if is_first else 0.3 * random()
    seen = torch.tensor([0] * 9 if is_first else [0, 1, 2, 7, 99, 1000, 4000, 4094, 4095], dtype=torch.int16)
    present = torch.arange(9) % 3 > 0 if has_present else None
    rho, factor = random() if has_rho else None, random() if to_step == "vector" else 0.3
    own = random() if seed % 3 or not has_rho else None
    linear = torch.arange(9) % 2 == 0
    expected, found = (
        kernels.clipping(RowGradients(sums, squares, second, seen, rows, present, rho, factor, own, linear))
        for kernels in (EagerKernels(), CompiledKernels())
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found[:4], expected[:4], rtol=tolerance, atol=tolerance)
    assert found.num_clipped == int(expected.num_clipped)
    torch.testing.assert_close(found.step, expected.step, rtol=tolerance, atol=0)
    if rho is None:
        assert found.step is own


@pytest.mark.compiler
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    views, shapes = [torch.randn(300, 1000), torch.randn(900, 300)], ((300, 1), (1, 300))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(CompiledKernels().sums_and_squares(views, shapes, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.compiler
@full
def test_a_forked_process_takes_steps() -> None:
    """Threads do not survive a fork; whoever waits for them hangs."""
    ended = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["child", "parent"]


# The compiler ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing has been compiled so far; the folder in which libraries are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    yield tmp_path / "lightning_ecopt"
    library._load.cache_clear()


@pytest.mark.compiler
def test_the_library_is_compiled_once_and_kept(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load()
    (kept,) = anew.iterdir()
    before = kept.stat().st_mtime_ns
    library._load.cache_clear()
    monkeypatch.setattr(library, "_compile", None)  # is not called
    library.load()
    assert [path.stat().st_mtime_ns for path in anew.iterdir()] == [before]


@pytest.mark.compiler
def test_a_library_of_another_system_is_compiled_anew(anew: Path) -> None:
    library.load()
    (kept,) = anew.iterdir()
    library._load.cache_clear()
    kept.unlink()
    kept.write_bytes(b"no library")
    assert CompiledKernels().sums_and_squares([torch.ones(2, 3)], ((2, 1),), torch.float32).tolist() == [[3, 3]] * 2


@pytest.mark.compiler
def test_a_folder_that_cannot_be_written_keeps_nothing(
    anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    library.load()
    assert not anew.exists()


@pytest.mark.compiler
@pytest.mark.parametrize("other", ["mode", "owner"])
def test_nothing_is_run_that_another_user_may_have_written(
    anew: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    library.load()
    library._load.cache_clear()
    if other == "mode":
        anew.chmod(0o777)
    else:
        monkeypatch.setattr(library.os, "geteuid", lambda: anew.stat().st_uid + 1)
    monkeypatch.setattr(library, "_kept", None)  # is not called
    library.load()


@pytest.mark.compiler
def test_a_compiler_without_threads_is_good_enough(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "OF_THREADS", ("-fno-such-option", "-fopenmp-simd"))
    assert CompiledKernels().sums_and_squares([torch.ones(2, 3)], ((2, 1),), torch.float32).tolist() == [[3, 3]] * 2


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("no-such-compiler", "no C compiler"),
        ("'cc", "no C compiler"),
        ("false", "false says"),
        pytest.param("cc -fvisibility=hidden", "no such function", marks=pytest.mark.compiler),
    ],
)
def test_without_a_compiler_operations_take_the_same_steps(
    command: str, why: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("CC", command)
    assert type(choose_kernels("auto", [torch.zeros(3)])) is EagerKernels
    told = [str(warning.message) for warning in recwarn]
    assert all("could not be compiled and run operation by operation" in line for line in told)
    assert len(told) == ("says" in why or "function" in why)  # who has no compiler does not expect one to be used
    with pytest.raises(ValueError, match=f"'compiled' needs a C compiler: .*{why}.*use 'auto'"):
        choose_kernels("compiled", [torch.zeros(3)])


@pytest.mark.compiler
@pytest.mark.usefixtures("anew")
def test_a_copy_on_a_machine_without_a_compiler_runs_operation_by_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = pickle.dumps(CompiledKernels())
    assert type(pickle.loads(saved)) is CompiledKernels
    library._load.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert type(pickle.loads(saved)) is EagerKernels
