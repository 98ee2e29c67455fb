"""Skeleton weights: one element that pins the scale of each unit, and one through which its paths leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod

import numpy as np
import torch
from torch import Tensor

from lightning_ecopt.common.tensors import Tensors, padded, piece_length
from lightning_ecopt.symmetry import Coupling
from lightning_ecopt.symmetry.coupling import NO_UNIT


def _tie(dtype: torch.dtype) -> float:
    """Relative difference below which magnitudes count as equal, so that rounding does not decide between them."""
    return min(1024 * torch.finfo(dtype).eps, 0.01)


def narrow(numbers: Tensor, least: torch.dtype = torch.int32) -> Tensor:
    """Return whole numbers in the smallest type that holds them, ``least`` or a wider one; masks as they are."""
    if numbers.dtype == torch.bool:
        return numbers
    most = int(numbers.max()) if numbers.numel() else 0
    kinds = (torch.int16, torch.int32, torch.int64)
    return numbers.to(next(kind for kind in kinds[kinds.index(least) :] if most <= torch.iinfo(kind).max))


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The skeleton weights of all units; every field is a tensor ``[H]``, ``NO_UNIT`` where a unit has none.

    Numbers of couplings are kept in 16 bits, others in 32, if they fit.

    An element is given by the number of its coupling and by its flat index in the coupling's region.

    Args:
        active: whether the unit has skeleton weights at all; if not it is treated in weight space.
        fixed_coupling: coupling of the incoming skeleton weight, which is held fixed.
        fixed_index: flat index of the incoming skeleton weight.
        out_coupling: coupling of the outgoing skeleton weight.
        out_index: flat index of the outgoing skeleton weight.
        target: the unit into which the outgoing skeleton weight leads; ``NO_UNIT`` for an output.
        free: whether the outgoing skeleton weight is not the fixed one of ``target``.
        root: the unit whose outgoing skeleton weight is the first free one on the way out.
    """

    active: Tensor
    fixed_coupling: Tensor
    fixed_index: Tensor
    out_coupling: Tensor
    out_index: Tensor
    target: Tensor
    free: Tensor
    root: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            # The others are indices, and torch takes none of 16 bits.
            least = torch.int16 if field.name.endswith("_coupling") else torch.int32
            object.__setattr__(self, field.name, narrow(getattr(self, field.name), least))

    def state_dict(self) -> dict[str, Tensor]:
        """The fields by name; numbers in 64 bits, as ever."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value if value.dtype == torch.bool else value.long() for name, value in values.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Skeleton:
        """The inverse of :meth:`state_dict`; states of earlier versions have more fields, which nothing needs."""
        return cls(**{field.name: state[field.name].cpu() for field in fields(cls)})

    def fits(self, couplings: Sequence[Coupling], parameters: Tensors) -> bool:
        """Whether all skeleton weights are elements of the parameters, which may be some of the couplings' alone."""
        chosen = (
            (self.active, self.fixed_coupling, self.fixed_index),
            (self.active, self.out_coupling, self.out_index),
        )
        for units, coupling, index in chosen:
            for number in coupling[units].unique().tolist():
                if number >= len(couplings) or couplings[number].parameter not in parameters:
                    return False
                size = couplings[number].view(parameters[couplings[number].parameter]).numel()
                if int(index[units & (coupling == number)].max()) >= size:
                    return False
        return True

    @property
    def num_units(self) -> int:
        """Number of units H."""
        return len(self.active)


def choose_skeleton(
    couplings: Sequence[Coupling], parameters: Mapping[str, Tensor], active: Tensor, rule: str = "max"
) -> Skeleton:
    """Choose the skeleton weights of the active units.

    Incoming skeleton weights form a forest whose roots are inputs and biases, outgoing ones a forest whose roots are
    outputs; otherwise they would not define paths (through a residual stream the largest weights can run in a circle).
    Both are grown from the roots, level by level. Within a level the largest magnitude is taken, and biases only where
    nothing else leads on. Elements that are zero are never taken.

    Args:
        couplings: of the scaling group. Units that are alive but not active must be held fixed in them.
        parameters: the parameters by name.
        active: ``bool[H]``, the units that are to have skeleton weights, all of them alive.
        rule: ``"max"``, or ``"diagonal"`` for the choice of Meng et al., arXiv:1802.03713: unit i to unit i at the
            centre of the kernel, for networks in which every unit has one incoming and one outgoing weight tensor.
            Then magnitudes do not matter, and the first such element is taken: of ``Linear(784, 64)`` the 64 elements
            ``[i, i]``, of ``Linear(64, 10)`` the 64 elements ``[i % 10, i]``, as in the authors' code.

    Raises:
        ValueError: if the rule is unknown, or the diagonal one does not fit the network.
    """
    if rule not in ("max", "diagonal"):
        raise ValueError(f"skeleton must be 'max' or 'diagonal', got {rule!r}")
    active = active.cpu()
    weights = [coupling.view(parameters[coupling.parameter].detach()) for coupling in couplings]
    if rule == "diagonal":
        weights = [_diagonal(c, w) for c, w in zip(couplings, weights, strict=True)]
    edges = [(c.outgoing.numpy(), c.incoming.numpy(), c.additive, w) for c, w in zip(couplings, weights, strict=True)]
    incoming = _grow(edges, active)
    outgoing = _grow([(target, source, additive, w) for source, target, additive, w in edges], active)
    missing = active & ~(incoming.reached & outgoing.reached)
    if bool(missing.any()):
        why = (
            "The diagonal choice needs non-zero diagonals and one weight tensor on each side of every unit: use "
            "rule='path' with skeleton='max'."
            if rule == "diagonal"
            else "Only units that are alive can be active."
        )
        raise ValueError(f"No path leads through {int(missing.sum())} of {int(active.sum())} active units. {why}")
    target = outgoing.other
    meets_fixed = (target != NO_UNIT) & (outgoing.coupling == incoming.coupling[target])
    meets_fixed &= outgoing.index == incoming.index[target]
    free = active & ~meets_fixed
    root = torch.where(meets_fixed, target, torch.arange(len(active), device="cpu"))
    while not bool((root == root[root]).all()):
        root = root[root]
    return Skeleton(
        active,
        incoming.coupling,
        incoming.index,
        outgoing.coupling,
        outgoing.index,
        target,
        free,
        torch.where(active, root, NO_UNIT),
    )


@dataclass(frozen=True, eq=False)
class _Forest:
    """A tree edge for each unit; all fields are ``[H]``.

    Args:
        coupling: of the element that leads to the unit.
        index: flat index of the element in the coupling's region.
        other: the unit at the other end of the element; ``NO_UNIT`` at a root.
        reached: whether there is such an element.
    """

    coupling: Tensor
    index: Tensor
    other: Tensor
    reached: Tensor


#: Source units, target units, whether the elements are added, and the elements.
Edges = tuple[np.ndarray, np.ndarray, bool, Tensor]


def _grow(edges: Sequence[Edges], active: Tensor) -> _Forest:
    """Grow a forest over all active units, from what belongs to no unit."""
    num_units = len(active)
    coupling, index, other = (np.full(num_units, NO_UNIT) for _ in range(3))
    reached = np.zeros(num_units + 1, dtype=bool)
    reached[NO_UNIT] = True
    wanted = padded(active, False).numpy()
    while wanted.any():
        best = np.zeros(num_units)
        for biases in (False, True):
            for number, (source, target, additive, weight) in enumerate(edges):
                open_, asked = reached[source], wanted[target]
                if additive != biases or not asked.any() or not open_.any():
                    continue
                tie = _tie(weight.dtype)
                units, values, places = _largest(weight, open_, asked, target, tie)
                better = values > best[units] * (1 + tie)
                units, values, places = units[better], values[better], places[better]
                best[units], coupling[units], index[units] = values, number, places
                other[units] = _at(source, places, weight.shape)
            if best.any():
                break
        if not best.any():
            break
        reached[:NO_UNIT] |= best > 0
        wanted[:NO_UNIT] &= best == 0
    return _Forest(*map(torch.from_numpy, (coupling, index, other, reached[:NO_UNIT])))


def _largest(
    weight: Tensor, open_: np.ndarray, wanted: np.ndarray, target: np.ndarray, tie: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each wanted unit its largest open element: units, magnitudes and flat indices in ``weight``."""
    kept = [k for k, size in enumerate(target.shape) if size > 1]
    order = [*kept, *(k for k in range(weight.ndim) if k not in kept)]
    shape = [weight.shape[k] for k in order]
    step = piece_length(weight.permute(order), "refresh") if kept else weight.numel()
    sides = (torch.from_numpy(side).to(weight.device).expand(weight.shape) for side in (open_, wanted))
    pieces = (tensor.permute(order).split(step) for tensor in (weight, *sides))
    largest, columns = [], []
    for piece, *marks in zip(*pieces, strict=True):
        rows = (piece.abs() * (marks[0] & marks[1])).reshape(prod(piece.shape[: len(kept)]), -1)
        top = rows.amax(1, keepdim=True)
        largest.append(top[:, 0])
        columns.append((rows >= top * (1 - tie)).to(torch.uint8).argmax(1))
    found = torch.cat(largest).to(torch.float64).cpu().numpy()
    positions = np.arange(len(found)) * (weight.numel() // len(found)) + torch.cat(columns).cpu().numpy()
    along = dict(zip(order, np.unravel_index(positions, shape), strict=True))
    places = np.ravel_multi_index([along[k] for k in range(weight.ndim)], weight.shape)
    # One unit may own several rows.
    units = target.reshape(-1)
    most = np.zeros(int(units.max(initial=NO_UNIT)) + 2)
    np.fmax.at(most, units, found)  # NaN, of units that are not wanted, never is the largest
    rows_kept = np.flatnonzero((found > 0) & (units != NO_UNIT) & (found >= most[units] * (1 - tie)))
    owners, first = np.unique(units[rows_kept], return_index=True)
    return owners, most[owners], places[rows_kept[first]]


def _at(ids: np.ndarray, places: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Entries of ``ids``, which broadcasts to ``shape``, at flat indices in that shape."""
    axes = np.unravel_index(places, shape)
    return ids[tuple(axis if size > 1 else 0 * axis for axis, size in zip(axes, ids.shape, strict=True))]


def _diagonal(coupling: Coupling, weight: Tensor) -> Tensor:
    """One for the elements from channel i to channel i at the centre of the kernel, unless they are zero; else zero.

    Where there are more channels on one side than on the other, the other's are counted again from the first.
    """
    mask = torch.zeros_like(weight)
    if coupling.additive or weight.ndim < 2:
        return mask
    outputs, inputs, *kernel = weight.shape
    number = torch.arange(max(outputs, inputs), device=weight.device)
    centre = [number.new_tensor(size // 2) for size in kernel]
    place = [number % outputs, number % inputs, *centre]
    mask[tuple(place)] = 1
    return mask * (weight != 0)
