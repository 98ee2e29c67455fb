"""Where an optimizer's scaling group comes from, when to look for it again, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ecopt.common.flat import check_pieces
from lightning_ecopt.kernels import check_implementation
from lightning_ecopt.optim.options import Options
from lightning_ecopt.steps import RULES
from lightning_ecopt.symmetry import DeferredGroup, KnownGroup, ScalingGroup
from lightning_ecopt.symmetry.followers import Given
from lightning_ecopt.symmetry.held import units_of

#: Finds the group of a list of parameters, now or later.
Finder = Callable[[Sequence[Tensor]], ScalingGroup | DeferredGroup]
#: A group, one that is found later, or a function that finds one and is asked again.
Source = ScalingGroup | DeferredGroup | Finder

WAY_OUT = (
    "load it into the network and the parameter groups that it was made with, traced in the same way. The plain "
    "optimizer's part of it can be loaded by itself: leave out the entry 'equivalent_class' of the state dict."
)
NO_FREEDOMS = (
    "The network has no scaling freedoms, so the base optimizer is used as it is. optimizer.group.summary() "
    "names the operations that cost them. What is computed to be logged alone, as norms of "
    "weights, costs nothing outside of training_step, as in on_train_batch_end."
)


def find_by_module_calls(parameters: Sequence[Tensor]) -> DeferredGroup:
    """Watch the calls of modules that use the parameters: what an optimizer does if nobody tells it of a group."""
    from lightning_ecopt.symmetry.module_calls import GroupFromModuleCalls  # which takes long to import

    return GroupFromModuleCalls(parameters)


def parameters_of(base: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer, in its order."""
    return [p for options in base.param_groups for p in options["params"]]


def trainable_parameters(base: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer that require a gradient, in its order."""
    return [p for p in parameters_of(base) if p.requires_grad]


class Binding:
    """Where the group of one optimizer comes from.

    Args:
        base: the optimizer whose parameters the group is to have.
        source: a function is called with all of its parameters, now and when :meth:`is_outgrown` says so.
        followers: copies of the weights that are told by hand.

    Attributes:
        source: as given.
        deferred: the group, now or later.

    Raises:
        ValueError: if a group is given that knows none of the optimizer's parameters, or followers that do not fit.
        ValueError: if FSDP1 has flattened the optimizer's parameters into one.
    """

    def __init__(self, base: Optimizer, source: Source, followers: Given) -> None:
        check_pieces(parameters_of(base))
        self._base = base
        self.source = source
        found = source if isinstance(source, ScalingGroup | DeferredGroup) else source(parameters_of(base))
        self.deferred: DeferredGroup = KnownGroup.of(found) if isinstance(found, ScalingGroup) else found
        if isinstance(self.deferred, KnownGroup):
            check_belongs(self.deferred.group, trainable_parameters(base))
        self.deferred.followers.add(followers)
        self.deferred.followers.check(parameters_of(base))

    def is_outgrown(self) -> bool:
        """Whether the optimizer has parameters that the source was not asked about, and can be asked again."""
        if isinstance(self.source, ScalingGroup | DeferredGroup):
            return False
        return not self.deferred.covers(parameters_of(self._base))

    def cancel_unless_shared(self, other: Binding) -> None:
        """Stop watching, unless another binding waits for the same: a function may find one group for several."""
        if self.deferred is not other.deferred:
            self.deferred.cancel()


def check_not_replaced(before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    """Check that DeepSpeed has not put other tensors in the place of an optimizer's parameters.

    Args:
        before: parameters of the optimizer at the last look.
        now: those that it has.

    Raises:
        ValueError: with the ways of training on several devices that work.
    """
    kept = {id(p) for p in now}
    # DeepSpeed leaves these attributes at the parameters: of ZeRO 1 and 2 the first, of ZeRO 3 the second.
    if any(id(p) not in kept and (hasattr(p, "_hp_mapping") or hasattr(p, "ds_id")) for p in before):
        raise ValueError(
            "DeepSpeed has put flat pieces in the place of the optimizer's parameters, which have lost their shapes: "
            "use DDP or FSDP2 (in Lightning strategy='ddp' or ModelParallelStrategy), or the plain optimizer."
        )


@dataclass(frozen=True, eq=False)
class Network:
    """What an optimizer knows of its network once the group is known.

    Args:
        group: the scaling group.
        exclusive: units that scale trainable parameters of this optimizer alone, ``bool[H]``.
        names: names of the group's parameters that the optimizer has.
        unused: parameters that the optimizer trains and no traced call has used, or that the group does not have.
        sought: those of them that a further call may use: the others are in no group.
    """

    group: ScalingGroup
    exclusive: Tensor
    names: frozenset[str]
    unused: Sequence[Tensor]
    sought: Sequence[Tensor]

    @classmethod
    def of(cls, base: Optimizer, group: ScalingGroup, options: Options) -> Network:
        """Find what a group means for an optimizer, whose parameters may be known to it in part.

        Raises:
            ValueError: if the rule does not work for the group.
        """
        RULES[options.rule].check(group)
        own = {id(p) for p in parameters_of(base)}
        trainable = trainable_parameters(base)
        seen = {id(p) for name, p in group.parameters.items() if name not in group.unseen}
        check_implementation(options.implementation, group.parameters.values())
        return cls(
            group,
            ~units_of(group, {id(p) for p in group.parameters.values()} - {id(p) for p in trainable}),
            frozenset(name for name, p in group.parameters.items() if id(p) in own),
            [p for p in parameters_of(base) if p.requires_grad and id(p) not in seen],
            [group.parameters[name] for name in group.unseen if id(group.parameters[name]) in set(map(id, trainable))],
        )

    def active_units(self) -> Tensor:
        """Units that are alive now and exclusive, ``bool[H]``."""
        return self.group.alive().cpu() & self.exclusive

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the group."""
        return self.group.fingerprint()

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether the rule's part of a checkpoint is from this network, trained in the same parts."""
        return state.get("fingerprint", self.fingerprint) == self.fingerprint

    def check_state(self, state: Mapping[str, Any], options: Options) -> None:
        """Check that the rule's part of a checkpoint belongs to this network.

        Raises:
            ValueError: if it does not.
        """
        try:
            units = len(state.get("active", range(self.group.num_units)))
            if units != self.group.num_units:
                found = f"{units} units, this network has {self.group.num_units}"
                raise ValueError(f"The checkpoint was made with {found}: {WAY_OUT}")
            if not self.fits(state):
                raise ValueError(f"The checkpoint was made with a network that has other freedoms: {WAY_OUT}")
            if state.get("rule") == options.rule:
                RULES[options.rule].check_state(self.group, self.parameters, state)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"The rule's part of the checkpoint is damaged ({error!r}): {WAY_OUT}") from error

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The optimizer's own parameters by name."""
        return {name: p for name, p in self.group.parameters.items() if name in self.names}


def check_belongs(group: ScalingGroup, parameters: Sequence[Tensor]) -> None:
    """Check that a group has any of some parameters.

    Raises:
        ValueError: if it has none.
    """
    known = {id(p) for p in group.parameters.values()}
    if parameters and known.isdisjoint(map(id, parameters)):
        raise ValueError(
            "The scaling group was traced from another module: it has none of the optimizer's parameters. "
            "Call scaling_group on the module that this optimizer trains."
        )
