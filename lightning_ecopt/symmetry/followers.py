"""Copies of the weights that are mixed with them, and so have to be rescaled whenever they are.

A target network, t <- m t + (1 - m) w, or an average of weights is a function again only as long as t and w are
rescaled in the same way. Such a copy *follows*: at every balance it is rescaled as its leader is, by which its own
function changes as little as the leader's.

Followers are found while they are near what they follow, or they are told by hand. They are kept by name, so that those
of a run that is resumed are known, however far they are by then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ecopt.common.flat import plain_name, unwrapped
from lightning_ecopt.common.sharding import (
    Ranks,
    gathering_modules,
    named_parameters,
    num_elements,
    release,
    whole_shape,
)
from lightning_ecopt.common.tensors import listing
from lightning_ecopt.common.warn import warn
from lightning_ecopt.symmetry.copies import Candidate, Places, averages_in, is_sibling, key, named, tensors_of
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.nearness import are_near

HIDDEN = (
    "{copy} has the form of {leader}, and nobody can see whether it follows that: FullyShardedDataParallel has put "
    "them on different ranks. Say so with followers={{{copy!r}: ...}}, or wrap both alike, layer by layer."
)
#: A name in the module, or a module, tensor, or sequence or mapping of tensors itself.
Side = Any
#: By what follows, what it follows.
Given = Mapping[Any, Any]


@dataclass(frozen=True, eq=False)
class _Pair:
    follower: Side
    leader: Side

    def __str__(self) -> str:
        return f"{named(self.follower)} follows {named(self.leader)}"


def _unknown() -> None:
    return None


def check_given(given: object) -> None:
    """Check that followers that are given by hand have the right form, before any module is known.

    Raises:
        TypeError: if they are no mapping.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"followers is a mapping, as in followers={{'target': 'online'}}, got {given!r:.60}.")


class Followers:
    """The followers of the weights of a module, and how they are found.

    Args:
        module: the module that is trained; ``None`` if it is not known, so that followers are told by hand only.
        given: by hand: what follows, and what it follows, each a name in the module, a module or a tensor.
        beside: returns what else may hold copies of the module, by name, as callbacks of a Trainer do.
        trained: returns the ``id`` of all that optimizers train, or ``None`` if it is not known.

    Raises:
        TypeError: if something is given that is no follower.

    Example::

        followers = Followers(model, {"target": "online"})
        followers.rescale_(group, group.balance_())
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        given: Given | None = None,
        beside: Callable[[], Mapping[str, object]] = dict,
        trained: Callable[[], Collection[int] | None] = _unknown,
    ) -> None:
        self._places = Places(module, beside)
        self._trained = trained
        self._pairs: dict[Any, _Pair] = {}
        self._named: set[str] = set()  # copies that a warning has named
        self.are_new = False  # whether some have been found since a call was traced
        self._doubted: set[Any] = set()  # pairs that a warning was about
        self.add({} if given is None else given)

    def add(self, given: Given) -> None:
        """Take followers that are given by hand.

        Raises:
            TypeError: if it is no mapping, or something in it is neither a name nor a module nor a tensor.
        """
        check_given(given)
        for follower, leader in given.items():
            for side in (follower, leader):
                is_name = isinstance(side, str) and self._places.module is not None
                if not is_name and not isinstance(side, nn.Module | Tensor):
                    ways = "a module or a tensor" if self._places.module is None else "a name, a module or a tensor"
                    raise TypeError(
                        f"In followers, {side!r:.60} is not {ways}. EquivalentClassOptimizer, ECSGD and ECAdamW, which "
                        "know no module, take followers={target: online}, and of tensors "
                        "followers=dict(zip(copies, online.parameters()))."
                    )
            self._pairs[_pair_key(follower)] = _Pair(follower, leader)

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Check that followers that were told by hand fit what they follow, which is trained.

        Args:
            parameters: those that are trained.

        Raises:
            ValueError: if names or shapes differ, if nothing of the leader is trained, or the follower is.
        """
        own, leader_of = {id(p) for p in parameters}, self._leaders()
        for pair in self._pairs.values():
            tensors = self._matched(pair)
            trained = [
                name for name, (follower, _) in tensors.items() if id(follower) in own and follower.requires_grad
            ]
            if trained:
                swapped = (
                    f" Or did you mean {{{pair.leader!r}: {pair.follower!r}}}?"
                    if _have_names(pair) and pair.follower != pair.leader
                    else ""
                )
                raise ValueError(
                    f"followers: {pair}, but an optimizer trains it, {trained[0] or 'it'} first. Freeze it with "
                    f"requires_grad_(False), or leave it out of the optimizer.{swapped}"
                )
            if not any(id(_root(leader, leader_of)) in own for _, leader in tensors.values()):
                raise ValueError(f"followers: {pair}, but no optimizer trains {named(pair.leader)}.")
            self._doubt(pair, tensors.values(), own)

    def _doubt(self, pair: _Pair, tensors: Iterable[tuple[Tensor, Tensor]], own: set[int]) -> None:
        """Warn if a name that was given is far from the named leader, and near another trained part."""
        module, name = self._places.module, _pair_key(pair.follower)
        if (
            module is None
            or not _have_names(pair)
            or name in self._doubted
            or are_near([list(tensors)])[0] is not False
        ):
            return
        self._doubted.add(name)
        one = Candidate(name, self._places.find(name))
        alike = [part for part in trained_parts(module, own) if part.name != pair.leader and may_follow(one, part)]
        matched = [list(_match(one.held, part.held).values()) for part in alike]
        near = [part.name for part, is_near in zip(alike, are_near(matched), strict=True) if is_near]
        if near:
            meant = _nearest(name, near)
            warn(
                f"followers: {name} is near {named(meant)} and not {named(pair.leader)}, which it is told to follow: "
                f"is {{{name!r}: {meant!r}}} meant?"
            )

    @property
    def module(self) -> nn.Module | None:
        """Where they are looked for."""
        return self._places.module

    # Finding them -----------------------------------------------------------------------------------------------------

    def look(self, parameters: Mapping[str, Tensor]) -> bool:
        """Look for copies of what is trained now, which from now on follow it.

        A copy is a module, or a list or dictionary of tensors, with the classes, names and shapes of a trained part or
        of some of it, and near it. Copies that are parts of something else count if they are all of it. An average of
        torch (``AveragedModel``) or of Lightning follows wherever it is: its first update copies. What has been taken
        for a copy and is none loses nothing, as its function stays what it is.

        Args:
            parameters: what is trained, or may be.

        Returns:
            Whether there are any that were not known.
        """
        try:
            return self._look(parameters)
        except Exception as error:  # whatever a user's objects may raise must not stop training
            warn(f"Copies that follow the weights cannot be looked for: {error!r}. Tell them with followers=...")
            return False

    def _look(self, parameters: Mapping[str, Tensor]) -> bool:
        module = self._places.module
        leaders = {id(p) for p in self._leading(parameters)}
        if module is None or not leaders:
            return False
        ranks, pairs = Ranks(parameters), list[tuple[Candidate, Candidate]]()
        try:
            candidates = self._candidates(parameters)
            parts = trained_parts(module, leaders) if candidates else []
            pairs = [(one, part) for one in candidates for part in parts if may_follow(one, part)]
        finally:  # even if this rank has failed: the others would wait for it
            is_common = ranks.have_same(repr([(one.name, part.name) for one, part in pairs]))
        if not is_common:
            raise RuntimeError("the ranks that share parameters have different copies, or one of them has failed")
        if not pairs:
            return False
        found: dict[str, list[str]] = {}
        for (one, part), agrees in zip(pairs, self._agreement(pairs, ranks, leaders), strict=True):
            if agrees:
                found.setdefault(one.name, []).append(part.name)
        outermost = [one for one in candidates if one.name in found and not _has_parent(one.name, found)]
        new = [one for one in outermost if one.averages or _is_whole(one, outermost, candidates, parts)]
        self._pairs |= {one.name: _Pair(one.name, _nearest(one.name, found[one.name])) for one in new}
        self.are_new |= bool(new)
        return bool(new)

    def _candidates(self, parameters: Mapping[str, Tensor]) -> list[Candidate]:
        """What may be a copy, and is not known as one."""
        taken = {key(follower) for follower, _ in self._all()}
        candidates = self._places.candidates(self._is_trained_by(parameters))
        return [one for one in candidates if not taken >= {key(t) for t in tensors_of(one.held).values()}]

    def _is_trained_by(self, parameters: Mapping[str, Tensor]) -> Callable[[Tensor, bool], bool]:
        """Whether a tensor is trained; if nobody knows, what requires a gradient is, but for averages of weights."""
        storages, trained = {key(p)[0] for p in self._leading(parameters)}, self._trained()

        def is_trained(tensor: Tensor, averages: bool) -> bool:
            may_be = tensor.requires_grad and not averages and (trained is None or id(tensor) in trained)
            return may_be or key(tensor)[0] in storages

        return is_trained

    def _leading(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """What is trained; averages of torch are not, though they may require a gradient and be in an optimizer."""
        averages = {} if self._places.module is None else averages_in(self._places.module)
        return [p for p in parameters.values() if p.requires_grad and id(p) not in averages]

    def _agreement(self, pairs: list[tuple[Candidate, Candidate]], ranks: Ranks, leaders: set[int]) -> list[bool]:
        """Whether each candidate agrees with a part of the module; on all ranks, if parameters are sharded."""
        marks = torch.tensor([[True, False]], device="cpu").repeat(len(pairs), 1)  # whether it differs, and if any tell
        try:
            leader_of = self._leaders()

            def has_leader(leader: Tensor) -> bool:
                return id(_root(leader, leader_of)) in leaders

            matched = [
                [both for both in _match(one.held, part.held).values() if has_leader(both[1])] for one, part in pairs
            ]
            for (one, _), tensors, near, mark in zip(pairs, matched, are_near(matched), marks, strict=True):
                mark[0] = not tensors or (near is False and not one.averages)
                mark[1] = one.averages or near is True
        finally:  # even if this rank has failed
            ranks.any_(marks)
        found = marks.tolist()
        unknown = {one.name: part.name for (one, part), of in zip(pairs, found, strict=True) if not any(of)}
        hidden = {one.name for one, _ in pairs if one.name in unknown and one.is_in_pieces} - self._named
        self._named |= hidden
        for name in sorted(name for name in hidden if not _has_parent(name, hidden)):
            warn(HIDDEN.format(copy=name, leader=unknown[name] or "the module"))
        return [tells and not differs for differs, tells in found]

    def seen_by_trace(self, parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """What follows some parameters at the start of a traced call, which shows all uses of it."""
        self.look(parameters)
        self.are_new = False
        return self.of(parameters)

    # Using them -------------------------------------------------------------------------------------------------------

    def of(self, parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """The tensors that follow some parameters now, each with the name of the parameter; no tensor twice.

        What is trained by now, was replaced by something else or is gone, follows no more.
        """
        if not self._pairs:
            return []
        names = {id(p): name for name, p in parameters.items()}
        trained = {key(p)[0] for p in self._leading(parameters)}
        leader_of = self._leaders()
        found: dict[Any, tuple[str, Tensor]] = {}
        for follower, leader in self._all():
            place, name = key(follower), names.get(id(_root(leader, leader_of)))
            if name is not None and place[0] not in trained and whole_shape(parameters[name]) == whole_shape(follower):
                found.setdefault(place, (name, follower))
        return list(found.values())

    @torch.no_grad()
    def rescale_(self, group: ScalingGroup, log_scale: Tensor) -> None:
        """Rescale all that follows the parameters of a group, as the group has rescaled them.

        Args:
            group: the group.
            log_scale: ``[H]``, natural logarithms of the units' factors.
        """
        rounds: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        for name, tensor in self.of(group.parameters):
            number = 0
            while name in rounds.get((number, tensor.device), {}):
                number += 1
            rounds.setdefault((number, tensor.device), {})[name] = tensor
        for (_, device), tensors in rounds.items():
            couplings = [coupling for coupling in group.couplings if coupling.parameter in tensors]
            copied: Any = tensors  # cut by their own shards, not by those of the parameters
            own = replace(group, parameters=copied, couplings=couplings)
            own.rescale_(tensors, log_scale.to(device))

    def lines(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """For the report: ``target follows online``, of all that follow some parameters now."""
        known = {key(tensor) for _, tensor in self.of(parameters)}
        return [str(pair) for pair in self._pairs.values() if known & {key(follower) for follower, _ in self._of(pair)}]

    def saved(self) -> list[tuple[str, str]]:
        """What a checkpoint needs: the names of those that have one."""
        return [(pair.follower, pair.leader) for pair in self._pairs.values() if _have_names(pair)]

    def load(self, state: Iterable[tuple[str, str]]) -> None:
        """Add what :meth:`saved` returned in another run; those that are given by hand stay."""
        if self._places.module is not None:
            self._pairs = {str(follower): _Pair(str(follower), str(leader)) for follower, leader in state} | self._pairs

    # Tensors ----------------------------------------------------------------------------------------------------------

    def _all(self) -> list[tuple[Tensor, Tensor]]:
        return [both for pair in self._pairs.values() for both in self._of(pair)]

    def _of(self, pair: _Pair) -> list[tuple[Tensor, Tensor]]:
        """What follows what, tensor by tensor; nothing if a side is gone, or does not fit any more."""
        try:
            return list(self._matched(pair).values())
        except ValueError:
            return []

    def _matched(self, pair: _Pair) -> dict[str, tuple[Tensor, Tensor]]:
        sides = []
        for side in (pair.follower, pair.leader):
            held = self._places.find(side) if isinstance(side, str) else side
            if held is None:
                raise ValueError(
                    f"followers: {type(self._places.module).__name__} has no {side}. It has "
                    f"{listing(self._places.names(), 9)}."
                )
            if isinstance(held, nn.Module):
                release(gathering_modules(held))
            sides.append(held)
        try:
            return _match(*sides)
        except ValueError as error:
            raise ValueError(f"followers: {pair.follower!r:.60} does not fit {pair.leader!r:.60}: {error}") from None

    def _leaders(self) -> dict[Any, Tensor]:
        """What each tensor follows, by its memory."""
        return {key(follower): leader for follower, leader in self._all()}


def _root(leader: Tensor, leader_of: Mapping[Any, Tensor]) -> Tensor:
    """What a leader follows in turn, at the end: an average of a pipeline has a copy of its target network, too."""
    for _ in range(len(leader_of)):
        if key(leader) not in leader_of:
            break
        leader = leader_of[key(leader)]
    return leader


def _have_names(pair: _Pair) -> bool:
    return isinstance(pair.follower, str) and isinstance(pair.leader, str)


def _pair_key(follower: Side) -> Any:
    return follower if isinstance(follower, str) else id(follower)


def trained_parts(module: nn.Module, leaders: set[int]) -> list[Candidate]:
    """The parts of a module that are trained."""
    parts = {plain_name(name): unwrapped(part) for name, part in module.named_modules(remove_duplicate=False)}
    found = [Candidate(name, part) for name, part in parts.items()]
    return [part for part in found if any(id(p) in leaders for p in tensors_of(part.held).values())]


def may_follow(one: Candidate, part: Candidate) -> bool:
    """Whether a candidate has the form of a part of the module. Layers of one list are no copies of each other."""
    if isinstance(one.held, nn.Module):
        return not is_sibling(one.name, part.name) and one.form.is_in(part.form)
    try:
        return bool(_match(one.held, part.held))
    except ValueError:
        return False


def _is_whole(one: Candidate, found: list[Candidate], candidates: list[Candidate], parts: list[Candidate]) -> bool:
    """Whether a copy is no part of something else that is no copy.

    Whatever is a part of a network with another activation function, say, would change that network.
    """
    around = [
        other
        for other in candidates
        if one.name.startswith(f"{other.name}.") and not isinstance(other.held, nn.ModuleList | nn.ModuleDict)
    ]
    if not around:
        return True
    whole = min(around, key=lambda other: len(other.name))
    copied = {key(t) for each in found for t in tensors_of(each.held).values()}
    looks_alike = any(whole.form.shapes.items() <= part.form.shapes.items() for part in parts)
    return not looks_alike and all(key(t) in copied for t in tensors_of(whole.held).values())


def _has_parent(name: str, found: Iterable[str]) -> bool:
    return any(name != other and name.startswith(f"{other}.") for other in found)


def _nearest(name: str, leaders: list[str]) -> str:
    """Of several leaders the one whose name is most like the follower's: ``target_critic_2`` follows ``critic_2``."""
    return max(leaders, key=lambda leader: (SequenceMatcher(None, name, leader).ratio(), leader != ""))


def _match(follower: Side, leader: Side) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair the tensors of two sides: by their names or, where these differ, by their order.

    Raises:
        ValueError: if they do not fit; it names what differs.
    """
    first, second = tensors_of(follower), tensors_of(leader)
    if not first or not second:
        raise ValueError("there are no tensors")
    if not first.keys() <= second.keys():
        if isinstance(follower, nn.Module) and isinstance(leader, nn.Module) and not _is_flat(follower):
            missing = [name for name in first if name not in second]
            raise ValueError(f"{listing(missing)} is not among {listing(list(second), 9)}")
        second = _in_order(first, second, leader)
    for name, tensor in first.items():
        shape, other = whole_shape(tensor), whole_shape(second[name]) if name in second else None
        if other is not None and other != shape:
            raise ValueError(f"{name or 'it'} has shape {list(shape)}, and not {list(other)}")
    return {name: (tensor, second[name]) for name, tensor in first.items() if name in second}


def _is_flat(module: nn.Module) -> bool:
    """Whether a module holds buffers of its own only, as those that hold averages under names without dots."""
    return not list(module.parameters()) and not list(module.children())


def _plain(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum())


def _in_order(first: Mapping[str, Tensor], second: Mapping[str, Tensor], leader: Side) -> dict[str, Tensor]:
    """The tensors of a leader under the names of its follower: of like spelling, or one after the other.

    Raises:
        ValueError: if there are others, or more or fewer of them.
    """
    spelt = {_plain(name): tensor for name, tensor in second.items()}
    if any(_plain(name) in spelt for name in first):
        odd = [name for name, tensor in first.items() if _plain(name) not in spelt and num_elements(tensor) > 1]
        if odd:
            raise ValueError(f"{listing(odd)} is not among {listing(list(second), 9)}")
        return {name: spelt[_plain(name)] for name in first if _plain(name) in spelt}
    orders: list[list[Tensor]] = [list(second.values())]
    if isinstance(leader, nn.Module):
        own = [parameter for _, parameter in named_parameters(leader)]
        orders = [[*own], [p for p in own if p.requires_grad], *orders]
    for order in orders:
        if [*map(whole_shape, order)] == [*map(whole_shape, first.values())]:
            return dict(zip(first, order, strict=True))
    shapes = [str(list(whole_shape(tensor))) for tensor in first.values()]
    raise ValueError(f"its {len(first)} tensors of shapes {listing(shapes)} are not {listing(list(second), 9)}")
