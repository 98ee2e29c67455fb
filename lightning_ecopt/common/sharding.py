"""Parameters of which each rank holds a part only, as ``torch.distributed.fsdp.fully_shard`` (FSDP2) leaves them.

What is written for whole tensors fits them with three changes, none of which does anything where nothing is sharded:

- read and change :func:`local` tensors, through the couplings of what is here, ``coupling.of_shard(parameter)``;
- add sums over units, and whatever else several ranks hold parts of, up with :meth:`Ranks.sum_`: the result is the same
  on all ranks, bit for bit; what of unsharded parameters goes into such sums is left to one rank, :meth:`Ranks.counts`;
- do so on all ranks alike, in the same order, whether or not a rank has something to add.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

GATHERING = "torch.distributed.fsdp._fully_shard"


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks share the tensor (a ``DTensor``): each of them holds a part of it, or a copy."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:  # as nearly always
        return False
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory; all of it, if the tensor is not sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        return sharded.to_local()


@dataclass(frozen=True)
class Part:
    """What this rank holds of a box-shaped region of a parameter.

    Args:
        region: slices of the local tensor.
        rows: which positions of the region these are, along its first axis.
    """

    region: tuple[slice, ...]
    rows: slice

    @classmethod
    def of(cls, region: tuple[slice, ...], parameter: Tensor) -> Part | None:
        """What of a region is here, ``None`` if nothing is.

        Args:
            region: slices of the whole parameter, with a start, a stop and a positive step.
            parameter: whose layout it is; gradients and the like have the same.
        """
        first, *others = region
        places = range(first.start, first.stop, first.step)
        if _cut_axis(parameter) is None:
            return cls(region, slice(0, len(places)))
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
        """What of ``values``, which broadcast to the whole region, broadcasts to what is here."""
        return values[self.rows] if values.ndim == len(self.region) and len(values) > 1 else values


class Ranks:
    """The ranks among which parameters are sharded, to add up what each of them finds in its parts.

    Args:
        parameters: by name; none of them has to be sharded.

    Raises:
        ValueError: if one is sharded in another way than :class:`Part` knows, or over other ranks than the others.

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
        """Whether what is here of a tensor goes into sums: what every rank holds all of does so on one of them."""
        return self._group is None or _cut_axis(tensor) is not None or torch.distributed.get_rank(self._group) == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Add up over the ranks, in place; the same bits on all of them. Nothing to do where nothing is sharded."""
        if self._group is not None:
            there = values.to(self._device)  # the parameters may be offloaded, and GPUs only talk to each other
            torch.distributed.all_reduce(there, group=self._group)
            if there is not values:
                values.copy_(there)
        return values

    def any_(self, values: Tensor) -> Tensor:
        """Set what is set on one of the ranks, in place."""
        if self._group is not None:
            values.copy_(self.sum_(values.to(torch.int32)) > 0)
        return values


def _cut_axis(tensor: Tensor) -> int | None:
    """The axis of the mesh along which a tensor is cut, ``None`` if this rank holds all of it."""
    if not is_sharded(tensor):
        return None
    sharded: Any = tensor
    cut = [axis for axis, placement in enumerate(sharded.placements) if type(placement) is not Replicate]
    if not cut:
        return None
    placement = sharded.placements[cut[0]]
    if len(cut) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise ValueError(f"is sharded as {sharded.placements}")
    return cut[0]


def _numbers(group: Any) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)


def gathering_modules(module: nn.Module) -> list[Any]:
    """The modules in ``module`` that gather sharded parameters for their calls."""
    if not torch.distributed.is_available():
        return []
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def release(modules: Iterable[Any]) -> None:
    """Give up gathered parameters, which the next call would use; the sharded ones are the module's again."""
    for module in modules:
        module.reshard()


def stop_gathering_(module: nn.Module) -> None:
    """Take away what gathers parameters when a module is called; to be put back by the caller."""
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for number, hook in list(hooks.items()):
                if str(getattr(hook, "__module__", "")).startswith(GATHERING):
                    del hooks[number]
        for name, method in list(vars(part).items()):  # of register_fsdp_forward_method
            function = method.__func__ if isinstance(method, MethodType) else None
            if str(getattr(function, "__globals__", {}).get("__name__")).startswith(GATHERING):
                vars(part)[name] = function.__wrapped__  # type: ignore[union-attr]
