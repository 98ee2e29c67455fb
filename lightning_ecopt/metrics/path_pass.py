"""A call of a module that finds sums over paths instead of activations.

A *path* leads from an element of the input, or a bias, along one weight of each layer to an element of the output. For
two layers, y = V relu(W x + b) + c, the sum of the products of absolute weights along all paths is

    1' (|V| (|W| 1 + |b|) + |c|)

which is the network itself, called with ones, with absolute weights and without ReLUs; for the ``p``-th powers of the
products, weights are raised to the power p. :class:`PathPass` makes any module compute this in one call. While it is
entered, it intercepts every ATen operation, and a rule computes the sums over all paths to the elements of the output
from those to the elements of the inputs: ``mm`` multiplies them by ``|W|^p``, ``add`` adds them, ``relu`` returns them
as they are.

Operations on parameters and constants alone are computed as they are. So a weight that is normalised, pruned or merged
from others counts as the one weight that it is, and only where it meets an activation it is raised to the power.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_ecopt.common.tensors import widest
from lightning_ecopt.symmetry.aten import base_name, named_arguments, written_to

#: What a piece of memory may stand for. PATHS: for each element the sum over all paths to it. GIVEN: integers and truth
#: values of the inputs, and all that is made of them alone. UNDEFINED: integers that depend on activations, such as
#: positions of maxima. COPY: a constant from outside that the call writes to, so that a copy is written to instead.
PATHS, GIVEN, UNDEFINED, COPY = range(4)

#: Operations through which paths lead as they are; a dropout is an identity in evaluation mode.
_IDENTITIES = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "detach"})
#: Operations whose results depend on nothing of a tensor but its shape.
_FACTORIES = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("zeros", "ones", "full", "empty", "empty_strided")
    for prefix, suffix in (("", "_like"), ("new_", ""))
)


class NotCoveredError(ValueError):
    """An operation has no paths."""


@dataclass(frozen=True, eq=False)
class _Shadow:
    """What a piece of memory stands for during the call.

    Args:
        reference: keeps the address of the memory from being used again while the shadow is known.
        kind: one of the kinds above.
        flat: what the elements stand for, in the order of the memory; ``None`` if they stand for themselves.
    """

    reference: StorageWeakRef
    kind: int
    flat: Tensor | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """Return what stands for a tensor in this memory."""
        assert self.flat is not None
        return self.flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class PathPass(TorchDispatchMode):
    """Lets operations compute sums over paths while it is entered.

    The module sees *carriers*: tensors of the right shapes, types and strides whose values are undefined (NaN). What
    they stand for is looked up by their memory. So a view of a carrier, and a change of a view in place, need no rules:
    the same view of the sums is meant.

    Args:
        module: gives the names of the modules in which operations run, for errors.
        p: exponent of the weights.
        rules: by the base names of ATen operations.

    Example::

        paths = PathPass(model, 1.0, RULES)
        ones = paths.enter(x)
        with paths:
            y = model(ones)
        paths.value(y).sum()
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, p: float, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.p = p
        self._rules = rules
        self._names = {id(part): name for name, part in module.named_modules()}
        self._shadows: dict[int, _Shadow] = {}
        self._made: dict[int, StorageWeakRef] = {}

    def enter(self, tensor: Tensor) -> Tensor:
        """Return what the module is given for one of its inputs: one path begins at each real number."""
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
        operation = PathOperation(self, func, name, arguments, args, kwargs)
        shadows = [self._find(tensor) for tensor in operation.tensors]
        kinds = {shadow.kind for shadow in shadows if shadow is not None} - {COPY}
        rule = self._rules.get(name) if kinds else None
        if name in _IDENTITIES:
            return operation["input" if "input" in arguments else "self"]
        if rule is None:  # but never where there is a rule: the parts may have other paths than the whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if _is_view(func):
            return self._view(operation)
        if not kinds or name in _FACTORIES:
            return self._as_is(operation)
        if UNDEFINED in kinds:
            raise self.refused(name, "it uses positions of maxima, which depend on the data")
        if all(not _is_real(tensor) or self._is(GIVEN, tensor) for tensor in operation.tensors):
            return tree_map_only(Tensor, self._given, self._as_is(operation))
        if rule is None:
            raise self.refused(name)
        return self._follow(rule, operation)

    def refused(self, name: str, reason: str = "it has no paths") -> NotCoveredError:
        """Return the error for an operation that is not covered, with the module in which it runs."""
        # The innermost module on the stack is the one whose code calls the operation.
        frame = sys._getframe(1)
        place = "no module"
        while frame is not None:
            part = frame.f_locals.get("self")
            if isinstance(part, nn.Module) and id(part) in self._names:
                path = self._names[id(part)]
                place = f"module {path!r} ({type(part).__name__})" if path else type(part).__name__
                break
            frame = frame.f_back  # type: ignore[assignment]
        return NotCoveredError(f"PathNorm does not cover the operation {name!r} in {place}: {reason}")

    def value(self, tensor: Tensor, *, keep: bool = False) -> Tensor:
        """Return the sums over paths to the elements of a tensor; of a constant w the power ``|w|^p``.

        Args:
            tensor: any that an operation is given.
            keep: return a constant as it is.
        """
        shadow = self._find(tensor)
        if shadow is not None and shadow.kind == PATHS:
            return shadow.view(tensor)
        real = self.real(tensor)
        if keep or tensor.dtype is torch.bool:
            return real
        return real.to(widest(tensor.device)).abs().pow(self.p)

    def real(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor that does not depend on activations."""
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
        self._shadows = {key: shadow for key, shadow in self._shadows.items() if not shadow.reference.expired()}
        storage = tensor.untyped_storage()
        self._shadows[storage._cdata] = _Shadow(StorageWeakRef(storage), kind, flat)
        return tensor

    def _given(self, tensor: Tensor) -> Tensor:
        shadow = self._find(tensor)
        return self._mark(tensor, GIVEN, None if shadow is None else shadow.flat)

    def _carrier(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor for the module that stands for ``values``, which nothing else refers to."""
        # The carrier has the strides of the values, so these must fill their memory without gaps, as empty_like does.
        dense = torch.empty_like(values)
        if dense.stride() != values.stride() or values.untyped_storage().nbytes() != values.nbytes:
            values = dense.copy_(values)
        tensor = torch.empty_strided(values.shape, values.stride(), dtype=dtype, device=values.device).fill_(math.nan)
        return self._mark(tensor, PATHS, _flat(values))

    def _view(self, operation: PathOperation) -> Any:
        """Run an operation that returns views: the memory of the result is known already."""
        result = operation.func(*operation.args, **operation.kwargs)
        before = {tensor.dtype for tensor in operation.tensors}
        if any(self.is_path(leaf) and leaf.dtype not in before for leaf in tree_leaves(result)):
            raise operation.refused("it takes real numbers for something else")
        return result

    def _as_is(self, operation: PathOperation) -> Any:
        """Run an operation on the values of constants; of memory from outside that it writes to, a copy is changed."""
        if torch.Tag.nondeterministic_seeded in operation.func.tags:
            raise operation.refused("what is random has no path norm; put the model in evaluation mode, model.eval()")
        for argument in operation.func._schema.arguments:
            hidden = argument.name.startswith("running_")  # of batch norm by cuDNN, whose schema does not say so
            if hidden or (argument.alias_info is not None and argument.alias_info.is_write):
                for leaf in tree_leaves(operation[argument.name]):
                    if isinstance(leaf, Tensor):
                        self._copy_from_outside(leaf)
        originals: dict[int, Tensor] = {}

        def real(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or self.is_path(leaf):
                return leaf
            value = self.real(leaf)
            originals[id(value)] = leaf
            return value

        result = operation.func(*tree_map(real, operation.args), **tree_map(real, operation.kwargs))

        def returned(leaf: Any) -> Any:
            # An operation in place returns its argument: the module must get its own tensor, not the copy.
            if not isinstance(leaf, Tensor) or id(leaf) in originals:
                return originals.get(id(leaf), leaf)
            if leaf.layout is torch.strided:
                self._made = {key: made for key, made in self._made.items() if not made.expired()}
                self._made[leaf.untyped_storage()._cdata] = StorageWeakRef(leaf.untyped_storage())
            return leaf

        return tree_map(returned, result)

    def _copy_from_outside(self, tensor: Tensor) -> None:
        """Let a copy stand for memory that was there before the call."""
        key = tensor.untyped_storage()._cdata
        if key not in self._made and key not in self._shadows:
            self._mark(tensor, COPY, _flat(tensor).clone())

    def _follow(self, rule: Rule, operation: PathOperation) -> Any:
        """Let a rule compute the results of an operation, and write or return them as the operation would."""
        targets = [None if name is None else operation[name] for name in written_to(operation.func)]
        for target in targets:
            if target is not None and not self.is_path(target):
                # A constant that becomes an activation: zeros that parts are written to, for instance.
                self._mark(target, PATHS, self.value(_flat(self.real(target))))
        try:
            results = rule(operation)
        except NotCoveredError:
            raise
        except Exception as error:
            raise operation.refused(f"this form of it is not known, {error!r}") from error
        several = isinstance(results, tuple | list)
        outputs = []
        for target, result in zip(targets, results if several else [results], strict=True):
            if target is not None:
                self.value(target).copy_(result)
                outputs.append(target)
            elif result.is_floating_point():
                outputs.append(self._carrier(result, operation.dtype))
            else:
                outputs.append(self._mark(result, UNDEFINED))
        return tuple(outputs) if several else outputs[0]


def _is_view(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return torch.Tag.inplace_view in func.tags or any(alias is not None and not alias.is_write for alias in returned)


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _flat(tensor: Tensor) -> Tensor:
    """All elements in the memory of a tensor, in their order."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


@dataclass(frozen=True, eq=False)
class PathOperation:
    """One call of an operation, as a rule sees it. Arguments have the names of the operation's schema.

    Args:
        paths: the pass in which it is called.
        func: the operation.
        name: its base name, the same for its form in place.
        arguments: all of them, by name; those that are not given have their defaults.
        args: as given by position.
        kwargs: as given by name.
    """

    paths: PathPass
    func: Any
    name: str
    arguments: dict[str, Any]
    args: Any
    kwargs: Any

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def p(self) -> float:
        """Exponent of the weights."""
        return self.paths.p

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def value(self, name: str) -> Tensor:
        """Return the sums over paths to the elements of an argument; of a constant w the power ``|w|^p``."""
        return self.paths.value(self.arguments[name])

    def constant(self, name: str) -> Any:
        """Return an argument as it is; it must not depend on activations."""
        argument = self.arguments[name]
        if self.paths.is_path(argument):
            raise self.refused(f"its {name!r} depends on activations")
        return self.paths.real(argument).to(widest(argument.device)) if isinstance(argument, Tensor) else argument

    def refused(self, reason: str = "it has no paths") -> NotCoveredError:
        """Return the error for this operation."""
        return self.paths.refused(self.name, reason)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the result that the module gets to see."""
        if self.arguments.get("dtype") is not None:
            return self.arguments["dtype"]
        real = [tensor for tensor in self.tensors if _is_real(tensor)]
        # As torch promotes: a tensor without axes does not decide where there are others.
        dtypes = [tensor.dtype for tensor in real if tensor.ndim] or [tensor.dtype for tensor in real]
        return reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()

    def run(self) -> Any:
        """Run the operation itself, on sums over paths and powers of constants."""
        schema = {argument.name: argument for argument in self.func._schema.arguments}

        def changed(argument: Any, given: Any) -> Any:
            if argument.name == "dtype":
                return None
            if isinstance(given, int | float) and any(kind in str(argument.type) for kind in ("number", "Tensor")):
                return abs(given) ** self.p
            keep = argument.name in ("index", "indices", "mask", "condition")
            return tree_map_only(Tensor, partial(self.paths.value, keep=keep), given)

        args = [changed(argument, given) for argument, given in zip(schema.values(), self.args, strict=False)]
        return self.func(*args, **{name: changed(schema[name], given) for name, given in self.kwargs.items()})


#: Returns the sums over paths to the elements of an operation's output.
Rule = Callable[[PathOperation], Any]
