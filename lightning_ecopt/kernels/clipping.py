"""How the gradients of rows are centred and clipped to their running size; :mod:`lightning_ecopt.steps.unit` says why.

All vectors run over rows, ``[R]``. With g the gradients of row k::

    c   = g - share mean(g)                    mean(c^2) = mean(g^2) - share (2 - share) mean(g)^2
    q_k = running mean of mean(c^2)            its sum with weights, ``second``, over the sum of these, 1 - MEMORY**seen
    g_v = c min(1, sqrt(q_k / mean(c^2)))      g_v = scale g + shift
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ecopt.common.runs import Runs

CENTRING = 0.9  # share of the mean that is taken out of the gradients of a row
MEMORY = 0.99  # of the running second moments
FAINT = 1e-5  # relative size of gradients that are rounding
#: Of so many gradients the weights add up to one in double precision.
MOST_SEEN = 4095


class ClippedRows(NamedTuple):
    """What clipping needs to know of the rows.

    Args:
        runs: of two vectors: numbers of elements, infinite for rows that are neither centred nor clipped; and minus
            the share of the mean that is taken out of the gradients, c = g + centre mean(g).
        one: a scalar.
        slack: relative size of mean(c**2) - q_k that is rounding.
        tiny: lower bound of sqrt(q_k) in the quotient, so that it does not overflow.
    """

    runs: Runs
    one: Tensor
    slack: float
    tiny: float

    @classmethod
    def of(cls, size: Tensor, uncentred: Tensor, whole: Tensor | None, tiny: float) -> ClippedRows:
        """For rows, some of which are not centred, and some of which belong to matrices that are treated whole."""
        size = size if whole is None else size.masked_fill(whole, torch.inf)
        centre = -CENTRING * (~uncentred).to(size)
        return cls(Runs.of(size, centre), size.new_ones(()), 1 + 8 * torch.finfo(size.dtype).eps, tiny)


class RowGradients(NamedTuple):
    """What a step knows of the gradients of rows.

    Args:
        sums: of the gradients in each row.
        squares: sums of their squares.
        second: the running mean of mean(c**2) times the sum of its weights, before this step.
        seen: how many gradients are in the running mean, ``int16``; ``MOST_SEEN`` stands for more.
        rows: what does not change from step to step.
        present: rows that have a gradient; ``None`` if all have one.
        rho: rho_k; ``None`` if no step is relative to gradients.
        to_step: factor of steps that are: a number, or one for each row.
        own: s_k of rows whose steps are not; ``None`` if there are none.
        linear: rows whose steps are relative to gradients; looked at only if there are others.
    """

    sums: Tensor
    squares: Tensor
    second: Tensor
    seen: Tensor
    rows: ClippedRows
    present: Tensor | None
    rho: Tensor | None
    to_step: Tensor | float
    own: Tensor | None
    linear: Tensor | None


class Clipping(NamedTuple):
    """How gradients are centred and clipped in one step, g_v = scale g + shift, and how long the step is.

    Args:
        second: the running mean of mean(c**2) times the sum of its weights, with this step in it.
        seen: how many gradients are in the running mean, this one included.
        scale: factor of the gradients.
        shift: what is added to them.
        step: s_k: ``to_step`` rho_k / sqrt(q_k), or what is known of the row.
        num_clipped: how many rows were clipped.
    """

    second: Tensor
    seen: Tensor
    scale: Tensor
    shift: Tensor
    step: Tensor
    num_clipped: Tensor | int


def sum_of_weights(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the weights in a running mean of so many gradients, 1 - MEMORY**seen."""
    return -torch.expm1(seen.to(dtype) * math.log(MEMORY))


def seen_of(weight: Tensor) -> Tensor:
    """The number of gradients that a sum of weights belongs to, as far as its rounding tells, ``int16``."""
    # On the CPU, as not all devices have double precision.
    seen = torch.log1p(-weight.cpu().double().clamp(max=1)) / math.log(MEMORY)
    return seen.round().nan_to_num(0.0, MOST_SEEN).clamp(0, MOST_SEEN).to(torch.int16)


def clipping(gradients: RowGradients) -> Clipping:
    """Update the running second moments, and find how gradients are centred and clipped.

    q_k includes the gradient at hand: at most a factor of 10 is cut, and an outlier shortens the next hundred steps.
    """
    sums, squares, second, seen, rows, present, rho, to_step, own, linear = gradients
    size, centre = rows.runs.vectors()
    mean = sums / size
    # Without another pass over the gradients.
    centred_square = torch.addcmul(squares / size, mean * mean, centre, value=2 - CENTRING).clamp(min=0)
    centred_square = centred_square.nan_to_num(-1, -1)  # a gradient that is not finite leaves q_k as it is
    known = centred_square >= 0 if present is None else (centred_square >= 0) & present
    second = torch.addcmul(second, known.to(second.dtype), centred_square - second, value=1 - MEMORY)
    seen = (seen + known).clamp(max=MOST_SEEN)
    q = second / sum_of_weights(seen, second.dtype).clamp(min=1 - MEMORY)
    # The first gradient equals its own mean, but for rounding. Where the root is NaN, nothing is clipped.
    scale = torch.fmin((centred_square / (rows.slack * q)).rsqrt(), rows.one)
    shift = (mean * centre).nan_to_num(0, 0, 0) * scale
    if rho is None:
        assert own is not None
        return Clipping(second, seen, scale, shift, own, (scale < 1).sum())
    deviation = q.sqrt()
    faint = torch.linalg.vector_norm(rho * deviation) * (FAINT / len(rho) ** 0.5) / rho
    step = to_step * (rho / torch.maximum(deviation, faint).clamp(min=rows.tiny))
    if own is not None:
        assert linear is not None
        step = torch.where(linear, step, own)
    return Clipping(second, seen, scale, shift, step, (scale < 1).sum())
