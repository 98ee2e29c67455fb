"""What the schema of an ATen operation tells: its name, its arguments, and which of them it writes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.common.nested import tensors_in

#: Methods by which values leave torch. No operation shows what becomes of them.
EXITS = frozenset(
    {"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "__reduce_ex__", "storage", "untyped_storage"}
)


def base_name(func: Any) -> str:
    """The name under which an operation has its rule: ``relu`` for ``aten.relu.default`` and ``aten.relu_.default``.

    Overloads and in-place forms share it. Operations outside of ``aten`` keep their namespace: ``prim::device``.
    """
    schema = getattr(func, "_schema", None)
    if schema is None:
        return str(func)
    namespace, _, name = schema.name.partition("::")
    if namespace != "aten":
        return str(schema.name)
    in_place = name.endswith("_") and not name.endswith("__") and schema.is_mutable
    return name[:-1] if in_place else name


def named_arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments by their names in the schema, defaults filled in; ``None`` if the operation has no schema."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    named = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(args):
            named[argument.name] = args[position]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def written_to(func: Any) -> list[str | None]:
    """For each output the argument in whose memory it is, or ``None``: ``["self"]`` for ``relu_``."""
    names = {
        alias: argument.name
        for argument in func._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
        for alias in argument.alias_info.before_set
    }
    aliases = [value.alias_info.before_set if value.alias_info else () for value in func._schema.returns]
    return [next((names[alias] for alias in output if alias in names), None) for output in aliases]


def changed_tensors(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes in place; all tensors among them if it has no schema."""
    arguments = named_arguments(func, args, kwargs)
    if arguments is None:
        return tensors_in((args, kwargs))
    changed = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    return tensors_in([arguments[name] for name in changed])


#: Operations on lists of tensors that are taken down tensor by tensor.
_FOREACH = frozenset({"add", "sub", "mul", "div", "lerp", "copy", "addcmul", "addcdiv", "neg", "zero"})


def tensor_by_tensor(name: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Callable[[], Any]] | None:
    """The calls that an operation on lists of tensors stands for: ``lerp_`` of each for ``_foreach_lerp_``.

    Args:
        name: the base name of the operation.
        func: the operation.
        args: its arguments.
        kwargs: likewise.
    """
    single = name.removeprefix("_foreach_")
    if single == name or single not in _FOREACH or not args or kwargs.keys() - {"alpha", "value"}:
        return None
    count, given, named = len(args[0]), list(args), dict(kwargs)
    if single in ("addcmul", "addcdiv") and len(given) == 4:
        if isinstance(given[3], Tensor):
            return None
        named["value"] = given.pop()  # `scalars` of a list is the `value` of a tensor

    def of(number: int, argument: Any) -> Any:
        return argument[number] if isinstance(argument, list | tuple) else argument

    operation = getattr(torch.ops.aten, f"{single}_" if func._schema.is_mutable else single)
    return [
        partial(
            operation, *(of(k, argument) for argument in given), **{key: of(k, each) for key, each in named.items()}
        )
        for k in range(count)
    ]


def is_inexact(tensor: Tensor) -> bool:
    """Whether the tensor holds real or complex numbers that a scale can multiply."""
    return (tensor.dtype.is_floating_point or tensor.dtype.is_complex) and tensor.layout is torch.strided
