"""What is looked at in gradients and weights is in C what it is by tensor operations."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_ecopt.common.sides import AXES, Sides
from lightning_ecopt.kernels import EagerKernels
from lightning_ecopt.kernels.compiled import CompiledKernels
from lightning_ecopt.symmetry.derivatives import SAMPLE, _digits_of_all, _largest_of_all
from lightning_ecopt.symmetry.squares import multiply_

pytestmark = pytest.mark.compiler

DTYPES = [torch.float32, torch.float64]
#: Forms of memory: of the same elements in the same order of axes.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.T.contiguous().T if tensor.ndim == 2 else tensor,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "wide": lambda tensor: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]],
    "every other": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "expanded": lambda tensor: tensor[:1].expand_as(tensor),
}


#: The shape of a box, and of its two sides.
Drawn = tuple[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]]


@st.composite
def boxes(draw: st.DrawFn) -> Drawn:
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)))
    varies = st.tuples(*[st.booleans()] * len(shape))
    into, out = (tuple(n if axis else 1 for n, axis in zip(shape, draw(varies), strict=True)) for _ in range(2))
    return shape, (into, out)


@given(
    drawn=st.lists(boxes(), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    forms=st.lists(st.sampled_from(list(FORMS)), min_size=8, max_size=8),
    left_out=st.integers(0, 15),
    cut=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_sums_over_both_sides(
    drawn: list[Drawn],
    dtype: torch.dtype,
    forms: list[str],
    left_out: int,
    cut: bool,
) -> None:
    generator, expected = torch.Generator().manual_seed(left_out), []
    first: list[Tensor | None] = []
    second: list[Tensor | None] = []

    def view(tensor: Tensor) -> Tensor:
        return tensor[tensor.shape[0] // 2 :] if cut else tensor

    for k, (shape, sides) in enumerate(drawn):
        whole = (2 * shape[0], *shape[1:]) if cut else shape
        pair = [
            FORMS[form](torch.randn(whole, generator=generator, dtype=dtype)) if prod(whole) else torch.zeros(whole)
            for form in forms[2 * k : 2 * k + 2]
        ]
        pair = [one.to(dtype) for one in pair]
        is_left_out = bool(left_out >> k & 1)
        first.append(None if is_left_out else pair[0])
        second.append(None if is_left_out else pair[1])
        products = (view(pair[0]).double() * view(pair[1]).double()) * (not is_left_out)
        for sign, side in zip((1, -1), sides, strict=True):
            sums = [products.sum_to_size(side) * sign, products.abs().sum_to_size(side)]
            expected.append(torch.stack([one.reshape(-1) for one in sums]))
    sides_of_all = Sides([view] * len(drawn), [sides for _, sides in drawn])
    kernels = CompiledKernels()
    for _ in range(2):  # the second time with what is kept
        found = kernels.both_sides(sides_of_all, first, second, sign=-1.0)
        assert found is not None
        torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-12, atol=1e-12)
    assert EagerKernels().both_sides(sides_of_all, first, second, sign=-1.0) is None


@given(
    drawn=st.lists(boxes(), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    forms=st.lists(st.sampled_from(list(FORMS)[:-1]), min_size=4, max_size=4),
    left_out=st.integers(0, 15),
)
@settings(max_examples=100, deadline=None)
def test_rescaling_has_the_bits_of_tensor_operations(
    drawn: list[Drawn],
    dtype: torch.dtype,
    forms: list[str],
    left_out: int,
) -> None:
    generator = torch.Generator().manual_seed(left_out)
    sides = Sides([lambda tensor: tensor] * len(drawn), [both for _, both in drawn])
    factors = torch.randn(sides.entries, generator=generator, dtype=torch.float64).exp()
    parts = iter(factors.split([prod(side) for _, both in drawn for side in both]))
    given_: list[Tensor | None] = []
    expected = []
    for k, (shape, both) in enumerate(drawn):
        tensor = FORMS[forms[k]](torch.randn(shape, generator=generator, dtype=dtype))
        first, second = (next(parts).view(side) for side in both)
        is_left_out = bool(left_out >> k & 1)
        given_.append(None if is_left_out else tensor)
        expected.append(tensor.clone())
        if not is_left_out:
            multiply_(expected[-1], first, second)
    versions = [0 if tensor is None else tensor._version for tensor in given_]
    assert not EagerKernels().rescale_(sides, given_, lambda: factors)
    if any(tensor is not None and 0 in tensor.stride() for tensor in given_):
        return  # of an empty one
    assert CompiledKernels().rescale_(sides, given_, lambda: factors)
    for tensor, other, version in zip(given_, expected, versions, strict=True):
        assert tensor is None or (torch.equal(tensor, other) and tensor._version > version)


def test_tensors_that_cannot_be_rescaled_in_c_stay_as_they_are() -> None:
    sides, factors = Sides([lambda tensor: tensor], [((4, 1), (1, 6))]), torch.full((10,), 2.0, dtype=torch.float64)
    with torch.inference_mode():
        inference = torch.ones(4, 6)
    for other in (factors.float(), factors.to("meta"), factors[:-1], factors[::2]):
        assert not CompiledKernels().rescale_(sides, [torch.ones(4, 6)], lambda other=other: other)
    others = [inference, torch.ones(1, 6).expand(4, 6), torch._neg_view(-torch.ones(4, 6)), torch.ones(4, 6).half()]
    for other in others:
        assert not CompiledKernels().rescale_(sides, [other], lambda: factors)
        assert bool((other == 1).all())


class OfClass(Tensor):
    """A tensor whose memory may be elsewhere."""


def test_other_strides_and_types_than_before_are_seen() -> None:
    sides, kernels = Sides([lambda tensor: tensor], [((4, 1), (1, 6))]), CompiledKernels()
    weight = torch.randn(4, 6)
    for gradient in (torch.randn(4, 6), torch.randn(6, 4).T, torch.randn(4, 6)):
        found = kernels.both_sides(sides, [weight], [gradient], sign=1.0)
        assert found is not None
        products = weight.double() * gradient.double()
        torch.testing.assert_close(found[0], torch.cat([products.sum(1), products.sum(0)]))
    zeros, elsewhere = torch._efficientzerotensor((4, 6)), weight.to("meta")
    of_a_class = nn.Parameter(weight).as_subclass(OfClass)
    others = [torch.randn(4, 5), torch.randn(6, 4), torch.randn(24), of_a_class]  # which have no such place in memory
    for other in (torch._neg_view(weight), zeros, weight.bfloat16(), weight.double(), elsewhere, *others):
        assert kernels.both_sides(sides, [weight], [other], sign=1.0) is None
    for both in (torch.randn(4, 5), torch.randn(24), torch.randn(4, 6, 1)):
        assert kernels.both_sides(sides, [both], [both], sign=1.0) is None
    assert not kernels.rescale_(sides, [elsewhere], lambda: torch.ones(10, dtype=torch.float64))
    assert kernels.both_sides(sides, [weight.half()], [weight.half()], sign=1.0) is None


def test_one_large_tensor_is_left_to_operations_where_many_threads_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = torch.randn(1000, 1000), torch.randn(10, 10)
    sides = Sides([lambda tensor: tensor] * 2, [((1000, 1), (1, 1000)), ((10, 1), (1, 10))])
    factors = torch.ones(sides.entries, dtype=torch.float64)
    for threads, is_done in ((1, True), (4, True), (16, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        kernels, pair = CompiledKernels(), [large, small]
        if not is_done:  # those that are done would start these threads
            assert kernels.both_sides(sides, pair, pair, sign=1.0) is None
            assert kernels.magnitudes(pair, SAMPLE) is None
            assert not kernels.rescale_(sides, pair, lambda: factors)
        assert kernels._library.can_share([large.numel(), small.numel()]) == is_done


def test_a_box_of_too_many_axes_is_left_to_operations() -> None:
    shape = (2,) * (AXES + 1)
    scattered = torch.zeros((3,) * len(shape))[(slice(2),) * len(shape)]
    sides = Sides([lambda tensor: tensor], [(shape, (1,) * len(shape))])
    assert CompiledKernels().both_sides(sides, [scattered], [scattered], sign=1.0) is None


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(300, 400), torch.randn(400, 300), torch.randn(300)]
    shapes = [((300, 1), (1, 400)), ((400, 1), (1, 300)), ((300,), (1,))]
    sides, before = Sides([lambda tensor: tensor] * 3, shapes), torch.get_num_threads()
    factors = torch.arange(1, sides.entries + 1, dtype=torch.float64)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(CompiledKernels().both_sides(sides, weights, weights, sign=1.0))
            found.append(CompiledKernels().magnitudes(weights, SAMPLE))
            scaled = [weight.clone() for weight in weights]
            assert CompiledKernels().rescale_(sides, scaled, lambda: factors)
            found.append(torch.cat([weight.flatten() for weight in scaled]))
    finally:
        torch.set_num_threads(before)
    assert all(one is not None for one in found)
    for k, one in enumerate(found):
        assert torch.equal(one, found[k % 3])  # type: ignore[arg-type]


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 3.0e-39, 1e-45, float("inf"), float("-inf"), float("nan"), 1 / 3, 1 + 2**-12]


@given(
    numbers=st.lists(
        st.lists(st.sampled_from(SPECIAL) | st.floats(-4, 4, width=32), max_size=12), min_size=1, max_size=5
    ),
    dtype=st.sampled_from(DTYPES),
    rounded=st.booleans(),
    long=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_magnitudes(numbers: list[list[float]], dtype: torch.dtype, rounded: bool, long: bool) -> None:
    tensors = [torch.tensor(of, dtype=dtype) for of in numbers]
    if rounded:
        tensors = [tensor.bfloat16().to(dtype) for tensor in tensors]
    if long:  # some are behind those whose digits are looked at
        tensors = [torch.cat([torch.full((SAMPLE,), 0.1, dtype=dtype), tensor]) for tensor in tensors]
    found = CompiledKernels().magnitudes(tensors, SAMPLE)
    assert found is not None
    for k, tensor in enumerate(tensors):
        _, (sizes, counts) = _largest_of_all({"": tensor})
        digits = _digits_of_all([tensor[:SAMPLE]])[:, 0].double()
        expected = torch.cat([sizes.double(), counts.double(), digits])
        torch.testing.assert_close(found[:, k], expected, rtol=0, atol=0, equal_nan=True)


def test_magnitudes_of_what_memory_does_not_have_as_it_is() -> None:
    plain = torch.randn(4, 6)
    others = [plain[:, ::2], torch._neg_view(plain), torch._efficientzerotensor((4, 6)), plain.half(), plain.double()]
    others.append(plain.to("meta"))
    for other in others:
        assert CompiledKernels().magnitudes([plain, other], SAMPLE) is None
    assert CompiledKernels().magnitudes([], SAMPLE) is None
    assert EagerKernels().magnitudes([plain], SAMPLE) is None
