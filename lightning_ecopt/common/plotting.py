"""Matplotlib, which is an extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure

    #: What a plot returns, as those of torchmetrics do.
    Picture: TypeAlias = tuple[Figure, Axes]


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: if Matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pictures need Matplotlib: pip install 'lightning-ecopt[plots]', or pip install matplotlib"
        ) from error
    return pyplot
