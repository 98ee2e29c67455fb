"""Every rule keeps the function, and loses no freedom that it need not lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt.symmetry import labels, scaling_group
from lightning_ecopt.symmetry.labels import GROUND, ZERO, ParameterView
from lightning_ecopt.symmetry.rules import RULES, Call
from lightning_ecopt.symmetry.tracer import Tracer
from tests.symmetry.helpers import assert_same, draw_, evaluate

# Labels ---------------------------------------------------------------------------------------------------------------

tidy = settings(max_examples=100, deadline=None, derandomize=True)
sizes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=4)


@st.composite
def factorings(draw: Any, count: int) -> tuple[int, ...]:
    """A shape with ``count`` elements, axes of size 1 among them."""
    shape: list[int] = []
    while count > 1:
        size = draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
        shape.append(size)
        count //= size
        if len(shape) > 4:
            shape.append(count)
            break
    return tuple(shape)


@st.composite
def labelled(draw: Any) -> tuple[tuple[int, ...], np.ndarray]:
    """A shape, and a label that is uniform along some of its axes."""
    shape = tuple(draw(sizes))
    own = tuple(size if draw(st.booleans()) else 1 for size in shape)
    numbers = draw(st.lists(st.integers(-1, 4), min_size=prod(own), max_size=prod(own)))
    return shape, np.array(numbers, dtype=np.int64).reshape(own)


@tidy
@given(labelled(), st.data())
def test_reshape_does_to_a_label_what_it_does_to_the_written_out_tensor(
    given_label: tuple[tuple[int, ...], np.ndarray], data: Any
) -> None:
    shape, ids = given_label
    new = data.draw(factorings(prod(shape)))
    result = labels.reshape(ids, shape, new)
    assert result.ndim == len(new)
    np.testing.assert_array_equal(np.broadcast_to(result, new), np.broadcast_to(ids, shape).reshape(new))


@pytest.mark.parametrize("ids", [np.full((1, 1), 3), np.arange(3).reshape(1, 3), np.zeros((0, 3), dtype=np.int64)])
@pytest.mark.parametrize("new", [(0, 3), (3, 0), (0,), (2, 0, 1)])
def test_labels_of_empty_tensors_can_be_reshaped(ids: np.ndarray, new: tuple[int, ...]) -> None:
    result = labels.reshape(ids, (0, 3), new)
    assert result.ndim == len(new)
    assert np.broadcast_to(result, new).size == 0


@tidy
@given(labelled())
def test_compress_keeps_the_elements_and_leaves_no_axis_to_shrink(given_label: tuple[Any, np.ndarray]) -> None:
    shape, ids = given_label
    small = labels.compress(np.broadcast_to(ids, shape))
    np.testing.assert_array_equal(np.broadcast_to(small, shape), np.broadcast_to(ids, shape))
    for axis, size in enumerate(small.shape):
        assert size == 1 or (small != small.take([0], axis)).any()


@tidy
@given(labelled(), st.data())
def test_stretch_writes_out_the_named_axes_only(given_label: tuple[Any, np.ndarray], data: Any) -> None:
    shape, ids = given_label
    axes = [axis for axis in range(len(shape)) if data.draw(st.booleans())]
    result = labels.stretch(ids, shape, axes)
    assert result.shape == tuple(s if k in axes else ids.shape[k] for k, s in enumerate(shape))
    np.testing.assert_array_equal(np.broadcast_to(result, shape), np.broadcast_to(ids, shape))


def test_align_prepends_axes_as_broadcasting_does() -> None:
    ids = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(labels.align(ids, 4), ids[None, None])


def test_a_view_of_a_parameter_knows_its_elements_through_reshapes() -> None:
    weight = ParameterView.whole("w", (2, 6))
    assert weight.varying() == {0, 1}
    split = weight.map(lambda axis: labels.reshape(axis, (2, 6), (2, 3, 2)))
    element = np.broadcast_arrays(*split.axes)
    np.testing.assert_array_equal(element[0] * 6 + element[1], np.arange(12).reshape(2, 3, 2))
    assert ParameterView.whole("s", ()).varying() == set()


# Rules ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """Operations between a first and a last layer.

    Args:
        name: base name of the ATen operation that must be met.
        call: from the module, whose further parameters are attributes, and the features of the first layer.
        units: number of freedoms of the whole network.
        spatial: 0 for features ``[8, 4]`` of a linear layer, more for ``[8, 4, 4, ...]`` of a convolution.
        shapes: shapes of further parameters.
        inference: trace in inference mode, where composite operations are not taken apart before they are seen.
    """

    name: str
    call: Callable[[Any, Tensor], Tensor]
    units: int = 4
    spatial: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inference: bool = False


class Around(nn.Module):
    """First layer, operation, last layer."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.first = kinds[op.spatial - 1](2, 4, 2, padding="same") if op.spatial else nn.Linear(2, 4)
        for name, shape in op.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.register_buffer("known", torch.full((4,), 0.5))
        self.register_buffer("matrix", torch.arange(16.0).reshape(4, 4) / 8 - 1)
        self.double()
        with torch.no_grad():
            features = self.op.call(self, self.first(self.example())).reshape(8, -1).shape[1]
        self.last = nn.Linear(features, 3).double()

    def example(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randn((8, 2) + (4,) * self.op.spatial, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.op.call(self, self.first(x))
        return self.last(y.reshape(len(x), -1).to(x.dtype))


def out_of(function: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
    """The form of a function that writes into tensors it is given."""

    def call(*args: Any, **kwargs: Any) -> Any:
        out = tuple(torch.empty(0, dtype=torch.float64) for _ in range(count))
        return function(*args, **kwargs, out=out[0] if count == 1 else out)

    return call


def _normalised(m: Any, h: Tensor, function: Any, *last: Any) -> Tensor:
    return function(h, m.w, m.b, torch.zeros_like(h[0]), torch.ones_like(h[0]), *last)[0]


GAIN = {"w": (4,), "b": (4,)}
ops = torch.ops.aten
upsample = {"mode": "nearest", "scale_factor": 2}

OPS = [
    # Homogeneous functions
    Op("relu", lambda m, h: h.relu()),
    Op("relu", lambda m, h: h.relu_()),
    Op("leaky_relu", lambda m, h: F.leaky_relu(h, 0.3)),
    Op("leaky_relu", lambda m, h: F.leaky_relu_(h, 0.3)),
    Op("leaky_relu", lambda m, h: out_of(torch._C._nn.leaky_relu)(h.detach()) + h),
    Op("abs", lambda m, h: h.abs()),
    Op("abs", lambda m, h: h.abs_()),
    Op("absolute", lambda m, h: h.absolute(), inference=True),
    Op("neg", lambda m, h: -h),
    Op("neg", lambda m, h: h.neg_()),
    Op("negative", lambda m, h: h.negative(), inference=True),
    Op("rrelu_with_noise", lambda m, h: F.rrelu(h, training=True)),
    Op("rrelu_with_noise", lambda m, h: F.rrelu(h, training=False)),
    Op("_prelu_kernel", lambda m, h: F.prelu(h, m.w), shapes={"w": (4,)}),
    Op("_prelu_kernel", lambda m, h: F.prelu(h, m.w), spatial=1, shapes={"w": (1,)}),
    Op("_prelu_kernel", lambda m, h: F.prelu(h + m.w, m.w), 0, shapes={"w": (4,)}),
    Op("prelu", lambda m, h: F.prelu(h, m.w), shapes={"w": (4,)}, inference=True),
    Op("native_dropout", lambda m, h: torch.native_dropout(h, 0.3, True)[0]),
    # What is compared with or cut at something
    Op("clamp", lambda m, h: h.clamp(0, None)),
    Op("clamp", lambda m, h: h.clamp_(0, 0.5), 0),
    Op("clamp", lambda m, h: h.clamp(max=h.roll(1, 1).detach()), 1),
    Op("clamp_min", lambda m, h: h.clamp_min(0)),
    Op("clamp_min", lambda m, h: h.clamp_min_(0.25), 0),
    Op("clamp_max", lambda m, h: h.clamp_max(0)),
    Op("clamp_max", lambda m, h: h.clamp_max(0.5), 0),
    Op("clip", lambda m, h: h.clip(0), inference=True),
    Op("clip", lambda m, h: h.clip(-0.5, 0.5), 0, inference=True),
    Op("hardtanh", lambda m, h: F.hardtanh(h, 0, 0.5), 0),
    Op("hardtanh", lambda m, h: F.hardtanh(h, -0.5, 0), 0),
    Op("threshold", lambda m, h: F.threshold(h, 0, 0)),
    Op("threshold", lambda m, h: F.threshold_(h, 0.2, 0), 0),
    Op("threshold", lambda m, h: F.threshold(h, 0, 0.2), 0),
    Op("where", lambda m, h: torch.where(h > 0, h, 0.1 * h)),
    Op("where", lambda m, h: torch.where(h > 0, h, 0.0)),
    Op("where", lambda m, h: torch.where(h > 0, h, 1.0), 0),
    Op("where", lambda m, h: torch.where(h > 0, h, h.roll(1, 1)), 1),
    Op("masked_fill", lambda m, h: h.masked_fill(h < 0, 0.0)),
    Op("masked_fill", lambda m, h: h.masked_fill_(h < 0, 0.5), 0),
    Op("gt", lambda m, h: h * (h > 0)),
    Op("gt", lambda m, h: h * (h > 0.1), 0),
    Op("ge", lambda m, h: h * (h >= h.roll(1, 1)), 1),
    Op("lt", lambda m, h: h * (h < 0)),
    Op("lt", lambda m, h: h * (h < 0.1), 0),
    Op("le", lambda m, h: h * (h <= h.roll(1, 1)), 1),
    Op("eq", lambda m, h: h.relu() * (h.relu() == 0).logical_not()),
    Op("eq", lambda m, h: h * (h == h.amax(1, keepdim=True)), 1),
    Op("ne", lambda m, h: h * (h.relu() != 0)),
    Op("ne", lambda m, h: h * (h != h.amax(1, keepdim=True)), 1),
    Op("greater", lambda m, h: h * h.greater(0), inference=True),
    Op("greater_equal", lambda m, h: h * h.greater_equal(0), inference=True),
    Op("less", lambda m, h: h * h.less(h.roll(1, 1)), 1, inference=True),
    Op("less_equal", lambda m, h: h * h.less_equal(0.1), 0, inference=True),
    Op("not_equal", lambda m, h: h * h.relu().not_equal(0), inference=True),
    Op("sign", lambda m, h: h * h.sign()),
    Op("sign", lambda m, h: torch.cat([h, h.clone().sign_()], 1)),
    Op("sgn", lambda m, h: h * h.sgn()),
    Op("signbit", lambda m, h: h * h.signbit()),
    Op("logical_not", lambda m, h: h * h.relu().logical_not()),
    Op("isnan", lambda m, h: h * h.isnan().logical_not()),
    Op("isinf", lambda m, h: h * h.isinf().logical_not()),
    Op("isfinite", lambda m, h: h * h.isfinite(), inference=True),
    # Sums and products
    Op("add", lambda m, h: h + h.relu()),
    Op("add", lambda m, h: h.clone().add_(h.roll(1, 1)), 1),
    Op("add", lambda m, h: out_of(torch.add)(h.detach(), h.detach(), alpha=2)),
    Op("add", lambda m, h: h + 1, 0),
    Op("add", lambda m, h: h + 0),
    Op("add", lambda m, h: h + m.b, shapes={"b": (4,)}),
    Op("add", lambda m, h: h + m.b, 1, shapes={"b": (1,)}),
    Op("add", lambda m, h: h + m.b.unsqueeze(1), spatial=1, shapes={"b": (4,)}),
    Op("add", lambda m, h: h + m.b, 1, spatial=1, shapes={"b": (4,)}),
    Op("sub", lambda m, h: h - h.relu()),
    Op("sub", lambda m, h: h.clone().sub_(h[:, :1]), 1),
    Op("sub", lambda m, h: h - m.known, 0),
    Op("subtract", lambda m, h: h.subtract(h.relu()), inference=True),
    Op("rsub", lambda m, h: torch.rsub(h, h.relu())),
    Op("rsub", lambda m, h: 1 - h, 0),
    Op("maximum", lambda m, h: torch.maximum(h, 0.2 * h)),
    Op("maximum", lambda m, h: torch.maximum(h, m.known), 0),
    Op("minimum", lambda m, h: torch.minimum(h, h.roll(1, 1)), 1),
    Op("fmax", lambda m, h: torch.fmax(h, 0.2 * h)),
    Op("fmin", lambda m, h: torch.fmin(h, m.known), 0),
    Op("mul", lambda m, h: h * m.known),
    Op("mul", lambda m, h: h.mul_(3)),
    Op("mul", lambda m, h: h * h.roll(1, 1), 0),
    Op("mul", lambda m, h: h * m.g, 8, shapes={"g": (4,)}),
    Op("mul", lambda m, h: (m.g * h).abs(), 8, shapes={"g": (4,)}),
    Op("mul", lambda m, h: h * m.g[:, None], 8, spatial=1, shapes={"g": (4,)}),
    Op("mul", lambda m, h: h @ (m.w * (m.matrix > 0)), 8, shapes={"w": (4, 4)}),
    Op("mul", lambda m, h: h.mean(1, keepdim=True) * m.g, 5, shapes={"g": (4,)}),
    Op("mul", lambda m, h: h * (m.g * m.k), 4, shapes={"g": (4,), "k": (4,)}),
    Op("multiply", lambda m, h: h.multiply(m.known), inference=True),
    Op("div", lambda m, h: h / m.known),
    Op("div", lambda m, h: h.div_(3)),
    Op("div", lambda m, h: m.known / (h.abs() + 1), 0),
    Op("div", lambda m, h: m.known / h, 0),
    Op("div", lambda m, h: 8 * h.div(0.1, rounding_mode="floor"), 0),
    Op("div", lambda m, h: h @ (m.w / 3), 8, shapes={"w": (4, 4)}),
    Op("divide", lambda m, h: h.divide(m.known), inference=True),
    Op("true_divide", lambda m, h: h.true_divide(m.known), inference=True),
    # Contractions
    Op("mm", lambda m, h: h @ m.w, 4 + 5, shapes={"w": (4, 5)}),
    Op("mm", lambda m, h: (m.w @ h.t()).t(), 4 + 5, shapes={"w": (5, 4)}),
    Op("mm", lambda m, h: out_of(torch.mm)(h.detach(), m.w.detach()), 4 + 5, shapes={"w": (4, 5)}),
    Op("mm", lambda m, h: h @ m.matrix, 1),
    Op("mm", lambda m, h: m.matrix.repeat(2, 2) @ h),
    Op("mm", lambda m, h: h @ h.t(), 0),
    Op("mm", lambda m, h: torch.zeros(8, 4, dtype=h.dtype) @ m.w + h, 4, shapes={"w": (4, 4)}),
    Op("mm", lambda m, h: torch.cat([h @ m.w, h.relu() @ m.w], 1), 8, shapes={"w": (4, 4)}),
    Op("mm", lambda m, h: torch.cat([h @ m.w[:, :2], h @ m.w[:, 2:]], 1), 8, shapes={"w": (4, 4)}),
    Op("mm", lambda m, h: torch.cat([h @ m.w[:, :3], h @ m.w[:, 2:]], 1), 0, shapes={"w": (4, 4)}),
    Op("addmm", lambda m, h: torch.addmm(m.b, h, m.w), 4 + 5, shapes={"w": (4, 5), "b": (5,)}),
    Op("addmm", lambda m, h: torch.addmm(m.known, h, m.w), 4, shapes={"w": (4, 4)}),
    Op("addmm", lambda m, h: h.clone().addmm_(h, m.w), 4, shapes={"w": (4, 4)}),
    Op("bmm", lambda m, h: torch.bmm(h, m.w.expand(8, 4, 5)), 1 + 5, 1, shapes={"w": (4, 5)}),
    Op("bmm", lambda m, h: torch.bmm(m.w.expand(8, 5, 4), h), 4 + 5, 1, shapes={"w": (5, 4)}),
    Op(
        "bmm",
        lambda m, h: torch.bmm(h.reshape(8, 2, 2).transpose(0, 1), m.w).transpose(0, 1),
        4 + 6,
        shapes={"w": (2, 2, 3)},
    ),
    Op("bmm", lambda m, h: torch.bmm(h, h.transpose(1, 2)), 0, 1),
    Op("baddbmm", lambda m, h: torch.baddbmm(m.b, m.w.expand(8, 5, 4), h), 4 + 5, 1, {"w": (5, 4), "b": (5, 1)}),
    Op("mv", lambda m, h: torch.mv(h, m.w), 4 + 1, shapes={"w": (4,)}),
    Op("mv", lambda m, h: torch.mv(m.w, h[0]) + 0 * h[:, :1], 4 + 5, shapes={"w": (5, 4)}),
    Op("addmv", lambda m, h: torch.addmv(m.b, h, m.w), 4 + 1, shapes={"w": (4,), "b": (1,)}),
    Op("linear", lambda m, h: F.linear(h, m.w, m.b), 4 + 5, shapes={"w": (5, 4), "b": (5,)}, inference=True),
    Op("linear", lambda m, h: F.linear(h, m.w), 1 + 5, 1, shapes={"w": (5, 4)}, inference=True),
    Op("convolution", lambda m, h: F.conv1d(h, m.w, m.b), 4 + 6, 1, {"w": (6, 4, 2), "b": (6,)}),
    Op("convolution", lambda m, h: F.conv2d(h, m.w, None, 2, 1, 2), 4 + 3, 2, {"w": (3, 4, 2, 2)}),
    Op("convolution", lambda m, h: F.conv2d(h, m.w, groups=2), 4 + 6, 2, {"w": (6, 2, 2, 2)}),
    Op("convolution", lambda m, h: F.conv3d(h, m.w, m.b, groups=4), 4 + 4, 3, {"w": (4, 1, 2, 2, 2), "b": (4,)}),
    Op("convolution", lambda m, h: F.conv_transpose1d(h, m.w, m.b), 4 + 3, 1, {"w": (4, 3, 2), "b": (3,)}),
    Op("convolution", lambda m, h: F.conv_transpose2d(h, m.w, groups=2), 4 + 6, 2, {"w": (4, 3, 2, 2)}),
    Op("convolution", lambda m, h: F.conv1d(h, m.matrix[:, :, None]), 1, 1),
    Op("convolution", lambda m, h: F.conv1d(h, m.matrix[:, :2, None], groups=2), 2, 1),
    Op("convolution", lambda m, h: F.conv1d(h, m.w, m.known), 4, 1, {"w": (4, 4, 2)}),
    Op("convolution", lambda m, h: F.conv1d(h.roll(1, 1), m.w) + h[:, :, 1:], 4, 1, {"w": (4, 4, 2)}),
    Op("convolution", lambda m, h: h + F.conv1d(torch.zeros_like(h), m.w, m.b), 4, 1, {"w": (4, 4, 1), "b": (4,)}),
    Op("_convolution", lambda m, h: torch._convolution(
        h, m.w, None, [1], [0], [1], False, [0], 1, False, False, False, False), 4 + 3, 1, {"w": (3, 4, 2)}, True),
    # Normalisation
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.w, m.b), 4, 0, GAIN),
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.w, m.b, True), 4, 2, GAIN),
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known), 0, 1),
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.known, m.b), 0, 1, {"b": (4,)}),
    Op("native_batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.w, m.known), 0, 1, {"w": (4,)}),
    Op("native_batch_norm", lambda m, h: F.instance_norm(h, weight=m.w, bias=m.b), 4, 2, GAIN),
    Op("batch_norm", lambda m, h: F.batch_norm(h, m.known * 0, m.known, m.w, m.b), 4, 0, GAIN, True),
    Op("_native_batch_norm_legit", lambda m, h: ops._native_batch_norm_legit(
        h, m.w, m.b, m.known * 0, m.known * 1, True, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_native_batch_norm_legit", lambda m, h: ops._native_batch_norm_legit(
        h, m.w, m.b, True, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_native_batch_norm_legit_no_training", lambda m, h: ops._native_batch_norm_legit_no_training(
        h, m.w, m.b, m.known * 0, m.known, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_native_batch_norm_legit_functional", lambda m, h: ops._native_batch_norm_legit_functional(
        h, m.w, m.b, m.known * 0, m.known, True, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_batch_norm_with_update", lambda m, h: ops._batch_norm_with_update(
        h, m.w, m.b, m.known * 0, m.known * 1, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_batch_norm_with_update_functional", lambda m, h: ops._batch_norm_with_update_functional(
        h, m.w, m.b, m.known * 0, m.known, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("_batch_norm_no_update", lambda m, h: ops._batch_norm_no_update(
        h, m.w, m.b, m.known * 0, m.known, 0.1, 0.1)[0], 4, 1, GAIN),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4,), m.w, m.b), 4, 0, GAIN),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4, 4)), 0, 1),
    Op("native_layer_norm", lambda m, h: F.layer_norm(h, (4, 4), m.w), 0, 1, {"w": (4, 4)}),
    Op("native_group_norm", lambda m, h: F.group_norm(h, 2, m.w, m.b), 4, 2, GAIN),
    # Reductions
    Op("sum", lambda m, h: h.sum(2), spatial=1),
    Op("sum", lambda m, h: h.sum(1, keepdim=True), 1),
    Op("sum", lambda m, h: h.sum() + 0 * h[:, :1], 1, 1),
    Op("sum", lambda m, h: out_of(torch.sum)(h.detach(), (1, 2)), 1, 1),
    Op("mean", lambda m, h: h.mean((-1, -2)), spatial=2),
    Op("mean", lambda m, h: h.mean(0) + 0 * h),
    Op("mean", lambda m, h: h.mean(1), 1),
    Op("amax", lambda m, h: h.amax(-1), spatial=1),
    Op("amax", lambda m, h: h.amax((0, 1)) + 0 * h[:, :1], 1),
    Op("amin", lambda m, h: h.amin(1), 1),
    Op("nansum", lambda m, h: h.nansum(2), spatial=1),
    Op("nansum", lambda m, h: h.nansum(1), 1),
    Op("nanmean", lambda m, h: h.nanmean(2), spatial=1, inference=True),
    Op("max", lambda m, h: h.max(2).values, spatial=1),
    Op("max", lambda m, h: h.max(1, keepdim=True).values, 1),
    Op("max", lambda m, h: h.max() + 0 * h[:, :1], 1),
    Op("max", lambda m, h: torch.cat([h, h.max(2, keepdim=True).indices.expand(8, 4, 2).double()], 2), spatial=1),
    Op("max", lambda m, h: h.max(h.roll(1, 1)), 1, inference=True),
    Op("min", lambda m, h: h.min(2).values, spatial=1),
    Op("min", lambda m, h: h.min(0).values + 0 * h),
    Op("min", lambda m, h: h.min(0.5 * h), inference=True),
    Op("cumsum", lambda m, h: h.cumsum(2), spatial=1),
    Op("cumsum", lambda m, h: h.cumsum_(1), 1),
    Op("avg_pool1d", lambda m, h: F.avg_pool1d(h, 2, padding=1), spatial=1, inference=True),
    Op("avg_pool2d", lambda m, h: F.avg_pool2d(h, 2, ceil_mode=True), spatial=2),
    Op("avg_pool2d", lambda m, h: F.avg_pool2d(h.transpose(1, 3), 2), 1, 2),
    Op("avg_pool3d", lambda m, h: F.avg_pool3d(h, 2), spatial=3),
    Op("max_pool1d", lambda m, h: F.max_pool1d(h, 2), spatial=1, inference=True),
    Op("max_pool1d_with_indices", lambda m, h: F.max_pool1d(h, 2, return_indices=True)[0], spatial=1, inference=True),
    Op("max_pool2d", lambda m, h: F.max_pool2d(h, 3, 1, 1), spatial=2, inference=True),
    Op("max_pool2d_with_indices", lambda m, h: F.max_pool2d(h, 3, 1, 1), spatial=2),
    Op("max_pool2d_with_indices", lambda m, h: F.max_pool2d(h.permute(0, 2, 1, 3), 2), 1, 2),
    Op("max_pool3d", lambda m, h: F.max_pool3d(h, 2), spatial=3, inference=True),
    Op("max_pool3d_with_indices", lambda m, h: F.max_pool3d(h, 2), spatial=3),
    Op("adaptive_avg_pool1d", lambda m, h: F.adaptive_avg_pool1d(h, 3), spatial=1, inference=True),
    Op("_adaptive_avg_pool2d", lambda m, h: F.adaptive_avg_pool2d(h, 3), spatial=2),
    Op("adaptive_avg_pool2d", lambda m, h: F.adaptive_avg_pool2d(h, 3), spatial=2, inference=True),
    Op("_adaptive_avg_pool3d", lambda m, h: F.adaptive_avg_pool3d(h, 3), spatial=3),
    Op("adaptive_avg_pool3d", lambda m, h: F.adaptive_avg_pool3d(h, 3), spatial=3, inference=True),
    Op("adaptive_max_pool1d", lambda m, h: F.adaptive_max_pool1d(h, 3), spatial=1, inference=True),
    Op("adaptive_max_pool2d", lambda m, h: F.adaptive_max_pool2d(h, 3), spatial=2),
    Op("adaptive_max_pool3d", lambda m, h: F.adaptive_max_pool3d(h, 3), spatial=3),
    Op("upsample_nearest1d", lambda m, h: F.interpolate(h, **upsample), spatial=1),
    Op("upsample_nearest2d", lambda m, h: F.interpolate(h, **upsample), spatial=2),
    Op("upsample_nearest2d", lambda m, h: F.interpolate(h.transpose(1, 2), **upsample), 1, 2),
    Op("upsample_nearest3d", lambda m, h: F.interpolate(h, **upsample), spatial=3),
    Op("_upsample_nearest_exact1d", lambda m, h: F.interpolate(h, 3, mode="nearest-exact"), spatial=1),
    Op("_upsample_nearest_exact2d", lambda m, h: F.interpolate(h, 3, mode="nearest-exact"), spatial=2),
    Op("_upsample_nearest_exact3d", lambda m, h: F.interpolate(h, 3, mode="nearest-exact"), spatial=3),
    Op("upsample_linear1d", lambda m, h: F.interpolate(h, 7, mode="linear"), spatial=1),
    Op("upsample_bilinear2d", lambda m, h: F.interpolate(h, 7, mode="bilinear"), spatial=2),
    Op("_upsample_bilinear2d_aa", lambda m, h: F.interpolate(h, 3, mode="bilinear", antialias=True), spatial=2),
    Op("upsample_bicubic2d", lambda m, h: F.interpolate(h, 7, mode="bicubic"), spatial=2),
    Op("upsample_trilinear3d", lambda m, h: F.interpolate(h, 3, mode="trilinear"), spatial=3),
    # Views
    Op("view", lambda m, h: h.view(8, 2, 2)),
    Op("view", lambda m, h: h.view(8, 2, 8).relu().view(8, 4, 4), spatial=1),
    Op("view", lambda m, h: h @ m.w.view(2, 2, 4).view(4, 4), 8, shapes={"w": (4, 4)}),
    Op("view", lambda m, h: F.linear(h, m.w.view(5, 4)), 4 + 5, shapes={"w": (20,)}),
    Op("_unsafe_view", lambda m, h: h.transpose(1, 2) @ m.w, 4 + 3, 1, {"w": (4, 3)}),
    Op("_reshape_alias", lambda m, h: ops._reshape_alias(h, [8, 2, 2], [4, 2, 1])),
    Op("reshape", lambda m, h: h.t().reshape(2, 2, 8).permute(2, 1, 0), inference=True),
    Op("flatten", lambda m, h: h.flatten(1), spatial=2, inference=True),
    Op("unflatten", lambda m, h: h.unflatten(1, (2, 2)).transpose(1, 2), inference=True),
    Op("view_as", lambda m, h: h.view_as(h.relu()), inference=True),
    Op("view_as", lambda m, h: h.view_as(m.known.expand(8, 2, 2, 4)[..., 0]), inference=True),
    Op("squeeze", lambda m, h: h[:, None].squeeze(1)),
    Op("squeeze", lambda m, h: h[:, None, :, None].squeeze()),
    Op("squeeze", lambda m, h: h.view(8, 1, 4).squeeze_(1)),
    Op("unsqueeze", lambda m, h: h.unsqueeze(1) * torch.ones(2, 1, dtype=h.dtype)),
    Op("unsqueeze", lambda m, h: h.unsqueeze_(-1)),
    Op("atleast_1d", lambda m, h: torch.atleast_1d(h), inference=True),
    Op("atleast_1d", lambda m, h: torch.atleast_1d([h, h])[1], inference=True),
    Op("atleast_2d", lambda m, h: torch.atleast_2d(h), inference=True),
    Op("detach", lambda m, h: h.detach()),
    Op("clone", lambda m, h: h.clone()),
    Op("contiguous", lambda m, h: h.t().contiguous().t(), inference=True),
    Op("alias", lambda m, h: ops.alias(h)),
    Op("positive", lambda m, h: +h, inference=True),
    Op("lift_fresh", lambda m, h: ops.lift_fresh(h)),
    Op("lift_fresh_copy", lambda m, h: ops.lift_fresh_copy(h)),
    Op("detach_copy", lambda m, h: ops.detach_copy(h)),
    Op("_to_copy", lambda m, h: h.float().double() * 0 + h),
    Op("_to_copy", lambda m, h: (8 * h).long().double(), 0),
    Op("to", lambda m, h: h.to(torch.float64), inference=True),
    Op("type_as", lambda m, h: h.type_as(m.known), inference=True),
    Op("permute", lambda m, h: h.permute(2, 0, 1).permute(1, 0, -1), spatial=1),
    Op("transpose", lambda m, h: h.transpose(1, -1), spatial=2),
    Op("transpose", lambda m, h: h.transpose_(1, 2), spatial=1),
    Op("t", lambda m, h: h.t().roll(1, 0).t()),
    Op("t", lambda m, h: h.t_().roll(1, 0).t()),
    Op("t", lambda m, h: torch.cat([h, m.w.t().expand(8, 3)], 1), 4 + 3, shapes={"w": (3,)}, inference=True),
    Op("numpy_T", lambda m, h: (h.T * m.known[:, None]).T, inference=True),
    Op("mT", lambda m, h: h.mT, spatial=1, inference=True),
    Op("adjoint", lambda m, h: h.adjoint(), spatial=1, inference=True),
    Op("expand", lambda m, h: h[:, None].expand(8, 3, -1)),
    Op("expand", lambda m, h: h * m.g.expand(8, 4), 8, shapes={"g": (4,)}),
    Op("slice", lambda m, h: h[:, 1:]),
    Op("slice", lambda m, h: torch.cat([h[:, 1::2], h[:, -4:-3]], 1)),  # what nobody reads is free too
    Op("slice", lambda m, h: h[:, :2] + h[:, 2:], 2),
    Op("slice", lambda m, h: h[:, :, ::2], spatial=1),
    Op("slice", lambda m, h: torch.cat([h[:, :0].reshape(8, 0), h], 1)),
    Op("select", lambda m, h: h[:, -1] * h[:, -1].sign() + h.relu().sum(1) * 0, 1),
    Op("select", lambda m, h: torch.stack([h[:, 2], h[:, 0]], 1)),
    Op("select", lambda m, h: h[:, :, 1], spatial=1),
    Op("split", lambda m, h: torch.cat(h.split(3, 1)[::-1], 1)),
    Op("split", lambda m, h: h.split(2, 1)[0] - h.split(2, 1)[1], 2),
    Op("split", lambda m, h: h.split(1, 2)[1], spatial=1),
    Op("split", lambda m, h: torch.cat([h @ part for part in m.w.split(2, 1)], 1), 8, shapes={"w": (4, 4)}),
    Op("split_with_sizes", lambda m, h: torch.cat(h.split([1, 3], 1)[::-1], 1) + h, 1),
    Op("split_with_sizes", lambda m, h: h.split([1, 3], 1)[1] - h[:, :3], 1),
    Op("chunk", lambda m, h: h.chunk(2, 1)[0] - h.chunk(2, 1)[1], 2, inference=True),
    Op("tensor_split", lambda m, h: h.tensor_split(2, 1)[0] - h.tensor_split(2, 1)[1], 2, inference=True),
    Op("unbind", lambda m, h: torch.stack(h.unbind(1)[::-1], 1) + h, 2),
    Op("unbind", lambda m, h: h.unbind(2)[3], spatial=1),
    Op("roll", lambda m, h: h.roll(1, 1) + h.roll(3, 1), 2),
    Op("roll", lambda m, h: h.roll((1, 1), (1, 2)), spatial=1),
    Op("roll", lambda m, h: h.roll(2) + h, 2),
    Op("flip", lambda m, h: h.flip(1) + h, 2),
    Op("flip", lambda m, h: h.flip(-1, 0), spatial=1),
    Op("repeat", lambda m, h: h.repeat(1, 2)[:, 1:5] + h, 1),
    Op("repeat", lambda m, h: h + m.b.repeat(2), 2, shapes={"b": (2,)}),
    Op("repeat", lambda m, h: h.repeat(1, 3, 1, 2), spatial=1),
    Op("cat", lambda m, h: torch.cat([h, h.roll(1, 1)], 1)),
    Op("cat", lambda m, h: torch.cat([torch.zeros(0, dtype=h.dtype), h, m.known.expand(8, 4)], -1)),
    Op("cat", lambda m, h: torch.cat([h, h.flip(1)], 0)[4:12], 2),
    Op("cat", lambda m, h: torch.cat([h, m.w.expand(8, 3)], 1), 4 + 3, shapes={"w": (3,)}),
    Op("concat", lambda m, h: torch.concat([h, h], 1), inference=True),
    Op("concatenate", lambda m, h: torch.concatenate([h, h], 1), inference=True),
    Op("stack", lambda m, h: torch.stack([h, h.roll(1, 1)], -1)),
    Op("stack", lambda m, h: torch.stack([h, h.roll(1, 1)], 1).sum(1), 1),
    Op("constant_pad_nd", lambda m, h: F.pad(h, (1, 2))[:, 1:-2] + F.pad(h, (1, -1)), 1),
    Op("constant_pad_nd", lambda m, h: F.pad(h, (0, 0, 2, 2)) + F.pad(h, (0, 0, 4, 0)), 2, 1),
    Op("constant_pad_nd", lambda m, h: F.pad(h, (1, 1, 0, 0, 1, 0)), spatial=2),
    Op("constant_pad_nd", lambda m, h: F.pad(h, (1, 1), value=1.0), 0, 1),
    Op("reflection_pad1d", lambda m, h: F.pad(h, (1, 1), "reflect"), spatial=1),
    Op("reflection_pad1d", lambda m, h: F.pad(h.mT, (1, 1), "reflect"), 1, 1),
    Op("reflection_pad2d", lambda m, h: F.pad(h, (1, 1, 1, 0), "reflect"), spatial=2),
    Op("reflection_pad3d", lambda m, h: F.pad(h, (1, 1, 1, 0, 1, 1), "reflect"), spatial=3),
    Op("replication_pad1d", lambda m, h: F.pad(h, (1, 1), "replicate"), spatial=1),
    Op("replication_pad2d", lambda m, h: F.pad(h, (1, 1, 1, 0), "replicate"), spatial=2),
    Op("replication_pad2d", lambda m, h: F.pad(h.transpose(1, 3), (1, 1, 1, 0), "replicate"), 1, 2),
    Op("replication_pad3d", lambda m, h: F.pad(h, (1, 1, 1, 0, 1, 1), "replicate"), spatial=3),
    Op("index_select", lambda m, h: h.index_select(2, torch.tensor([2, 0])), spatial=1),
    Op("index_select", lambda m, h: h.index_select(1, torch.tensor([2, 0])), 1),
    Op("index", lambda m, h: h[:, :, torch.tensor([2, 0])], spatial=1),
    Op("index", lambda m, h: h[:, torch.tensor([2, 0])], 1),
    Op("index", lambda m, h: h[torch.arange(7, -1, -1)]),
    Op("index", lambda m, h: h[:, :, torch.tensor([[0], [1]]), torch.tensor([1, 2, 3])], spatial=2),
    Op("index", lambda m, h: h[torch.arange(8)[:, None], :, torch.tensor([1, 2, 3])].transpose(1, 2), spatial=1),
    # New tensors
    Op("zeros", lambda m, h: h + torch.zeros(4, dtype=h.dtype)),
    Op("zeros", lambda m, h: out_of(torch.zeros)(4) + h),
    Op("zeros_like", lambda m, h: torch.zeros_like(h).add_(h)),
    Op("new_zeros", lambda m, h: h + h.new_zeros(4)),
    Op("zero", lambda m, h: h + h.clone().zero_()),
    Op("full", lambda m, h: h + torch.full((4,), 0.0, dtype=h.dtype)),
    Op("full", lambda m, h: h + torch.full((4,), 0.5, dtype=h.dtype), 0),
    Op("full_like", lambda m, h: h * torch.full_like(h, 0.5) + torch.full_like(h, 0)),
    Op("full_like", lambda m, h: h + torch.full_like(h, 0.5), 0),
    Op("new_full", lambda m, h: h + h.new_full((4,), 0)),
    Op("new_full", lambda m, h: h + h.new_full((4,), 0.5), 0),
    Op("fill", lambda m, h: h + h.clone().fill_(0)),
    Op("fill", lambda m, h: h + h.clone().fill_(0.5), 0),
    Op("fill", lambda m, h: torch.zeros_like(h).fill_(m.known[0]) * h),
    Op("fill", lambda m, h: torch.zeros_like(h).fill_(h.sum()), 1),
    Op("scalar_tensor", lambda m, h: h + torch.scalar_tensor(0.0)),
    Op("scalar_tensor", lambda m, h: h + torch.scalar_tensor(0.5), 0),
    Op("ones", lambda m, h: h * torch.ones(4)),
    Op("ones", lambda m, h: h + torch.ones(4), 0),
    Op("ones_like", lambda m, h: h * torch.ones_like(h)),
    Op("ones_like", lambda m, h: h + torch.ones_like(h), 0),
    Op("new_ones", lambda m, h: h + h.new_ones(4), 0),
    Op("empty", lambda m, h: torch.empty(4).fill_(0) + h),
    Op("empty_like", lambda m, h: torch.empty_like(h).copy_(h)),
    Op("new_empty", lambda m, h: h.new_empty(8, 4).copy_(h)),
    Op("empty_strided", lambda m, h: torch.empty_strided((8, 4), (1, 8), dtype=h.dtype).copy_(h)),
    Op("new_empty_strided", lambda m, h: h.new_empty_strided((8, 4), (1, 8)).copy_(h)),
    Op("empty_permuted", lambda m, h: torch.empty_permuted((8, 4), (1, 0), dtype=h.dtype).copy_(h)),
    Op("copy", lambda m, h: torch.zeros_like(h).copy_(h.roll(1, 1)) + h, 1),
    Op("copy", lambda m, h: torch.zeros(8, 4, dtype=h.dtype).copy_(h[:, 0, None]) + h, 1),
    Op("copy", lambda m, h: (h[:, :1].copy_(h[:, 1:2]), h)[1], 0),
    Op("copy", lambda m, h: h @ torch.empty_like(m.w).copy_(m.w), 8, shapes={"w": (4, 4)}),
    Op("rand", lambda m, h: h * torch.rand(4)),
    Op("rand", lambda m, h: h + torch.rand(4), 0),
    Op("rand_like", lambda m, h: h + torch.rand_like(h), 0),
    Op("randn", lambda m, h: h + torch.randn(4), 0),
    Op("randn_like", lambda m, h: h + torch.randn_like(h), 0),
    Op("randint", lambda m, h: h + torch.randint(1, 4, (4,)), 0),
    Op("randint_like", lambda m, h: h + torch.randint_like(h, 1, 4), 0),
    Op("randperm", lambda m, h: h + torch.randperm(4), 0),
    Op("randperm", lambda m, h: h * torch.randperm(4)),
    Op("arange", lambda m, h: h + torch.arange(4), 0),
    Op("arange", lambda m, h: h * torch.arange(4.0)),
    Op("linspace", lambda m, h: h * torch.linspace(1, 2, 4)),
    Op("linspace", lambda m, h: torch.linspace(h.sum(), 1.0, 8), 0),
    Op("eye", lambda m, h: h @ torch.eye(4, dtype=h.dtype), 1),
]  # fmt: skip

# Operations of other devices, and names that the operations here are never called by.
OUT_OF_REACH = {
    "convolution_overrideable",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_adaptive_avg_pool1d",
}


def _name(op: Op) -> str:
    return f"{op.name}{op.spatial or ''}-{op.units}"


@pytest.mark.parametrize("op", OPS, ids=_name)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    module, met = Around(op), []
    draw_(module, torch.Generator().manual_seed(2))
    rule = RULES.get(op.name)  # a composite operation may do without one
    if rule is not None:
        monkeypatch.setitem(RULES, op.name, lambda call: met.append(op.name) or rule(call))
    with torch.inference_mode(op.inference):
        group = scaling_group(module, module.example())
    assert met or rule is None, "the operation was not met"
    before = evaluate(module, (module.example(),))
    group.act_(torch.randn(group.num_units, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    assert_same(evaluate(module, (module.example(),)), before)
    assert group.num_units == op.units


def test_every_rule_is_tested() -> None:
    assert set(RULES) - {op.name for op in OPS} - OUT_OF_REACH == set()


def _directly(name: str, tracer: Tracer, output: Any, tensors: dict[str, Any], **arguments: Any) -> Any:
    """What a rule says of a call made by hand: label and tensor of each argument."""
    values = {id(tensor): value for tensor, value in tensors.values()}
    named = {key: tensor for key, (tensor, _) in tensors.items()}
    shapes = {id(tensor): tuple(tensor.shape) for tensor in named.values()}
    return RULES[name](Call(tracer, {**named, **arguments}, values, shapes, output))


@pytest.mark.parametrize("name", ["cudnn_batch_norm", "miopen_batch_norm"])
def test_accelerators_batch_norm_grounds_its_input_and_starts_anew(name: str) -> None:
    tracer = Tracer({"w": (4,), "b": (4,)})
    features = tracer.fresh((1, 4, 1))
    image, vector = torch.zeros(2, 4, 3), torch.zeros(4)
    outputs = _directly(
        name,
        tracer,
        (image, vector, vector.clone()),
        {
            "input": (image, features),
            "weight": (vector, ParameterView.whole("w", (4,))),
            "bias": (torch.ones(4), ParameterView.whole("b", (4,))),
        },
    )
    assert outputs[0].shape == (1, 4, 1)
    assert set(outputs[0].ravel()).isdisjoint({GROUND, ZERO, *features.ravel()})
    assert all((ids == GROUND).all() for ids in outputs[1:])
    grounded = np.concatenate([ids for _, ids in tracer.groundings])
    np.testing.assert_array_equal(np.sort(grounded), features.ravel())
    (weight,), (bias,) = tracer.uses["w"], tracer.uses["b"]
    np.testing.assert_array_equal(weight.incoming, outputs[0].ravel())
    np.testing.assert_array_equal(bias.incoming, outputs[0].ravel())
    assert bias.additive
    assert not weight.additive


def test_overrideable_convolution_leads_from_input_to_new_output_channels() -> None:
    tracer = Tracer({"w": (6, 2, 3)})
    features = tracer.fresh((1, 4, 1))
    output = _directly(
        "convolution_overrideable",
        tracer,
        torch.zeros(2, 6, 3),
        {
            "input": (torch.zeros(2, 4, 5), features),
            "weight": (torch.zeros(6, 2, 3), ParameterView.whole("w", (6, 2, 3))),
        },
        bias=None,
        groups=2,
        transposed=False,
    )
    (use,) = tracer.uses["w"]
    np.testing.assert_array_equal(use.incoming.ravel(), output.ravel())
    expected = features.reshape(2, 1, 2).repeat(3, axis=1).reshape(6, 2, 1)
    np.testing.assert_array_equal(np.broadcast_to(use.outgoing, (6, 2, 1)), expected)


def test_one_dimensional_average_wants_one_label_along_its_axis() -> None:
    tracer = Tracer({})
    image = torch.zeros(2, 4, 3)
    output = _directly("_adaptive_avg_pool1d", tracer, torch.zeros(2, 4, 1), {"self": (image, tracer.fresh((1, 4, 3)))})
    assert output.shape == (1, 4, 1)
    assert {tuple(pair) for pair in np.concatenate(tracer.equalities)} == {
        (3 * row + k + 1, 3 * row + 3) for row in range(4) for k in range(2)
    }


# What no rule may let through ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda h: torch.from_numpy(h.detach().numpy()), id="numpy"),
        pytest.param(lambda h: torch.tensor(h.tolist()), id="tolist"),
        pytest.param(lambda h: torch.tensor([[float(h.sum())]] * 8), id="float"),
        pytest.param(lambda h: h.view(torch.float32).nan_to_num(), id="view as another type"),
        pytest.param(lambda h: h.half().view(torch.bfloat16), id="view as another type of the same size"),
        pytest.param(lambda h: h.view(torch.int64).view(torch.float64), id="view there and back"),
        pytest.param(lambda h: torch.view_as_real(h.to(torch.complex128)), id="complex"),
        pytest.param(lambda h: torch.bucketize(h, torch.tensor([-0.5, 0.0, 0.5])), id="bucketize"),
        pytest.param(lambda h: h.round(decimals=1), id="round"),
        pytest.param(lambda h: h.argsort(1), id="argsort"),
        pytest.param(lambda h: h.softmax(1), id="softmax"),
        pytest.param(lambda h: h.view(8, 2, 2).permute(2, 1, 0).T.T.T, id="reversed axes"),
        pytest.param(lambda h: torch.as_strided(h, (8, 2), (4, 2)), id="as_strided"),
        pytest.param(lambda h: h.data, id="data"),
        pytest.param(lambda h: h.unfold(1, 2, 1), id="unfold"),
        pytest.param(lambda h: torch.cat([h[:, :1].add_(1), h], 1), id="written into a view"),
        pytest.param(lambda h: torch.zeros_like(h).index_add_(1, torch.tensor([1, 2, 1, 0]), h), id="index_add"),
        pytest.param(lambda h: torch.einsum("bi,bj->bij", h, h), id="einsum"),
        pytest.param(lambda h: F.normalize(h), id="normalize"),
        pytest.param(lambda h: F.alpha_dropout(h, 0.5), id="alpha dropout"),
        pytest.param(lambda h: F.dropout1d(h[:, :, None], 0.5), id="channel dropout"),
        pytest.param(lambda h: F.pad(h[:, None], (1, 1), "circular"), id="circular padding"),
        pytest.param(lambda h: F.pixel_shuffle(h[:, :, None, None], 2), id="pixel shuffle"),
        pytest.param(lambda h: h.masked_select(h > 0).sum().expand(8, 1), id="masked_select"),
        pytest.param(lambda h: h.gather(1, h.argmax(1, keepdim=True)), id="gather"),
        pytest.param(lambda h: torch.addcmul(h, h, h), id="addcmul"),
        pytest.param(lambda h: torch.lerp(h, h.roll(1, 1), 0.3), id="lerp"),
        pytest.param(lambda h: torch.sparse.mm(torch.eye(8, dtype=h.dtype).to_sparse(), h), id="sparse"),
        pytest.param(lambda h: torch.vmap(lambda row: row.cumsum(0))(h), id="vmap"),
    ],
)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_nothing_that_changes_the_function_gets_through(call: Callable[[Tensor], Tensor], inference: bool) -> None:
    module = Around(Op("", lambda m, h: call(h)))
    draw_(module, torch.Generator().manual_seed(2))
    with torch.inference_mode(inference):
        group = scaling_group(module, module.example())
    before = evaluate(module, (module.example(),))
    group.act_(torch.randn(group.num_units, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    assert_same(evaluate(module, (module.example(),)), before)
