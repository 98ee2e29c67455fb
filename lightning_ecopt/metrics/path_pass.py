"""Sums over all paths through a network, of the weights along them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.common.tensors import widest
from lightning_ecopt.symmetry.aten import base_name, named_arguments, written_to
from lightning_ecopt.symmetry.isolation import attributes_kept


def path_power(model: nn.Module, inputs: Any, samples: int | None, p: float) -> Tensor:
    """Sum over all paths of the ``p``-th powers of the absolute products of weights, a scalar in float64."""
    state = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in state):
        raise RuntimeError("the model has parameters or buffers on the meta device, which have no values")
    if any(map(is_sharded, state)):
        raise ValueError("PathNorm does not cover sharded parameters")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be a positive number, got {samples}")
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    args = args if isinstance(args, tuple) else (args,)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not given:
        raise ValueError("the inputs hold no tensor")
    walk = _PathPass(model, p)
    with ExitStack() as stack:
        for device in {tensor.device.type for tensor in [*state, *given]}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(attributes_kept(model, {}))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode())  # under it a dropout is seen as one operation
        args, kwargs = tree_map_only(Tensor, walk.enter, (args, kwargs))
        with walk:
            output = model(*args, **kwargs)
        outputs = [tensor for tensor in tensors_in(output, objects=True) if walk.is_path(tensor)]
        if not outputs:
            raise ValueError(f"no output of {type(model).__name__} is a real number that depends on the inputs")
        if samples is None:
            samples = _first_axis(given[0], outputs)
        totals = [walk.value(tensor).sum() / (samples if tensor.ndim else 1) for tensor in outputs]
        result = torch.stack([total.to(totals[0].device) for total in totals]).sum()
    return result.clone()  # no inference tensor


def _first_axis(first: Tensor, outputs: Sequence[Tensor]) -> int:
    """The number of samples: the size of the first axis of the inputs, if outputs have it, or all of it merged."""
    samples = len(first) if first.ndim else 1
    for output in outputs:
        if output.ndim and (samples == 0 or len(output) % samples):
            raise ValueError(
                f"an output has shape {list(output.shape)}, but the first tensor of the inputs {list(first.shape)}: if "
                "its first axis is not that of the samples, say how many there are, with samples=1 for one without axis"
            )
    return samples


PATHS, GIVEN, UNDEFINED, COPY = range(4)


@dataclass(frozen=True, eq=False)
class _Shadow:
    """What a piece of memory stands for during the call.

    Args:
        reference: keeps the address from being used again while this is known.
        kind: ``PATHS``: for each element the sum over all paths to it. ``GIVEN``: integers and truth values of the
            inputs, and what is made of them alone. ``UNDEFINED``: integers that depend on activations. ``COPY``: memory
            from outside that the call writes to.
        flat: the elements, in the order of the memory, if they are not there.
    """

    reference: StorageWeakRef
    kind: int
    flat: Tensor | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor in this memory."""
        assert self.flat is not None
        return self.flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _NotCoveredError(ValueError):
    """An operation has no paths."""


class _PathPass(TorchDispatchMode):
    """While it is entered, operations compute sums over paths.

    The tensors that the module sees have the right shapes, types and strides, but no values (NaN). What they stand for
    is known by their memory, so that views and changes in place are right by themselves.

    Args:
        module: gives the names of the modules in which operations run.
        p: exponent of the weights.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, p: float) -> None:
        super().__init__()
        self.p = p
        self._names = {id(part): name for name, part in module.named_modules()}
        self._shadows: dict[int, _Shadow] = {}
        self._made: dict[int, StorageWeakRef] = {}

    def enter(self, tensor: Tensor) -> Tensor:
        """What the module is given for one of its inputs."""
        if tensor.is_complex():
            raise ValueError("PathNorm does not cover complex numbers among the inputs")
        if tensor.is_floating_point():
            return self._carrier(torch.ones_like(tensor, dtype=widest(tensor.device)), tensor.dtype)
        return self._given(tensor.clone())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = base_name(func)
        if name.startswith("prim::"):  # a question about a tensor, such as its device
            return func(*args, **kwargs)
        arguments = named_arguments(func, args, kwargs)
        if arguments is None:
            raise self.refused(name)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kinds = {shadow.kind for tensor in tensors if (shadow := self._find(tensor)) is not None}
        rule = _RULES.get(name) if kinds - {COPY} else None
        if name in _IDENTITIES:
            return arguments["input" if "input" in arguments else "self"]
        if rule is None:  # what an operation with a rule consists of may have other paths
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if torch.Tag.inplace_view in func.tags or any(
            value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns
        ):
            return self._viewed(func, name, args, kwargs)
        if not kinds - {COPY} or name in _FACTORIES:
            return self._plain(func, name, args, kwargs)
        if UNDEFINED in kinds:
            raise self.refused(name, "it uses positions of maxima, which depend on the data")
        if all(not _is_real(tensor) or self._is(GIVEN, tensor) for tensor in tensors):
            return tree_map_only(Tensor, self._given, self._plain(func, name, args, kwargs))
        if rule is None:
            raise self.refused(name)
        return self._follow(rule, func, name, arguments, args, kwargs)

    def refused(self, name: str, reason: str = "it has no paths") -> _NotCoveredError:
        """The error for an operation that is not covered, with the module in which it runs."""
        frame = sys._getframe(1)
        place = "no module"
        while frame is not None:
            part = frame.f_locals.get("self")
            if isinstance(part, nn.Module) and id(part) in self._names:
                path = self._names[id(part)]
                place = f"module {path!r} ({type(part).__name__})" if path else type(part).__name__
                break
            frame = frame.f_back  # type: ignore[assignment]
        return _NotCoveredError(f"PathNorm does not cover the operation {name!r} in {place}: {reason}")

    def value(self, tensor: Tensor, *, keep: bool = False) -> Tensor:
        """Sums over paths; of a constant the power of its absolute value, unless it is to be kept as it is."""
        shadow = self._find(tensor)
        if shadow is not None and shadow.kind == PATHS:
            return shadow.view(tensor)
        real = self.real(tensor)
        if keep or tensor.dtype is torch.bool:
            return real
        return real.to(widest(tensor.device)).abs().pow(self.p)

    def real(self, tensor: Tensor) -> Tensor:
        """The values of a tensor that does not depend on activations."""
        shadow = self._find(tensor)
        return tensor if shadow is None or shadow.flat is None else shadow.view(tensor)

    def is_path(self, argument: Any) -> bool:
        """Whether the argument of an operation depends on the inputs by paths."""
        return isinstance(argument, Tensor) and self._is(PATHS, argument)

    def _is(self, kind: int, tensor: Tensor) -> bool:
        shadow = self._find(tensor)
        return shadow is not None and shadow.kind == kind

    def _find(self, tensor: Tensor) -> _Shadow | None:
        if tensor.layout is not torch.strided:
            return None
        return self._shadows.get(tensor.untyped_storage()._cdata)

    def _mark(self, tensor: Tensor, kind: int, flat: Tensor | None = None) -> Tensor:
        """Take down what the memory of a tensor stands for from now on."""
        self._shadows = {key: item for key, item in self._shadows.items() if not item.reference.expired()}
        storage = tensor.untyped_storage()
        self._shadows[storage._cdata] = _Shadow(StorageWeakRef(storage), kind, flat)
        return tensor

    def _given(self, tensor: Tensor) -> Tensor:
        shadow = self._find(tensor)
        return self._mark(tensor, GIVEN, None if shadow is None else shadow.flat)

    def _carrier(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor for the module that stands for ``values``, which nothing else refers to."""
        dense = torch.empty_like(values)
        if dense.stride() != values.stride() or values.untyped_storage().nbytes() != values.nbytes:
            values = dense.copy_(values)
        tensor = torch.empty_strided(values.shape, values.stride(), dtype=dtype, device=values.device).fill_(math.nan)
        return self._mark(tensor, PATHS, _flat(values))

    def _viewed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        before = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if any(self.is_path(leaf) and leaf.dtype not in before for leaf in tree_leaves(result)):
            raise self.refused(name, "it takes real numbers for something else")
        return result

    def _plain(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run an operation on constants; of memory from outside that it would change a copy is changed."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.refused(name, "what is random has no path norm; put the model in evaluation mode, model.eval()")
        arguments = named_arguments(func, args, kwargs) or {}
        for argument in func._schema.arguments:
            hidden = argument.name.startswith("running_")  # of batch norm by cuDNN, whose schema is silent
            if hidden or (argument.alias_info is not None and argument.alias_info.is_write):
                for tensor in tree_leaves(arguments[argument.name]):
                    if isinstance(tensor, Tensor):
                        self._own(tensor)
        originals: dict[int, Tensor] = {}

        def real(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or self.is_path(leaf):
                return leaf
            value = self.real(leaf)
            originals[id(value)] = leaf
            return value

        result = func(*tree_map(real, args), **tree_map(real, kwargs))

        def taken(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in originals and leaf.layout is torch.strided:
                self._made = {key: item for key, item in self._made.items() if not item.expired()}
                self._made[leaf.untyped_storage()._cdata] = StorageWeakRef(leaf.untyped_storage())
            return originals.get(id(leaf), leaf)

        return tree_map(taken, result)

    def _own(self, tensor: Tensor) -> None:
        """Let a copy stand for memory from outside."""
        key = tensor.untyped_storage()._cdata
        if key not in self._made and key not in self._shadows:
            self._mark(tensor, COPY, _flat(tensor).clone())

    def _follow(self, rule: _Rule, func: Any, name: str, arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        written = written_to(func)
        targets = [None if n is None else arguments[n] for n in written]
        for target in targets:
            if target is not None and not self.is_path(target):
                self._mark(target, PATHS, self.value(_flat(self.real(target))))
        call = _Call(self, func, name, arguments, args, kwargs)
        try:
            results = rule(call)
        except _NotCoveredError:
            raise
        except Exception as error:
            raise self.refused(name, f"this form of it is not known, {error!r}") from error
        several = isinstance(results, tuple | list)
        outputs = []
        for target, result in zip(targets, results if several else [results], strict=True):
            if target is not None:
                self.value(target).copy_(result)
                outputs.append(target)
            elif result.is_floating_point():
                outputs.append(self._carrier(result, call.dtype))
            else:
                outputs.append(self._mark(result, UNDEFINED))
        return tuple(outputs) if several else outputs[0]


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _flat(tensor: Tensor) -> Tensor:
    """All elements in the memory of a tensor, in their order."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of an operation, as a rule sees it; names are those of the operation's schema."""

    walk: _PathPass
    func: Any
    name: str
    arguments: dict[str, Any]
    args: Any
    kwargs: Any

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def value(self, name: str) -> Tensor:
        """Sums over paths, or the power of a constant."""
        return self.walk.value(self.arguments[name])

    def constant(self, name: str) -> Any:
        """An argument as it is, which must not depend on activations."""
        argument = self.arguments[name]
        if self.walk.is_path(argument):
            raise self.walk.refused(self.name, f"its {name!r} depends on activations")
        return self.walk.real(argument).to(widest(argument.device)) if isinstance(argument, Tensor) else argument

    def refused(self, reason: str = "it has no paths") -> _NotCoveredError:
        return self.walk.refused(self.name, reason)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the module gets to see."""
        if self.arguments.get("dtype") is not None:
            return self.arguments["dtype"]
        tensors = [
            leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor) and _is_real(leaf)
        ]
        dtypes = [tensor.dtype for tensor in tensors if tensor.ndim] or [tensor.dtype for tensor in tensors]
        return reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()

    def run(self) -> Any:
        """The operation itself, on sums over paths and powers of constants."""
        schema = {argument.name: argument for argument in self.func._schema.arguments}

        def changed(argument: Any, given: Any) -> Any:
            if argument.name == "dtype":
                return None
            if isinstance(given, int | float) and any(kind in str(argument.type) for kind in ("number", "Tensor")):
                return abs(given) ** self.walk.p
            keep = argument.name in ("index", "indices", "mask", "condition")
            return tree_map_only(Tensor, partial(self.walk.value, keep=keep), given)

        args = [changed(argument, given) for argument, given in zip(schema.values(), self.args, strict=False)]
        return self.func(*args, **{name: changed(schema[name], given) for name, given in self.kwargs.items()})


_Rule = Callable[[_Call], Any]
_RULES: dict[str, _Rule] = {}
_IDENTITIES = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "detach"})
_FACTORIES = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("zeros", "ones", "full", "empty", "empty_strided")
    for prefix, suffix in (("", "_like"), ("new_", ""))
)


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    """Register the rule for the ATen operations of these base names."""

    def register(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


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
def _multilinear(call: _Call) -> Tensor:
    """Sums of products of elements: paths join and continue, and take up the weights they meet."""
    return call.run()


@_rule("scatter", "scatter_add", "scatter_reduce", "index_reduce")
def _scattered(call: _Call) -> Tensor:
    if call.arguments.get("reduce") not in (None, "sum", "add"):
        raise call.refused("it does not add")
    return call.run()


@_rule("relu", "abs", "neg")
def _passing(call: _Call) -> Tensor:
    return call.value("self").clone()


@_rule("copy")
def _copied(call: _Call) -> Tensor:
    return call.value("src").expand(call["self"].shape)


@_rule("_to_copy")
def _converted(call: _Call) -> Tensor:
    if call["dtype"] is not None and not call["dtype"].is_floating_point:
        raise call.refused("it makes other numbers of activations")
    return call.value("self").to(call["device"] or call["self"].device, copy=True)


@_rule("sub", "rsub", "maximum", "minimum", "fmax", "fmin")
def _joined(call: _Call) -> Tensor:
    first, second = (
        call.value(name) if isinstance(call[name], Tensor) else abs(call[name]) ** call.walk.p
        for name in ("self", "other")
    )
    weight = abs(call.arguments.get("alpha", 1)) ** call.walk.p
    return weight * first + second if call.name == "rsub" else first + weight * second


@_rule("div")
def _divided(call: _Call) -> Tensor:
    if call.arguments.get("rounding_mode") is not None:
        raise call.refused()
    call.constant("other")
    return call.run()


@_rule("pow", "square")
def _raised(call: _Call) -> Tensor:
    exponent = call.arguments.get("exponent", 2)
    if not isinstance(exponent, int | float) or exponent < 1 or exponent != int(exponent):
        raise call.refused("its exponent is no positive integer")
    return call.value("self") ** exponent


@_rule("leaky_relu")
def _leaky(call: _Call) -> Tensor:
    return call.value("self") * max(1.0, abs(call["negative_slope"])) ** call.walk.p


@_rule("_prelu_kernel")
def _prelu(call: _Call) -> Tensor:
    call.constant("weight")
    return call.value("self") * call.value("weight").clamp(min=1.0)


@_rule("clamp", "clamp_min", "clamp_max", "hardtanh", "threshold")
def _clamped(call: _Call) -> Tensor:
    """A ReLU, if the one bound is zero."""
    bounds = [
        call[name] for name in ("min", "max", "min_val", "max_val", "threshold") if call.arguments.get(name) is not None
    ]
    if len(bounds) != 1 or isinstance(bounds[0], Tensor) or bounds[0] != 0 or call.arguments.get("value", 0) != 0:
        raise call.refused("it has a bound other than zero")
    return call.value("self").clone()


@_rule("batch_norm")
def _batch_norm(call: _Call) -> Tensor:
    """Gain and shift of evaluation mode, whatever the mode."""
    if call["running_mean"] is None or call["running_var"] is None:
        raise call.refused("it normalises by statistics of the batch")
    values, mean = call.value("input"), call.constant("running_mean")
    gain = (call.constant("running_var") + call["eps"]).rsqrt()
    if call["weight"] is not None:
        gain = call.constant("weight") * gain
    shift = -mean * gain
    if call["bias"] is not None:
        shift = call.constant("bias") + shift
    gain, shift = (
        vector.abs().pow(call.walk.p).reshape((1, -1) + (1,) * (values.ndim - 2)) for vector in (gain, shift)
    )
    return values * gain + shift


@_rule("mean")
def _mean(call: _Call) -> Tensor:
    total = call.run()
    count = call["self"].numel() / max(total.numel(), 1)
    return total * count ** (1 - call.walk.p)


@_rule("amax", "amin", "max", "min")
def _extreme(call: _Call) -> Any:
    values = call.value("self")
    if "other" in call.arguments:
        return values + call.value("other")
    if "dim" not in call.arguments:
        return values.sum()
    axes = call["dim"] if call["dim"] != [] else list(range(values.ndim))
    result = values.sum(axes, keepdim=call["keepdim"])
    return result if call.name.startswith("a") else _with_positions(result)


def _with_positions(result: Tensor) -> tuple[Tensor, Tensor]:
    return result, torch.zeros_like(result, dtype=torch.long)


def _separable(call: _Call, values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply maps ``[out, in]``, their elements to the power, along the last axes of ``values``, one for each axis."""
    for axis, matrix in enumerate(matrices, -len(matrices)):
        weight = matrix.to(values).abs().pow(call.walk.p)
        values = (values.movedim(axis, -1) @ weight.T).movedim(-1, axis)
    return values


def _sizes(given: int | Sequence[int], spatial: int, default: Sequence[int] = ()) -> list[int]:
    sizes = [given] if isinstance(given, int) else list(given or default)
    return sizes * spatial if len(sizes) == 1 else sizes


def _windows(
    length: int, kernel: int, stride: int, padding: int, dilation: int, *, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """Positions ``[out, kernel]`` of the elements in each window of a pooling, and which is which, ``[out, in]``."""
    steps = (length + 2 * padding - dilation * (kernel - 1) - 1) / stride
    count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
    if ceil_mode and (count - 1) * stride >= length + padding:
        count -= 1
    positions = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel) * dilation
    return positions, (positions[..., None] == torch.arange(length)).sum(1).double()


def _max_pool(call: _Call, spatial: int) -> tuple[Tensor, Tensor]:
    values = call.value("self")
    kernels = _sizes(call["kernel_size"], spatial)
    strides, paddings = _sizes(call["stride"], spatial, kernels), _sizes(call["padding"], spatial)
    sizes = zip(values.shape[-spatial:], kernels, strides, paddings, _sizes(call["dilation"], spatial), strict=True)
    return _with_positions(
        _separable(call, values, [_windows(*size, ceil_mode=call["ceil_mode"])[1] for size in sizes])
    )


def _avg_pool(call: _Call, spatial: int) -> Tensor:
    values = call.value("self")
    kernels = _sizes(call["kernel_size"], spatial)
    strides, paddings = _sizes(call["stride"], spatial, kernels), _sizes(call["padding"], spatial)
    matrices = []
    for length, kernel, stride, padding in zip(values.shape[-spatial:], kernels, strides, paddings, strict=True):
        positions, matrix = _windows(length, kernel, stride, padding, 1, ceil_mode=call["ceil_mode"])
        if call["divisor_override"] is None:
            inside = positions < length + padding
            counts = inside.sum(1) if call["count_include_pad"] else matrix.sum(1)
            matrix = matrix / counts[:, None]
        matrices.append(matrix)
    return _separable(call, values, matrices) / (call["divisor_override"] or 1) ** call.walk.p


def _adaptive(length: int, count: int) -> Tensor:
    """Which elements are in each window of an adaptive pooling, ``[out, in]``."""
    numbers, places = torch.arange(count)[:, None], torch.arange(length)
    first, end = numbers * length // count, -(-(numbers + 1) * length // count)
    return ((places >= first) & (places < end)).double()


def _adaptive_matrices(call: _Call, spatial: int) -> list[Tensor]:
    lengths = call["self"].shape[-spatial:]
    return [_adaptive(*sizes) for sizes in zip(lengths, _sizes(call["output_size"], spatial), strict=True)]


def _adaptive_avg_pool(call: _Call, spatial: int) -> Tensor:
    matrices = [matrix / matrix.sum(1, keepdim=True) for matrix in _adaptive_matrices(call, spatial)]
    return _separable(call, call.value("self"), matrices)


def _adaptive_max_pool(call: _Call, spatial: int) -> tuple[Tensor, Tensor]:
    return _with_positions(_separable(call, call.value("self"), _adaptive_matrices(call, spatial)))


def _resized(call: _Call, spatial: int) -> Tensor:
    """Interpolation, axis by axis; its weights are what it makes of single pixels."""
    values = call.value("self" if "self" in call.arguments else "input")
    scales = call.arguments.get("scale_factors") or [
        v for name, v in call.arguments.items() if name.startswith("scales")
    ]
    scales = scales or [None] * spatial
    lengths = values.shape[-spatial:]
    resize = getattr(torch.ops.aten, call.name).default
    matrices = []
    for axis, (length, scale) in enumerate(zip(lengths, scales, strict=True)):
        size = call["output_size"][axis] if call["output_size"] else math.floor(length * scale)
        pixels = torch.eye(length, dtype=values.dtype, device=values.device)
        # Two alike along the other axes: with one, the antialiasing operations of torch 2.13 are wrong.
        pixels = pixels.reshape(1, length, *(length if k == axis else 1 for k in range(spatial)))
        pixels = pixels.expand(1, length, *(length if k == axis else 2 for k in range(spatial))).contiguous()
        others = [(size, scale) if k == axis else (2, None) for k in range(spatial)]
        weights = resize(pixels, [s for s, _ in others], call["align_corners"], *(s for _, s in others))
        matrices.append(weights[0].movedim(axis + 1, 1).reshape(length, size, -1)[..., 0].T)
    return _separable(call, values, matrices)


for _spatial in (2, 3):  # those along one axis consist of these
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
