"""The rescalings that leave a network's function unchanged."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_ecopt.common.sharding import Ranks, gathering_modules, local, release
from lightning_ecopt.common.tensors import widest
from lightning_ecopt.symmetry.balance import alive_units, balancing_scale, mean_square, sums_of_squares
from lightning_ecopt.symmetry.coupling import NO_UNIT, Coupling
from lightning_ecopt.symmetry.describe import UnitSet, describe_unit, sort_units
from lightning_ecopt.symmetry.equations import Operation
from lightning_ecopt.symmetry.monomials import Monomials
from lightning_ecopt.symmetry.solve import Solution
from lightning_ecopt.symmetry.squares import SquaredWeights, are_finite, multiply_

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, eq=False)
class ScalingGroup:
    """All rescalings of hidden units that leave the function of a module unchanged.

    Made by :func:`lightning_ecopt.scaling_group`. A *unit* is one freedom: everything that must be rescaled together
    by one positive factor. Formulas: positive scaling, equivalent class and the dimension m - H are those of
    Meng et al., arXiv:1802.03713, for arbitrary networks.

    Args:
        parameters: the parameters that may be rescaled, by name.
        couplings: how they scale.
        monomials: the scales that the couplings refer to, as products of powers of units.
        costs: for each operation that fixed scales which would otherwise have been free, how many.
        unseen: names of parameters that the traced call did not use.
        gathering: modules that gather sharded parameters for their calls.
    """

    parameters: Mapping[str, nn.Parameter]
    couplings: Sequence[Coupling]
    monomials: Monomials
    costs: Mapping[Operation, int]
    unseen: tuple[str, ...] = ()
    gathering: Sequence[nn.Module] = ()

    @classmethod
    def from_solution(
        cls, parameters: Mapping[str, nn.Parameter], solution: Solution, unseen: tuple[str, ...]
    ) -> ScalingGroup:
        """Put the result of a trace into tensors."""
        couplings = [
            Coupling(
                use.parameter,
                use.region,
                torch.from_numpy(use.incoming).to(torch.int32),
                torch.from_numpy(use.outgoing).to(torch.int32),
                use.additive,
            )
            for use in solution.uses
        ]
        monomials = Monomials(
            solution.num_units,
            solution.num_scales,
            torch.from_numpy(solution.scales),
            torch.from_numpy(solution.units),
            torch.from_numpy(solution.exponents),
        )
        return cls(parameters, couplings, monomials, Counter(solution.costs), unseen)

    @property
    def num_units(self) -> int:
        """Number of freedoms H."""
        return self.monomials.num_units

    @property
    def num_parameters(self) -> int:
        """Number of scalar parameters m."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def dimension(self) -> int:
        """Dimension m - H of the equivalent-class space."""
        return self.num_parameters - self.num_units

    def __repr__(self) -> str:
        sizes = f"num_units={self.num_units}, num_parameters={self.num_parameters}, dimension={self.dimension}"
        return f"{type(self).__name__}({sizes})"

    def of(self, module: nn.Module) -> ScalingGroup:
        """The same group for the parameters that a module has under the same names, as after ``fully_shard``.

        Args:
            module: the one that was traced, or another of the same structure.

        Raises:
            ValueError: if a parameter is missing, has another shape, or is sharded in a way that is not supported.

        Example::

            group = scaling_group(model, x)
            fully_shard(model)  # which replaces its parameters
            group = group.of(model)
        """
        gathering = gathering_modules(module)
        release(gathering)
        own = dict(module.named_parameters(remove_duplicate=False))
        for name, parameter in self.parameters.items():
            if name not in own or own[name].shape != parameter.shape:
                found = f"one of shape {list(own[name].shape)}" if name in own else "no such parameter"
                raise ValueError(
                    f"The group was traced from a module with a parameter {name} of shape {list(parameter.shape)}, and "
                    f"{type(module).__name__} has {found}: trace it with scaling_group."
                )
        parameters = {name: own[name] for name in self.parameters}
        Ranks(parameters)  # of a layout that is not supported it says so now
        return replace(self, parameters=parameters, gathering=gathering)

    def fingerprint(self) -> str:
        """Equal for two groups of one network that were found from the same operations, on two ranks for instance."""
        arrays = [self.monomials.products, self.monomials.units, self.monomials.exponents]
        uses = []
        for coupling in self.couplings:
            uses.append((coupling.parameter, str(coupling.region), coupling.additive))
            arrays += [coupling.incoming, coupling.outgoing]
        shapes = [tuple(array.shape) for array in arrays]
        digest = hashlib.sha256(repr((self.num_units, uses, shapes, self.unseen)).encode())
        for array in arrays:
            digest.update(array.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def unit_sets(self) -> list[UnitSet]:
        """The units, sorted into sets that couple the same parameters in the same way."""
        return sort_units(self.couplings, self.monomials)

    def summary(self, console: Console | None = None) -> None:
        """Print what the freedoms are: the units, set by set, the dimensions, and which operations cost freedoms.

        Args:
            console: where to print; by default standard output.

        Example::

            scaling_group(model, x).summary()
        """
        from lightning_ecopt.symmetry.report import print_report  # which imports this module

        print_report(self, console)

    def describe(self, unit: int) -> str:
        """In words what one unit is: which elements it multiplies, as index expressions, and by which power of ``c``.

        Where an element is named twice, as in the row and in the column of one weight, both factors apply.

        Args:
            unit: its number, from 0 to H - 1.

        Returns:
            One line, such as ``Unit 5: c multiplies conv.weight[5], conv.bias[5]; 1/c multiplies head.weight[:, 5]``.

        Raises:
            IndexError: if there is no such unit; negative numbers do not count from the end.

        Example::

            print(scaling_group(model, x).describe(5))
        """
        if not 0 <= unit < self.num_units:
            numbers = f"units 0 to {self.num_units - 1}" if self.num_units else "no units"
            raise IndexError(f"there is no unit {unit}: the group has {numbers}")
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        return describe_unit(unit, self.couplings, self.monomials, shapes)

    @torch.no_grad()
    def act_(self, log_scale: Tensor) -> ScalingGroup:
        """Rescale the module's own parameters in place: unit ``u`` by ``exp(log_scale[u])``.

        The module's outputs do not change, to rounding, in training and in evaluation mode. Buffers need no change:
        what a normalisation layer keeps statistics of is never rescaled. If parameters are sharded, call it on all
        ranks, with the same factors.

        Args:
            log_scale: ``[H]``, natural logarithms of the factors.

        Raises:
            ValueError: if the shape is not ``[H]`` or a value is not finite.

        Example::

            group = scaling_group(model, x)
            group.act_(torch.randn(group.num_units))  # the same function
        """
        if log_scale.shape != (self.num_units,):
            raise ValueError(f"log_scale must have shape [{self.num_units}], one per unit, got {list(log_scale.shape)}")
        if not bool(log_scale.isfinite().all()):
            raise ValueError("log_scale must be finite")
        release(self.gathering)
        self.rescale_(self.parameters, log_scale)
        return self

    @torch.no_grad()
    def rescale_(self, tensors: Mapping[str, Tensor | None], log_scale: Tensor, *, power: int = 1) -> None:
        """Multiply tensors that belong to the parameters by their factors to the ``power``.

        Weights have power 1, covectors such as gradients and momentum -1. Of sharded tensors each rank rescales what it
        holds.

        Args:
            tensors: by parameter name, sharded like the parameters; ``None`` and missing ones are passed over.
            log_scale: ``[H]``, natural logarithms of the units' factors.
            power: exponent of the factors.
        """
        log_scale = power * self.monomials.to(log_scale.device).of(log_scale.to(widest(log_scale.device)))
        factors = torch.cat([log_scale, log_scale.new_zeros(1)]).exp()  # index -1 is the last
        for coupling in self.couplings:
            tensor = tensors.get(coupling.parameter)
            here = None if tensor is None else coupling.of_shard(tensor)
            if tensor is not None and here is not None:
                here = here.to(factors.device)
                multiply_(here.view(local(tensor)), factors[here.incoming], 1 / factors[here.outgoing])

    @cached_property
    def scale_invariant(self) -> Tensor:
        """Units of weights whose length does not matter, such as v of ``g * v / |v|``, ``bool[H]``.

        Nothing is divided by them and nothing else scales their weights. Without a balance between two sides, their
        representative is the one whose rows have a mean square of one over their number of elements.
        """
        alone = torch.zeros(self.monomials.num_scales, dtype=torch.bool)
        others = torch.zeros_like(alone)
        for coupling in self.couplings:
            incoming, outgoing = coupling.incoming, coupling.outgoing
            alone[incoming[(incoming != NO_UNIT) & _any_beside(outgoing == NO_UNIT, incoming)]] = True
            others[incoming[(incoming != NO_UNIT) & _any_beside(outgoing != NO_UNIT, incoming)]] = True
            others[outgoing[outgoing != NO_UNIT]] = True
        return alone[: self.num_units] & ~self.monomials.in_(others) & self.monomials.simple

    @torch.no_grad()
    def alive(self) -> Tensor:
        """Which units lie on a path of non-zero elements through the network, ``bool[H]``.

        The others (all weights of one side zero, as in a zero-initialised layer) are *dormant*: they have no balanced
        scale and no path. Scale-invariant weights are alive unless all are zero. If parameters are sharded, call it on
        all ranks.
        """
        ranks = Ranks(self.parameters)
        return self._alive(list(self._flows(ranks)), ranks)

    def _alive(self, flows: list[SquaredWeights], ranks: Ranks) -> Tensor:
        alive = alive_units(flows, self.monomials, ranks)
        if not bool(self.scale_invariant.any()):
            return alive
        excess = mean_square(flows, self.monomials, ranks)
        return torch.where(self.scale_invariant.to(excess.device), (excess > 0) & excess.isfinite(), alive)

    @torch.no_grad()
    def balance_(self, active: Tensor | None = None) -> Tensor:
        """Move the parameters to the balanced member of their class, the one of least sum of squares.

        There the squares of the incoming and of the outgoing elements of every unit add up to the same. It depends on
        the class alone; outputs do not change. If parameters are sharded, call it on all ranks; weights stay where they
        are, and sums over units are added up.

        Args:
            active: ``bool[H]``, the units to move; by default all that are :meth:`alive`.

        Returns:
            The log-scales ``[H]`` that were applied, zero for units that were not moved.
        """
        ranks = Ranks(self.parameters)
        flows = list(self._flows(ranks))
        if active is None:
            active = self._alive(flows, ranks)
        log_scale = torch.zeros(0, dtype=torch.double)
        if flows:
            active = active.to(flows[0].roots.device)
            invariant = active & self.scale_invariant.to(active.device)
            resolution = max(torch.finfo(parameter.dtype).eps for parameter in self.parameters.values())
            log_scale = balancing_scale(flows, self.monomials, active & ~invariant, resolution, ranks)
            if bool(invariant.any()):
                log_scale -= torch.where(invariant, mean_square(flows, self.monomials, ranks).log() / 2, 0.0)
        release(self.gathering)
        self.rescale_(self.parameters, log_scale)
        return log_scale

    @torch.no_grad()
    def imbalance(self) -> Tensor:
        """How far the parameters are from the balanced member, a scalar: see :class:`lightning_ecopt.UnitImbalance`.

        If parameters are sharded, call it on all ranks.
        """
        ranks = Ranks(self.parameters)
        flows = list(self._flows(ranks))
        if not flows:
            return torch.ones(())
        incoming, outgoing = sums_of_squares(flows, self.monomials, ranks)
        invariant = self.scale_invariant.to(incoming.device)
        ratio = torch.where(invariant, mean_square(flows, self.monomials, ranks), incoming / outgoing)
        ratio = torch.where(self._alive(flows, ranks), ratio, 1.0)
        undefined = ranks.any_(torch.tensor(not all(are_finite(flows)), device=ratio.device))
        return torch.where(undefined, torch.nan, torch.maximum(ratio, 1 / ratio).amax().sqrt())

    def _flows(self, ranks: Ranks) -> Iterator[SquaredWeights]:
        """Sums of squares of each coupling, one per pair of units, of what this rank is to add up."""
        empty = [name for name, parameter in self.parameters.items() if parameter.is_meta]
        if empty:
            raise RuntimeError(
                f"{len(empty)} parameters, {empty[0]} first, are on the meta device and have no values: materialise "
                "the module (module.to_empty(device=...) and its initialisation) and trace it again."
            )
        for coupling in self.couplings:
            if all(bool((side == NO_UNIT).all()) for side in (coupling.incoming, coupling.outgoing)):
                continue
            parameter = self.parameters[coupling.parameter]
            weight = local(parameter.detach())
            dtype = widest(weight.device)
            here = coupling.of_shard(parameter) if ranks.counts(parameter) else None
            if here is None:
                yield SquaredWeights.nothing(dtype, weight.device)
                continue
            here = here.to(weight.device)
            yield SquaredWeights.of(here.view(weight), here.incoming, here.outgoing, dtype)


def _any_beside(marks: Tensor, numbers: Tensor) -> Tensor:
    """For each of the ``numbers``, whether one of the marks is set that are broadcast together with it."""
    for axis, size in enumerate(numbers.shape):
        if size == 1:
            marks = marks.any(axis, keepdim=True)
    return marks.expand_as(numbers)
