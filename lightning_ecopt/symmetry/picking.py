"""What data pick: any of the elements along an axis, so that these must have one scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import Cases, ParameterView, Value, map_value, varying


def pick(equations: Equations, value: Value, axes: Iterable[int]) -> Value:
    """The label after data have chosen among the elements along ``axes``: size 1 there."""
    axes = tuple(axes)
    if not isinstance(value, ParameterView):
        return equations.match_along(value, axes)
    changing = [varying(index) for part in value.parts() for index in part.axes]
    # Reshaped: an axis of the parameter lies along axes of the view of both kinds.
    is_mixed = any(along & set(axes) and not along <= set(axes) for along in changing)
    # It is the product with the factor that must have one label.
    if is_mixed or any(varying(part.factor) & set(axes) for part in value.parts()):
        return equations.uniform(equations.materialise(value, axes), axes)
    where = tuple(slice(1) if k in axes else slice(None) for k in range(value.ndim))

    def first(part: ParameterView) -> ParameterView:
        chosen = {number for number, index in enumerate(part.axes) if set(axes) & varying(index)}
        indices = tuple(index[where] for index in part.axes)
        return replace(part, axes=indices, factor=part.factor[where], picked=part.picked | chosen)

    return value.each(first)


def in_any_case(equations: Equations, cases: Cases) -> Value:
    """The label of a tensor of cases, for operations that do not ask which case a row is: one label for all."""
    return map_value(pick(equations, cases.value, [0]), lambda ids: ids[0])
