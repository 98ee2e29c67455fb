"""What is common to groups that are found in calls: the equations of all of them, and what is trained."""

from __future__ import annotations

import pickle
import zlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ecopt.common.warn import warn
from lightning_ecopt.symmetry.deferred import DeferredGroup
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.trace import all_fixed, hold_results_fixed, solved
from lightning_ecopt.symmetry.trace_mode import TraceMode

#: Takes the group and the equations of this rank, and gives all ranks that train together the equations of each of
#: them, in the order of the ranks; nothing if they have found the same group, ``None`` if there are no other ranks.
Gather = Callable[[ScalingGroup, Equations], Sequence[Equations] | None]


class GroupFromCalls(DeferredGroup):
    """The scaling group of parameters, from the equations of traced calls.

    Args:
        offered: the parameters that an optimizer has asked about.
        gather: collects the equations of all ranks, if several train together; called by :meth:`settle`.
        equations: of a call that has been traced already.
    """

    def __init__(
        self, offered: Iterable[Tensor], gather: Gather | None = None, equations: Equations | None = None
    ) -> None:
        self.gather = gather
        self._offered = list(offered)
        self._calls = [] if equations is None else [equations]
        self._packed = b""
        self._trained: frozenset[str] = frozenset()  # names of what has been trained at any time
        self._groups: dict[frozenset[str], ScalingGroup] = {}  # from the calls so far, by the names of the trained
        self._settled: ScalingGroup | None = None
        self.is_final = False  # whether all parameters are trained and seen, so that the group stays what it is
        self.has_ranks = False  # whether others train together with this process
        self._version = 0

    @property
    def version(self) -> int:
        """Another number than before: a call has been traced, or something else is trained."""
        return self._version

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are traced, by name."""

    def _gathering(self) -> list[Any]:
        """The modules that gather sharded parameters for their calls."""
        return []

    def note_trained(self) -> None:
        """Remember which parameters require a gradient now: from now on they belong to the group."""
        before = len(self._trained)
        self._trained |= {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        self._version += len(self._trained) > before

    def end_call(self) -> None:
        """Take note that there are other equations than before."""
        self._groups = {}
        self._version += 1

    def equations(self) -> Equations | None:
        """The equations of all calls; ``None`` if there was none, or if one is running."""
        if len(self._calls) > 1:
            self._calls = [self._joined(self._calls)]
        return self._calls[0] if self._calls else None

    def _joined(self, parts: Iterable[Equations]) -> Equations:
        joined = Equations({name: tuple(parameter.shape) or (1,) for name, parameter in self.parameters.items()})
        for part in parts:
            joined.absorb(part)
        return joined

    @property
    def group(self) -> ScalingGroup | None:
        """The group as far as calls have been traced; ``None`` before the first, and during one."""
        if self.is_final:
            return self._settled
        equations = self.equations()
        if equations is None:
            return None
        if not self._trained:
            self.note_trained()
        return self._solved(self._trained, equations)

    def _solved(self, names: frozenset[str], equations: Equations) -> ScalingGroup:
        if names not in self._groups:
            try:
                self._groups[names] = solved(self.parameters, equations, names, self._gathering())
            except Exception as error:  # a fault of ours must not stop training
                warn(f"The freedoms cannot be solved for, so that all is held fixed: {error!r}")
                fixed = all_fixed(nn.Module(), self.parameters)
                self._groups[names] = solved(self.parameters, fixed, names, self._gathering())
        return self._groups[names]

    def settle(self) -> ScalingGroup | None:
        """The group of what is trained now, or has been; what ranks that train together have found is joined."""
        self.note_trained()
        group, equations = self.group, self.equations()
        if group is None or equations is None or group is self._settled:
            return group
        parts = None if self.gather is None else self.gather(group, equations)
        self.has_ranks = parts is not None
        if parts:
            equations, self._groups = self._joined(parts), {}
            self.replace(equations)  # the same on all ranks from now on, whichever part of it is solved for
            group = self._solved(self._trained, equations)
        before = self._settled
        if before is not None and before.fingerprint() == group.fingerprint():  # a further call has told nothing new
            group = self._groups[self._trained] = before
        self._settled = group
        if not group.unseen and self._trained >= self.parameters.keys():
            # The equations are for earlier phases from now on, and take a hundredth of the memory of the weights.
            self.is_final, self._packed = True, zlib.compress(pickle.dumps(equations), 1)
            self.replace(None)
        return group

    def replace(self, equations: Equations | None) -> None:
        """Use these equations in place of those of the calls so far."""
        self._calls = [] if equations is None else [equations]

    def take_back(self, names: Collection[str]) -> ScalingGroup | None:
        """The group as it was when these parameters, and no others, had been trained."""
        wanted, equations = frozenset(names), self.equations()
        if self._packed:
            equations = pickle.loads(zlib.decompress(self._packed))
            self._calls, self._packed, self.is_final = [equations], b"", False
        if equations is None or not self.parameters.keys() >= wanted:
            return None
        self._trained = wanted
        self._version += 1
        self._settled = self._solved(wanted, equations)
        return self._settled

    def covers(self, parameters: Iterable[Tensor]) -> bool:
        """Whether these are among the parameters that it was offered."""
        return {id(p) for p in self._offered}.issuperset(map(id, parameters))


def ended(mode: TraceMode, module: nn.Module, output: Any, name: str) -> Equations:
    """The equations of a call that has ended; whatever it leaves behind must not change."""
    try:
        hold_results_fixed(mode, module, output, name)
    except Exception as error:  # a fault of ours must not stop training
        warn(f"What {type(module).__name__} returns cannot be read, so that all is held fixed: {error!r}")
        mode.hold_all_fixed(name)
    return mode.equations


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
