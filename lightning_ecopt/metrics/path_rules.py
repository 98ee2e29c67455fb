"""What each operation does to sums over paths.

A rule is given a :class:`~lightning_ecopt.metrics.path_pass.PathOperation` and returns the sums over all paths to the
elements of its output, from those to the elements of its inputs. Most operations have no rule of their own: torch says
what they consist of, and the parts have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.metrics.path_pass import PathOperation, Rule

#: The rules, by the base names of ATen operations.
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule for the ATen operations of these base names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


#: Sums of products of elements, with weights that the operation itself has none of but 1, or its own numbers. What such
#: an operation makes of sums over paths and of powers of weights is the sum over paths to its results.
_MULTILINEAR = """
add addbmm addcmul addmm addmv addr baddbmm bmm cat channel_shuffle clone col2im constant_pad_nd convolution cumsum
diag_embed dot embedding fill flip gather im2col index index_add index_copy index_fill index_put _index_put_impl
index_select kron masked_fill mm mul mv native_channel_shuffle pixel_shuffle pixel_unshuffle reflection_pad1d
reflection_pad2d reflection_pad3d repeat replication_pad1d replication_pad2d replication_pad3d roll select_scatter
slice_scatter stack sum trace tril _trilinear triu _unsafe_index _unsafe_index_put _unsafe_view upsample_nearest1d
upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
vdot where zero
"""


@_rule(*_MULTILINEAR.split())
def _multilinear(operation: PathOperation) -> Tensor:
    """Paths join and go on, and take up the weights that they meet: ``mm`` of X and W gives ``X |W|^p``."""
    return operation.run()


@_rule("scatter", "scatter_add", "scatter_reduce", "index_reduce")
def _scattered(operation: PathOperation) -> Tensor:
    """Elements that are added up; other ways to reduce them are not covered."""
    if operation.arguments.get("reduce") not in (None, "sum", "add"):
        raise operation.refused("it does not add")
    return operation.run()


@_rule("relu", "abs", "neg")
def _passing(operation: PathOperation) -> Tensor:
    """Slopes of -1, 0 and 1: a path counts with the largest magnitude."""
    return operation.value("self").clone()


@_rule("copy")
def _copied(operation: PathOperation) -> Tensor:
    """``x.copy_(y)`` has the paths of y."""
    return operation.value("src").expand(operation["self"].shape)


@_rule("_to_copy")
def _converted(operation: PathOperation) -> Tensor:
    """Another dtype or device."""
    if operation["dtype"] is not None and not operation["dtype"].is_floating_point:
        raise operation.refused("it makes other numbers of activations")
    return operation.value("self").to(operation["device"] or operation["self"].device, copy=True)


@_rule("sub", "rsub", "maximum", "minimum", "fmax", "fmin")
def _joined(operation: PathOperation) -> Tensor:
    """Paths of both arguments join: ``x - alpha y`` has those of x and, times ``|alpha|^p``, those of y."""
    first, second = (
        operation.value(name) if isinstance(operation[name], Tensor) else abs(operation[name]) ** operation.p
        for name in ("self", "other")
    )
    weight = abs(operation.arguments.get("alpha", 1)) ** operation.p
    return weight * first + second if operation.name == "rsub" else first + weight * second


@_rule("div")
def _divided(operation: PathOperation) -> Tensor:
    """A product with the reciprocal of a constant."""
    if operation.arguments.get("rounding_mode") is not None:
        raise operation.refused()
    operation.constant("other")
    return operation.run()


@_rule("pow", "square")
def _raised(operation: PathOperation) -> Tensor:
    """A product of k factors has paths through all of them: ``(sum of paths)^k``."""
    exponent = operation.arguments.get("exponent", 2)
    if not isinstance(exponent, int | float) or exponent < 1 or exponent != int(exponent):
        raise operation.refused("its exponent is no positive integer")
    return operation.value("self") ** exponent


@_rule("leaky_relu")
def _leaky(operation: PathOperation) -> Tensor:
    """Slopes of 1 and a: a path counts with the larger magnitude."""
    return operation.value("self") * max(1.0, abs(operation["negative_slope"])) ** operation.p


@_rule("_prelu_kernel")
def _prelu(operation: PathOperation) -> Tensor:
    """A leaky ReLU whose slopes are parameters."""
    operation.constant("weight")
    return operation.value("self") * operation.value("weight").clamp(min=1.0)


@_rule("clamp", "clamp_min", "clamp_max", "hardtanh", "threshold")
def _clamped(operation: PathOperation) -> Tensor:
    """A ReLU, up to signs, if it has one bound and this is zero."""
    names = ("min", "max", "min_val", "max_val", "threshold")
    bounds = [operation[name] for name in names if operation.arguments.get(name) is not None]
    if len(bounds) != 1 or isinstance(bounds[0], Tensor) or bounds[0] != 0 or operation.arguments.get("value", 0) != 0:
        raise operation.refused("it has a bound other than zero")
    return operation.value("self").clone()


@_rule("batch_norm")
def _batch_norm(operation: PathOperation) -> Tensor:
    """The affine map of evaluation mode, whatever the mode: a gain on the paths, and paths that begin at its shift."""
    if operation["running_mean"] is None or operation["running_var"] is None:
        raise operation.refused("it normalises by statistics of the batch")
    values, mean = operation.value("input"), operation.constant("running_mean")
    gain = (operation.constant("running_var") + operation["eps"]).rsqrt()
    if operation["weight"] is not None:
        gain = operation.constant("weight") * gain
    shift = -mean * gain
    if operation["bias"] is not None:
        shift = operation.constant("bias") + shift
    gain, shift = (
        vector.abs().pow(operation.p).reshape((1, -1) + (1,) * (values.ndim - 2)) for vector in (gain, shift)
    )
    return values * gain + shift


@_rule("mean")
def _mean(operation: PathOperation) -> Tensor:
    """A sum of n elements with weights 1/n, whose power is n^-p; the operation itself has divided by n."""
    total = operation.run()
    count = operation["self"].numel() / max(total.numel(), 1)
    return total * count ** (1 - operation.p)


@_rule("amax", "amin", "max", "min")
def _extreme(operation: PathOperation) -> Any:
    """Paths lead through all elements that compete: ``max`` becomes a sum."""
    values = operation.value("self")
    if "other" in operation.arguments:
        return values + operation.value("other")
    if "dim" not in operation.arguments:
        return values.sum()
    axes = operation["dim"] if operation["dim"] != [] else list(range(values.ndim))
    result = values.sum(axes, keepdim=operation["keepdim"])
    return result if operation.name.startswith("a") else _with_positions(result)


def _with_positions(result: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of the maxima depend on activations; no operation may use them, so they are all 0."""
    return result, torch.zeros_like(result, dtype=torch.long)


def _separable(operation: PathOperation, values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply linear maps along the last axes of ``values``.

    Args:
        operation: gives the exponent.
        values: sums over paths.
        matrices: the weights ``[out, in]`` along each of the axes; they are raised to the power.
    """
    for axis, matrix in enumerate(matrices, -len(matrices)):
        weight = matrix.to(values).abs().pow(operation.p)
        values = (values.movedim(axis, -1) @ weight.T).movedim(-1, axis)
    return values


def _sizes(given: int | Sequence[int], spatial: int, default: Sequence[int] = ()) -> list[int]:
    """One number for each of the spatial axes."""
    sizes = [given] if isinstance(given, int) else list(given or default)
    return sizes * spatial if len(sizes) == 1 else sizes


def _counts(number: int) -> Tensor:
    return torch.arange(number, device="cpu")


def _windows(
    length: int, kernel: int, stride: int, padding: int, dilation: int, *, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """Return the windows of a pooling along one axis.

    Returns:
        The positions of the elements of each window, ``[out, kernel]``, some of them in the padding; and how often each
        element is in each window, ``[out, in]``.
    """
    steps = (length + 2 * padding - dilation * (kernel - 1) - 1) / stride
    count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
    if ceil_mode and (count - 1) * stride >= length + padding:
        count -= 1
    positions = _counts(count)[:, None] * stride - padding + _counts(kernel) * dilation
    return positions, (positions[..., None] == _counts(length)).sum(1).double()


def _max_pool(operation: PathOperation, spatial: int) -> tuple[Tensor, Tensor]:
    """Sums over windows."""
    values = operation.value("self")
    kernels = _sizes(operation["kernel_size"], spatial)
    strides, paddings = _sizes(operation["stride"], spatial, kernels), _sizes(operation["padding"], spatial)
    dilations = _sizes(operation["dilation"], spatial)
    sizes = zip(values.shape[-spatial:], kernels, strides, paddings, dilations, strict=True)
    matrices = [_windows(*size, ceil_mode=operation["ceil_mode"])[1] for size in sizes]
    return _with_positions(_separable(operation, values, matrices))


def _avg_pool(operation: PathOperation, spatial: int) -> Tensor:
    """Sums over windows, with the weights of the averages."""
    values = operation.value("self")
    kernels = _sizes(operation["kernel_size"], spatial)
    strides, paddings = _sizes(operation["stride"], spatial, kernels), _sizes(operation["padding"], spatial)
    matrices = []
    for length, kernel, stride, padding in zip(values.shape[-spatial:], kernels, strides, paddings, strict=True):
        positions, matrix = _windows(length, kernel, stride, padding, 1, ceil_mode=operation["ceil_mode"])
        if operation["divisor_override"] is None:
            inside = positions < length + padding
            counts = inside.sum(1) if operation["count_include_pad"] else matrix.sum(1)
            matrix = matrix / counts[:, None]
        matrices.append(matrix)
    return _separable(operation, values, matrices) / (operation["divisor_override"] or 1) ** operation.p


def _adaptive(length: int, count: int) -> Tensor:
    """Return which elements are in each window of an adaptive pooling along one axis, ``[out, in]``."""
    numbers, places = _counts(count)[:, None], _counts(length)
    first, end = numbers * length // count, -(-(numbers + 1) * length // count)
    return ((places >= first) & (places < end)).double()


def _adaptive_matrices(operation: PathOperation, spatial: int) -> list[Tensor]:
    lengths = operation["self"].shape[-spatial:]
    return [_adaptive(*sizes) for sizes in zip(lengths, _sizes(operation["output_size"], spatial), strict=True)]


def _adaptive_avg_pool(operation: PathOperation, spatial: int) -> Tensor:
    matrices = [matrix / matrix.sum(1, keepdim=True) for matrix in _adaptive_matrices(operation, spatial)]
    return _separable(operation, operation.value("self"), matrices)


def _adaptive_max_pool(operation: PathOperation, spatial: int) -> tuple[Tensor, Tensor]:
    return _with_positions(_separable(operation, operation.value("self"), _adaptive_matrices(operation, spatial)))


def _resized(operation: PathOperation, spatial: int) -> Tensor:
    """Interpolation, axis by axis. Its weights along an axis are what it makes of images of one pixel each."""
    values = operation.value("self" if "self" in operation.arguments else "input")
    scales = operation.arguments.get("scale_factors") or [
        v for name, v in operation.arguments.items() if name.startswith("scales")
    ]
    scales = scales or [None] * spatial
    lengths = values.shape[-spatial:]
    resize = getattr(torch.ops.aten, operation.name).default
    matrices = []
    for axis, (length, scale) in enumerate(zip(lengths, scales, strict=True)):
        size = operation["output_size"][axis] if operation["output_size"] else math.floor(length * scale)
        pixels = torch.eye(length, dtype=values.dtype, device=values.device)
        # Two alike along the other axes: with one, the antialiasing operations of torch 2.13 are wrong.
        pixels = pixels.reshape(1, length, *(length if k == axis else 1 for k in range(spatial)))
        pixels = pixels.expand(1, length, *(length if k == axis else 2 for k in range(spatial))).contiguous()
        others = [(size, scale) if k == axis else (2, None) for k in range(spatial)]
        weights = resize(pixels, [s for s, _ in others], operation["align_corners"], *(s for _, s in others))
        matrices.append(weights[0].movedim(axis + 1, 1).reshape(length, size, -1)[..., 0].T)
    return _separable(operation, values, matrices)


for _spatial in (2, 3):  # torch takes pooling along one axis for pooling along two
    for _name, _function in (
        ("max_pool{}d_with_indices", _max_pool),
        ("avg_pool{}d", _avg_pool),
        ("_adaptive_avg_pool{}d", _adaptive_avg_pool),
        ("adaptive_max_pool{}d", _adaptive_max_pool),
    ):
        _rule(_name.format(_spatial))(partial(_function, spatial=_spatial))
for _spatial, _name in enumerate(("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"), 1):
    _rule(_name)(partial(_resized, spatial=_spatial))
_rule("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")(partial(_resized, spatial=2))
