"""What all metrics of models have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torchmetrics import Metric

from lightning_ecopt.common.plotting import pyplot

if TYPE_CHECKING:
    from lightning_ecopt.common.plotting import Axes, Picture

#: Of the states. A metric may be moved to any device of the machine, and MPS has no float64.
DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


class MetricOfModels(Metric):
    """A metric of a model, whose values can be drawn."""

    is_differentiable = False
    full_state_update = False
    #: Whether the picture has a logarithmic axis: for values that differ by factors.
    plots_logarithms = False

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> Picture:
        """Draw one value as a point, or several, as those of all epochs, as a curve; this needs Matplotlib.

        Args:
            val: what ``compute`` or ``forward`` has returned, or a list of that; by default ``compute()`` is called.
            ax: where to draw; by default in a figure of its own.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: if Matplotlib is not installed.

        Example::

            values = [metric(group) for group in groups]
            figure, ax = metric.plot(values)
        """
        pyplot()
        drawn: Any = self._plot(val, ax)[1]
        if self.plots_logarithms:
            drawn.set_ylim(bottom=0.8 * (self.plot_lower_bound or 1.0), auto=None)
            drawn.set_yscale("log")
        return drawn.figure, drawn


class MeanOverUpdates(MetricOfModels):
    """Computes the mean of the numbers that its updates add.

    Args:
        name: of the number, for the name of the state. A ``MetricCollection`` takes two metrics for the same one if
            their states have the same names and their first values agree. So no two metrics that may differ later,
            such as path norms of different exponents, may have the same name.
        **kwargs: keyword arguments of :class:`torchmetrics.Metric`.
    """

    count: Tensor

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sum = f"sum_of_{name}"
        self.add_state(self._sum, torch.zeros((), dtype=DTYPE, device="cpu"), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long, device="cpu"), dist_reduce_fx="sum")

    def _add(self, value: Tensor) -> None:
        """Add the number of one update."""
        # ``metric.half()`` and the like change the dtype of states; a sum of many numbers needs all its digits.
        total: Tensor = getattr(self, self._sum)
        setattr(self, self._sum, total.to(DTYPE) + value.to(total.device, DTYPE))
        self.count = self.count + 1

    def compute(self) -> Tensor:
        """The mean of the values of all updates since the last reset, a scalar."""
        total: Tensor = getattr(self, self._sum)
        return total / self.count


@contextmanager
def unobserved() -> Iterator[None]:
    """Compute without gradients, and outside all modes that watch operations.

    A first training step may be traced for its scaling group. A metric that is updated in it must leave no marks there.
    """
    with torch.no_grad(), _disable_current_modes():
        yield
