"""How the elements of parameters scale with the units: the one form in which all further code reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_ecopt.common.parts import Part, lengths
from lightning_ecopt.common.sharding import parts
from lightning_ecopt.common.sides import Sides
from lightning_ecopt.common.tensors import padded, region_of
from lightning_ecopt.symmetry.labels import compress
from lightning_ecopt.symmetry.monomials import Monomials

#: Stands in a coupling for "no unit": these elements are not multiplied. As an index it picks the last entry, see
#: :func:`~lightning_ecopt.common.tensors.padded`.
NO_UNIT = -1


@dataclass(frozen=True, eq=False)
class Coupling:
    """How a box-shaped region of one parameter scales.

    Rescaling unit ``u`` by ``c`` multiplies the elements where ``incoming == u`` by ``c``, and divides those where
    ``outgoing == u`` by ``c``. Numbers from H on stand for products of powers of units, see
    :class:`~lightning_ecopt.symmetry.monomials.Monomials`; ``NO_UNIT`` stands for a factor of one.

    Args:
        parameter: name of the parameter.
        region: slices of the parameter, with a start, a stop and a positive step.
        incoming: ``int32``, units that the elements lead into; broadcasts to the region.
        outgoing: ``int32``, units that the elements come out of; broadcasts to the region.
        additive: whether the elements are added (a bias) rather than multiplied with data.

    Example: the hidden layer of ``Linear(3, 2), ReLU(), Linear(2, 1)`` has two units. Its weight ``[2, 3]`` has
    ``incoming=[[0], [1]], outgoing=[[-1]]``, its bias ``[2]`` has ``incoming=[0, 1], outgoing=[-1]``, and the weight
    ``[1, 2]`` of the output layer has ``incoming=[[-1]], outgoing=[[0, 1]]``.
    """

    parameter: str
    region: tuple[slice, ...]
    incoming: Tensor
    outgoing: Tensor
    additive: bool

    @property
    def is_fixed(self) -> bool:
        """Whether no unit scales any element of the region."""
        return all(bool((side == NO_UNIT).all()) for side in (self.incoming, self.outgoing))

    def view(self, tensor: Tensor) -> Tensor:
        """Return the region of ``tensor``, which has the parameter's shape, as a view."""
        return region_of(tensor, self.region)

    def here(self, parameter: Tensor) -> list[LocalCoupling]:
        """Cut the coupling to what this rank holds of the parameter, box by box; none if nothing of the region is."""
        return [
            LocalCoupling(
                self.parameter,
                self.region,
                part.cut(self.incoming).contiguous(),  # as some operations need it
                part.cut(self.outgoing).contiguous(),
                self.additive,
                part,
                (part.share(self.incoming, self.region), part.share(self.outgoing, self.region)),
            )
            for part in parts(self.region, parameter)
        ]

    def to(self, device: torch.device) -> Self:
        """Return the same coupling with its unit numbers on ``device``."""
        if self.incoming.device == self.outgoing.device == device:
            return self
        return replace(self, incoming=self.incoming.to(device), outgoing=self.outgoing.to(device))

    def restricted(self, active: Tensor) -> Self:
        """Return the coupling with ``NO_UNIT`` for all products, and for the units that are not ``active``, ``[H]``."""
        kept = padded(active, False)  # for NO_UNIT, and also for products
        sides = self.incoming, self.outgoing
        remain = [kept[side.clamp(max=len(active))] | (side == NO_UNIT) for side in sides]
        if all(bool(marks.all()) for marks in remain):
            return self  # shares its numbers
        incoming, outgoing = (side.where(marks, NO_UNIT) for side, marks in zip(sides, remain, strict=True))
        return replace(self, incoming=incoming, outgoing=outgoing)


@dataclass(frozen=True, eq=False)
class LocalCoupling(Coupling):
    """A box of what this rank holds of a coupling.

    Args:
        part: where the box is. ``region`` is that of the whole coupling; ``incoming`` and ``outgoing`` are cut to the
            box.
        shares: of the elements at one entry of ``incoming``, and of ``outgoing``, that are in the box. Over all boxes
            on all ranks they add up to one for each entry.

    Example: two ranks share the columns of a weight ``[2, 6]``. Each has half of each row, and all of three columns:
    ``shares`` are ``(0.5, 1.0)``.
    """

    part: Part
    shares: tuple[float, float]

    @property
    def width(self) -> int:
        """Number of elements of a whole row: of a position along the first axis of the region."""
        return prod(lengths(self.region)[1:])

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """``incoming`` and ``outgoing`` with all axes of the box."""
        axes = len(self.part.places)
        incoming, outgoing = (s.view((1,) * (axes - s.ndim) + s.shape) for s in (self.incoming, self.outgoing))
        return incoming, outgoing

    def view(self, tensor: Tensor) -> Tensor:
        """Return the box in a :func:`~lightning_ecopt.common.sharding.local` tensor as a view."""
        return self.part.view(tensor)


def sharing_memory(couplings: Iterable[Coupling]) -> list[Coupling]:
    """Return the same couplings, in which equal unit numbers share memory, as those of a gain and of its bias do.

    So do the rows of one layer and the columns of the next. Nobody may write to unit numbers.
    """
    known: dict[tuple[torch.dtype, bytes], Tensor] = {}

    def shared(side: Tensor) -> Tensor:
        numbers = side.reshape(-1)
        return known.setdefault((side.dtype, numbers.cpu().numpy().tobytes()), numbers).view(side.shape)

    return [replace(each, incoming=shared(each.incoming), outgoing=shared(each.outgoing)) for each in couplings]


def couplings_here(couplings: Iterable[Coupling], parameters: Mapping[str, Tensor]) -> list[LocalCoupling]:
    """Cut couplings to what this rank holds of the parameters; those of which it holds nothing are left out.

    Args:
        couplings: of whole parameters.
        parameters: by name, sharded or not.
    """
    return [box for coupling in couplings for box in coupling.here(parameters[coupling.parameter])]


def fingerprint(couplings: Iterable[Coupling], monomials: Monomials, unseen: Sequence[str]) -> str:
    """Return a hash that is equal for couplings that rescale parameters of the same names in the same way."""
    arrays = [monomials.products, monomials.units, monomials.exponents]
    uses = []
    for coupling in couplings:
        uses.append((coupling.parameter, str(coupling.region), coupling.additive))
        # A side on which nothing changes may be written out or not, whichever way it was found.
        arrays += [torch.from_numpy(compress(side.cpu().numpy())) for side in (coupling.incoming, coupling.outgoing)]
    shapes = [tuple(array.shape) for array in arrays]
    digest = hashlib.sha256(repr((monomials.num_units, uses, shapes, unseen)).encode())
    for array in arrays:
        digest.update(array.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sides_of(couplings: Iterable[LocalCoupling]) -> Sides:
    """Return what kernels need to know of couplings to add up over the entries of their sides."""
    own = list(couplings)
    return Sides([c.view for c in own], [(into.shape, out.shape) for into, out in (c.sides for c in own)])


def factors_of_entries(couplings: Sequence[LocalCoupling], factors: Tensor) -> Tensor:
    """Return by what the elements at each entry of both sides are multiplied, ``[E]``.

    Args:
        couplings: of which each has entries of its own.
        factors: of the scales, ``[S + 1]``, the last for ``NO_UNIT``; ``outgoing`` takes their inverses.
    """
    here = [coupling.to(factors.device) for coupling in couplings]
    sides = [side.reshape(-1) for coupling in here for side in (coupling.incoming, coupling.outgoing)]
    if not sides:
        return factors[:0]
    sizes = torch.tensor([len(side) for side in sides], device=factors.device)
    numbers = torch.cat(sides).long()
    is_second = torch.arange(len(sides), device=factors.device).repeat_interleave(sizes, output_size=len(numbers)) % 2
    return torch.where(is_second == 1, (1 / factors)[numbers], factors[numbers])


def scales_of_parameters(couplings: Iterable[Coupling]) -> dict[str, int]:
    """Count the scales that multiply or divide elements of each parameter; those without any are left out."""
    numbers: dict[str, list[Tensor]] = {}
    for coupling in couplings:
        numbers.setdefault(coupling.parameter, []).extend([coupling.incoming, coupling.outgoing])
    counts = {
        name: int((torch.cat([side.reshape(-1) for side in sides]).unique() != NO_UNIT).sum())
        for name, sides in numbers.items()
    }
    return {name: count for name, count in counts.items() if count}


def scale_invariant_units(couplings: Iterable[Coupling], monomials: Monomials) -> Tensor:
    """Find the units of weights whose length does not matter, ``bool[H]``: they divide nothing, and scale alone."""
    alone = torch.zeros(monomials.num_scales, dtype=torch.bool, device="cpu")  # scales that some element has alone
    others = torch.zeros_like(alone)  # scales that divide, or multiply together with another
    for coupling in couplings:
        incoming, outgoing = coupling.incoming, coupling.outgoing
        alone[incoming[(incoming != NO_UNIT) & _any_beside(outgoing == NO_UNIT, incoming)]] = True
        others[incoming[(incoming != NO_UNIT) & _any_beside(outgoing != NO_UNIT, incoming)]] = True
        others[outgoing[outgoing != NO_UNIT]] = True
    return alone[: monomials.num_units] & ~monomials.in_(others) & monomials.simple


def _any_beside(marks: Tensor, numbers: Tensor) -> Tensor:
    """Return for each of the ``numbers`` whether one of the marks that broadcasting pairs it with is set."""
    for axis, size in enumerate(numbers.shape):
        if size == 1:
            marks = marks.any(axis, keepdim=True)
    return marks.expand_as(numbers)
