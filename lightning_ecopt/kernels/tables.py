"""What C is told of a step, in tables that are kept as long as they hold.

Most of it stays what it is from one step to the next, and in a small network telling it would take longer than the
step. What a table has the address of is kept with it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lightning_ecopt.kernels.allocation import Paths
from lightning_ecopt.kernels.clipping import CENTRING, FAINT, MEMORY, RowGradients
from lightning_ecopt.kernels.lines import OfPass, Step, Words
from lightning_ecopt.kernels.passes import Elements

#: Among the vectors of ``KnownRows``, the number of the first of the two that change.
MOMENTS = 3


class KnownRows(NamedTuple):
    """What ``vectors.c`` calls Rows.

    Args:
        table: numbers, and addresses of vectors.
        kept: the vectors.
        like: what a step knew of the rows, from ``second`` on.
    """

    table: array[int]
    kept: list[Tensor | None]
    like: tuple[Any, ...]

    @classmethod
    def of(cls, gradients: RowGradients) -> KnownRows:
        """Make the table of what a step knows of the rows, but for sums and a factor that is the same for all rows."""
        _, _, second, seen, rows, present, rho, to_step, own, linear = gradients
        has_others = rho is not None and own is not None
        vectors = [
            *(rows.runs.lengths, *rows.runs.values, second, seen),
            None if present is None else present.to(second),
            rho,
            to_step.to(second) if _is_vector(to_step) else None,
            own if has_others else None,
            linear if has_others else None,
        ]
        kept = [None if vector is None else vector.contiguous() for vector in vectors]
        words = [0 if vector is None else vector.data_ptr() for vector in kept]
        numbers = _bits(MEMORY, 2 - CENTRING, rows.slack, rows.tiny, FAINT)
        return cls(array("q", [len(second), *words, *numbers]), kept, _compared(gradients))

    def holds(self, gradients: RowGradients) -> bool:
        """Whether it is true of other gradients, too."""
        return len(self.like) > 0 and all(map(is_, self.like, _compared(gradients)))

    @property
    def is_in_place(self) -> bool:
        """Whether the table has the addresses of the moments themselves, and not of copies."""
        return self.kept[MOMENTS] is self.like[0] and self.kept[MOMENTS + 1] is self.like[1]

    @property
    def address(self) -> int:
        """Where the table is."""
        return self.table.buffer_info()[0]


NO_ROWS = KnownRows(array("q"), [], ())


class CoefficientTables:
    """The coefficients of passes in tables, which hold as long as what they were made of is the same.

    Args:
        coefficients: of each pass.
        dtype: of the blocks.
        of: the objects that they were made of: rates, and vectors.
    """

    def __init__(
        self, coefficients: Sequence[OfPass] = (), dtype: torch.dtype = torch.float32, of: Sequence[object] = ()
    ) -> None:
        self._of = of
        self._words = [Words.of(each, dtype, torch.device("cpu")) for each in coefficients]
        self.tables = [words.table() for words in self._words]

    def holds(self, *of: object) -> bool:
        """Whether the tables hold for these very objects."""
        return len(of) == len(self._of) and all(map(is_, of, self._of))


NO_COEFFICIENTS = CoefficientTables()


class OnPaths:
    """Memory and tables of steps in the coordinates of one skeleton.

    Args:
        step: one of them.
        paths: of the skeleton.
        skeleton: its elements.
        max_ratio: the guard.

    Attributes:
        scales: by what weights are divided before the step, and by what after it, ``[R]`` both.
        free: the free coordinates, ``[H]``.
        addresses: of what ``path_step`` in ``passes.c`` takes.
    """

    def __init__(self, step: Step, paths: Paths, skeleton: Elements, max_ratio: float | None) -> None:
        rows, units = len(paths.unit_of_row), paths.num_units
        self._of = step.plan, paths, skeleton, max_ratio
        found = torch.empty(2 * rows + (2 * len(step.lists) + 3) * units + 1, dtype=step.dtype, device="cpu")
        at_root = torch.empty(units + 1, dtype=torch.float64, device="cpu")
        to_weights, scale = found[: 2 * rows].view(2, rows)
        self.scales, self.free = (scale, to_weights), found[:units]
        counts = array("q", skeleton.counts)
        known, elements = paths_table(paths, max_ratio), elements_table(skeleton, step.plan.sizes, counts)
        self._kept = found, at_root, counts, known, elements
        tables = known.buffer_info()[0], elements.buffer_info()[0]
        self.addresses = (*tables, found.data_ptr(), at_root.data_ptr())

    def holds(self, step: Step, *of: object) -> bool:
        """Whether another step is one of them, too."""
        return all(map(is_, self._of, (step.plan, *of)))


def paths_table(paths: Paths, max_ratio: float | None) -> array[int]:
    """What ``vectors.c`` calls Paths; it is good as long as ``paths`` is kept."""
    vectors = (paths.unit_of_row, paths.root, paths.target, paths.is_free, paths.beta)
    guard = (0.0, 0.0) if max_ratio is None else (1 / max_ratio, max_ratio)
    words = [len(paths.unit_of_row), paths.num_units, *(vector.data_ptr() for vector in vectors)]
    return array("q", [*words, *_bits(paths.start, *guard)])


def elements_table(elements: Elements, sizes: array[int], counts: array[int]) -> array[int]:
    """What ``passes.c`` calls Elements; it is good as long as the arrays are kept."""
    addresses = (sizes.buffer_info()[0], counts.buffer_info()[0], elements.at.data_ptr(), elements.slots.data_ptr())
    return array("q", [len(counts), *addresses, elements.at.dtype == torch.int64])


def _bits(*numbers: float) -> array[int]:
    """Numbers in 64 bits each."""
    return array("q", array("d", numbers).tobytes())


def _compared(gradients: RowGradients) -> tuple[Any, ...]:
    return (*gradients[2:7], gradients.to_step if _is_vector(gradients.to_step) else None, *gradients[8:])


def common_factor(gradients: RowGradients) -> float:
    """The factor of relative steps, if it is the same for all rows; else 1, as it is a vector."""
    return 1.0 if _is_vector(gradients.to_step) else float(gradients.to_step)


def _is_vector(value: Tensor | float) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0
