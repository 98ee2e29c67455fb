"""Values of integer tensors that are the same in every call, such as the indices that a network makes for itself."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ecopt.symmetry.aten import base_name, is_inexact
from lightning_ecopt.symmetry.labels import IntArray
from lightning_ecopt.symmetry.memory import View, is_ordinary, view_of


class Constants:
    """Follows integer and boolean tensors that depend on no input, so that they are the same in every call.

    For ``h[:, torch.tensor([2, 0, 1])]`` the rule for indexing then knows which channel goes where. The values are
    computed beside the trace, with real tensors on the CPU, since fake tensors have none.
    """

    MOST = 2**16  # elements of a tensor that is followed

    def __init__(self) -> None:
        self._known: dict[tuple[int, View], tuple[Tensor, Tensor]] = {}
        self._named: dict[tuple[int, View], tuple[Tensor, int]] = {}  # each tensor is kept, so that its address is, too
        self._escaped: dict[int, Tensor] = {}
        self._names = count()

    def follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> dict[int, IntArray]:
        """Take note of the outputs of an operation; returns the known values of its inputs, by ``id`` of the tensor."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {id(t): self._known[key][1] for t in tensors if (key := _key(t)) in self._known}
        if base_name(func) == "lift_fresh" and not is_inexact(tensors[0]) and not isinstance(tensors[0], FakeTensor):
            known[id(tensors[0])] = tensors[0]  # a literal
        with unset_fake_temporarily():
            if func._schema.is_mutable:
                for tensor in tensors:
                    self.forget(tensor)
            elif len(known) == len(tensors) and torch.Tag.nondeterministic_seeded not in func.tags:
                self._make(func, args, kwargs, output, known)
            return {number: value.numpy() for number, value in known.items()}

    def _make(self, func: Any, args: Any, kwargs: Any, output: Any, known: dict[int, Tensor]) -> None:
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if any(is_inexact(leaf) or leaf.numel() > self.MOST or not is_ordinary(leaf) for leaf in outputs):
            return

        def value(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return known[id(leaf)] if isinstance(leaf, Tensor) else leaf

        made = tree_leaves(func(*tree_map(value, args), **tree_map(value, kwargs)))
        for leaf, real in zip(outputs, (leaf for leaf in made if isinstance(leaf, Tensor)), strict=True):
            self._known[_key(leaf)] = (leaf, real.clone())

    def name(self, tensor: Tensor) -> int:
        """A number for the values of a tensor, in their order: as long as nobody writes to them, it stays the same."""
        place, (offset, shape, strides, size) = _key(tensor)
        if place in self._escaped:
            return next(self._names)
        if tensor.is_contiguous():
            shape, strides = (tensor.numel(),), (1,)
        return self._named.setdefault((place, (offset, shape, strides, size)), (tensor, next(self._names)))[1]

    def forget(self, tensor: Tensor, *, escaped: bool = False) -> None:
        """Forget the values of a tensor, and of all tensors that share its memory.

        Args:
            tensor: has been written to.
            escaped: it may be written to again, unseen.
        """
        place = tensor.untyped_storage()._cdata
        if escaped:
            self._escaped[place] = tensor
        for known in (self._known, self._named):
            for key in [key for key in known if key[0] == place]:
                del known[key]


def _key(tensor: Tensor) -> tuple[int, View]:
    return tensor.untyped_storage()._cdata, view_of(tensor)
