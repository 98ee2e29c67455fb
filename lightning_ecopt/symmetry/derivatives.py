"""How a loss changes when units are rescaled, from weights and gradients alone.

If unit h is rescaled by exp(s), an element e that its scale multiplies with exponent k_e becomes w_e exp(k_e s). So

    Q_h = dL/ds = sum_e k_e w_e g_e,        A_h = sum_e |k_e w_e g_e|,

and Q_h = 0, whatever the batch, if the loss does not change (Noether's identity). What is computed differs from zero by
rounding.

How much rounding explains. Backward passes hand on what they have computed: the rounding of a value far from unit h
changes the gradients of its incoming and of its outgoing elements alike, and drops out of Q_h. What is left is rounded
between the two: in each *place* where elements of the unit meet data, a product is rounded, and what is added,
activated or normalised behind it, on the way there and on the way back: :data:`ROUNDINGS` in all. Each is off by a
relative error within u, all errors equally likely, which has the variance u**2 / 3. The E elements of a place are added
up in 32 bits or more. Errors of different roundings are independent, with mean zero, so that they add up like a random
walk (Higham and Mary, SIAM J. Sci. Comput. 41 (2019)):

    |Q_h| <= LAMBDA r_h A_h,        r_h**2 = sum over places of (ROUNDINGS u**2 + E u32**2) / 3,

but with a probability of 2 exp(-LAMBDA**2 / 2), which is 3e-8. Elements w_e g_e are sums over a batch themselves,
though, and may cancel where their terms do not: at a stationary point, or behind a softmax or a norm. So A_h alone is
no yardstick. The terms of other units are of the same size, and were so at earlier steps. So the mean of A over all
units, or the largest that this mean has been, is added to A_h.

- In float32 u counts four times, since sums over the positions of attention are not among the places.
- u is that of the *computation*: of the type of weights and gradients, or of 16 bits if gradients have the trailing
  zeros of numbers that were cast (autocast), or of TF32 where torch may use it. float16 counts as bfloat16, as it also
  underflows; float64 as float32, as parts of a network often compute in it.
- A clipped gradient (``clip_grad_value_``) is none. If the largest magnitude of a parameter's gradient is a number of
  one or two decimal digits, or several elements have it, these make the A of their units infinite, which are not
  judged. Nor are units with an element that has no gradient, or none that is finite.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, prod

import torch
from torch import Tensor

from lightning_ecopt.common.parts import lengths
from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import Ranks, local
from lightning_ecopt.common.sides import Passes, Sides
from lightning_ecopt.common.tensors import alike, are_few, pieces, stacked, sums_of_pieces, to_device, widest
from lightning_ecopt.symmetry.coupling import NO_UNIT, LocalCoupling
from lightning_ecopt.symmetry.monomials import Monomials

#: Standard deviations that rounding may reach.
LAMBDA = 6.0
#: In each place of a unit, on the way forward and back.
ROUNDINGS = 4.0
#: Half of a normal distribution is within so many standard deviations.
MEDIAN = 0.6745
#: Unit roundoffs of what is computed in. That of float32 is 2**-24; in attention, where sums over positions are rounded
#: too, decoders that were trained for some hundred steps have shown 22 standard deviations of it.
FLOAT32, TF32, SIXTEEN, EIGHT = 2.0**-22, 2.0**-11, 2.0**-8, 2.0**-3
#: So many equal largest magnitudes are no coincidence: two are, of two classes.
CLIPPED = 3
#: Most elements of a gradient whose digits are looked at, and fewest that tell something.
SAMPLE, ENOUGH = 4096, 6
#: Of so many entries :class:`DerivativeSums` keeps how they are added up from one look to the next.
FEW_ENTRIES = 1 << 13

#: Weights and their gradients on this rank, by parameter name.
Pairs = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Derivatives:
    """Derivatives of a loss by the log-scales of units, and what rounding explains of them.

    Args:
        total: Q, ``[H]``.
        size: A, ``[H]``; infinite or undefined for units that cannot be judged.
        rounding: r, ``[H]``, at the precision that was found.
        places: what takes the place of r**2 for a larger unit roundoff u, over u**2, ``[H]``.
    """

    total: Tensor
    size: Tensor
    rounding: Tensor
    places: Tensor

    def evidence(self, floor: Tensor) -> Evidence:
        """What can be said of units from this gradient alone.

        Args:
            floor: the largest mean of A so far, a scalar.
        """
        judged = self.judged
        total, size, rounding, places = (
            torch.where(judged, values, 0.0) for values in (self.total, self.size, self.rounding, self.places.sqrt())
        )
        yardstick = size + torch.where(judged, floor, 0.0)
        return Evidence(torch.stack([total, size, LAMBDA * rounding * yardstick, places * yardstick]))

    @cached_property
    def judged(self) -> Tensor:
        """Units of which the gradient can tell something, ``bool[H]``."""
        return self.size.isfinite() & self.total.isfinite() & (self.size > 0)

    def mean_size(self) -> Tensor:
        """The mean of A over all units that are judged, a scalar; zero if there is none."""
        judged = self.judged
        return torch.where(judged, self.size, 0.0).sum() / judged.sum().clamp(min=1)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Sums over one gradient or several, which tell whether units may be rescaled.

    Args:
        sums: ``[4, H]``: Q; A; how large Q may be for rounding; and how large per unit roundoff u, of a larger u.
    """

    sums: Tensor

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.sums + other.sums)

    def to(self, dtype: torch.dtype) -> Evidence:
        """Return the same sums in another type. Their rounding is far below what they are compared with."""
        return Evidence(self.sums.to(dtype))

    @property
    def ratio(self) -> Tensor:
        """|Q| / A, ``[H]``; zero for units that have not been judged."""
        total, size = self.sums[:2]
        return torch.where(size > 0, total.abs() / size, 0.0)

    def bound(self, *, is_known: bool = False) -> Tensor:
        """The largest ratio that rounding explains, ``[H]``.

        Args:
            is_known: whether the precision of the computation is known. If not, and most units stand out of the
                rounding of the one that was found by no more than TF32 or 16 bits explain, it was that. Gradients do
                not show it when numbers of 16 bits have been divided, added up, or clipped by their norm.
        """
        total, size, most, per_roundoff = self.sums
        judged = size > 0
        if not is_known and bool(judged.any()):
            middle = torch.where(judged, total.abs() / per_roundoff, torch.nan).nanmedian()
            if float(torch.where(judged, total.abs() / most, torch.nan).nanmedian()) > 1:
                explains = [u for u in (TF32, SIXTEEN) if float(middle) <= MEDIAN * u][:1]
                most = torch.maximum(most, LAMBDA * sum(explains) * per_roundoff)
        return torch.where(judged, most / size, torch.inf)


class DerivativeSums:
    """Sums w * g over the elements of each unit.

    They are added up for each *entry* of ``incoming`` and ``outgoing`` of the couplings first, of which there are E.

    Args:
        couplings: of the group, cut to what this rank holds of the parameters.
        monomials: the scales that the couplings refer to.
        sides: those of the couplings.
    """

    def __init__(self, couplings: Sequence[LocalCoupling], monomials: Monomials, sides: Sides) -> None:
        self._couplings, self._monomials, self._sides = couplings, monomials, sides
        scales = [(c.incoming[c.incoming != NO_UNIT], c.outgoing.reshape(-1)) for c in couplings]
        self._joins = [bool(torch.isin(incoming, outgoing).any()) for incoming, outgoing in scales]
        sizes = [[c.incoming.numel(), c.outgoing.numel()] for c in couplings]
        self._entries = [sum(of) for of in sizes]
        self._sizes = torch.tensor(sizes, dtype=torch.int64, device="cpu").view(-1)  # of the sides
        elements = [prod(lengths(c.part.places)) for c in couplings]
        self._places = torch.tensor(
            [
                [ROUNDINGS * share / 3 for c in couplings for share in c.shares],
                [
                    count / max(size, 1) * FLOAT32**2 / 3
                    for count, of in zip(elements, sizes, strict=True)
                    for size in of
                ],
            ],
            dtype=torch.float64,
            device="cpu",
        )
        self._on: dict[torch.device, list[LocalCoupling]] = {}
        self._few: dict[torch.device, SegmentSum] = {}

    def _at(self, device: torch.device) -> list[LocalCoupling]:
        """The couplings on a device."""
        if device not in self._on:
            self._on[device] = [coupling.to(device) for coupling in self._couplings]
        return self._on[device]

    def _of_scales(self, device: torch.device) -> SegmentSum:
        """What adds up the entries of each scale, to ``[S]``; kept if it is small."""
        if device in self._few:
            return self._few[device]
        size = self._monomials.num_scales
        sides = [side.reshape(-1) for c in self._couplings for side in (c.incoming, c.outgoing)]
        made = SegmentSum(torch.cat([side.where(side != NO_UNIT, size) for side in sides]), size, device)
        if sum(map(len, sides)) <= FEW_ENTRIES:
            self._few[device] = made
        return made

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor | None],
        ranks: Ranks,
        roundoff: float,
        silent: Collection[str] = (),
        kernels: Passes | None = None,
    ) -> Derivatives:
        """Form Q, A and the rounding of all units.

        Args:
            weights: by parameter name, sharded or not.
            gradients: likewise; units with an element that has none are not judged.
            ranks: the ranks that hold parts of the weights; all of them get the same result.
            roundoff: unit roundoff of what is computed in, as far as it is known; the gradients may show a larger one.
            silent: names of parameters that the loss was seen not to reach. A unit that leads out through them is
                judged, as the loss does not depend on them; one that leads in through them is not, as the gradient may
                have been cut on the way, by ``detach``.
            kernels: add up, if they can; by default tensor operations do.
        """
        device = local(next(iter(weights.values()))).device
        if not self._couplings:  # on this rank; others may have some
            none = torch.zeros(4, self._monomials.num_scales, dtype=widest(device), device=device)
            return self._of_units(ranks.sum_(none))
        names = dict.fromkeys(coupling.parameter for coupling in self._couplings)
        present = {name: g for name in names if (g := gradients.get(name)) is not None}
        values = {name: _values(gradient) for name, gradient in present.items()}
        seen = None if kernels is None else kernels.magnitudes(list(values.values()), SAMPLE)
        limits, precision = _limits(values, seen), _roundoff(values.values(), roundoff, seen)
        pairs = {
            name: (local(weights[name]), local(gradient.to_dense()) if gradient.is_sparse else values[name])
            for name, gradient in present.items()
            if ranks.counts(weights[name])
        }
        sums = self._sums(pairs, limits, device, kernels)
        for coupling, part in zip(self._couplings, sums.split(self._entries, 1), strict=True):
            if coupling.parameter not in present:
                part[1, : coupling.incoming.numel() if coupling.parameter in silent else None] = inf
        of_scales = self._of_scales(device)
        return self._of_units(ranks.sum_(of_scales(torch.cat([sums, self._roundings(pairs, precision, device)]))))

    def _sums(self, pairs: Pairs, limits: Mapping[str, Tensor], device: torch.device, kernels: Passes | None) -> Tensor:
        """Add up w g, and its magnitude, for each entry, ``[2, E]``; zero where there is no gradient."""
        if kernels is not None and not limits and not any(self._joins):
            operands = [pairs.get(coupling.parameter, (None, None)) for coupling in self._couplings]
            own, theirs = ([pair[k] for pair in operands] for k in (0, 1))
            sums = kernels.both_sides(self._sides, own, theirs, sign=-1.0)
            if sums is not None:
                return sums
        here = self._at(device)
        boxes = {
            number: (coupling.view(pair[0]), coupling.view(pair[1]))
            for number, coupling in enumerate(here)
            if (pair := pairs.get(coupling.parameter)) is not None
        }
        kinds = {k: k if self._joins[k] else _kind(here[k], *box) for k, box in boxes.items()}
        found: dict[int, Tensor] = {}
        for numbers in alike(kinds, together=are_few(weight for weight, _ in boxes.values())):
            weights, gradients = (stacked(several) for several in zip(*(boxes[k] for k in numbers), strict=True))
            limit = torch.stack([limits[here[k].parameter] for k in numbers]) if limits else None
            sides = self._sums_of(numbers[0], weights, gradients, limit)
            found |= zip(numbers, torch.cat([side.flatten(2) for side in sides], 2).unbind(1), strict=True)
        for k, entries in enumerate(self._entries):
            if k not in found:
                found[k] = torch.zeros(2, entries, dtype=widest(device), device=device)
        return torch.cat([found[k] for k in range(len(here))], 1)

    def _sums_of(self, number: int, weights: Tensor, gradients: Tensor, limits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add up w g, and its magnitude, for the entries of either side of N couplings that are alike.

        Args:
            number: of one of the couplings; the only one if some of its elements have one scale on both sides.
            weights: ``[N, *box]``.
            gradients: ``[N, *box]``.
            limits: the magnitudes from which on elements are clipped, ``[N]``, if any may be.

        Returns:
            ``[2, N, *incoming]`` and ``[2, N, *outgoing]``.
        """
        here, box = self._at(weights.device)[number], weights.shape[1:]
        same = (here.incoming == here.outgoing).expand(box) if self._joins[number] else None  # k = 0 there
        limit = None if limits is None else limits.view(-1, *[1] * len(box))

        def products(rows: slice) -> Tensor:
            own = gradients[:, rows]
            both = own.new_empty(2, *own.shape, dtype=widest(own.device))
            signed, magnitudes = both
            signed.copy_(weights[:, rows]).mul_(own)
            if same is not None:
                signed.masked_fill_(same[rows], 0.0)
            torch.abs(signed, out=magnitudes)
            if limit is not None:
                magnitudes.masked_fill_((own.abs() >= limit) & (signed != 0), inf)
            return both

        shapes = [side.shape for side in here.sides]
        into, out = sums_of_pieces(products, shapes, pieces(weights[0], "refresh"))
        return into, torch.stack([-out[0], out[1]])

    def _roundings(self, pairs: Pairs, precision: Tensor, device: torch.device) -> Tensor:
        """The roundings, and the places, of each entry, ``[2, E]``; zero where there is no gradient."""
        is_here = torch.tensor([[c.parameter in pairs] * 2 for c in self._couplings], device="cpu").view(-1)
        each = to_device(self._places.where(is_here, 0.0).to(widest(device)), device)
        of_sides = to_device(self._sizes, device)
        places, sums = each.repeat_interleave(of_sides, 1, output_size=sum(self._entries))
        return torch.stack([places * precision**2 + sums, places])

    def _of_units(self, sums: Tensor) -> Derivatives:
        """Collect sums of scales, ``[4, S]``, for each unit."""
        monomials = self._monomials.to(sums.device)
        size, variance, places = (monomials.collect_sizes(row) for row in sums[1:])
        return Derivatives(monomials.collect(sums[0]), size, variance.sqrt(), places)


def _kind(coupling: LocalCoupling, weight: Tensor, gradient: Tensor) -> tuple[object, ...]:
    """What couplings must have in common to be added up together."""
    return weight.shape, weight.dtype, gradient.dtype, coupling.incoming.shape, coupling.outgoing.shape


def _values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient on this rank, in one tensor that is not sparse."""
    return local(gradient.coalesce().values() if gradient.is_sparse else gradient)


def _limits(gradients: Mapping[str, Tensor], seen: Tensor | None) -> dict[str, Tensor]:
    """For each gradient the magnitude from which on its elements may be clipped; none if it is known that none are.

    Args:
        gradients: by parameter name.
        seen: what kernels have seen of them, if they have.
    """
    if not gradients:
        return {}
    names, (sizes, counts) = (list(gradients), seen[:2]) if seen is not None else _largest_of_all(gradients)
    top = sizes == sizes.max()
    shared = (counts >= CLIPPED) | (top & (torch.where(top, counts, 0.0).sum() >= CLIPPED))
    clipped = (shared | is_chosen(sizes, 4 * FLOAT32)) & (sizes > 0)
    if sizes.device.type == "cpu" and not bool(clipped.any()):
        return {}
    return dict(zip(names, torch.where(clipped, sizes, inf).unbind(), strict=True))


def _largest_of_all(gradients: Mapping[str, Tensor]) -> tuple[list[str], Sequence[Tensor]]:
    """Names of gradients, their largest magnitudes, and how many elements have these, ``[N]`` both."""
    names, found = [], []
    kinds = {name: (g.shape, g.dtype, g.device) for name, g in gradients.items()}
    for several in alike(kinds, together=are_few(gradients.values())):
        names += several
        found.append(_largest(stacked([gradients[name] for name in several])))
    device = found[0][0].device
    return names, [torch.cat([pair[k].to(device, widest(device)) for pair in found]) for k in (0, 1)]


def is_chosen(values: Tensor, tolerance: float) -> Tensor:
    """Whether positive numbers have one or two decimal digits, as 0.5 and 0.25, to a relative tolerance."""
    decade = 10 ** values.log10().floor()
    return ((values / decade * 10).round() / 10 * decade / values - 1).abs() < tolerance


def _largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each of ``values [N, ...]``, and how many elements have it: ``[N]`` both."""
    if not values.numel():
        return values.new_zeros(len(values)), values.new_zeros(len(values))
    values = values if values.ndim > 1 else values[:, None]
    axes = tuple(range(1, values.ndim))
    largest = torch.maximum(values.amax(axes), -values.amin(axes))
    each = largest.view(-1, *[1] * len(axes))
    counts = [(values[:, rows].abs() == each).sum(axes) for rows in pieces(values[0], "refresh")]
    return largest, torch.stack(counts).sum(0)


def _roundoff(gradients: Iterable[Tensor], known: float, seen: Tensor | None) -> Tensor:
    """The unit roundoff of what gradients were computed in: of 16 bits if any of them shows that, or what is known.

    Numbers of 16 bits in 32 or 64 end in zeros, and so do sums of a few of them; of others one in 16 ends in four
    zeros. A gradient of more digits tells nothing of what its unit's other gradients, or activations, were computed in.

    Args:
        gradients: all of them.
        known: unit roundoff that is known.
        seen: what kernels have seen of them, if they have.
    """
    gradients = list(gradients)
    known = max(known, FLOAT32)
    if any(torch.finfo(gradient.dtype).bits < 32 for gradient in gradients):
        known = SIXTEEN
    samples = [g.reshape(-1)[:SAMPLE].contiguous() for g in gradients if g.dtype in (torch.float32, torch.float64)]
    if known >= SIXTEEN or not samples:
        return torch.tensor(known, device=gradients[0].device if gradients else "cpu")
    counts = _digits_of_all(samples) if seen is None else seen[2:]
    proper, rounded, deeply = torch.cat([counts, counts.sum(1, keepdim=True)], 1)
    # Of few elements, as of a bias, all must have twelve zeros: one of 4096 other numbers does.
    shows = ((proper >= ENOUGH) & (2 * rounded > proper)) | ((proper >= 2) & (deeply == proper))
    return torch.where(shows.any(), SIXTEEN, known)


def _digits_of_all(samples: Sequence[Tensor]) -> Tensor:
    """What :func:`_round_digits` says of each, ``[3, N]`` in any order."""
    kinds = {k: (len(sample), sample.dtype) for k, sample in enumerate(samples)}
    several = alike(kinds, together=are_few(samples))
    return torch.cat([_round_digits(stacked([samples[k] for k in numbers])) for numbers in several], 1)


def _round_digits(values: Tensor) -> Tensor:
    """How many of ``values [N, n]`` are not zero, and how many of these end, in 32 bits, in four and in twelve zeros.

    Returns:
        ``[3, N]``.
    """
    short = values.float()
    digits = short.view(torch.int32).where(short == values, -1)  # -1 ends in ones
    proper = values.bool()  # which takes a CPU less time than a comparison with zero
    count = proper.sum(1)
    return torch.stack([count, *(count - ((digits & low).bool() & proper).sum(1) for low in (15, 4095))])


def roundoff_of(parameters: Mapping[str, Tensor]) -> float:
    """Unit roundoff of what a network computes in, as far as its parameters and the switches of torch tell."""
    if any(torch.finfo(p.dtype).bits < 32 for p in parameters.values()):
        return SIXTEEN
    on_cuda = any(p.device.type == "cuda" for p in parameters.values())
    has_convolutions = any(p.ndim > 2 for p in parameters.values())
    try:
        precision = torch.get_float32_matmul_precision()
        if precision != "highest":
            return SIXTEEN if precision == "medium" else TF32
        return TF32 if on_cuda and has_convolutions and torch.backends.cudnn.allow_tf32 else FLOAT32
    except RuntimeError:  # the switches have been set by name for single operations
        return TF32 if on_cuda else SIXTEEN


def roundoff_at(precision: str | None) -> float | None:
    """Unit roundoff of what a Trainer of some precision computes in, such as ``"bf16-mixed"``; ``None`` if unknown."""
    if precision is None:
        return None
    if "transformer-engine" in precision:
        return EIGHT
    return SIXTEEN if "16" in precision else FLOAT32
