"""Small helpers for tensors: regions, padding, pieces that fit the cache, devices and types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ContextDecorator, ExitStack
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

#: Tensors by the name of the parameter that they belong to: weights, gradients, or one entry of the optimizer state.
Tensors = Mapping[str, Tensor]

_K = TypeVar("_K")


def listing(names: Sequence[str], limit: int = 5) -> str:
    """Join names for a message, the first ``limit`` of them: ``a, b and 7 more``."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# Regions and padding --------------------------------------------------------------------------------------------------


def region_of(tensor: Tensor, region: tuple[slice, ...] | None) -> Tensor:
    """Return a box-shaped region of a tensor as a view.

    Args:
        tensor: any tensor; a scalar counts as a vector of one element.
        region: one slice for each axis; ``None`` for the whole tensor.
    """
    if region is None:
        return tensor
    return tensor.view(1)[region] if tensor.ndim == 0 else tensor[region]


def padded(values: Tensor, fill: float) -> Tensor:
    """Append ``fill`` to a vector ``[N]``, so that index -1, which stands for "none", picks it: ``[N + 1]``.

    Example::

        padded(factors, 1)[coupling.incoming]  # 1 where the coupling has NO_UNIT
    """
    return torch.cat([values, values.new_full((1,), fill)])


# Pieces ---------------------------------------------------------------------------------------------------------------


class PieceSize(NamedTuple):
    """How many elements to work on at a time, where the work needs memory of the size of its operands.

    On a CPU a piece must stay in the cache; on an accelerator it must be worth the launch of a kernel.
    """

    cpu: int
    accelerator: int


Work = Literal["refresh", "step"]
#: A refresh takes squares in float64, twice as wide as what a step works on.
PIECE_SIZES: dict[Work, PieceSize] = {"refresh": PieceSize(2**17, 2**22), "step": PieceSize(2**18, 2**23)}


def piece_length(tensor: Tensor, work: Work, axis: int = 0) -> int:
    """Return how many positions along ``axis`` make a piece, at least one; possibly more than there are.

    Example::

        weight = torch.zeros(1000, 4096)
        piece_length(weight, "step")  # 64 rows, which are 2**18 elements
    """
    elements = PIECE_SIZES[work].cpu if tensor.device.type == "cpu" else PIECE_SIZES[work].accelerator
    width = tensor.numel() // max(tensor.shape[axis], 1)
    return max(1, elements // max(width, 1))


def pieces(tensor: Tensor, work: Work, axis: int = 0) -> Iterator[slice]:
    """Yield the slices that cut ``axis`` into pieces; the last one may be shorter.

    Example::

        for rows in pieces(weight, "refresh"):
            weight[rows].mul_(factor[rows])
    """
    length, end = piece_length(tensor, work, axis), tensor.shape[axis]
    for start in range(0, end, length):
        yield slice(start, min(start + length, end))


def sums_of_pieces(
    of: Callable[[slice], Tensor], shapes: Sequence[Sequence[int]], rows: Iterable[slice]
) -> list[Tensor]:
    """Sum what is made of the pieces of a tensor to shapes that broadcast to the tensor.

    Args:
        of: makes ``[..., *piece]`` of the piece at a slice of the first axis.
        shapes: with as many axes as the tensor, which are one or more.
        rows: the pieces, which cut the first axis; none if it is empty.

    Returns:
        ``[..., *shape]`` for each shape; of one piece, what has that shape already may be returned as it is.

    Example::

        squares = lambda rows: weight[rows].square()
        of_rows, of_columns = sums_of_pieces(squares, [(1000, 1), (1, 4096)], pieces(weight, "refresh"))
    """
    found: list[list[Tensor]] = [[] for _ in shapes]
    for each in list(rows) or [slice(0, 0)]:
        values = of(each)
        for parts, shape in zip(found, shapes, strict=True):
            others, length = values.shape[: -len(shape)], values.shape[-len(shape)]
            part = values.sum_to_size((*others, 1 if shape[0] == 1 else length, *shape[1:]))
            if parts and shape[0] == 1:
                parts[0] = parts[0] + part
            else:
                parts.append(part)
    return [
        parts[0] if len(parts) == 1 else torch.cat(parts, -len(shape))
        for parts, shape in zip(found, shapes, strict=True)
    ]


# Small networks -------------------------------------------------------------------------------------------------------

#: Most elements of a small network. Its tensors are worked on together: calls of operations are what they cost.
FEW = 2**16


def are_few(tensors: Iterable[Tensor]) -> bool:
    """Return whether tensors, all that some work is done on, are those of a small network."""
    return sum(tensor.numel() for tensor in tensors) <= FEW


def alike(kinds: Mapping[_K, Hashable], together: bool = True) -> list[list[_K]]:
    """Return the keys of equal values together, in their order; or, if not ``together``, each by itself.

    Example::

        alike({"a": (64, 64), "b": (64,), "c": (64, 64)})  # [["a", "c"], ["b"]]
    """
    if not together:
        return [[key] for key in kinds]
    found: dict[Hashable, list[_K]] = {}
    for key, kind in kinds.items():
        found.setdefault(kind, []).append(key)
    return list(found.values())


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape; a single one is not copied."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


# Devices and types ----------------------------------------------------------------------------------------------------


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor to a device; from the CPU to a GPU without waiting for the copy."""
    from_host = values.device.type == "cpu" and device.type == "cuda"
    return values.pin_memory().to(device, non_blocking=True) if from_host else values.to(device)


class ordinary_tensors(ContextDecorator):  # noqa: N801  # as torch.no_grad, which it adds to
    """Make tensors that can be changed later, also within ``torch.inference_mode``; they require no gradient."""

    def __enter__(self) -> None:
        self._modes = ExitStack()
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled():  # a step is neither: it waits for nothing
            self._modes.enter_context(torch.inference_mode(False))  # which alone would switch gradients on
            self._modes.enter_context(torch.no_grad())

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def _recreate_cm(self) -> ordinary_tensors:
        return ordinary_tensors()  # each call of a decorated function has modes of its own


def widest(device: torch.device) -> torch.dtype:
    """Return the most exact floating point type of a device: float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_shared_memory(tensors: Tensors) -> set[str]:
    """Return the names of tensors whose memory is used twice: by two of them, or by an expanded one."""
    memory = Counter(tensor.data_ptr() for tensor in tensors.values())
    return {name for name, tensor in tensors.items() if memory[tensor.data_ptr()] > 1 or 0 in tensor.stride()}


def is_lazy(tensor: Tensor) -> bool:
    """Return whether memory does not have the elements as they are: their negatives, or nothing, as all are zero."""
    return tensor.is_neg() or tensor._is_zerotensor()


def is_plain(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor are in the memory of this process, at its address and strides."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and not is_lazy(tensor)


def updates_by_difference(tensor: Tensor) -> bool:
    """Return whether a step is added to a weight as a difference, instead of scaling the weight there and back.

    This is so for types of sixteen bits: there a rounding is 0.2 per cent of the weight, and the roundings of scaling
    there and back would add up over the steps.
    """
    return torch.finfo(tensor.dtype).bits < 32
