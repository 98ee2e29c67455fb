"""Equations as what checkpoints may hold: tensors, numbers, words and lists."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ecopt.symmetry.equations import Equations, Use
from lightning_ecopt.symmetry.labels import IntArray
from lightning_ecopt.symmetry.scales import Operation, Relations


def packed(equations: Equations) -> Tensor:
    """The equations in little memory, as bytes: ``uint8[N]``."""
    file = io.BytesIO()
    torch.save(_to_state(equations), file)
    return torch.frombuffer(bytearray(zlib.compress(file.getvalue(), 1)), dtype=torch.uint8)


def unpacked(data: Tensor) -> Equations:
    """The equations that :func:`packed` was given.

    Raises:
        ValueError: if they are damaged.
    """
    try:
        file = io.BytesIO(zlib.decompress(data.cpu().numpy().tobytes()))
        return _from_state(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"The equations in the checkpoint are damaged: {error!r}") from error


def _to_state(equations: Equations) -> dict[str, Any]:
    return {
        "shapes": {name: list(shape) for name, shape in equations.shapes.items()},
        "num_scales": equations.num_scales,
        "seen": sorted(equations.seen),
        "uses": [
            [name, [[part.start, part.stop, part.step] for part in use.region], *_sides(use), use.additive, is_hidden]
            for is_hidden, kinds in enumerate((equations.uses, equations.hidden_uses))
            for name, uses in kinds.items()
            for use in uses
        ],
        "equalities": [_tensor(pairs) for pairs in equations.equalities],
        "relations": [[_tensor(one.scales), list(one.coefficients)] for one in equations.relations],
        "fixings": [[operation.name, operation.module, _tensor(ids)] for operation, ids in equations.fixings],
    }


def _from_state(state: Mapping[str, Any]) -> Equations:
    equations = Equations({name: tuple(shape) for name, shape in state["shapes"].items()})
    equations.fresh((int(state["num_scales"]) - 1,))
    equations.seen = set(state["seen"])
    for name, region, incoming, outgoing, additive, is_hidden in state["uses"]:
        use = Use(tuple(slice(*part) for part in region), _array(incoming), _array(outgoing), bool(additive))
        kinds = equations.hidden_uses if is_hidden else equations.uses
        kinds.setdefault(name, []).append(use)
    equations.equalities = [_array(pairs) for pairs in state["equalities"]]
    equations.relations = [Relations(_array(scales), tuple(given)) for scales, given in state["relations"]]
    equations.fixings = [(Operation(name, module), _array(ids)) for name, module, ids in state["fixings"]]
    return equations


def _sides(use: Use) -> list[Tensor]:
    return [_tensor(use.incoming), _tensor(use.outgoing)]


def _tensor(ids: IntArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int32))


def _array(ids: Tensor) -> IntArray:
    return ids.cpu().numpy().astype(np.int64)
