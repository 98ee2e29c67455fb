"""Where an optimizer's scaling group comes from, when to look for it again, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ecopt.common.sharding import can_be_rescaled
from lightning_ecopt.common.tensors import listing
from lightning_ecopt.common.warn import warn
from lightning_ecopt.kernels import Kernels, choose_kernels
from lightning_ecopt.optim.bases import BASES
from lightning_ecopt.optim.options import Options
from lightning_ecopt.steps import RULES
from lightning_ecopt.symmetry import DeferredGroup, KnownGroup, ScalingGroup
from lightning_ecopt.symmetry.coupling import NO_UNIT

#: Finds the group of a list of parameters, now or later.
Finder = Callable[[Sequence[Tensor]], ScalingGroup | DeferredGroup]
#: A group, one that is found later, or a function that finds one and is asked again.
Source = ScalingGroup | DeferredGroup | Finder

NO_FREEDOMS = (
    "The network has no scaling freedoms, so the base optimizer is used as it is. The report of the callback names the "
    "operations that cost them."
)


def find_by_module_calls(parameters: Sequence[Tensor]) -> DeferredGroup:
    """Watch the calls of modules that use the parameters: what an optimizer does if nobody tells it of a group."""
    from lightning_ecopt.symmetry.pending import GroupFromModuleCalls  # which takes long to import

    return GroupFromModuleCalls(parameters)


def trainable_parameters(base: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer that require a gradient and can be rescaled, in its order."""
    own = (p for options in base.param_groups for p in options["params"])
    return [p for p in own if p.requires_grad and can_be_rescaled(p)]


class Binding:
    """Where the group of one optimizer comes from.

    Args:
        base: the optimizer whose parameters the group is to have.
        source: a function is called with the trainable parameters, now and whenever the session asks again.

    Attributes:
        source: as given.
        trained: the parameters that were trainable when the group was last looked for.
        deferred: the group, now or later.
    """

    def __init__(self, base: Optimizer, source: Source) -> None:
        self.source = source
        self.trained = trainable_parameters(base)  # themselves, not their ids, so that a copy has its own
        found = source if isinstance(source, ScalingGroup | DeferredGroup) else source(self.trained)
        self.deferred: DeferredGroup = KnownGroup(found) if isinstance(found, ScalingGroup) else found

    def trains(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the group was last looked for when these very parameters were trainable."""
        return list(map(id, parameters)) == list(map(id, self.trained))

    @property
    def is_default(self) -> bool:
        """Whether nobody has said where the group comes from, so that calls of modules are watched."""
        return self.source is find_by_module_calls

    @property
    def finds_again(self) -> bool:
        """Whether the source is a function, which is called again when other parameters are trained."""
        return not isinstance(self.source, ScalingGroup | DeferredGroup)

    @property
    def missing(self) -> str:
        """What has not happened while the group has not been found."""
        return self.deferred.missing

    def found(self) -> ScalingGroup | None:
        """The group, checked; ``None`` while it has not been found."""
        return self.deferred.settle()

    def keep(self, group: ScalingGroup) -> None:
        """Use this group from now on, so that nobody watches for another."""
        if not isinstance(self.deferred, KnownGroup):
            self.deferred = KnownGroup(group)

    def cancel(self) -> None:
        """Stop watching, if a group has not been found."""
        self.deferred.cancel()

    def cancel_unless_shared(self, other: Binding) -> None:
        """Stop watching, unless another binding waits for the same: a function may find one group for several."""
        if self.deferred is not other.deferred:
            self.cancel()


@dataclass(frozen=True, eq=False)
class Network:
    """What an optimizer knows of its network once the group is known.

    Args:
        group: the scaling group.
        exclusive: units that scale trainable parameters of this optimizer alone, ``bool[H]``.
        names: names of the group's parameters that the optimizer has.
        kernels: make the passes over weights and gradients.
    """

    group: ScalingGroup
    exclusive: Tensor
    names: frozenset[str]
    kernels: Kernels

    @classmethod
    def of(cls, base: Optimizer, group: ScalingGroup, options: Options) -> Network:
        """Check that a group fits an optimizer, and find the units that are the optimizer's own.

        Raises:
            ValueError: if the group does not know all trainable parameters, or the rule does not work for it.
        """
        trainable = trainable_parameters(base)
        check_known(group, trainable)
        RULES[options.rule].check(group)
        if group.num_units == 0:
            warn(NO_FREEDOMS)
        own = {id(p) for groups in base.param_groups for p in groups["params"]}
        is_fused = type(base) in BASES and options.implementation != "wrapped"
        return cls(
            group,
            ~group.monomials.in_(_scales_of_others(group, {id(p) for p in trainable})),
            frozenset(name for name, p in group.parameters.items() if id(p) in own),
            choose_kernels(options.implementation, list(group.parameters.values()), is_fused),
        )

    def active_units(self) -> Tensor:
        """Units that are alive now and exclusive, ``bool[H]``."""
        return self.group.alive().cpu() & self.exclusive

    def check_state(self, state: Mapping[str, Any], options: Options) -> None:
        """Check that the rule's part of a checkpoint belongs to this network.

        Raises:
            ValueError: if it does not.
        """
        if "active" in state and len(state["active"]) != self.group.num_units:
            raise ValueError(
                f"The checkpoint was made with {len(state['active'])} units, this network has {self.group.num_units}: "
                "load it into the network that it was made with, traced in the same way."
            )
        if state.get("rule") == options.rule:
            RULES[options.rule].check_state(self.group, self.parameters, state)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The optimizer's own parameters by name."""
        return {name: p for name, p in self.group.parameters.items() if name in self.names}


def _scales_of_others(group: ScalingGroup, own: set[int]) -> Tensor:
    """Scales of parameters that this optimizer does not train: another does, or they are frozen by now; ``bool[S]``."""
    found = torch.zeros(group.monomials.num_scales, dtype=torch.bool)
    for coupling in group.couplings:
        if id(group.parameters[coupling.parameter]) not in own:
            for scales in (coupling.incoming, coupling.outgoing):
                found[scales[scales != NO_UNIT]] = True
    return found


def check_known(group: ScalingGroup, parameters: Sequence[Tensor]) -> None:
    """Check that the trace of a group has seen all of some parameters.

    Raises:
        ValueError: if it has not.
    """
    names = {id(p): name for name, p in group.parameters.items()}
    unknown = [p for p in parameters if id(p) not in names]
    if unknown and len(unknown) == len(parameters):
        raise ValueError(
            "The scaling group was traced from another module: it has none of the optimizer's parameters. "
            "Call scaling_group on the module that this optimizer trains."
        )
    if unknown:
        shapes = ", ".join(str(tuple(p.shape)) for p in unknown[:3])
        raise ValueError(
            f"{len(unknown)} of the optimizer's parameters (shapes {shapes}) are not in the scaling group. Call "
            "scaling_group on the module that owns all of them, when all of them require a gradient."
        )
    unseen = [names[id(p)] for p in parameters if names[id(p)] in group.unseen]
    if unseen:
        raise ValueError(
            f"The traced call never used these parameters of the optimizer: {listing(unseen)}. What was not seen "
            "cannot be rescaled safely: trace a call that uses them (check the example inputs), leave them out of "
            "the optimizer, or freeze them with requires_grad_(False)."
        )
