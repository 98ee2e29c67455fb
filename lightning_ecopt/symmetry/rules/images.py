"""Pooling, resizing and moving of pixels: all pixels of a channel have one label, ``[1, C, 1, 1]``, which is kept.

Where pixels become channels or the other way round, as in ``pixel_shuffle``, channels that are joined must agree.
"""

from __future__ import annotations

from math import prod

import numpy as np

from lightning_ecopt.symmetry.labels import FIXED, IntArray, constant
from lightning_ecopt.symmetry.rules.registry import Call, rule


def _pixels_alike(call: Call, spatial: int) -> IntArray:
    """The label of the input after demanding one scale along its last ``spatial`` axes."""
    name = "input" if "input" in call.arguments else "self"
    ndim = len(call.shape(name))
    return call.uniform(name, range(ndim - spatial, ndim))


def _register() -> None:
    for spatial in (1, 2, 3):

        def resized(call: Call, spatial: int = spatial) -> IntArray:
            return _pixels_alike(call, spatial)

        def pooled_with_indices(call: Call, spatial: int = spatial) -> list[IntArray]:
            values = _pixels_alike(call, spatial)
            return [values, constant(FIXED, values.ndim)]

        rule(
            f"avg_pool{spatial}d",
            f"max_pool{spatial}d",
            f"adaptive_avg_pool{spatial}d",
            f"_adaptive_avg_pool{spatial}d",
            f"upsample_nearest{spatial}d",
            f"_upsample_nearest_exact{spatial}d",
            f"max_unpool{spatial}d",
        )(resized)
        rule(f"max_pool{spatial}d_with_indices", f"adaptive_max_pool{spatial}d", f"fractional_max_pool{spatial}d")(
            pooled_with_indices
        )
    rule("upsample_linear1d")(lambda call: _pixels_alike(call, 1))
    rule("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")(
        lambda call: _pixels_alike(call, 2)
    )
    rule("upsample_trilinear3d")(lambda call: _pixels_alike(call, 3))


_register()


@rule("grid_sampler_2d", "grid_sampler_3d")
def sampled(call: Call) -> IntArray:
    """Interpolation between pixels at the positions that the grid gives, which must not change."""
    call.hold_fixed("grid")
    return _pixels_alike(call, call.output.ndim - 2)


@rule("pixel_shuffle")
def channels_to_pixels(call: Call) -> IntArray:
    """[N, C * r * r, H, W] to [N, C, H * r, W * r]: ``r * r`` channels become the pixels of one."""
    ids = _pixels_alike(call, 2)
    return _grouped(call, ids, call["upscale_factor"] ** 2)


def _grouped(call: Call, ids: IntArray, size: int) -> IntArray:
    """Demand one scale for every ``size`` channels in a row, along the third axis from the end."""
    axis = ids.ndim - 3
    if ids.shape[axis] == 1:
        return ids
    groups = ids.reshape(*ids.shape[:axis], -1, size, *ids.shape[axis + 1 :])
    return call.equations.uniform(groups, [axis + 1]).squeeze(axis + 1)


@rule("pixel_unshuffle")
def pixels_to_channels(call: Call) -> IntArray:
    ids = _pixels_alike(call, 2)
    axis = ids.ndim - 3
    return ids if ids.shape[axis] == 1 else np.repeat(ids, call["downscale_factor"] ** 2, axis)


@rule("channel_shuffle", "native_channel_shuffle")
def channels_shuffled(call: Call) -> IntArray:
    ids = call.ids("self")
    if ids.shape[1] == 1:
        return ids
    return ids.reshape(ids.shape[0], call["groups"], -1, *ids.shape[2:]).swapaxes(1, 2).reshape(ids.shape)


@rule("im2col")
def patches(call: Call) -> IntArray:
    """[N, C, H, W] to [N, C * kernel, patches]."""
    ids = _pixels_alike(call, 2)[..., 0]
    return ids if ids.shape[-2] == 1 else np.repeat(ids, prod(call["kernel_size"]), axis=-2)


@rule("col2im")
def from_patches(call: Call) -> IntArray:
    """[N, C * kernel, patches] to [N, C, H, W]: patches that overlap are added."""
    ids = _pixels_alike(call, 1)[..., None]
    return _grouped(call, ids, prod(call["kernel_size"]))
