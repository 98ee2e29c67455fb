"""Compares the passes through Triton with the plain ones, and prints what is wrong with each check as JSON.

It is a script of its own as Triton's interpreter, which needs no GPU, has to be chosen before Triton is imported.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

from lightning_ecopt.kernels import EagerKernels, Kernels, triton_plan
from lightning_ecopt.kernels import triton as triton_kernels
from lightning_ecopt.kernels.lines import NAMES, NUMBER, SCALAR, VECTOR
from lightning_ecopt.kernels.triton_plan import TritonKernels

TOLERANCE = {torch.bfloat16: 0.0, torch.float32: 1e-6, torch.float64: 1e-14}
SGD = ("fade", "gain", "shift", "decay", "keep", "move", "pull", "push")
ADAM = ("gain", "shift", "decay", "first", "second", "keep", "move", "root", "eps")
#: How many tensors the steps take at most, and their coefficients.
STEPS = {"affine_": (1, ("times", "plus")), "sgd_": (3, SGD), "adam_": (5, ADAM)}
OPTIONAL = ("fade", "shift", "decay", "keep", "pull", "push", "plus")


@dataclass(frozen=True)
class Layout:
    """A block in a tensor of a given size, with strides if it is not a contiguous one, and the shape of its places."""

    size: tuple[int, ...]
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor] = lambda base: base

    def base(self, dtype: torch.dtype, device: str) -> Tensor:
        return torch.randn(self.size, dtype=dtype).to(device)


SIMPLE = {
    "vector": Layout((7,), (7,)),
    "short rows": Layout((5, 27), (5, 1)),
    "long rows": Layout((2, 1100), (2, 1)),
    "columns": Layout((11, 6), (1, 6)),
    "transposed convolution": Layout((9, 5, 3, 3), (1, 5, 1, 1)),
}
LAYOUTS = SIMPLE | {
    "number": Layout((1,), (1,)),
    "number in a row": Layout((1, 1), (1, 1)),
    "one input": Layout((8, 1), (8, 1)),
    "convolution": Layout((40, 4, 3, 3), (40, 1, 1, 1)),
    "convolution, channels last": Layout((4, 3, 3, 6), (4, 1, 1, 1), lambda base: base.permute(0, 3, 1, 2)),
    "transposed convolution, channels last": Layout((9, 3, 3, 5), (1, 5, 1, 1), lambda base: base.permute(0, 3, 1, 2)),
    "row of several items": Layout((2, 5000), (2, 1)),
    "all in one": Layout((33, 70), (1, 1)),
    "columns of several items": Layout((70, 130), (1, 130)),
    "kernels of several items": Layout((70, 2, 12, 12), (1, 2, 1, 1)),
    "places of two axes": Layout((4, 3, 10), (4, 3, 1)),
    "part of the inputs": Layout((5, 40), (5, 1), lambda base: base[:, 8:20]),
    "part of the inputs of long rows": Layout((3, 900), (3, 1), lambda base: base[:, 100:800]),
    "one of the inputs": Layout((5, 40), (5, 1), lambda base: base[:, 8:9]),
    "part of all in one": Layout((6, 40), (1, 1), lambda base: base[:, 8:20]),
    "part of the columns": Layout((70, 12), (1, 5), lambda base: base[:, 3:8]),
    "part of the outputs of a transposed convolution": Layout((9, 5, 2, 2), (1, 3, 1, 1), lambda base: base[:, 1:4]),
    "every other row": Layout((9, 13), (5, 1), lambda base: base[::2]),
    "every other element": Layout((9,), (5,), lambda base: base[::2]),
    "every other input": Layout((4, 26), (4, 1), lambda base: base[:, ::2]),
    "places that are not neighbours": Layout((4, 5, 6), (4, 1, 6)),
    "places in another order": Layout((3, 4, 6), (4, 3, 1), lambda base: base.transpose(0, 1)),
    "no outputs": Layout((0, 4), (0, 1)),
}
SEVERAL_ITEMS = {name: layout for name, layout in LAYOUTS.items() if "several items" in name}


class Blocks:
    """Blocks of some layouts, with random elements."""

    def __init__(self, layouts: dict[str, Layout], dtype: torch.dtype, device: str, positive: bool = False) -> None:
        self.layouts = list(layouts.items())
        self.shapes = [layout.shape for layout in layouts.values()]
        self.bases = [layout.base(dtype, device) for layout in layouts.values()]
        if positive:
            self.bases = [base.abs() for base in self.bases]

    @property
    def views(self) -> list[Tensor]:
        return [layout.view(base) for (_, layout), base in zip(self.layouts, self.bases, strict=True)]

    @property
    def num_places(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    def copy(self) -> Blocks:
        copied = Blocks({}, torch.float32, "cpu")
        copied.layouts, copied.shapes, copied.bases = self.layouts, self.shapes, [base.clone() for base in self.bases]
        return copied

    def unlike(self, others: Blocks) -> list[str]:
        """Names of the blocks in tensors that are further apart than by rounding."""
        return [
            f"{name}: {float((a - b).abs().max()):.2g}"
            for (name, _), a, b in zip(self.layouts, self.bases, others.bases, strict=True)
            if not torch.allclose(a, b, rtol=TOLERANCE[a.dtype], atol=4 * TOLERANCE[a.dtype], equal_nan=True)
        ]


def wrong_sums(blocks: Blocks, found: Tensor, expected: Tensor, size: Tensor) -> list[str]:
    """Names of the blocks whose sums are off by more than rounding, relative to the sums of magnitudes."""
    counts = [prod(shape) for shape in blocks.shapes]
    off = (found - expected).abs() > TOLERANCE[found.dtype] * size
    return [
        name
        for (name, _), wrong in zip(blocks.layouts, (off | found.isnan()).split(counts, 1), strict=True)
        if bool(wrong.any())
    ]


def sums(device: str) -> Iterator[str]:
    for layouts, dtype, asked in (
        (LAYOUTS, torch.float32, torch.float32),
        (LAYOUTS, torch.float64, torch.float64),
        (SIMPLE, torch.float32, torch.float64),
    ):
        blocks = Blocks(layouts, dtype, device)
        yield from (f"{dtype}, {wrong}" for wrong in sums_of(blocks, Blocks(layouts, dtype, device), asked))


def sums_of(blocks: Blocks, others: Blocks, dtype: torch.dtype) -> Iterator[str]:
    """Where sums are not those that the plain version finds in float64; in float32 it is itself less exact."""
    shapes, eager = blocks.shapes, EagerKernels()
    wide = [[view.double() for view in one.views] for one in (blocks, others)]
    size = [[view.abs() for view in views] for views in wide]
    found = TritonKernels().sums_and_squares(blocks.views, shapes, dtype)
    expected = eager.sums_and_squares(wide[0], shapes, torch.float64)
    yield from wrong_sums(blocks, found, expected, eager.sums_and_squares(size[0], shapes, torch.float64))
    found = TritonKernels().products(blocks.views, others.views, shapes, dtype)
    expected = eager.products(*wide, shapes, torch.float64)
    wrong = wrong_sums(blocks, found, expected, eager.products(*size, shapes, torch.float64))
    yield from (f"products, {name}" for name in wrong)


def items_as_long_as_lines(device: str) -> Iterator[str]:
    """As those of the longest lines are, which are too long for a test."""
    before, triton_plan.MOST_PARTS = triton_plan.MOST_PARTS, (1, 1, 1)
    blocks = Blocks(SEVERAL_ITEMS, torch.float32, device)
    yield from sums_of(blocks, Blocks(SEVERAL_ITEMS, torch.float32, device), torch.float32)
    yield from wrong_step("affine_", [blocks], coefficients(("times", "plus"), blocks))
    triton_plan.MOST_PARTS = before


def coefficients(names: Iterable[str], blocks: Blocks, kind: str = "vectors") -> dict[str, Tensor | float]:
    """Between 0.1 and 0.9: vectors over the places, columns of a matrix, tensors without axes, or numbers."""
    names = tuple(names)
    matrix = torch.rand(blocks.num_places, len(names), dtype=torch.float64).mul(0.8).add(0.1).to(blocks.bases[0])
    vectors = dict(zip(names, matrix.unbind(1), strict=True))
    return {
        name: vector
        if kind == "columns"
        else vector.clone()
        if kind == "vectors"
        else vector[0].clone()
        if kind == "tensors"
        else float(vector[0])
        for name, vector in vectors.items()
    }


def state(blocks: Blocks, count: int) -> list[Blocks]:
    """A copy of the weights, gradients, and what else makes ``count`` tensors to a block; no squares are negative."""
    layouts, like = dict(blocks.layouts), blocks.bases[0]
    return [
        blocks.copy(),
        *(Blocks(layouts, like.dtype, str(like.device), positive=number > 2) for number in range(1, count)),
    ]


def step_(kernels: Kernels, name: str, tensors: list[Blocks], **given: Tensor | float) -> None:
    lists = [blocks.views for blocks in tensors]
    if name != "affine_":
        lists += [None] * ({"sgd_": 3, "adam_": 5}[name] - len(lists))
    getattr(kernels, name)(*lists, shapes=tensors[0].shapes, **given)


def wrong_step(name: str, tensors: list[Blocks], given: dict[str, Tensor | float]) -> list[str]:
    """Where a step through Triton does not end as the plain one does."""
    ours, theirs = ([blocks.copy() for blocks in tensors] for _ in range(2))
    like = tensors[0].bases[0]
    step_(TritonKernels(), name, ours, **given)
    # The plain version multiplies tensors with tensors only.
    step_(
        EagerKernels(),
        name,
        theirs,
        **{name: torch.as_tensor(value, dtype=torch.float64).to(like) for name, value in given.items()},
    )
    return [f"{name}, tensor {k}, {part}" for k, one in enumerate(ours) for part in one.unlike(theirs[k])]


def updates(device: str) -> Iterator[str]:
    for name, dtype in (("sgd_", torch.float32), ("adam_", torch.float64)):
        count, names = STEPS[name]
        blocks = Blocks(LAYOUTS, dtype, device)
        yield from wrong_step(name, state(blocks, count), coefficients(names, blocks))


def coefficients_in_every_form(device: str) -> Iterator[str]:
    for dtype in (torch.float32, torch.float64):
        blocks = Blocks(SIMPLE, dtype, device)
        for kind in ("columns", "tensors", "numbers"):
            for name, (count, names) in STEPS.items():
                wrong = wrong_step(name, state(blocks, count), coefficients(names, blocks, kind))
                yield from (f"{kind}: {one}" for one in wrong)


def coefficients_left_out(device: str) -> Iterator[str]:
    blocks = Blocks(SIMPLE, torch.float64, device)
    for name, count, names in (
        ("affine_", 1, ("times", "plus")),
        ("sgd_", 2, ("keep", "pull", "push")),
        ("sgd_", 3, SGD),
        ("adam_", 4, ADAM),
    ):
        for left in (*([one] for one in names), OPTIONAL):
            if set(left) <= set(OPTIONAL):
                given = coefficients((one for one in names if one not in left), blocks)
                yield from (f"without {left}: {one}" for one in wrong_step(name, state(blocks, count), given))


def what_is_not_finite(device: str) -> Iterator[str]:
    """It spreads as it does in the plain version: not by way of coefficients that are left out."""
    blocks = Blocks({name: SIMPLE[name] for name in ("short rows", "columns")}, torch.float32, device)
    for name, (count, names) in STEPS.items():
        for left in ((), OPTIONAL):
            for spoilt in range(count):
                tensors = state(blocks, count)
                for base in tensors[spoilt].bases:
                    base[0, 0], base[1, 1], base[0, 1] = torch.nan, torch.inf, 1e25  # whose square overflows
                given = coefficients((one for one in names if one not in left), blocks)
                yield from (f"tensor {spoilt} spoilt: {one}" for one in wrong_step(name, tensors, given))


def dtypes_side_by_side(device: str) -> Iterator[str]:
    dtypes = (torch.float64, torch.bfloat16, torch.float32, torch.float64, torch.float32)
    blocks = Blocks({str(number): SIMPLE["short rows"] for number in range(len(dtypes))}, torch.float32, device)
    tensors = state(blocks, 3)
    for one in tensors:
        one.bases = [base.to(dtype) for base, dtype in zip(one.bases, dtypes, strict=True)]
    yield from wrong_step("sgd_", tensors, coefficients(SGD, blocks))
    views = tensors[0].views
    found = TritonKernels().sums_and_squares(views, blocks.shapes, torch.float64)
    expected = EagerKernels().sums_and_squares(views, blocks.shapes, torch.float64)
    yield from wrong_sums(blocks, found, expected, expected.abs().sum(0, keepdim=True))


def rows_without_elements(device: str) -> Iterator[str]:
    layouts = {"before": SIMPLE["short rows"], "none": Layout((3, 0), (3, 1)), "after": SIMPLE["columns"]}
    blocks = Blocks(layouts, torch.float32, device)
    found = TritonKernels().sums_and_squares(blocks.views, blocks.shapes, torch.float32)
    if found.shape != (2, 5 + 3 + 6) or found[:, 5:8].any():
        yield "sums"
    yield from wrong_step("sgd_", state(blocks, 3), coefficients(SGD, blocks))
    empty = blocks.views[1:2]
    if TritonKernels().products(empty, empty, [(3, 1)], torch.float32).tolist() != [[0.0, 0.0, 0.0]]:
        yield "products"


def tensors_in_other_places(device: str) -> Iterator[str]:
    """Steps with gradients in new memory, in another order of memory, with other numbers, and with a copy."""
    kernels = TritonKernels()
    ours = state(Blocks(SIMPLE, torch.float64, device), 3)
    theirs = [one.copy() for one in ours]
    kept = []
    for number in range(4):
        gradients = Blocks(SIMPLE, torch.float64, device)
        if number == 2:
            gradients.bases = [base.mT.contiguous().mT if base.ndim > 1 else base for base in gradients.bases]
        if number == 3:
            kernels = copy.deepcopy(kernels)
        kept.append(gradients)  # so that the next have other memory
        vectors = coefficients(("gain", "move"), gradients)
        for one, tensors in ((kernels, ours), (EagerKernels(), theirs)):
            step_(one, "sgd_", [tensors[0], gradients, tensors[2]], fade=0.9 - number / 10, **vectors)
        for k in (0, 2):
            yield from (f"step {number}, tensor {k}, {wrong}" for wrong in ours[k].unlike(theirs[k]))


def the_same_bits_again(device: str) -> Iterator[str]:
    blocks = Blocks(SEVERAL_ITEMS, torch.float32, device)
    found = [TritonKernels().sums_and_squares(blocks.views, blocks.shapes, torch.float32) for _ in range(2)]
    if not torch.equal(*found):
        yield "sums differ"


def offsets_beyond_32_bits(device: str) -> Iterator[str]:
    """The second row is more than 2^31 elements behind the first, on the CPU in a file that is empty between them."""
    pitch = (1 << 31) + 8
    if device != "cpu" and torch.cuda.mem_get_info()[0] < 6 * pitch:
        return
    with tempfile.NamedTemporaryFile() as file:
        if device == "cpu":
            memory = torch.from_file(file.name, shared=True, size=pitch + 8)
        else:
            memory = torch.empty(pitch + 8, device=device)
        for shape in ((2, 1), (1, 6)):
            view = memory.as_strided((2, 6), (pitch, 1))
            values = torch.arange(12.0, device=device).view(2, 6)
            view.copy_(values)
            TritonKernels().affine_([view], shapes=[shape], times=2.0)
            if not torch.equal(view, 2 * values):
                yield f"elements at places {shape}"
            sums = TritonKernels().products([view], [view], [shape], torch.float32)[0]
            if not torch.equal(sums, (4 * values * values).sum_to_size(shape).reshape(-1)):
                yield f"sums at places {shape}"


def parameters_of_billions_of_elements(device: str) -> Iterator[str]:
    """They are worked on by the same launch, as long as no place has billions of them."""
    size = 1 << 18, 1 << 14
    big = torch.empty(size, device="meta")
    for shape, is_left in ((size[0], 1), False), ((1, size[1]), False), (size, True), ((1, 1), True):
        if (triton_plan._Plan([[big]], [shape], 0).rest != []) != is_left:
            yield f"places {shape}"


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the kernels that would be launched."""
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            return lambda *arguments: launched.append(self.name)

    kernels = [Counted(name) for name in ("sums", "sums_of_parts", "update")]
    for one in kernels:
        setattr(triton_kernels, one.name, one)
    try:
        yield launched
    finally:
        for one in kernels:
            setattr(triton_kernels, one.name, one.kernel)


def launches(device: str) -> Iterator[str]:
    """As many for a deep network as for a flat one."""
    found = []
    for depth in (1, 10):
        names = ("vector", "long rows", "transposed convolution")
        layouts = {f"{name} {k}": SIMPLE[name] for k in range(depth) for name in names}
        blocks = Blocks(layouts, torch.float32, device)
        with counted() as launched:
            TritonKernels().sums_and_squares(blocks.views, blocks.shapes, torch.float32)
            TritonKernels().products(blocks.views, blocks.views, blocks.shapes, torch.float32)
            for name, (count, names) in STEPS.items():
                step_(TritonKernels(), name, state(blocks, count), **coefficients(names, blocks))
        found.append(launched)
    expected = 2 * ["sums", "sums_of_parts"] + len(STEPS) * ["update"]
    if found != [expected, expected]:
        yield f"launched: {found}"


def versions(device: str) -> Iterator[str]:
    """Autograd knows what has been written to."""
    tensors = state(Blocks(SIMPLE, torch.float32, device), 5)
    before = [[base._version for base in one.bases] for one in tensors]
    step_(TritonKernels(), "adam_", tensors, **coefficients(ADAM, tensors[0]))
    for k, one in enumerate(tensors):
        if any((base._version > old) != (k != 1) for base, old in zip(one.bases, before[k], strict=True)):
            yield f"tensor {k}"


CHECKS = (
    sums,
    items_as_long_as_lines,
    updates,
    coefficients_in_every_form,
    coefficients_left_out,
    what_is_not_finite,
    dtypes_side_by_side,
    rows_without_elements,
    tensors_in_other_places,
    the_same_bits_again,
    offsets_beyond_32_bits,
    parameters_of_billions_of_elements,
    launches,
    versions,
)


def variants() -> Iterator[tuple[str, dict[str, str], dict[str, object]]]:
    """Names, pointers and constants of kernels; coefficients are numbers, tensors and vectors by turns."""
    tables = {"owner": "*i32", "blocks": "*i64"}
    for wide in ("*fp32", "*fp64"):
        yield "sums_of_parts", {**tables, "out": wide}, {}
    for tensors, dtype, wide in (
        (1, tl.float32, "*fp32"),
        (2, tl.float32, "*fp32"),
        (1, tl.float32, "*fp64"),
        (2, tl.float64, "*fp64"),
    ):
        yield "sums", {**tables, "table": "*i64", "out": wide}, {"TENSORS": tensors, "DTYPE": dtype}
    for tensors, dtype in (*((count, tl.float32) for count in range(1, 6)), (5, tl.float64)):
        kinds = [(NUMBER, SCALAR, VECTOR)[(number + tensors) % 3] for number in range(len(NAMES))]
        given = sum(kind * 4**number for number, kind in enumerate(kinds))
        yield "update", {**tables, "table": "*i64"}, {"GIVEN": given, "TENSORS": tensors, "DTYPE": dtype}


def compiled(capability: str) -> Iterator[str]:
    """All kernels compile; what threads side by side read and write is side by side in memory."""
    for name, pointers, constants in variants():
        kernel = getattr(triton_kernels, name)
        if "constexprs" in inspect.signature(ASTSource).parameters:
            types = {argument: pointers.get(argument, "constexpr") for argument in kernel.arg_names}
            source = ASTSource(kernel, types, {(kernel.arg_names.index(key),): of for key, of in constants.items()})
        else:
            source = ASTSource(kernel, pointers, constants)
        found = triton.compile(source, target=GPUTarget("cuda", int(capability), 32)).asm
        if not found.get("cubin"):
            yield f"{name} {constants}: no binary"
        layouts = dict(re.findall(r"(#blocked\d*) = .*threadsPerWarp = (\[[\d, ]+\])", found["ttgir"]))
        sizes = "|".join(f"{width}x{size}" for width, size in ((1, 1024), (16, 32), (8, 128)))
        accesses = re.findall(rf"tt\.(?:load|store) .*tensor<(?:{sizes})x!tt.ptr<.*>, (#blocked\d*)>", found["ttgir"])
        if name != "sums_of_parts" and (not accesses or {layouts[layout] for layout in accesses} != {"[1, 32]"}):
            yield f"{name} {constants}: threads are {[layouts[layout] for layout in accesses]}"


def let_scalars_be_indices() -> None:
    """Triton 3.2 makes integers of arrays with one element, which NumPy 2.4 does not do any more."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type) -> None:
        patch(tensor)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def main(task: str, of: str) -> None:
    torch.manual_seed(0)
    np.seterr(all="ignore")  # what is not finite is part of a check
    if triton.__version__.startswith("3.2."):
        let_scalars_be_indices()
    checks = CHECKS if task == "compare" else (compiled,)
    print(json.dumps({check.__name__: list(check(of)) for check in checks}))


if __name__ == "__main__":
    main(*sys.argv[1:])
