"""What ``FullyShardedDataParallel`` (FSDP1) leaves of parameters: pieces of them, flattened one after another.

With ``use_orig_params=True`` an optimizer holds the original ``nn.Parameter`` objects. Between calls each of them has
one axis, and those elements that this rank holds of the flattened parameter, perhaps none. During a forward pass
modules have tensors of the whole shape in their places, which are no parameters.

Nothing in such a parameter tells its shape or its first element; the FSDP module that has flattened it does. So
:func:`register` is called with every module that is met, and keeps what it tells by parameter.

``torch.distributed.fsdp`` takes half a second to import, so that nothing here does it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_ecopt.common.parts import FlatPiece

#: The name under which an FSDP module has what it wraps.
_WRAPPED = "_fsdp_wrapped_module"

WHOLLY_FLAT = (
    "The optimizer has parameters that FullyShardedDataParallel has flattened into one, in which nobody can tell them "
    "apart: pass use_orig_params=True to it (FSDPStrategy does so by itself)."
)
UNKNOWN = (
    "The optimizer has parameters of a FullyShardedDataParallel module that has not been seen: call the module before, "
    "or give it to ec_sgd(module, ...), scaling_group(module, ...) or group.of(module)."
)


@dataclass(frozen=True, eq=False)
class Piece:
    """What a parameter of an FSDP module is a piece of.

    Args:
        shape: of the whole parameter.
        layout: which elements this rank holds; ``None`` for all of them, as with ``NO_SHARD``.
        group: process group of the ranks that share the parameter.
        copies: process group of the ranks that hold the same elements (``HYBRID_SHARD``), if there are others.
        device: where the ranks exchange; the parameter itself may be offloaded to the CPU.
        problem: why the layout cannot be told, if it cannot.
        owner: the module that the parameter belongs to.
        name: of the parameter in its owner.
    """

    shape: tuple[int, ...]
    layout: FlatPiece | None
    group: Any
    copies: Any
    device: torch.device
    problem: str
    owner: ref[nn.Module]
    name: str

    @property
    def ranks(self) -> list[int]:
        """The global numbers of all ranks that hold some of the parameter.

        With ``HYBRID_SHARD`` those are all there are; or, if there are still others, those that share one copy: each
        copy then comes to the same sums by itself.
        """
        if self.copies_are_all:
            return list(range(torch.distributed.get_world_size()))
        return torch.distributed.get_process_group_ranks(self.group)

    @property
    def copies_are_all(self) -> bool:
        """Whether there are several copies of the parameter, and all ranks hold some of them."""
        if self.copies is None:
            return False
        return bool(self.group.size() * self.copies.size() == torch.distributed.get_world_size())

    @property
    def is_copy(self) -> bool:
        """Whether an earlier one of the ``ranks`` holds the same elements."""
        return self.copies_are_all and self.copies.rank() > 0

    @property
    def process_group(self) -> Any:
        """The process group of the ``ranks``."""
        return torch.distributed.group.WORLD if self.copies_are_all else self.group


_pieces: MutableMapping[Tensor, Piece] = WeakIdKeyDictionary()
_known: WeakSet[Any] = WeakSet()  # handles of FSDP modules, each with the parameters that it has flattened


def is_piece(tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter that FSDP1 has flattened, or what it has flattened several into."""
    is_flattened: bool = getattr(tensor, "_fsdp_flattened", False)
    return is_flattened


def is_known(tensor: Tensor) -> bool:
    """Return whether a parameter of an FSDP module is registered."""
    return is_piece(tensor) and tensor in _pieces


def piece_of(tensor: Tensor) -> Piece:
    """Return what is registered of a parameter for which :func:`is_piece` holds.

    Raises:
        ValueError: if nothing is.
    """
    check_pieces([tensor])
    found = _pieces.get(tensor)
    if found is None:
        raise ValueError(UNKNOWN)
    return found


def check_pieces(parameters: Iterable[Tensor]) -> None:
    """Check that an optimizer has parameters, and not what FSDP1 has flattened several of them into.

    Raises:
        ValueError: if it has.
    """
    if any(getattr(parameter, "_is_flat_param", False) for parameter in parameters):
        raise ValueError(WHOLLY_FLAT)


def has_flattened(module: Any) -> bool:
    """Return whether a module is an FSDP module with parameters of its own."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and isinstance(module, loaded.FullyShardedDataParallel) and module._has_params


def register(module: nn.Module) -> list[Any]:
    """Remember the pieces of all FSDP modules in ``module``, and return these modules."""
    found: list[Any] = [part for part in module.modules() if has_flattened(part)]
    for part in found:
        handle = part._handle
        if handle not in _known and handle._use_orig_params:
            flat = handle.flat_param
            for number, parameter in enumerate(flat._params):
                _pieces[parameter] = _told(part, handle, number)
            for parameter, shared in zip(flat._shared_params, flat._shared_param_infos, strict=True):
                first = getattr(shared.prim_module, shared.prim_param_name)
                _pieces.setdefault(parameter, _pieces[first])
            _known.add(handle)
    return found


def _told(module: Any, handle: Any, number: int) -> Piece:
    """What an FSDP module tells of one of its parameters."""
    flat, where = handle.flat_param, handle.flat_param._shard_param_infos[number]
    shape, owner = tuple(flat._shapes[number]), flat._param_infos[number]
    start, stop = (where.intra_param_start_idx, where.intra_param_end_idx + 1) if where.in_shard else (0, 0)
    problem = "is flattened in the order of its strides: make it contiguous() before it is wrapped"
    if flat._contiguities[number]:
        problem = "is a DTensor, too: take fully_shard, which works with tensor parallelism"
        if flat._param_extensions[number] is None:
            problem = ""
    return Piece(
        shape=shape,
        layout=FlatPiece(shape, start, stop) if handle.uses_sharded_strategy else None,
        group=handle.process_group,
        copies=getattr(module, "_inter_node_pg", None),
        device=handle.device,
        problem=problem,
        owner=ref(owner.module),
        name=owner.param_name,
    )


# Modules --------------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """Return the name that a module or parameter has without FSDP modules around it."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED) if _WRAPPED in name else name


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what an FSDP module wraps; any other module itself."""
    return module._modules.get(_WRAPPED) or module


def originals() -> dict[int, Tensor]:
    """Return the parameters whose places in modules tensors of the whole shape take at present, by their ``id``."""
    found: dict[int, Tensor] = {}
    for parameter, piece in list(_pieces.items()):
        owner = piece.owner()
        held = None if owner is None else owner._parameters.get(piece.name)
        if held is not None and held is not parameter:
            found[id(held)] = parameter
    return found


def reshard(module: Any) -> None:
    """Put an FSDP module's pieces in the place of whole parameters that a call has left, and forget those.

    A call that runs is left alone.
    """
    handle = module._handle
    # Attributes of whole parameters come with the first call.
    if not handle.uses_sharded_strategy or not hasattr(handle.flat_param, "_full_param_padded"):
        return
    if handle._training_state.name == "IDLE" and not handle.needs_unshard():
        handle.reshard(True)
        handle.post_reshard()
        handle._prefetched = False


def pass_through_(module: Any) -> None:
    """Have calls of FSDP modules call what they wrap, and do nothing else. The caller puts it back."""
    if _WRAPPED in module._modules:
        vars(module)["forward"] = unwrapped(module)
