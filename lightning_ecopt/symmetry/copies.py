"""Where copies of weights are kept: in modules, lists and dictionaries, in attributes of modules and of callbacks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from lightning_ecopt.common.flat import is_piece, plain_name, unwrapped
from lightning_ecopt.common.nested import dictionary, elements, is_a
from lightning_ecopt.common.sharding import local, named_parameters, whole_shape
from lightning_ecopt.symmetry.memory import storage_of

_LISTS: Any = list | tuple | dict
#: Objects of these packages hold no copies in lists of their own: trainers, optimizers, data loaders.
_OTHERS = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_ecopt", "torchmetrics"}
#: Every module has a dozen attributes of these types, such as its hooks, that are nearly always empty.
_OFTEN_EMPTY = (dict, OrderedDict, set, NoneType)


@dataclass(frozen=True)
class Form:
    """What two modules have in common if one is a copy of the other, or of some of it.

    Args:
        classes: of its parts by name; another activation function, say, makes other freedoms.
        shapes: of its tensors by name.
    """

    classes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, module: nn.Module) -> Form:
        """The form of a module."""
        parts = {plain_name(name): unwrapped(part) for name, part in module.named_modules()}
        classes = {name: type(part).__name__.removeprefix("FSDP") for name, part in parts.items()}
        return cls(classes, {name: whole_shape(tensor) for name, tensor in tensors_of(module).items()})

    def is_in(self, other: Form) -> bool:
        """Whether all that is here is there, too."""
        return self.classes.items() <= other.classes.items() and self.shapes.items() <= other.shapes.items()


@dataclass(frozen=True, eq=False)
class Candidate:
    """What may be a copy of something that is trained, or such a thing itself.

    Args:
        name: where it is.
        held: a module, or a list or dictionary of tensors.
        averages: whether it is known to become an average of weights, whatever it holds yet.
    """

    name: str
    held: Any
    averages: bool = False

    @cached_property
    def form(self) -> Form:
        """The form of a module."""
        return Form.of(self.held)

    @property
    def is_in_pieces(self) -> bool:
        """Whether FSDP1 has cut matrices in it to pieces, which may be compared on no rank."""
        return any(is_piece(tensor) and len(whole_shape(tensor)) > 1 for tensor in tensors_of(self.held).values())


class Places:
    """A module, and what else may hold copies of its weights; names lead to them.

    Args:
        module: the module; ``None`` if it is not known.
        beside: returns other objects by name, as callbacks of a Trainer.
    """

    def __init__(self, module: nn.Module | None, beside: Callable[[], Mapping[str, object]]) -> None:
        self.module, self._beside = module, beside

    def names(self) -> list[str]:
        """Names of parts of the module and of its tensors, for messages."""
        assert self.module is not None
        return [*(name for name, _ in unwrapped(self.module).named_children()), *tensors_of(self.module)]

    def find(self, name: str) -> Any:
        """What a name means: a module, a tensor, a container, or with ``_`` at its end all tensors that begin so."""
        if self.module is None:
            return None
        found = _walk(self.module, name.split(".")) if name else self.module
        if found is None:
            first, *rest = name.split(".")
            found = _walk(self._beside().get(first), rest)
        if found is not None or not name.endswith(("_", ".")):
            return found
        tensors = tensors_of(self.module)
        return {own.removeprefix(name): tensor for own, tensor in tensors.items() if own.startswith(name)} or None

    def candidates(self, is_trained: Callable[[Tensor, bool], bool]) -> list[Candidate]:
        """What may be a copy, outermost modules first. None of the tensors is trained."""
        search = _Search(is_trained)
        if self.module is not None:
            search.in_module("", self.module, averages=False)
            for name, holder in self._beside().items():
                averages = type(holder).__module__.partition(".")[0] in _OTHERS  # callbacks of Lightning itself
                for attribute, value in list(dictionary(holder).items()):
                    search.in_value(f"{name}.{attribute}", value, averages)
        return search.found


class _Search:
    """Goes through modules, and through what their attributes hold."""

    def __init__(self, is_trained: Callable[[Tensor, bool], bool]) -> None:
        self.found: list[Candidate] = []
        self._is_trained = is_trained
        self._seen: set[int] = set()

    def in_module(self, name: str, module: nn.Module, averages: bool) -> None:
        """Look at a module, at its parts and at their attributes."""
        module = unwrapped(module)
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if self._may_be_copies(tensors_of(module).values(), averages):
            self.found.append(Candidate(name, module, averages))
        for part, child in module.named_children():
            self.in_module(_joined(name, part), child, isinstance(module, AveragedModel))
        for attribute, value in list(dictionary(module).items()):
            holds_something = type(value) not in _OFTEN_EMPTY or value
            if holds_something and attribute not in ("_parameters", "_modules", "_trainer", "_fabric"):
                self.in_value(_joined(name, attribute), value)

    def _may_be_copies(self, tensors: Iterable[Tensor], averages: bool) -> bool:
        """Whether some of the tensors may be weights, and none of them is trained."""
        weights = [tensor for tensor in tensors if tensor.is_floating_point()]
        return bool(weights) and not any(self._is_trained(weight, averages) for weight in weights)

    def in_value(self, name: str, value: Any, averages: bool = False, depth: int = 1) -> None:
        """Look at what an attribute holds."""
        if is_a(value, nn.Module):
            self.in_module(name, value, averages)
        elif is_a(value, _LISTS):
            held = [(element[0] if is_a(value, dict) else k, element[-1]) for k, element in enumerate(elements(value))]
            if all(is_a(item, Tensor) for _, item in held) and self._may_be_copies([t for _, t in held], averages):
                self.found.append(Candidate(name, value))
            for number, item in held:
                if is_a(item, nn.Module):  # kept in a list, so that it is no part of the module
                    self.in_module(f"{name}.{number}", item, averages=False)
        elif depth and type(value).__module__.partition(".")[0] not in _OTHERS:
            for attribute, item in list(dictionary(value).items()):  # of an object that keeps averages
                if is_a(item, _LISTS) or is_a(item, nn.Module):
                    self.in_value(f"{name}.{attribute}", item, averages, 0)


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _walk(held: Any, parts: list[str]) -> Any:
    """Follow a name from an object to what it holds; ``None`` if there is no such thing."""
    for number, part in enumerate(parts):
        if is_a(held, nn.Module):
            held = unwrapped(held)
            named = (held._modules, held._parameters, held._buffers, dictionary(held))
            held = next((own[part] for own in named if own.get(part) is not None), None)
        elif is_a(held, dict):
            rest = ".".join(parts[number:])
            if rest in held:
                return held[rest]
            held = held.get(part)
        elif is_a(held, list | tuple):
            held = held[int(part)] if part.isdecimal() and int(part) < len(held) else None
        else:
            held = dictionary(held).get(part)
    return held if held is None or is_a(held, nn.Module | Tensor | _LISTS) else None


def tensors_of(held: Any) -> dict[str, Tensor]:
    """The tensors of a module, with its buffers, of a sequence or mapping, or of a tensor itself, by name."""
    if isinstance(held, Tensor):
        return {"": held}
    if isinstance(held, AveragedModel):
        held = held.module
    if isinstance(held, nn.Module):
        own = named_parameters(held, remove_duplicate=False), held.named_buffers(remove_duplicate=False)
        return {plain_name(name): tensor for pairs in own for name, tensor in pairs if not is_lazy(tensor)}
    pairs = held.items() if isinstance(held, Mapping) else enumerate(held)
    return {str(name): tensor for name, tensor in pairs if isinstance(tensor, Tensor)}


def averages_in(module: nn.Module) -> dict[int, Tensor]:
    """The parameters of averages that torch keeps in a module, by ``id``."""
    averages = [part for part in module.modules() if isinstance(part, AveragedModel)]
    return {id(p): p for average in averages for p in average.parameters()}


def is_sibling(name: str, other: str) -> bool:
    """Whether two names differ in numbers only, as those of the layers in a list, which may be equal at the start."""
    parts = [[None if part.isdecimal() else part for part in one.split(".")] for one in (name, other)]
    return parts[0] == parts[1]


def key(tensor: Tensor) -> tuple[int, int, int]:
    """The memory of a tensor: its storage, and where in it the tensor is.

    Under FSDP1 many parameters share a storage, and those of which this rank holds nothing have none of their own.
    """
    if is_piece(tensor):
        return id(tensor), 0, 0
    tensor = local(tensor)
    storage = storage_of(tensor)
    return (id(tensor), 0, 0) if storage is None else (storage._cdata, int(tensor.storage_offset()), tensor.numel())


def named(side: Any) -> str:
    """A follower or a leader in words."""
    if isinstance(side, str):
        return side or "the module"
    if isinstance(side, Tensor):
        return f"a tensor of shape {list(side.shape)}"
    return type(side).__name__
