"""Which kernels run the passes of an optimizer, and whether compiling them pays."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from lightning_ecopt.kernels import Kernels, choose_kernels
from lightning_ecopt.kernels.compiled import CompiledKernels
from lightning_ecopt.optim.bases import BASES
from lightning_ecopt.optim.binding import Network
from lightning_ecopt.optim.options import Options

COMPILING = (
    "The optimizer step is compiled now: that takes some seconds, up to a minute on a busy machine, and pays in "
    "{steps:g} steps. With implementation='eager' it is not."
)


def _unknown() -> None:
    return None


def _silent(message: str) -> None:
    """Tell nobody."""


class KernelChoice:
    """Chooses kernels once for each network, when a rule is first made for it.

    Attributes:
        steps: returns the number of steps of all training, if somebody knows it.
        tell: is called with a line for the user.
    """

    def __init__(self) -> None:
        self.steps: Callable[[], float | None] = _unknown
        self.tell: Callable[[str], object] = _silent
        self._chosen: tuple[Network, Kernels] | None = None

    def of(self, network: Network, base: Optimizer, options: Options) -> Kernels:
        """The kernels of a network, the same as long as it is.

        Raises:
            ValueError: if the parameters are not where the chosen implementation runs.
        """
        if self._chosen is None or self._chosen[0] is not network:
            steps, parameters = self.steps(), list(network.group.parameters.values())
            is_fused = type(base) in BASES and options.implementation != "wrapped"
            kernels = choose_kernels(options.implementation, parameters, is_fused, steps)
            if options.implementation == "auto" and isinstance(kernels, CompiledKernels):
                self.tell(COMPILING.format(steps=steps))
            self._chosen = network, kernels
        return self._chosen[1]
