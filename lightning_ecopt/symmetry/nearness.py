"""Whether tensors are near those that they may be copies of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_ecopt.common.flat import is_piece
from lightning_ecopt.common.sharding import is_sharded, layout_of, local, parts, whole_shape
from lightning_ecopt.common.tensors import widest

#: A copy is at most so far from what it follows, relative to its length. Networks that have nothing to do with each
#: other have a distance of 1.4; a copy that has begun to follow, or of a run that goes on, is not equal any more.
_NEAR = 0.5
#: About so many elements of each matrix are compared first; where these are so far apart, the others do not count.
_SAMPLE, _FAR = 2**12, 1.0

#: What may follow what.
Pairs = Sequence[tuple[Tensor, Tensor]]


def are_near(several: Sequence[Pairs]) -> list[bool | None]:
    """Whether tensors are near those that they may be copies of, in what this rank holds.

    Only matrices and kernels whose elements differ tell: biases and gains of any two networks may be alike. A frozen
    network is asked about again and again, so that a sample of each matrix is looked at first. That needs no memory of
    what was compared before, which could not know of all that writes to weights.

    Args:
        several: for each answer what may follow what. Devices are waited for twice in all.

    Returns:
        ``None`` where nothing tells.

    Example::

        [near] = are_near([list(zip(target.parameters(), online.parameters()))])
    """
    found: list[bool | None] = [_fit(pairs) for pairs in several]
    for length, limit in ((_SAMPLE, _FAR), (None, _NEAR)):
        left = [number for number, near in enumerate(found) if near is not False]
        squares = _squares([several[number] for number in left], length)
        for number in left:
            found[number] = _verdict([squares[_names(*pair)] for pair in several[number]], limit)
    return found


def _names(follower: Tensor, leader: Tensor) -> tuple[int, int]:
    return id(follower), id(leader)


def _fit(pairs: Pairs) -> bool:
    """Whether all tensors have values, and those on this rank the same shape."""
    here = [both for pair in pairs for both in _here(*pair)]
    return not any(one.is_meta or other.is_meta or one.shape != other.shape for one, other in here)


def _here(follower: Tensor, leader: Tensor) -> Pairs:
    """What this rank holds of a tensor and of what may follow it; a whole follower is cut as its leader is."""
    shape = whole_shape(leader)
    if not is_sharded(leader) or whole_shape(follower) != shape or not shape:
        return [(local(follower), local(leader))]
    if is_sharded(follower) and not (is_piece(follower) and is_piece(leader)):
        return [(local(follower), local(leader))]
    own = parts(tuple(slice(0, size, 1) for size in shape), leader)
    if not is_sharded(follower):
        return [(follower[part.places], part.view(local(leader))) for part in own]
    # Pieces under FSDP1 have one axis, and no shape that tells. Those of other elements cannot be compared here.
    alike = layout_of(follower) == layout_of(leader)
    return [(part.view(local(follower)), part.view(local(leader))) for part in own] if alike else []


@torch.no_grad()
def _squares(several: Sequence[Pairs], length: int | None) -> dict[tuple[int, int], list[float]]:
    """Of each pair the squares of its distance and of the leader's length, of about so many elements."""
    pairs = {_names(*pair): pair for pair in chain.from_iterable(several)}  # modules and their parts have the same
    boxes = {names: [_compared(*both, length) for both in _here(*pair)] for names, pair in pairs.items()}
    found = {names: [squares for squares in own if squares is not None] for names, own in boxes.items()}
    told = {names: torch.stack(squares).sum(0) for names, squares in found.items() if squares}
    values = {names: [0.0, 0.0] for names in found}
    if told:
        device = next(iter(told.values())).device
        together = torch.stack([squares.to(device, widest(device)) for squares in told.values()])
        values.update(zip(told, together.tolist(), strict=True))
    return values


def _compared(one: Tensor, other: Tensor, length: int | None) -> Tensor | None:
    if other.ndim < 2 or not other.numel():
        return None
    if length is not None:
        step = max(1, int((other.numel() / length) ** 0.5))
        one, other = one[::step, ::step], other[::step, ::step]
    tells = (other != other[(0,) * other.ndim]).any()
    wide = widest(other.device)
    leader = other.to(wide)
    distance = (one.to(other.device, wide) - leader).square().sum()
    return torch.stack([distance, leader.square().sum()]).where(tells, 0.0)


def _verdict(squares: Sequence[Sequence[float]], limit: float) -> bool | None:
    distance, size = 0.0, 0.0
    for of_distance, of_length in squares:
        distance, size = distance + of_distance, size + of_length
        if distance > limit**2 * size:
            return False
    return None if size == 0 else distance <= limit**2 * size
