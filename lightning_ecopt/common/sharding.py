"""Parameters of which each rank holds a part only, as FSDP2, FSDP1 and tensor parallelism leave them.

Code that is written for whole tensors works for sharded ones after three changes. None of them costs anything where
nothing is sharded.

- Read and change the :func:`local` tensors, in the :func:`parts` of a region that are on this rank. There may be
  several, and none of them need have a whole row.
- Add up sums over units with :meth:`Ranks.sum_`, which gives all ranks the same bits. What several ranks hold enters
  such a sum on one of them only: ask :meth:`Ranks.counts`.
- Call :meth:`Ranks.sum_` on all ranks in the same order, even on a rank that has nothing to add; otherwise the ranks
  wait for each other forever.

FSDP2 (``fully_shard``) and tensor parallelism make ``DTensor``s, which tell how they are cut and have the shape of the
whole. FSDP1 (``FullyShardedDataParallel``) leaves pieces with one axis in the parameters; :mod:`.flat` knows of what.
Such a piece tells by what it *is*: ask about the parameter itself, not about what ``detach`` returns.

``torch.distributed.fsdp`` takes half a second to import, so that nothing here does it: a tensor can only be a
``DTensor``, and a module an ``FSDPModule``, if somebody else has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import compress
from math import prod
from types import MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_ecopt.common import flat
from lightning_ecopt.common.parts import Cut, Grid, Layout, Part

#: Prefixes of the modules whose hooks and wrapped methods gather parameters, or cut inputs as parameters are cut.
GATHERING = ("torch.distributed.fsdp._fully_shard", "torch.distributed.tensor")


def may_be_sharded() -> bool:
    """Return whether anything can be sharded in this process, which asks less than each tensor."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each rank holds a part of the tensor, or a copy: a ``DTensor``, or a parameter under FSDP1."""
    if type(tensor) is Tensor:  # nearly always so; the look-up below costs more
        return False
    return flat.is_piece(tensor) or (type(tensor) is not nn.Parameter and _is_dtensor(tensor))


def _is_dtensor(tensor: Tensor) -> bool:
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def can_be_rescaled(parameter: Tensor) -> bool:
    """Return whether a parameter has real numbers and is a plain or a sharded tensor.

    Complex numbers, integers and what a subclass of ``Tensor`` makes of its values (a quantised weight, say) are held
    fixed: the base optimizer steps them where they are.
    """
    plain = type(parameter) is nn.Parameter or type(parameter.data) is Tensor  # `data` makes a tensor, which costs more
    return (plain or is_sharded(parameter)) and parameter.is_floating_point()


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory: all of it, if the tensor is not sharded."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter or not _is_dtensor(tensor):  # of each in each step
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        return sharded.to_local()


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor that is placed on the ranks as a parameter of its shape is: itself, or a redistributed copy.

    Backward passes of tensor parallelism leave partial sums at replicated parameters (gains of sequence-parallel norms)
    and whole gradients at sharded ones (embeddings that are split by words); SGD begins its momentum with a copy of
    them. The optimizers of torch redistribute them, too, operation by operation.
    """
    if not is_sharded(tensor) or not is_sharded(parameter):
        return tensor
    sharded, like = cast(Any, tensor), cast(Any, parameter)
    if sharded.placements == like.placements:
        return tensor
    with torch.no_grad():
        return cast(Tensor, sharded.redistribute(like.device_mesh, like.placements))


def parts(region: tuple[slice, ...], parameter: Tensor) -> list[Part]:
    """Return what this rank holds of a region of a parameter, in boxes that do not overlap; none if that is nothing.

    Args:
        region: slices of the whole parameter, with a start, a stop and a positive step.
        parameter: the parameter, or another tensor that is sharded like it.

    Example::

        for part in parts((slice(0, 6, 1), slice(0, 3, 1)), parameter):
            part.view(local(parameter)).mul_(part.cut(factors))  # factors [6, 1], of rows
    """
    layout = layout_of(parameter)
    return [Part.whole(region)] if layout is None else layout.parts(region)


def layout_of(tensor: Tensor) -> Layout | None:
    """Return which elements of a tensor this rank holds; ``None`` if it holds all of them.

    Raises:
        ValueError: if the local tensor of a ``DTensor`` has another shape than its placements say, or nobody knows of
            what a parameter under FSDP1 is a piece.
    """
    if not _is_cut(tensor):
        return None
    if not _is_dtensor(tensor):
        return flat.piece_of(tensor).layout
    sharded: Any = tensor
    place, sizes = sharded.device_mesh.get_coordinate(), sharded.device_mesh.shape
    cuts = [
        Cut(placement.dim, sizes[k], place[k], getattr(placement, "split_factor", 1))
        for k, placement in enumerate(sharded.placements)
        if not placement.is_replicate()
    ]
    layout = Grid.of(tensor.shape, cuts)
    if layout.local_shape != local(tensor).shape:
        raise ValueError(
            f"A DTensor of shape {list(tensor.shape)} with the placements {sharded.placements} has a local tensor of "
            f"shape {list(local(tensor).shape)}, where {list(layout.local_shape)} is expected: make it with "
            "distribute_tensor, parallelize_module or fully_shard, which cut as torch.chunk does."
        )
    return layout


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a whole tensor, of which this rank may hold a part."""
    layout = None if type(tensor) is not nn.Parameter and _is_dtensor(tensor) else layout_of(tensor)
    return tuple(tensor.shape) if layout is None else layout.shape


def shapes_of(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of whole parameters by name, with one axis for those that have none."""
    return {name: whole_shape(parameter) or (1,) for name, parameter in parameters.items()}


def num_elements(tensor: Tensor) -> int:
    """Return how many elements a whole tensor has."""
    return prod(whole_shape(tensor))


@dataclass(frozen=True)
class _Holders:
    """The ranks that share a tensor.

    Args:
        numbers: their global numbers.
        is_copy: whether an earlier one of them holds the same part of the tensor as this rank.
        device: where they exchange; parameters may be offloaded to the CPU, where NCCL cannot reach them.
        group: returns their process group.
    """

    numbers: Sequence[int]
    is_copy: bool
    device: torch.device
    group: Callable[[], Any]


def _holders(tensor: Any) -> _Holders:
    """The ranks that share a sharded tensor."""
    if not _is_dtensor(tensor):
        piece = flat.piece_of(tensor)
        return _Holders(piece.ranks, piece.is_copy, piece.device, lambda: piece.process_group)
    mesh = tensor.device_mesh
    places = zip(mesh.get_coordinate() or (), tensor.placements, strict=False)  # there is no place for other ranks
    is_copy = any(place for place, placement in places if placement.is_replicate())
    return _Holders(_numbers(mesh), is_copy, torch.device(mesh.device_type), partial(_group_of, mesh))


class Ranks:
    """Adds up what the ranks find, each in its parts of the sharded parameters.

    Parameters may be cut over different dimensions of a mesh: a sum goes over all ranks of the mesh, and each element
    enters it once. Of ranks that hold the same, as replicas do, the first one counts.

    Args:
        parameters: all parameters by name; if none of them is cut, there is nothing to add up.

    Raises:
        ValueError: if a parameter is a partial sum, this rank is not in its mesh, or it is sharded over ranks of which
            only some are among those of another parameter.

    Example::

        ranks = Ranks(group.parameters)
        total = torch.zeros((), dtype=torch.float64)
        for parameter in group.parameters.values():
            if ranks.counts(parameter):
                total += local(parameter).double().square().sum()
        ranks.sum_(total)  # the sum of squares of all parameters, on every rank
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        found: dict[str, _Holders] = {}
        for name, parameter in parameters.items():
            if is_sharded(parameter):
                _check(name, parameter)
                if _is_cut(parameter):
                    found[name] = _holders(parameter)
        # The ranks of the largest mesh exchange what they find.
        self._all = max(found.values(), key=lambda holders: len(holders.numbers), default=None)
        for name, holders in found.items():
            if self._all is not None and not set(holders.numbers) <= set(self._all.numbers):
                other = next(name for name, holders in found.items() if holders is self._all)
                raise ValueError(
                    f"{name} is sharded over the ranks {[*holders.numbers]} and {other} over {[*self._all.numbers]}: "
                    "shard all parameters that are trained over one mesh, or over dimensions of one mesh."
                )

    @property
    def are_several(self) -> bool:
        """Whether ranks exchange what they find."""
        return self._all is not None

    @property
    def process_group(self) -> Any:
        """The ranks that exchange what they find, as ``torch.distributed`` knows them; ``None`` if none do."""
        return None if self._all is None else self._all.group()

    def counts(self, tensor: Tensor) -> bool:
        """Return whether this rank's part of a tensor enters sums.

        Of several ranks that hold the same part, or the whole tensor, it does so on the first one only.
        """
        if self._all is None:
            return True
        if not _is_cut(tensor):
            return torch.distributed.get_rank() == self._all.numbers[0]
        holders = _holders(tensor)
        # A submesh is one of several, of which each holds the same; the first of them has the first rank.
        return not holders.is_copy and self._all.numbers[0] in holders.numbers

    def sum_(self, values: Tensor) -> Tensor:
        """Add up ``values`` over the ranks, in place, to the same bits on all of them; returns ``values``."""
        if self._all is not None:
            there = values.to(self._all.device)
            torch.distributed.all_reduce(there, group=self._all.group())
            if there is not values:
                values.copy_(there)
        return values

    def any_(self, values: Tensor) -> Tensor:
        """Set each entry of a ``bool`` tensor that is set on one of the ranks, in place; returns ``values``."""
        if self._all is not None:
            values.copy_(self.sum_(values.to(torch.int32)) > 0)
        return values

    def have_same(self, text: str) -> bool:
        """Return whether this text is the same on all ranks; on all ranks the same answer."""
        number = crc32(text.encode()) % 2**20  # so that the sum of squares is exact
        count, total, squares = self.sum_(torch.tensor([1, number, number**2], device="cpu")).tolist()
        return bool(count * squares == total**2)  # so it is for equal numbers alone


def exchange_device(parameters: Iterable[Tensor]) -> torch.device:
    """Return the device on which ranks that train some parameters can exchange what they find.

    Sharded parameters may be offloaded to the CPU, where NCCL cannot reach them: they tell by their mesh.
    """
    own = list(parameters)
    return next((_holders(parameter).device for parameter in own if is_sharded(parameter)), own[0].device)


def with_gradient(parameters: Sequence[Tensor]) -> set[int]:
    """Return the ``id`` of the parameters that have a gradient here or, under FSDP1, on another rank.

    FSDP1 gives no gradient to a rank that holds nothing of a parameter, whatever the others have. If it has flattened
    any of the parameters, all ranks call this together.
    """
    pieces = {str(k): p for k, p in enumerate(parameters) if flat.is_known(p)} if may_be_sharded() else {}
    if not pieces:
        return {id(parameter) for parameter in parameters if parameter.grad is not None}
    marks = torch.tensor([parameter.grad is not None for parameter in parameters], device="cpu")
    return {id(parameter) for parameter in compress(parameters, Ranks(pieces).any_(marks).tolist())}


def _is_cut(tensor: Tensor) -> bool:
    """Return whether this rank holds a part of a tensor, and others hold the rest."""
    if not is_sharded(tensor):
        return False
    if not _is_dtensor(tensor):
        return flat.piece_of(tensor).layout is not None
    sharded: Any = tensor
    return not all(placement.is_replicate() for placement in sharded.placements)


def _check(name: str, parameter: Any) -> None:
    """Raise if what this rank holds of a sharded parameter is no part of it, or nobody can tell which."""
    if not _is_dtensor(parameter):
        problem = flat.piece_of(parameter).problem
        if problem:
            raise ValueError(f"{name} {problem}, or freeze it with requires_grad_(False).")
        return
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    if any(type(placement) not in (Replicate, Shard, _StridedShard) for placement in parameter.placements):
        raise ValueError(
            f"{name} is placed as {parameter.placements}, and only parameters that are cut or replicated can be "
            "rescaled: redistribute it, or freeze it with requires_grad_(False) before the network is traced."
        )
    if parameter.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{name} is sharded over the ranks {_numbers(parameter.device_mesh)}, of which this one, "
            f"{torch.distributed.get_rank()}, is none: give the optimizer of each rank its own parameters."
        )


@lru_cache(maxsize=64)
def _numbers(mesh: Any) -> Sequence[int]:
    """Return the global numbers of the ranks of a mesh."""
    numbers: list[int] = mesh.mesh.flatten().tolist()
    return numbers


#: Process groups of meshes with several dimensions, by their ranks, for each default group.
_groups: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def _group_of(mesh: Any) -> Any:
    """Return the process group of all ranks of a mesh; where torch has none, all of them make it together."""
    if mesh.ndim == 1:
        return mesh.get_group()
    world, ranks = torch.distributed.group.WORLD, tuple(sorted(_numbers(mesh)))
    if len(ranks) == torch.distributed.get_world_size():
        return world
    known = _groups.setdefault(world, {})
    if ranks not in known:
        known[ranks] = torch.distributed.new_group(list(ranks), use_local_synchronization=True)
    return known[ranks]


def named_parameters(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module by the names that they have without FSDP1, also while a call gathers them."""
    held = flat.originals()
    for name, parameter in module.named_parameters(remove_duplicate=remove_duplicate):
        yield flat.plain_name(name), cast(nn.Parameter, held.get(id(parameter), parameter))


def plainly_named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module by the names that they have without FSDP1, DDP and ``torch.compile``.

    By these names checkpoints of optimizers know them, which may go on with or without what wraps the module now.
    """
    while isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        module = module.module
    for name, parameter in named_parameters(module):
        yield name.replace("_orig_mod.", ""), parameter


def gathering_modules(module: nn.Module) -> list[Any]:
    """Return the modules in ``module`` that gather sharded parameters before their calls.

    They are ``FSDPModule``s and, with parameters of their own, ``FullyShardedDataParallel`` modules.
    """
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return []
    return [part for part in module.modules() if isinstance(part, loaded.FSDPModule)] + flat.register(module)


def release(modules: Iterable[Any]) -> None:
    """Make the sharded parameters those of the modules again, in place of gathered copies, which may be out of date."""
    for module in modules:
        if flat.has_flattened(module):
            flat.reshard(module)
        else:
            module.reshard()


def stop_gathering_(module: nn.Module) -> None:
    """Remove what calls of a module with sharded parameters add: hooks and wrapped methods. The caller puts it back."""
    for part in module.modules():
        flat.pass_through_(part)
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for number, hook in list(hooks.items()):
                if str(getattr(hook, "__module__", "")).startswith(GATHERING):
                    del hooks[number]
        for name, method in list(vars(part).items()):  # register_fsdp_forward_method leaves them
            function = method.__func__ if isinstance(method, MethodType) else None
            if str(getattr(function, "__globals__", {}).get("__name__")).startswith(GATHERING):
                vars(part)[name] = function.__wrapped__  # type: ignore[union-attr]
