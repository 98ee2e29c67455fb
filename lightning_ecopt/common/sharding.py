"""Parameters of which each rank holds a part only, as ``torch.distributed.fsdp.fully_shard`` (FSDP2) leaves them.

Code that is written for whole tensors works for sharded ones after three changes. None of them costs anything where
nothing is sharded.

- Read and change the :func:`local` tensors, in the regions that are on this rank: :class:`Part`.
- Add up sums over units with :meth:`Ranks.sum_`, which gives all ranks the same bits. An unsharded parameter is whole
  on every rank, and enters such a sum on one of them only: ask :meth:`Ranks.counts`.
- Call :meth:`Ranks.sum_` on all ranks in the same order, even on a rank that has nothing to add; otherwise the ranks
  wait for each other forever.

``torch.distributed.fsdp`` takes half a second to import, so that nothing here does it: a tensor can only be a
``DTensor``, and a module an ``FSDPModule``, if somebody else has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

#: Prefixes of the modules whose hooks and wrapped methods gather parameters, or cut inputs as parameters are cut.
GATHERING = ("torch.distributed.fsdp._fully_shard", "torch.distributed.tensor")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a ``DTensor``, of which each rank holds a part, or a copy."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:  # nearly always so; the look-up below costs more
        return False
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
    if type(tensor) is Tensor or not is_sharded(tensor):  # of each tensor in each step: one call less
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        return sharded.to_local()


@dataclass(frozen=True)
class Part:
    """What this rank holds of a box-shaped region of a parameter.

    Args:
        region: one slice for each axis of the local tensor.
        rows: the positions that this is along the first axis of the region.

    Example: of a parameter of shape ``[8, 3]`` that two ranks share, the second one holds rows 4 to 7. Of the region
    ``[2:6, :]`` it has ``region=[0:2, :]`` of its local tensor, which are ``rows=2:4`` of the region.
    """

    region: tuple[slice, ...]
    rows: slice

    @classmethod
    def of(cls, region: tuple[slice, ...], parameter: Tensor) -> Part | None:
        """Return what this rank holds of a region of ``parameter``; ``None`` if that is nothing.

        Args:
            region: slices of the whole parameter, with a start, a stop and a positive step.
            parameter: the parameter, or another tensor that is sharded like it.
        """
        first, *others = region
        places = range(first.start, first.stop, first.step)
        if _cut_axis(parameter) is None:
            return cls(region, slice(0, len(places)))
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sharded: Any = parameter
        (length, *_), (start, *_) = compute_local_shape_and_global_offset(
            sharded.shape, sharded.device_mesh, sharded.placements
        )
        low, high = (
            min(max(-((places.start - end) // places.step), 0), len(places)) for end in (start, start + length)
        )
        if low == high:
            return None
        inside = slice(places[low] - start, places[high - 1] - start + 1, places.step)
        return cls((inside, *others), slice(low, high))

    def cut(self, values: Tensor) -> Tensor:
        """Cut ``values``, which broadcast to the whole region, to what broadcasts to the part of this rank."""
        return values[self.rows] if values.ndim == len(self.region) and len(values) > 1 else values


class Ranks:
    """Adds up what the ranks find, each in its parts of the sharded parameters.

    Args:
        parameters: all parameters by name; if none of them is sharded, there is nothing to add up.

    Raises:
        ValueError: if a parameter is cut along another axis than its first, or more than once, or is sharded over other
            ranks than the other parameters.

    Example::

        ranks = Ranks(group.parameters)
        total = torch.zeros((), dtype=torch.float64)
        for parameter in group.parameters.values():
            if ranks.counts(parameter):
                total += local(parameter).double().square().sum()
        ranks.sum_(total)  # the sum of squares of all parameters, on every rank
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._group: Any = None
        self._device: torch.device | None = None
        others = ""
        for name, parameter in parameters.items():
            sharded: Any = parameter
            try:
                axis = _cut_axis(parameter)
            except ValueError as error:
                raise ValueError(
                    f"{name} {error}. Only parameters that are cut along their first axis, once, can be rescaled: call "
                    "fully_shard without a shard_placement_fn and without tensor parallelism, or freeze this one with "
                    "requires_grad_(False) before the network is traced."
                ) from None
            if axis is None:
                continue
            group = sharded.device_mesh.get_group(axis)
            if self._group is None:
                self._group, self._device, others = group, torch.device(sharded.device_mesh.device_type), name
            elif _numbers(group) != _numbers(self._group):
                raise ValueError(
                    f"{name} is sharded over the ranks {_numbers(group)} and {others} over {_numbers(self._group)}: "
                    "shard all parameters that are trained over one mesh."
                )

    def counts(self, tensor: Tensor) -> bool:
        """Return whether this rank's part of a tensor enters sums.

        A sharded tensor does so on every rank, one that every rank holds as a whole on the first rank only.
        """
        return self._group is None or _cut_axis(tensor) is not None or torch.distributed.get_rank(self._group) == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Add up ``values`` over the ranks, in place, to the same bits on all of them; returns ``values``."""
        if self._group is not None:
            there = values.to(self._device)  # parameters may be offloaded to the CPU, where NCCL cannot reach them
            torch.distributed.all_reduce(there, group=self._group)
            if there is not values:
                values.copy_(there)
        return values

    def any_(self, values: Tensor) -> Tensor:
        """Set each entry of a ``bool`` tensor that is set on one of the ranks, in place; returns ``values``."""
        if self._group is not None:
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
    for parameter in own:
        if is_sharded(parameter):
            sharded: Any = parameter
            return torch.device(sharded.device_mesh.device_type)
    return own[0].device


def _cut_axis(tensor: Tensor) -> int | None:
    """Return the axis of the device mesh along which a tensor is cut; ``None`` if this rank holds all of it."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard

    sharded: Any = tensor
    cut = [axis for axis, placement in enumerate(sharded.placements) if type(placement) is not Replicate]
    if not cut:
        return None
    placement = sharded.placements[cut[0]]
    if len(cut) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise ValueError(f"is sharded as {sharded.placements}")
    return cut[0]


def _numbers(group: Any) -> list[int]:
    """Return the global numbers of the ranks of a process group."""
    return torch.distributed.get_process_group_ranks(group)


def gathering_modules(module: nn.Module) -> list[Any]:
    """Return the modules in ``module`` that gather sharded parameters before their calls (``FSDPModule``)."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return []
    return [part for part in module.modules() if isinstance(part, loaded.FSDPModule)]


def release(modules: Iterable[Any]) -> None:
    """Make the sharded parameters those of the modules again, in place of gathered copies, which may be out of date."""
    for module in modules:
        module.reshard()


def stop_gathering_(module: nn.Module) -> None:
    """Remove what calls of a module with sharded parameters add: hooks and wrapped methods. The caller puts it back."""
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for number, hook in list(hooks.items()):
                if str(getattr(hook, "__module__", "")).startswith(GATHERING):
                    del hooks[number]
        for name, method in list(vars(part).items()):  # register_fsdp_forward_method leaves them
            function = method.__func__ if isinstance(method, MethodType) else None
            if str(getattr(function, "__globals__", {}).get("__name__")).startswith(GATHERING):
                vars(part)[name] = function.__wrapped__  # type: ignore[union-attr]
