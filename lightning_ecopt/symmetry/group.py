"""The rescalings that leave a network's function unchanged.

Masks of units, ``bool[H]``, that this package and the optimizer speak of:

===============  ======================================  ===============================================================
mask             who makes it                            which units are set
===============  ======================================  ===============================================================
alive            :meth:`ScalingGroup.alive`              those on a path of non-zero elements, from inputs to outputs
dormant          the reverse of alive                    those on no such path, as when all weights of one side are zero
simple           :attr:`Monomials.simple`                those in no product or power of units
scale-invariant  :attr:`ScalingGroup.scale_invariant`    those whose weights may have any length, as v in ``g v / |v|``
exclusive        the optimizer, when it is bound         those with all their parameters in this optimizer
active           the optimizer, at a refresh             alive and exclusive: they are balanced
usable           ``optimizer.usable_units()``            active; for the rule ``path`` also simple, not scale-invariant
===============  ======================================  ===============================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_ecopt.common.sharding import (
    Ranks,
    gathering_modules,
    local,
    named_parameters,
    num_elements,
    release,
    whole_shape,
)
from lightning_ecopt.common.sides import Passes, Sides
from lightning_ecopt.common.signals import uninterrupted
from lightning_ecopt.common.tensors import padded, widest
from lightning_ecopt.symmetry.balance import alive_units, balancing_scale, imbalances_of, mean_square, resolution_of
from lightning_ecopt.symmetry.coupling import (
    Coupling,
    LocalCoupling,
    couplings_here,
    factors_of_entries,
    fingerprint,
    scale_invariant_units,
    scales_of_parameters,
    sharing_memory,
    sides_of,
)
from lightning_ecopt.symmetry.derivatives import Derivatives, DerivativeSums, roundoff_of
from lightning_ecopt.symmetry.describe import UnitSet, describe_unit, sort_units
from lightning_ecopt.symmetry.layers import Held, held_also, layers_of, lines_of
from lightning_ecopt.symmetry.monomials import Monomials
from lightning_ecopt.symmetry.plot import plot_layers
from lightning_ecopt.symmetry.report import Overview, html_report, print_report
from lightning_ecopt.symmetry.scales import Operation
from lightning_ecopt.symmetry.solve import Solution
from lightning_ecopt.symmetry.squares import SquaredWeights, multiply_

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_ecopt.common.plotting import Axes, Picture


#: What the report says of units that :meth:`ScalingGroup.without` has left out.
NOT_WANTED = Operation("left out by the user", "")


@dataclass(frozen=True, eq=False)
class ScalingGroup:
    """All rescalings of hidden units that leave the function of a module unchanged.

    Made by :func:`lightning_ecopt.scaling_group`. A *unit* is one freedom: everything that must be rescaled together
    by one positive factor. Positive scaling, equivalent class and the dimension m - H are defined as in Meng et al.,
    arXiv:1802.03713, here for arbitrary networks.

    Args:
        parameters: the parameters that may be rescaled, by name.
        couplings: how they scale.
        monomials: the scales that the couplings refer to, as products of powers of units.
        costs: for each operation that fixed scales, how many of them would otherwise have been free.
        unseen: names of parameters that no traced call has used, and no coupling has.
        gathering: modules that gather sharded parameters for their calls.
        held: for each parameter how many of the values that it leads into each operation holds fixed.

    Example::

        group = scaling_group(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))
        group.num_units, group.num_parameters, group.dimension  # (8, 58, 50)
    """

    parameters: Mapping[str, nn.Parameter]
    couplings: Sequence[Coupling]
    monomials: Monomials
    costs: Mapping[Operation, int]
    unseen: tuple[str, ...] = ()
    gathering: Sequence[nn.Module] = ()
    held: Held = field(default_factory=dict)

    @classmethod
    def from_solution(
        cls, parameters: Mapping[str, nn.Parameter], solution: Solution, unseen: tuple[str, ...]
    ) -> ScalingGroup:
        """Make the group of ``parameters`` from the solution of a trace."""
        couplings = sharing_memory(solution.couplings)
        return cls(parameters, couplings, solution.monomials, Counter(solution.costs), unseen, held=solution.held)

    @property
    def num_units(self) -> int:
        """Number of freedoms H."""
        return self.monomials.num_units

    @property
    def num_parameters(self) -> int:
        """Number of scalar parameters m."""
        return sum(num_elements(parameter) for parameter in self.parameters.values())

    @property
    def dimension(self) -> int:
        """Dimension m - H of the equivalent-class space."""
        return self.num_parameters - self.num_units

    def __repr__(self) -> str:
        sizes = f"num_units={self.num_units}, num_parameters={self.num_parameters}, dimension={self.dimension}"
        return f"{type(self).__name__}({sizes})"

    def of(self, module: nn.Module) -> ScalingGroup:
        """Return the same group for the parameters of ``module`` with the same names, as after ``fully_shard``.

        Args:
            module: the module that was traced, or another of the same structure.

        Raises:
            ValueError: if a parameter is missing, has another shape, or is sharded in a way that is not supported.

        Example::

            group = scaling_group(model, x)
            fully_shard(model)  # which replaces its parameters
            group = group.of(model)
        """
        gathering = gathering_modules(module)
        release(gathering)
        own = dict(named_parameters(module, remove_duplicate=False))
        for name, parameter in self.parameters.items():
            shape = whole_shape(parameter)
            if name not in own or whole_shape(own[name]) != shape:
                found = f"one of shape {list(whole_shape(own[name]))}" if name in own else "no such parameter"
                raise ValueError(
                    f"The group was traced from a module with a parameter {name} of shape {list(shape)}, and "
                    f"{type(module).__name__} has {found}: trace it with scaling_group."
                )
        parameters = {name: own[name] for name in self.parameters}
        Ranks(parameters)  # raises if the layout is not supported
        return replace(self, parameters=parameters, gathering=gathering)

    def without(self, units: Tensor, why: Operation = NOT_WANTED) -> ScalingGroup:
        """Return the group in which some units are held fixed, as for a loss that looks at the values behind them.

        Args:
            units: ``bool[H]``, those that are held. The others keep their order.
            why: what the report says of them.

        Raises:
            ValueError: if the shape is not ``[H]``.

        Example::

            group = group.without(~group.monomials.simple)  # only units that are in no product
        """
        if units.shape != (self.num_units,) or units.dtype != torch.bool:
            found = f"{units.dtype} of shape {list(units.shape)}"
            raise ValueError(f"units must be bool of shape [{self.num_units}], one per unit, got {found}")
        number, monomials = self.monomials.without(units.cpu())
        couplings = sharing_memory(
            replace(each, incoming=number[each.incoming.cpu()], outgoing=number[each.outgoing.cpu()])
            for each in self.couplings
        )
        costs = Counter(self.costs) + Counter({why: int(units.sum())})
        held = held_also(self.held, self.couplings, number, why)
        return replace(self, couplings=couplings, monomials=monomials, costs=costs, held=held)

    def fingerprint(self) -> str:
        """Return a hash that is equal for groups that rescale parameters of the same names in the same way.

        Two ranks can compare what they have found, and a checkpoint and the network that it is loaded into.
        """
        return fingerprint(self.couplings, self.monomials, self.unseen)

    def unit_sets(self) -> list[UnitSet]:
        """Sort the units into sets that couple the same parameters in the same way."""
        return sort_units(self.couplings, self.monomials)

    def scaled_by(self, units: Tensor) -> list[str]:
        """Names of the parameters that some units (``bool[H]``) scale, in the order of the group."""
        found = {name for each in self.unit_sets() if bool(units[each.units].any()) for name, _ in each.powers}
        return [name for name in self.parameters if name in found]

    def scales_of_parameters(self) -> dict[str, int]:
        """How many scales multiply or divide elements of each parameter; those without any are left out."""
        return scales_of_parameters(self.couplings)

    def summary(self, console: Console | None = None) -> None:
        """Print what the freedoms are: the units, set by set, the dimensions, and which operations cost freedoms.

        Args:
            console: where to print; by default standard output.

        Example::

            scaling_group(model, x).summary()
        """
        print_report(self.overview(), console)

    def overview(
        self, usable: Tensor | None = None, needs_paths: bool = False, followers: Sequence[str] = ()
    ) -> Overview:
        """Return what :meth:`summary` says, or a report of training; :class:`Overview` has the arguments."""
        used = None if usable is None else usable.cpu()
        simple, sets = self.monomials.simple.cpu(), self.unit_sets()
        return Overview(self.num_parameters, sets, self.costs, self.unseen, simple, used, needs_paths, followers)

    def _repr_html_(self) -> str:
        """The report, in a notebook."""
        return html_report(self.overview())

    def plot(self, ax: Axes | None = None) -> Picture:
        """Draw a map of the units through the layers: a bar for each layer, a line for each set of units.

        A bar says how many of the values that a layer leads into are free, and what holds the others fixed. A line
        joins the layers that its units scale, with their number beside it. Layers have the order of the module.

        Args:
            ax: where to draw; by default in a figure of its own, as large as the network needs.

        Raises:
            ModuleNotFoundError: if Matplotlib is not installed.

        Example::

            figure, ax = scaling_group(model, x).plot()
            figure.savefig("freedoms.png", bbox_inches="tight")
        """
        layers = layers_of(self.parameters, self.couplings, self.held)
        title = f"H = {self.num_units:,} freedoms of m = {self.num_parameters:,} parameters"
        return plot_layers(layers, lines_of(self.unit_sets(), layers), title, ax)

    def describe(self, unit: int) -> str:
        """Describe one unit in words: ``Unit 5: c multiplies conv.weight[5], conv.bias[5]; 1/c multiplies ...``.

        If an element is named twice, in a row and in a column of one weight, both factors apply.

        Args:
            unit: its number, from 0 to H - 1.

        Raises:
            IndexError: if there is no such unit; negative numbers do not count from the end.

        Example::

            print(scaling_group(model, x).describe(5))
        """
        shapes = {name: whole_shape(parameter) for name, parameter in self.parameters.items()}
        return describe_unit(unit, self.couplings, self.monomials, shapes)

    @torch.no_grad()
    def act_(self, log_scale: Tensor) -> ScalingGroup:
        """Rescale the module's own parameters in place: unit ``u`` by ``exp(log_scale[u])``.

        The module's outputs do not change, to rounding, in training and in evaluation mode. Buffers need no change:
        the inputs of normalisation layers, which keep statistics of them, are never rescaled. If parameters are
        sharded, call it on all ranks, with the same factors.

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
    def rescale_(
        self,
        tensors: Mapping[str, Tensor | None],
        log_scale: Tensor,
        *,
        power: int = 1,
        kernels: Passes | None = None,
    ) -> None:
        """Multiply tensors that belong to the parameters by their factors to the ``power``.

        Weights have power 1, covectors such as gradients and momentum have power -1. If tensors are sharded, each rank
        rescales its own part.

        Args:
            tensors: by parameter name, sharded like the parameters; ``None`` and missing ones are passed over.
            log_scale: ``[H]``, natural logarithms of the units' factors.
            power: exponent of the factors.
            kernels: multiply, if they can; by default tensor operations do.
        """
        log_scale = power * self.monomials.to(log_scale.device).of(log_scale.to(widest(log_scale.device)))
        factors = padded(log_scale, 0).exp()  # [S + 1], one for NO_UNIT
        inverse, couplings = 1 / factors, self.local_couplings
        own = [None if (t := tensors.get(coupling.parameter)) is None else local(t) for coupling in couplings]
        with uninterrupted():
            if kernels and kernels.rescale_(self._sides, own, lambda: factors_of_entries(couplings, factors)):
                return
            for coupling, tensor in zip(couplings, own, strict=True):
                if tensor is not None:
                    here = coupling.to(factors.device)
                    multiply_(here.view(tensor), factors[here.incoming], inverse[here.outgoing])

    @cached_property
    def local_couplings(self) -> list[LocalCoupling]:
        """The couplings that scale something, cut to what this rank holds of the parameters."""
        return couplings_here([coupling for coupling in self.couplings if not coupling.is_fixed], self.parameters)

    @cached_property
    def scale_invariant(self) -> Tensor:
        """Units of weights whose length does not matter, such as v in ``g * v / |v|``, ``bool[H]``.

        Such a unit divides nothing, and nothing else scales its weights: with one side only, it has no balance.
        Balancing gives its rows a mean sum of squares of one.
        """
        return scale_invariant_units(self.couplings, self.monomials)

    @torch.no_grad()
    def alive(self) -> Tensor:
        """Find the units on a path of non-zero elements through the network, ``bool[H]``.

        The others are *dormant*: all weights of one side are zero, as in a zero-initialised layer, so that they have no
        balanced scale and no path. A scale-invariant unit is alive unless all its weights are zero. If parameters are
        sharded, call it on all ranks.
        """
        ranks = Ranks(self.parameters)
        return self._alive(self.squares(ranks), ranks)

    def _alive(self, squares: list[SquaredWeights], ranks: Ranks) -> Tensor:
        alive = alive_units(squares, self.monomials, ranks)
        if not bool(self.scale_invariant.any()):
            return alive
        excess = mean_square(squares, self.monomials, ranks)
        return torch.where(self.scale_invariant.to(excess.device), (excess > 0) & excess.isfinite(), alive)

    @torch.no_grad()
    def balance_(self, active: Tensor | None = None, kernels: Passes | None = None) -> Tensor:
        """Move the parameters to the balanced member of their class, the one of least sum of squares.

        There, for every unit, the squares of its incoming and of its outgoing elements have the same sum. The balanced
        member depends on the class alone, and outputs do not change. If parameters are sharded, call it on all ranks;
        only sums over units are exchanged.

        Args:
            active: ``bool[H]``, the units to move; by default all that are :meth:`alive`.
            kernels: multiply, if they can; by default tensor operations do.

        Returns:
            The log-scales ``[H]`` that were applied, zero for units that were not moved.
        """
        ranks = Ranks(self.parameters)
        squares = self.squares(ranks)
        if active is None:
            active = self._alive(squares, ranks)
        log_scale = torch.zeros(0, dtype=torch.double, device="cpu")
        if squares:
            active = active.to(squares[0].roots.device)
            invariant = active & self.scale_invariant.to(active.device)
            resolution = resolution_of(self.parameters.values())
            log_scale = balancing_scale(squares, self.monomials, active & ~invariant, resolution, ranks)
            if bool(invariant.any()):
                log_scale -= torch.where(invariant, mean_square(squares, self.monomials, ranks).log() / 2, 0.0)
        release(self.gathering)
        self.rescale_(self.parameters, log_scale, kernels=kernels)
        return log_scale

    @torch.no_grad()
    def imbalances(self) -> Tensor:
        """Measure how far each unit is from the balanced member, ``[H]``: 1 there, NaN if a weight is not finite.

        The formula is that of :class:`lightning_ecopt.UnitImbalance`. If parameters are sharded, call it on all ranks.
        """
        ranks = Ranks(self.parameters)
        squares = self.squares(ranks)
        if not squares:
            return torch.ones(self.num_units, dtype=torch.double, device="cpu")
        alive, invariant = self._alive(squares, ranks), self.scale_invariant
        return imbalances_of(squares, self.monomials, alive, invariant, ranks)

    def imbalance(self) -> Tensor:
        """The largest of the :meth:`imbalances`, a scalar; 1 if there are no units."""
        each = self.imbalances()
        return each.amax() if len(each) else each.new_ones(())

    @torch.no_grad()
    def derivatives(
        self,
        gradients: Mapping[str, Tensor | None] | None = None,
        roundoff: float | None = None,
        silent: Collection[str] = (),
        kernels: Passes | None = None,
    ) -> Derivatives:
        """Differentiate a loss by the log-scales of the units; zero to rounding if the loss does not change with them.

        See :func:`lightning_ecopt.check_invariance`. If parameters are sharded, call it on all ranks.

        Args:
            gradients: of the loss by parameter name; by default those that the parameters have. Units of parameters
                without a gradient are not judged.
            roundoff: unit roundoff of what is computed in; by default as parameters, gradients and torch's switches
                tell.
            silent: names of parameters that the loss was seen not to reach.
            kernels: add up, if they can; by default tensor operations do.

        Example::

            loss(model(x), y).backward()
            group.derivatives().total  # [H], about zero
        """
        if gradients is None:
            gradients = {name: p.grad for name, p in self.parameters.items()}
        roundoff = roundoff_of(self.parameters) if roundoff is None else roundoff
        return self._derivative_sums(self.parameters, gradients, Ranks(self.parameters), roundoff, silent, kernels)

    @cached_property
    def _derivative_sums(self) -> DerivativeSums:
        return DerivativeSums(self.local_couplings, self.monomials, self._sides)

    @cached_property
    def _sides(self) -> Sides:
        return sides_of(self.local_couplings)

    def squares(self, ranks: Ranks) -> list[SquaredWeights]:
        """Take the squares of all regions that this rank adds up; empty on all ranks if nothing scales."""
        empty = [name for name, parameter in self.parameters.items() if parameter.is_meta]
        if empty:
            raise RuntimeError(
                f"{len(empty)} parameters, {empty[0]} first, are on the meta device and have no values: materialise "
                "the module (module.to_empty(device=...) and its initialisation) and trace it again."
            )
        squares = []
        for coupling in self.local_couplings:
            parameter = self.parameters[coupling.parameter]
            if ranks.counts(parameter):
                weight = local(parameter.detach())
                squares.append(SquaredWeights.of(coupling.to(weight.device), weight, widest(weight.device)))
        if not squares and not all(coupling.is_fixed for coupling in self.couplings):  # other ranks wait for this one
            device = local(next(iter(self.parameters.values()))).device
            squares.append(SquaredWeights.nothing(widest(device), device))
        return squares
