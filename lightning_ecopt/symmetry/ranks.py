"""The ranks that train copies of one network together, by ``torch.nn.parallel.DistributedDataParallel``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.group import ScalingGroup


class RanksOf:
    """The ranks of a module, from which equations are gathered.

    Args:
        module: the module, which copies of it may not have any more.
    """

    def __init__(self, module: DistributedDataParallel) -> None:
        self.module = module
        self._join = module._join_config  # every context has one of its own

    @classmethod
    def calling(cls, module: nn.Module) -> RanksOf | None:
        """Return the ranks whose call of ``module``, or of what wraps it, runs now; ``None`` if there are none."""
        active = DistributedDataParallel._get_active_ddp_module()
        called = module if isinstance(module, DistributedDataParallel) else active
        return None if called is None or all(part is not module for part in called.modules()) else cls(called)

    @property
    def process_group(self) -> Any:
        """The ranks, as ``torch.distributed`` knows them."""
        return self.module.process_group

    @property
    def compresses(self) -> bool:
        """Whether a communication hook may change gradients, as by rounding them or taking a few of their ranks."""
        return bool(self.module._comm_hooks)

    @property
    def may_have_joined(self) -> bool:
        """Whether other ranks may have run out of batches already, within ``Join``, and would not answer."""
        return bool(self.module._join_config.enable)

    def begin_join(self) -> bool:
        """Return whether a ``Join`` context has begun since the last question; some ranks may have missed steps in it.

        A rank without batches in a context asks in a later one, which has begun for all of them.
        """
        before, self._join = self._join, self.module._join_config
        return self._join is not before and self.may_have_joined

    def __call__(self, group: ScalingGroup, equations: Equations) -> Sequence[Equations] | None:
        """Gather the equations of all ranks by :func:`gather_if_different`; ``None`` if some may not answer."""
        if self.may_have_joined:
            return None
        return gather_if_different(group, equations, process_group=self.process_group)


@dataclass(frozen=True)
class RanksOfShards:
    """The ranks that share parameters, from which equations are gathered. All of them make the same calls.

    Args:
        process_group: the ranks, as ``torch.distributed`` knows them.
    """

    process_group: Any

    def __call__(self, group: ScalingGroup, equations: Equations) -> Sequence[Equations] | None:
        """Gather the equations of all ranks by :func:`gather_if_different`."""
        return gather_if_different(group, equations, process_group=self.process_group)


def gather_if_different(group: ScalingGroup, equations: Equations, *, process_group: Any = None) -> Sequence[Equations]:
    """Gather the equations of all ranks if their groups differ: each would rescale its weights in its own way.

    Args:
        group: the group that this rank has found.
        equations: those that it was found from.
        process_group: the ranks; by default all.

    Returns:
        Of each rank, in the order of the ranks, with the names that parameters have on this rank; nothing if all ranks
        have found the same group.
    """
    world = torch.distributed.get_world_size(process_group)
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, group.fingerprint(), process_group)
    if len(set(found)) == 1:
        return []
    torch.distributed.all_gather_object(found, equations, process_group)
    return [one.renamed(dict(zip(one.shapes, equations.shapes, strict=True))) for one in found]
