"""Steps relative to the unit that takes them.

At the balanced member of the class, a *row* is all the elements of one parameter that lead into one value: a unit, or
an output that is held fixed. With rho_h the root mean square of the n elements of row h, and g their gradient,

    centred    g_e - 0.9 mean of g over the row
    clipped    so that |g|^2 / n is at most v_h, its own running mean over about 100 steps
    step       of row h: that of the base optimizer times s_h

    SGD, ASGD:  s_h = (1 - momentum) rho_h / sqrt(v_h)       lr is the relative length of a step
    all others: s_h = rho_h / rho, rho that of all rows      lr keeps its meaning

Why it depends on the class alone: the balanced member does, and everything above is a function of the weights and the
gradients there. The relative step is that of Nero (Liu et al., "Learning by Turning", arXiv:2102.07227) without its
projection: rho is that of the start, which fixes the lengths of steps as the projection would, and balancing
takes care of the rest.

Why centred: the gradient of a row is the sum over the data of delta_h a, where a are the values that it reads. Behind a
ReLU these are positive, so that by far the largest eigenvalue of E[a a^T], which is the metric of the row, belongs to
their mean, at the balanced member close to the direction of equal entries. Dividing the gradient's component there by
10 is a natural gradient for that rank-one part, at the price of one mean per row; to take it out altogether is gradient
centralization (Yong et al., arXiv:2004.01461).

Rows of one element (gains, biases) take a tenth of a step: of their own magnitude or, for what is added, of the norm of
the weights into the same unit. Magnitudes are at least a tenth of their mean; gradients that are, relative to rho_h,
below 1e-5 of the root mean square of all rows (such as that of a bias before a batch norm, which is rounding alone) are
not blown up to full steps. Weight decay is lr * weight_decay * w, not scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.optim.rule import Tensors, UnitStatistics
from lightning_ecopt.optim.state import Moments, points_of
from lightning_ecopt.paths.coordinates import is_low_precision
from lightning_ecopt.symmetry import Coupling, SegmentSum
from lightning_ecopt.symmetry.shards import Part, Ranks, local

CENTRING = 0.9
MEMORY = 0.99
SINGLE = 0.1
FLOOR = 0.1
FAINT = 1e-5
SAVED = ("rho", "reference", "second", "weight")


class _Rows:
    """The rows of one coupling: reductions over them, and what broadcasts to them.

    Where parameters are sharded, reductions are of what is to be added up over the ranks, and tensors are local ones.
    """

    def __init__(self, coupling: Coupling, parameter: Tensor, ranks: Ranks) -> None:
        self.parameter = coupling.parameter
        shape = tuple(len(range(part.start, part.stop, part.step)) for part in coupling.region)
        whole = (1,) * (len(shape) - coupling.incoming.ndim) + tuple(coupling.incoming.shape)
        if len(shape) == 1 and not coupling.additive:  # gains and slopes, whatever they lead into
            whole = shape
        self._axes = [axis for axis, (own, size) in enumerate(zip(whole, shape, strict=True)) if own < size]
        units = coupling.incoming.expand(whole).reshape(-1)
        # One unit may be met at several places: in a grouped transposed convolution, once for each input of the group.
        apart = torch.where(units < 0, -1 - torch.arange(len(units)), units)
        met, place, times = apart.unique(return_inverse=True, return_counts=True)
        if len(met) == len(units):
            met, place, times = units, torch.arange(len(units)), torch.ones_like(units)
        self.units = met.clamp(min=-1)
        self.count = len(met)
        self.sizes = times * (prod(shape) // max(len(units), 1))
        #: Whether a row has no direction of its own: it is one element, or added to what the unit's weights give.
        self.single = coupling.additive or bool((self.sizes == 1).all())
        self.additive = coupling.additive
        self._counts = ranks.counts(parameter)
        part = Part.of(coupling.region, parameter)
        self._region = None if part is None else part.region
        here = place.view(whole) if part is None else part.cut(place.view(whole))
        self._shape, place = here.shape, here.reshape(-1)
        in_order = self.count == len(place) and bool((place == torch.arange(self.count)).all())
        place = place.to(local(parameter).device)
        self._place = None if in_order else place
        self._merge = None if in_order else SegmentSum(place, self.count)

    def view(self, tensor: Tensor) -> Tensor | None:
        """What is here of the rows, ``None`` if nothing is."""
        if self._region is None:
            return None
        return tensor.view(1)[self._region] if tensor.ndim == 0 else tensor[self._region]

    def squares(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums of squares of the rows, ``[count]``."""
        view = self._counted(tensor)
        if view is None:
            return tensor.new_zeros(self.count, dtype=dtype)
        norm = torch.linalg.vector_norm(view, dim=self._axes, dtype=dtype) if self._axes else view.to(dtype)
        return self._merged(norm.square())

    def sums(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums of the rows, ``[count]``."""
        view = self._counted(tensor)
        if view is None:
            return tensor.new_zeros(self.count, dtype=dtype)
        return self._merged(view.sum(self._axes, dtype=dtype) if self._axes else view.to(dtype))

    def _counted(self, tensor: Tensor) -> Tensor | None:
        return self.view(tensor) if self._counts else None

    def _merged(self, values: Tensor) -> Tensor:
        return values.reshape(-1) if self._merge is None else self._merge(values.reshape(-1))

    def spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """One value for each row, ``[count]``, as a tensor that broadcasts to the elements."""
        return (values if self._place is None else values[self._place]).view(self._shape).to(dtype)

    def scale_(self, tensors: Tensors, values: Tensor) -> None:
        """Multiply the rows of the own parameter, if it is among ``tensors``, by one value each."""
        view = self.view(local(tensors[self.parameter])) if self.parameter in tensors else None
        if view is not None:
            view.mul_(self.spread(values, view.dtype))


def _bounded(scale: Tensor, mean: Tensor) -> Tensor:
    """Scales that are not too far below their mean; what is zero, and has no scale of its own, is like the mean."""
    return torch.where(scale > 0, torch.maximum(scale, FLOOR * mean), mean)


class UnitRule:
    """Scales the steps of a base optimizer by unit.

    The magnitudes rho are those of the start: were they taken anew at each refresh, norms and steps would drive each
    other up, exponentially in the number of epochs.

    Args:
        couplings: of the scaling group; rows of parameters that are not among ``parameters`` are left out.
        parameters: the base optimizer's own, by name, at the balanced member; all on one device. If they are sharded,
            all ranks take their steps together.
        normalized: whether the base's steps are of a size of their own, as those of Adam, or linear in gradients.
        means: of gradients, by name, as far as the base holds some already; the running second moments start with them.
    """

    def __init__(
        self, couplings: Sequence[Coupling], parameters: Tensors, normalized: bool, means: Tensors | None = None
    ) -> None:
        first = local(next(iter(parameters.values())))
        dtypes = sorted({p.dtype for p in parameters.values()}, key=lambda kind: torch.finfo(kind).bits)
        self._dtype = torch.promote_types(torch.float32, dtypes[-1])
        # Gradients below do not count, so that scales and what they are divided into stay within the range.
        self._tiny = torch.finfo(dtypes[0]).tiny ** 0.75
        self._normalized = normalized
        self._ranks = Ranks(parameters)
        self._rows = [_Rows(c, parameters[c.parameter], self._ranks) for c in couplings if c.parameter in parameters]
        self._counts = [rows.count for rows in self._rows]
        sizes = [rows.sizes for rows in self._rows]
        self._size = torch.cat(sizes or [torch.zeros(0)]).to(first.device, self._dtype)
        self._centring = self._spread([0.0 if rows.single else CENTRING for rows in self._rows], first.device)
        self._clipped = torch.zeros((), dtype=torch.int64, device=first.device)
        self._steps = 0
        self._second = (1 - MEMORY) * self._collect(_Rows.squares, of=means or {})[0] / self._size
        self._weight = (self._second > 0).to(self._dtype) * (1 - MEMORY)  # sum of the weights in the running mean
        self._next = (self._second, self._weight, self._clipped)
        self._moving: set[str] = set()  # names of the parameters with a dense gradient
        self._rho, self._reference = self._scales(parameters)

    def _spread(self, values: Sequence[float], device: torch.device) -> Tensor:
        """One value for each coupling, repeated for each of its rows: ``[R]``."""
        counts = torch.tensor(self._counts)
        return torch.tensor(values, dtype=self._dtype).repeat_interleave(counts).to(device)

    def _collect(self, *reductions: Callable[[_Rows, Tensor, torch.dtype], Tensor], of: Tensors) -> Tensor:
        """Reductions of all rows, ``[len(reductions), R]``; zero for tensors that there are not."""
        parts = [
            reduction(rows, local(of[rows.parameter]), self._dtype)
            if rows.parameter in of
            else self._size.new_zeros(rows.count)
            for reduction in reductions
            for rows in self._rows
        ]
        return self._ranks.sum_(torch.cat([*parts, self._size[:0]]).view(len(reductions), -1))

    def _scales(self, parameters: Tensors) -> tuple[Tensor, Tensor]:
        """rho_h of all rows ``[R]``, with what stands for it in rows of one element; and that of all together."""
        norms = self._collect(_Rows.squares, of=parameters)[0].sqrt().split(self._counts)
        proper = [(rows, norm) for rows, norm in zip(self._rows, norms, strict=True) if not rows.single and rows.count]
        ones = self._size.new_ones(1)
        squares = torch.cat([norm.square() for _, norm in proper] or [ones])
        sizes = torch.cat([rows.sizes.to(ones) for rows, _ in proper] or [ones])
        mean = (squares.sum() / sizes.sum()).sqrt()
        mean_norm = squares.mean().sqrt()
        into = [(rows.units, norm.square()) for rows, norm in zip(self._rows, norms, strict=True) if not rows.additive]
        units = torch.cat([units for units, _ in into]) if into else torch.zeros(0, dtype=torch.int64)
        num_units = int(max((rows.units.max() for rows in self._rows if rows.count), default=-1)) + 1
        total = SegmentSum(units % (num_units + 1), num_units + 1)
        of_unit = total(torch.cat([square for _, square in into])).sqrt() if into else mean_norm.expand(num_units + 1)
        of_unit = torch.cat([of_unit[:-1], mean_norm[None]])  # the last stands for what leads into no unit
        scales = []
        for rows, norm in zip(self._rows, norms, strict=True):
            if rows.single:
                own = of_unit[rows.units.to(of_unit.device)] if rows.additive else norm
                scales.append(SINGLE * _bounded(own, mean_norm))
            else:
                scales.append(_bounded(norm / rows.sizes.to(norm).sqrt(), mean))
        return torch.cat(scales), mean

    def gradients_(self, weights: Tensors, gradients: Tensors) -> None:
        """Centre and clip gradients in place."""
        self._moving = set(gradients)
        sums, squares = self._collect(_Rows.sums, _Rows.squares, of=gradients)
        mean = sums / self._size
        # |g - c m|^2 = |g|^2 - n m^2 (1 - (1 - c)^2)
        shift = self._centring * mean
        second = squares / self._size - mean.square() * (1 - (1 - self._centring).square())
        second = second.clamp(min=0)
        known = second.isfinite()
        if any(rows.parameter not in gradients for rows in self._rows):
            known &= self._spread([rows.parameter in gradients for rows in self._rows], known.device) > 0
        running = torch.where(known, self._second.lerp(second, 1 - MEMORY), self._second)
        weight = torch.where(known, self._weight.lerp(torch.ones_like(self._weight), 1 - MEMORY), self._weight)
        limit = running / weight
        slack = 1 + 8 * torch.finfo(self._dtype).eps
        factor = torch.where(second > slack * limit, (limit / second).sqrt(), 1.0)
        self._next = (running, weight, self._clipped + (factor < 1).sum())
        for rows, less, times in zip(self._rows, shift.split(self._counts), factor.split(self._counts), strict=True):
            gradient = gradients.get(rows.parameter)
            view = None if gradient is None else rows.view(gradient)
            if view is not None:
                if not rows.single:
                    view.sub_(rows.spread(less, view.dtype))
                view.mul_(rows.spread(times, view.dtype))

    def enter_(self, weights: Tensors, moments: Moments, average: Mapping[str, float]) -> Callable[[Moments], None]:
        """Divide the weights by s_h, so that a step of the base optimizer becomes one of s_h times its length.

        Args:
            weights: by parameter name.
            moments: averages of weights go with them; all others stay those of weights.
            average: for each parameter, what makes an average of the base's momentum: 1 - momentum for SGD.
        """
        if self._normalized:
            scale = self._rho / self._reference
        else:
            second, weight, _ = self._next
            deviation = (second / weight.clamp(min=1 - MEMORY)).sqrt()
            faint = FAINT * (self._rho * deviation).square().mean().sqrt() / self._rho
            factors = [average[rows.parameter] for rows in self._rows]
            constant = factors[0] if len(set(factors)) == 1 else self._spread(factors, self._rho.device)
            scale = constant * self._rho / torch.maximum(deviation, faint).clamp(min=self._tiny)
        parts = [
            (rows, part)
            for rows, part in zip(self._rows, scale.split(self._counts), strict=True)
            if rows.parameter in self._moving
        ]
        steps = []
        for rows, part in parts:
            view = rows.view(weights[rows.parameter])
            if view is not None:
                spread = rows.spread(part, view.dtype)
                steps.append((view, spread, view.clone() if is_low_precision(view) else None))
        for view, spread, _ in steps:
            view.div_(spread)
        for points in points_of(moments):
            for rows, part in parts:
                rows.scale_(points, 1 / part)

        def leave_(moments: Moments) -> None:
            for view, spread, before in steps:
                if before is None:
                    view.mul_(spread)
                else:
                    view.sub_(before / spread).mul_(spread).add_(before)
            for points in points_of(moments):
                for rows, part in parts:
                    rows.scale_(points, part)

        return leave_

    def visit_(self, weights: Tensors) -> Callable[[], object]:
        """Nothing: averages are those of weights."""
        return lambda: None

    def accept(self) -> None:
        """The running second moments take note of the gradients."""
        self._second, self._weight, self._clipped = self._next
        self._steps += 1

    def leave_(self, weights: Tensors, moments: Moments) -> None:
        """Nothing: moments are those of the gradients of weights."""

    def statistics(self, dormant: int) -> UnitStatistics:
        """How much was clipped."""
        return UnitStatistics(int(self._clipped) / max(1, self._steps * len(self._size)), dormant)

    def state_dict(self, moments: Moments) -> dict[str, Any]:
        """Tensors ``[R]`` over the rows, and the reference."""
        return {name: getattr(self, f"_{name}").clone() for name in SAVED}

    def load_state_dict(self, state: Mapping[str, Any], moments: Moments) -> None:
        """Take over the state of a checkpoint.

        Raises:
            ValueError: if it is of other rows.
        """
        for name in SAVED:
            own = getattr(self, f"_{name}")
            if state[name].shape != own.shape:
                raise ValueError(
                    f"The checkpoint was made with {len(state['rho'])} rows of weights, this optimizer has "
                    f"{len(self._rho)}: load it into the network and the parameter groups that it was made with."
                )
            own.copy_(state[name])
