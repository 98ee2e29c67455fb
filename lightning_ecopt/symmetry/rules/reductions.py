"""Sums, means, extremes and pooling: what is combined must have one label."""

from __future__ import annotations

from typing import Any

from lightning_ecopt.symmetry.labels import GROUND, IntArray, constant
from lightning_ecopt.symmetry.rules.pointwise import add
from lightning_ecopt.symmetry.rules.registry import Call, rule


def _reduced(call: Call, output: Any) -> IntArray:
    """One label along the reduced axes, which stay (size 1) or go."""
    ids = call.ids("self")
    axes = call.axes("dim")
    ids = call.tracer.uniform(ids, axes)
    return ids if output.ndim == ids.ndim else ids.squeeze(axes)


@rule("sum", "mean", "amax", "amin", "nansum", "nanmean")
def reduced(call: Call) -> IntArray:
    return _reduced(call, call.output)


@rule("max", "min")
def extreme(call: Call) -> Any:
    """Of two tensors, over all of one, or the values and the indices along an axis."""
    if "other" in call.arguments:
        return add(call, call.value("self"), call.value("other"), call.output.ndim)
    if "dim" not in call.arguments:
        return _reduced(call, call.output)
    values = _reduced(call, call.output[0])
    return [values, constant(GROUND, values.ndim)]


@rule("cumsum")
def accumulated(call: Call) -> IntArray:
    return call.tracer.uniform(call.ids("self"), call.axes("dim"))


def _pool(call: Call, spatial: int) -> IntArray:
    ids = call.ids("self")
    return call.tracer.uniform(ids, range(ids.ndim - spatial, ids.ndim))


def _register_pools() -> None:
    for spatial in (1, 2, 3):

        def pooled(call: Call, spatial: int = spatial) -> IntArray:
            return _pool(call, spatial)

        def pooled_with_indices(call: Call, spatial: int = spatial) -> list[IntArray]:
            values = _pool(call, spatial)
            return [values, constant(GROUND, values.ndim)]

        rule(
            f"avg_pool{spatial}d",
            f"max_pool{spatial}d",
            f"adaptive_avg_pool{spatial}d",
            f"_adaptive_avg_pool{spatial}d",
            f"upsample_nearest{spatial}d",
            f"_upsample_nearest_exact{spatial}d",
        )(pooled)
        rule(f"max_pool{spatial}d_with_indices", f"adaptive_max_pool{spatial}d")(pooled_with_indices)
    rule("upsample_linear1d")(lambda call: _pool(call, 1))
    rule("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa")(lambda call: _pool(call, 2))
    rule("upsample_trilinear3d")(lambda call: _pool(call, 3))


_register_pools()
