"""Operations on tensors for whose rows data choose among cases (:class:`~lightning_ecopt.symmetry.labels.Cases`).

An operation that treats all rows alike, and does not mix them, does to the row of a case what it would do to it if all
rows were of this case. So its rule is asked about that, for all cases at once: labels, shapes and axes have one more
axis in front. All other operations, and those on tensors of two choices, see one label for all cases.

Example, two layers of experts, where row ``t`` of ``x`` belongs to the expert ``e[t]``::

    h = bmm(up[e], x[:, :, None]).relu()  # as matmul(up[:, None], x[:, :, None]).relu(): [experts, rows, units, 1]
    y = bmm(down[e], h)  # by the same e, so that the units of an expert meet weights of the same expert
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_ecopt.symmetry.labels import Cases, Choice, IntArray, Label, Value, align, compressed, map_value
from lightning_ecopt.symmetry.rules.contractions import contract
from lightning_ecopt.symmetry.rules.registry import Call, Rule, rule

Axes = tuple[int, ...]
#: From a call, an argument that has cases and the axes of its rows: the axes of the output's rows, and the arguments
#: that name axes with one more in front; ``None`` if the operation mixes rows.
RowAxes = Callable[[Call, str, Axes], tuple[Axes, dict[str, Any]] | None]


def by_case(name: str, function: Rule, call: Call) -> Any:
    """What a rule says of a call: of each case by itself, where the operation keeps rows apart."""
    cases = {key: value for key, value in call.values.items() if isinstance(value, Cases)}
    if not cases or name not in _ROWS:
        return function(call)
    own = {key: cases[id(argument)] for key, argument in call.arguments.items() if id(argument) in cases}
    choices = {value.choice for value in cases.values()}
    rows = [_ROWS[name](call, key, value.axes) for key, value in own.items()]
    if len(choices) > 1 or rows[0] is None or any(other != rows[0] for other in rows):
        return function(call)
    (choice,), (axes, arguments) = choices, rows[0]
    labels: Any = function(_of_all(call, choice.number, arguments, broadcast=name in _BROADCAST))
    if isinstance(labels, list | tuple):
        return [Cases(choice, axes, label).simplified(compressed) for label in labels]
    return Cases(choice, axes, labels).simplified(compressed)


@dataclass(frozen=True)
class _Output:
    """What a rule asks of an output, of one in which every row is there for every case."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.layout

    @property
    def ndim(self) -> int:
        return len(self.shape)


def _of_all(call: Call, number: int, arguments: Mapping[str, Any], *, broadcast: bool) -> Call:
    """The same call with one more axis in front of all tensors, along which the cases lie."""
    ndim = max(t.ndim for t in tree_leaves(call.output)) if broadcast else 0

    def extended(value: Value | Cases, missing: int) -> Value:
        def change(ids: IntArray) -> IntArray:
            first, rest = (ids.shape[:1], ids.shape[1:]) if isinstance(value, Cases) else ((1,), ids.shape)
            return ids.reshape((*first, *(1,) * missing, *rest))

        return map_value(value.value if isinstance(value, Cases) else value, change)

    missing = {key: max(ndim - len(shape), 0) for key, shape in call.shapes.items()}
    return replace(
        call,
        values={key: extended(value, missing[key]) for key, value in call.values.items()},
        shapes={key: (number, *(1,) * missing[key], *shape) for key, shape in call.shapes.items()},
        output=tree_map_only(Tensor, lambda t: _Output((number, *t.shape), t.dtype, t.layout), call.output),
        arguments={**call.arguments, **arguments},
    )


# Where rows lie after an operation ------------------------------------------------------------------------------------


def _broadcast(call: Call, name: str, axes: Axes) -> tuple[Axes, dict[str, Any]] | None:
    """Element by element."""
    shape, whole = call.shape(name), tuple(tree_leaves(call.output)[0].shape)
    moved = tuple(axis + len(whole) - len(shape) for axis in axes)
    fits = all(new >= 0 and whole[new] == shape[old] for old, new in zip(axes, moved, strict=True))
    return (moved, {}) if fits else None


def _product(call: Call, name: str, axes: Axes) -> tuple[Axes, dict[str, Any]] | None:
    """A matrix product, whose left factor is summed over its last axis, and its right one over the last but one."""
    summed = {"self": 1, "mat1": 1, "batch1": 1, "mat2": 2, "batch2": 2}
    if name == "self" and not ("mat2" in call.arguments and "mat1" not in call.arguments):
        return _broadcast(call, name, axes)  # what is added
    return None if call.output.ndim - summed[name] in axes else (axes, {})


def _along(call: Call, name: str, axes: Axes) -> tuple[Axes, dict[str, Any]] | None:
    """Along one axis or several, which are gone afterwards or not."""
    ndim, dim = len(call.shape(name)), call.arguments.get("dim")
    lost = ndim - tree_leaves(call.output)[0].ndim
    if dim is None or dim == [] or set(call.axes("dim")) & set(axes) or lost not in (0, len(call.axes("dim"))):
        return None
    gone = call.axes("dim") if lost else ()
    moved = tuple(axis - sum(other < axis for other in gone) for axis in axes)
    return moved, {"dim": dim % ndim + 1 if isinstance(dim, int) else [axis + 1 for axis in call.axes("dim")]}


def _permuted(call: Call, name: str, axes: Axes) -> tuple[Axes, dict[str, Any]] | None:
    order = call.axes("dims")
    return tuple(order.index(axis) for axis in axes), {"dims": [0, *(axis + 1 for axis in order)]}


def _turned(call: Call, name: str, axes: Axes) -> tuple[Axes, dict[str, Any]] | None:
    return (tuple(1 - axis for axis in axes), {}) if len(call.shape(name)) == 2 else None


def _transposed(call: Call, name: str, axes: Axes) -> tuple[Axes, dict[str, Any]] | None:
    (first,), (second,) = call.axes("dim0"), call.axes("dim1")
    swapped = {first: second, second: first}
    return tuple(swapped.get(axis, axis) for axis in axes), {"dim0": first + 1, "dim1": second + 1}


def _unsqueezed(call: Call, name: str, axes: Axes) -> tuple[Axes, dict[str, Any]] | None:
    place = call["dim"] % call.output.ndim
    return tuple(axis + (axis >= place) for axis in axes), {}


def _reshaped(call: Call, name: str, axes: Axes) -> tuple[Axes, dict[str, Any]] | None:
    """Rows that lie along neighbouring axes may be numbered in another way, if no other axis is taken in.

    Axes of size one beside them are taken for axes of rows, too: a batch of one looks like that.
    """
    old, new = call.shape(name), tuple(call.output.shape)
    if not axes:
        return axes, {}
    if axes != tuple(range(axes[0], axes[0] + len(axes))) or prod(old) == 0:
        return None
    before, until = prod(old[: axes[0]]), prod(old[: axes[-1] + 1])
    bounds = [prod(new[:k]) for k in range(len(new) + 1)]
    if before not in bounds or until not in bounds:
        return None
    moved = tuple(range(bounds.index(before), len(bounds) - 1 - bounds[::-1].index(until)))
    return (moved, {}) if moved else None


_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
_BROADCAST = {
    *("relu", "leaky_relu", "abs", "absolute", "neg", "negative", "nan_to_num", "_prelu_kernel", "native_dropout"),
    *(
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "hardtanh",
        "threshold",
        "pow",
        "square",
        "sqrt",
        "rsqrt",
        "reciprocal",
    ),
    *("add", "sub", "subtract", "rsub", "maximum", "minimum", "mul", "multiply", "div", "divide", "true_divide"),
    *("addcmul", "addcdiv", "where", "masked_fill", "copy", "gt", "ge", "lt", "le", "eq", "ne"),
    *("detach", "clone", "alias", "positive", "_to_copy", "expand", *_PRODUCTS),
}
_ROWS: dict[str, RowAxes] = {
    **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(("slice", "select", "split", "split_with_sizes", "unbind", "squeeze", "glu"), _along),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "nansum"), _along),
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias"), _reshaped),
    "t": _turned,
    "permute": _permuted,
    "transpose": _transposed,
    "unsqueeze": _unsqueezed,
}


# Rows that lie between offsets ----------------------------------------------------------------------------------------


@rule("_grouped_mm")
def grouped_product(call: Call) -> Label | Cases:
    """``offs`` cuts an axis, here of t, into groups e.

    [t, k] @ [e, k, n] = [t, n] and [e, m, k] @ [k, t] = [m, t] multiply the rows or columns of each group by a matrix
    of their own, [m, t] @ [t, n] = [e, m, n] sums over each group, and without ``offs`` it is a batch of products.
    """
    call.hold_fixed("bias")
    offsets, (first, second) = call["offs"], (len(call.shape(name)) for name in ("self", "mat2"))
    if offsets is None:
        return contract(call, call.value("self"), call.value("mat2"), 3)
    choice = Choice("group", call.values_of(offsets), offsets.shape[0])

    def of_all(name: str, rows: int) -> Value:
        value = call.values[id(call[name])]
        if len(call.shape(name)) == 2 and isinstance(value, Cases) and (value.choice, value.axes) == (choice, (rows,)):
            return value.value
        return map_value(call.value(name), lambda ids: align(ids, 3))

    label = contract(call, of_all("self", 0 if second == 3 else 1), of_all("mat2", 1 if first == 3 else 0), 3)
    return label if first == second else Cases(choice, (0 if second == 3 else 1,), label)
