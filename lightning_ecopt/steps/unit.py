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
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import local
from lightning_ecopt.common.tensors import Tensors, updates_by_difference
from lightning_ecopt.kernels import Coefficient, Kernels
from lightning_ecopt.steps.rows import Rows
from lightning_ecopt.steps.rule import Frame, UnitStatistics
from lightning_ecopt.steps.state import Moments, points_of
from lightning_ecopt.symmetry import Coupling

CENTRING = 0.9
MEMORY = 0.99
SINGLE = 0.1
FLOOR = 0.1
FAINT = 1e-5
SAVED = ("rho", "reference", "second", "weight")


def _bounded(scale: Tensor, mean: Tensor) -> Tensor:
    """Monomials that are not too far below their mean; what is zero, and has no scale of its own, is like the mean."""
    return torch.where(scale > 0, torch.maximum(scale, FLOOR * mean), mean)


def _frame(
    sums: Tensor,
    squares: Tensor,
    second: Tensor,
    weight: Tensor,
    size: Tensor,
    single: Tensor,
    present: Tensor | None,
    rho: Tensor | None,
    tiny: float,
) -> tuple[Tensor | None, ...]:
    """Take note of gradients, by rows; everything is ``[R]``.

    Args:
        sums: of the gradients of each row.
        squares: likewise, of their squares.
        second: running mean of second moments, times ``weight``.
        weight: sum of the weights in it.
        size: number of elements.
        single: whether rows are not centred.
        present: whether there is a gradient at all; ``None`` if there is for all.
        rho: magnitude of the weights, if steps are to be relative to it.
        tiny: gradients below do not count.

    Returns:
        The new ``second`` and ``weight``; by what gradients are multiplied, and what is added to them then; the length
        of steps over that of gradients, ``None`` without ``rho``; and how many rows were clipped.
    """
    mean = sums / size
    centring = CENTRING * (~single).to(size)
    # |g - c m|^2 = |g|^2 - n m^2 (1 - (1 - c)^2)
    own = (squares / size - mean.square() * (centring * (2 - centring))).clamp(min=0)
    own = own.nan_to_num(-1, -1)
    known = own >= 0 if present is None else (own >= 0) & present
    second = second.lerp(torch.where(known, own, second), 1 - MEMORY)
    weight = torch.addcmul(weight, 1 - weight, known.to(size), value=1 - MEMORY)
    limit = second / weight.clamp(min=1 - MEMORY)
    slack = 1 + 8 * torch.finfo(size.dtype).eps
    is_clipped = own > slack * limit
    times = torch.where(is_clipped, (limit / own).sqrt(), 1.0)
    plus = (mean * centring).nan_to_num(0, 0, 0) * -times
    relative = None
    if rho is not None:
        deviation = limit.sqrt()
        faint = FAINT * (rho * deviation).square().mean().sqrt() / rho
        relative = rho / torch.maximum(deviation, faint).clamp(min=tiny)
    return second, weight, times, plus, relative, is_clipped.sum()


class UnitRule:
    """Monomials the steps of a base optimizer by unit.

    The magnitudes rho are those of the start: were they taken anew at each refresh, norms and steps would drive each
    other up, exponentially in the number of epochs.

    Args:
        couplings: of the scaling group; rows of parameters that are not among ``parameters`` are left out.
        parameters: the base optimizer's own, by name, at the balanced member; all on one device. If they are sharded,
            all ranks take their steps together.
        kernels: what passes over weights and gradients are made with.
        normalized: whether the base's steps are of a size of their own, as those of Adam, or linear in gradients.
        means: of gradients, by name, as far as the base holds some already; the running second moments start with them.
    """

    def __init__(
        self,
        couplings: Sequence[Coupling],
        parameters: Tensors,
        kernels: Kernels,
        normalized: bool,
        means: Tensors | None = None,
    ) -> None:
        narrowest = min((p.dtype for p in parameters.values()), key=lambda kind: torch.finfo(kind).bits)
        # Gradients below do not count, so that scales and what they are divided into stay within the range.
        self._tiny = torch.finfo(narrowest).tiny ** 0.75
        self._normalized = normalized
        self.kernels = kernels
        self.rows = Rows(couplings, parameters)
        dtype = self.rows.dtype
        self._size = self.rows.sizes
        self._clipped = torch.zeros((), dtype=torch.int64, device=self._size.device)
        self._steps = 0
        self._moving: set[str] = set()  # names of the parameters with a dense gradient
        self._second = (1 - MEMORY) * self._sums_and_squares(means or {})[1] / self._size
        self._weight = (self._second > 0).to(dtype) * (1 - MEMORY)  # sum of the weights in the running mean
        self._next = (self._second, self._weight, self._clipped)
        own = {name: local(parameter) for name, parameter in parameters.items()}
        self._rho, self._reference = self._scales(self._sums_and_squares(own)[1])
        self.rows.forget()

    def _sums_and_squares(self, tensors: Tensors) -> Tensor:
        """Of all rows, ``[2, R]``; zero for tensors that there are not."""
        return self.rows.reduced(self.kernels, "sums_and_squares", tensors)

    def _scales(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """rho_h of all rows ``[R]``, with what stands for it in rows of one element; and that of all together.

        Args:
            squares: sums of the squares of their weights, ``[R]``.
        """
        rows, one = self.rows, self._size.new_ones(1)
        proper = bool((~rows.single).any())
        counted = squares[~rows.single] if proper else one
        mean = (counted.sum() / (self._size[~rows.single] if proper else one).sum()).sqrt()
        mean_norm = counted.mean().sqrt()
        last = int(rows.units.max()) + 1 if len(rows) else 0  # what leads into no unit
        total = SegmentSum(torch.where(rows.units < 0, last, rows.units), last + 1)
        into_unit = total(torch.where(rows.additive, 0.0, squares)).sqrt()
        into_unit[last] = mean_norm
        single = torch.where(rows.additive, into_unit[rows.units], squares.sqrt())
        rho = _bounded((squares / self._size).sqrt(), mean)
        return torch.where(rows.single, SINGLE * _bounded(single, mean_norm), rho), mean

    def frame(self, weights: Tensors, gradients: Tensors, average: Coefficient) -> Frame:
        """Where the base optimizer takes its step; takes no note of the gradients yet."""
        self._moving = set(gradients)
        present = self.rows.present(gradients)
        if present is not None:
            present = self.rows.spread(present)
        sums, squares = self._sums_and_squares(gradients)
        running = (self._second, self._weight, self._size, self.rows.single)
        rho = None if self._normalized else self._rho
        second, weight, times, plus, relative, clipped = self.kernels.run(
            _frame, sums, squares, *running, present, rho, self._tiny
        )
        self._next = (second, weight, self._clipped + clipped)
        return Frame(self._rho / self._reference if relative is None else average * relative, times, plus)

    def show_(self, frame: Frame, gradients: Tensors) -> Callable[[], None]:
        """Centre and clip gradients in place."""
        assert frame.plus is not None
        times, plus = 1 / frame.times, -frame.plus / frame.times
        self.rows.apply_(self.kernels, "affine_", gradients, times=frame.times, plus=frame.plus)
        return lambda: self.rows.apply_(self.kernels, "affine_", gradients, times=times, plus=plus)

    def enter_(self, frame: Frame, weights: Tensors, moments: Moments) -> Callable[[Moments], None]:
        """Divide the weights that have gradients by s_h, and averages of them."""

        def scale_(tensors: Tensors, factors: Tensor) -> None:
            own = {name: local(tensor) for name, tensor in tensors.items() if name in self._moving}
            self.rows.apply_(self.kernels, "affine_", own, times=factors)

        low = {name: w for name, w in weights.items() if name in self._moving and updates_by_difference(w)}
        before = {name: weight.clone() for name, weight in low.items()}
        for tensors in (weights, *points_of(moments)):
            scale_(tensors, 1 / frame.scale)
        entered = {name: weight.clone() for name, weight in low.items()}

        def leave_(moments: Moments) -> None:
            for name, weight in low.items():
                weight.sub_(entered[name])
            for tensors in (weights, *points_of(moments)):
                scale_(tensors, frame.scale)
            for name, weight in low.items():
                weight.add_(before[name])

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
