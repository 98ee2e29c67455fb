"""Copies that follow the weights, but that an optimizer has, too: nobody has frozen them, and no loss reaches them.

Such a target would be balanced as a network of its own, and be mixed with another member of its class. Whether it is
one shows in the first step: it is near a trained part of the same form, which has gradients, and has none itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.symmetry.copies import Candidate
from lightning_ecopt.symmetry.followers import may_follow, trained_parts
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.held import units_of
from lightning_ecopt.symmetry.nearness import are_near


@dataclass(frozen=True)
class UnfrozenCopies:
    """Parts of a module that look like followers, and are trained.

    Args:
        names: of the copies, each with the name of the part that it is near.
        units: ``bool[H]``, those that scale any of either.
    """

    names: Mapping[str, str]
    units: Tensor

    def __str__(self) -> str:
        pairs = " and ".join(f"{copy} looks like a copy that follows {leader}" for copy, leader in self.names.items())
        return (
            f"{pairs} (near values, no gradients), but an optimizer has it, so that both are held fixed: "
            f"{int(self.units.sum())} of {len(self.units)} units. Freeze the copy with requires_grad_(False), or leave "
            "it out of the optimizer; then it is rescaled with what it follows."
        )


def unfrozen_copies(module: nn.Module | None, group: ScalingGroup) -> UnfrozenCopies | None:
    """Look for them after a backward pass; ``None`` if there are none, or if parameters are sharded."""
    trained = {id(p) for p in group.parameters.values() if p.requires_grad}
    if module is None or any(map(is_sharded, group.parameters.values())):
        return None
    parts = trained_parts(module, trained)
    silent = [part for part in parts if all(p.grad is None for p in part.held.parameters())]
    heard = [part for part in parts if all(p.grad is not None for p in part.held.parameters())]
    found: dict[str, str] = {}
    for one in silent:
        if not any(one.name.startswith(f"{name}.") for name in found):
            leader = next((part for part in heard if may_follow(one, part) and _is_near(one, part)), None)
            if leader is not None:
                found[one.name] = leader.name
    if not found:
        return None
    held = [dict(module.named_modules())[name] for pair in found.items() for name in pair]
    return UnfrozenCopies(found, units_of(group, {id(p) for part in held for p in part.parameters()}))


def _is_near(one: Candidate, part: Candidate) -> bool:
    others = dict(part.held.named_parameters())
    return bool(are_near([[(p, others[name]) for name, p in one.held.named_parameters()]])[0])
