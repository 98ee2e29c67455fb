"""The state of an equivalent-class optimizer in checkpoints: saved with the base's, checked when it is loaded.

A state dict is the base optimizer's, at the weights, so that the plain base can load it, with one entry more:

    {"state": ..., "param_groups": ..., "equivalent_class": {"rule": "unit", "active": bool[H], ...}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_ecopt.common.sharding import whole_shape
from lightning_ecopt.common.tensors import listing
from lightning_ecopt.common.warn import warn
from lightning_ecopt.optim.binding import WAY_OUT, Network, parameters_of
from lightning_ecopt.optim.calls import without_hooks
from lightning_ecopt.optim.session import Session
from lightning_ecopt.optim.stages import Idle, Ready, Resting, Running, Waiting
from lightning_ecopt.steps import RULES
from lightning_ecopt.symmetry import ScalingGroup

KEY = "equivalent_class"
OTHER_FREEDOMS = (
    "The checkpoint was made with a network that has other freedoms, so that the rule begins anew. The base optimizer "
    "goes on from its own state."
)


def saved(session: Session) -> dict[str, Any]:
    """The state dict of the base optimizer and, under :data:`KEY`, what the rule needs to go on."""
    with without_hooks(session.base):
        state: dict[str, Any] = session.base.state_dict()
    own = saved_rule(session)
    if own is not None:
        state[KEY] = own
    stage = session.stage
    if isinstance(stage, Running) and not stage.rule.has_weight_entries():
        # The base holds entries of coordinates; the plain base, which may load them, needs entries of weights.
        held = session.entries(stage.network)
        entries = {
            name: replace(entry, tensors={parameter: value.clone() for parameter, value in entry.tensors.items()})
            for name, entry in held.items()
        }
        stage.rule.to_weight_entries_(entries, session.weights(stage.network))
        at_weights = {
            id(value): entries[name].tensors[parameter]
            for name, entry in held.items()
            for parameter, value in entry.tensors.items()
        }
        # By the tensors themselves, as wrappers of optimizers have forms of their own for their states.
        state = tree_map_only(Tensor, lambda value: at_weights.get(id(value), value), state)
    return state


def saved_rule(session: Session) -> dict[str, Any] | None:
    """What the rule needs to go on beside the base's state; ``None`` before the first step."""
    stage = session.stage
    if isinstance(stage, Waiting | Ready):
        is_known = session.has_stepped_plainly or bool(session.binding.deferred.held)  # more than at the beginning
        if stage.saved or not is_known:
            return dict(stage.saved) or None
        group = session.group or session.binding.deferred.group
        return None if group is None else _saved_group(session, group, group.fingerprint())
    trained = set(map(id, session.trained))
    counts = {
        **_saved_group(session, stage.network.group, stage.network.fingerprint),
        "steps_since_refresh": session.steps_since_refresh,
        "refresh_due": session.refresh_due,
        "active": stage.active.clone(),
        "trained": [id(p) in trained for p in stage.network.parameters.values()],
    }
    if isinstance(stage, Running):
        return {"rule": stage.rule.name, **stage.rule.state_dict(session.entries(stage.network)), **counts}
    return None if session.refresh_due else counts  # there was nothing to be done at the last refresh


def _saved_group(session: Session, group: ScalingGroup, fingerprint: str) -> dict[str, Any]:
    """The group, with which the next step begins, and what else is known of the training."""
    deferred = session.binding.deferred
    state = {
        "steps_since_refresh": 0,
        "refresh_due": True,
        "epoch": session.last_epoch,
        "surprises": session.surprises,
        "fingerprint": fingerprint,
        "parameters": list(group.parameters),
        "shapes": _shapes(session),
        "equations": deferred.saved(),
        "check": session.gradient_check.state_dict(),
        "watching": session.watching.state_dict(),
    }
    followers = deferred.followers.saved()
    return {**state, "followers": followers} if followers else state


def load(session: Session, state_dict: Mapping[str, Any]) -> None:
    """Load what :func:`saved` has saved, or a state of the plain base optimizer, from which the rule begins anew.

    Raises:
        ValueError: if the state belongs to another network; then nothing has changed.
    """
    rest = dict(state_dict)
    own = rest.pop(KEY, None) or {}
    network = _network_of(session, own)  # before the base has taken anything over
    with without_hooks(session.base):
        session.base.load_state_dict(rest)
    _go_on_from(session, own, network)


def load_rule(session: Session, state: Mapping[str, Any] | None) -> None:
    """Go on from what :func:`saved_rule` has saved, from the next step on; from ``None``, begin anew.

    Raises:
        ValueError: if the state belongs to another network; then nothing has changed.
    """
    own = state or {}
    _go_on_from(session, own, _network_of(session, own))


def _shapes(session: Session) -> list[list[int]]:
    return [list(whole_shape(p)) for p in parameters_of(session.base)]


def _network_of(session: Session, state: Mapping[str, Any]) -> Network | None:
    """The network that a state belongs to, as far as that is known by now.

    It may be another than the present one: an earlier phase of fine-tuning is loaded, or one in which more is trained.

    Raises:
        ValueError: if the state belongs to another network in which the same parameters are trained.
    """
    _check_kinds(state)
    network = None if isinstance(session.stage, Waiting) else session.stage.network
    deferred, equations = session.binding.deferred, state.get("equations")
    if network is None and "parameters" not in state:
        return None
    names = set(state.get("parameters", () if network is None else network.group.parameters))
    if network is not None and network.group.parameters.keys() == names and network.fits(state):
        network.check_state(state, session.options)
        if "fingerprint" in state:
            deferred.confirm()
        return network
    if "shapes" in state and state["shapes"] != _shapes(session):
        raise ValueError(f"The checkpoint was made with parameters of other shapes: {WAY_OUT}")
    may_differ = deferred.may_differ
    undo = deferred.load(equations, names)
    group = deferred.take_back(names)
    found = None if group is None else Network.of(session.base, group, session.options)
    if found is not None and found.fits(state):
        return found
    if network is not None:
        undo()
        if network.group.parameters.keys() == names and not may_differ:
            network.check_state(state, session.options)  # raises
    return None


#: What the rule's part of a state may hold beside what belongs to the rule.
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "rule": str,
    "steps_since_refresh": int,
    "refresh_due": bool,
    "epoch": (int, type(None)),
    "surprises": int,
    "active": Tensor,
    "fingerprint": str,
    "parameters": list,
    "trained": list,
    "shapes": list,
    "equations": (Mapping, type(None)),
    "followers": list,
    "check": Mapping,
    "watching": Mapping,
}


def _check_kinds(state: Any) -> None:
    """Check what can be checked while the group is unknown.

    Raises:
        ValueError: if the state is damaged.
    """
    damaged = [] if isinstance(state, Mapping) else ["all of it"]
    if not damaged and state:
        damaged = [name for name, kinds in _KINDS.items() if name in state and not isinstance(state[name], kinds)]
        damaged += [name for name in ("steps_since_refresh", "refresh_due") if name not in state]
    if damaged:
        raise ValueError(f"The rule's part of the checkpoint is damaged ({listing(damaged)}): {WAY_OUT}")


def _go_on_from(session: Session, state: Mapping[str, Any], network: Network | None) -> None:
    stage = session.stage
    if network is None and not isinstance(stage, Waiting):
        network = stage.network
    session.binding.deferred.followers.load(state.get("followers", ()))
    session.watching.load(state.get("watching"))  # whatever becomes of the rule
    session.stage = Waiting(state) if network is None else Ready(network, state)
    session.refresh_due = True


def restore(session: Session) -> bool:
    """Take over the saved state, if there is one and the group is known, as if training had not stopped.

    Returns:
        Whether training goes on from it; it begins anew after a state of another rule.
    """
    stage = session.stage
    if not isinstance(stage, Ready) or not stage.saved:
        return False
    state, network = stage.saved, stage.network
    if not _is_usable(session, state, network):
        session.stage = Ready(network)
        return False
    active = state["active"].cpu() if "active" in state else network.active_units()
    if "rule" in state:
        rule = RULES[session.options.rule].resume(session.setting(network, active), state, session.entries(network))
        session.stage = session.running(network, active, rule)
    else:
        session.stage = Idle(network, active)
    session.steps_since_refresh = state["steps_since_refresh"]
    session.last_epoch = state.get("epoch", session.last_epoch)
    session.surprises = state.get("surprises", 0)
    session.gradient_check.load(state.get("check"), network.group)
    trained = [p.requires_grad for p in network.parameters.values()]
    session.refresh_due = state["refresh_due"] or session.interval_is_over() or state.get("trained", trained) != trained
    return True


def _is_usable(session: Session, state: Mapping[str, Any], network: Network) -> bool:
    """Whether the rule can go on from a state; warns if it cannot although it would have without an interruption."""
    if not network.fits(state):
        names = set(state["parameters"])
        was_waiting = bool((state.get("equations") or {}).get("is_waiting"))  # for what has changed the freedoms now
        if (names == network.group.parameters.keys() and not was_waiting) or names.isdisjoint(network.group.parameters):
            warn(OTHER_FREEDOMS)  # otherwise other parts are trained or known, and the rule begins anew anyway
        return False
    try:
        network.check_state(state, session.options)
    except ValueError as error:  # the group was not known when the state was loaded
        warn(f"The rule begins anew. {error}")
        return False
    return bool(state.get("rule", session.options.rule) == session.options.rule)


def rest(session: Session) -> None:
    """Leave the base's state at the weights, if it is elsewhere; the next step goes on as if it had stayed there."""
    session.is_resting, stage = True, session.stage
    if isinstance(stage, Running) and not stage.rule.has_weight_entries():
        state = saved_rule(session) or {}
        with torch.no_grad():
            session.leave_rule()
        session.stage, session.refresh_due = Resting(stage.network, state, stage), True
