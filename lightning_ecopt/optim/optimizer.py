"""Any step of a torch optimizer, taken in the equivalent-class space."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ecopt.optim.path_rule import PathRule
from lightning_ecopt.optim.rule import Moment, PathStatistics, Rule, UnitStatistics
from lightning_ecopt.optim.unit_rule import UnitRule
from lightning_ecopt.paths import Skeleton, choose_skeleton
from lightning_ecopt.symmetry import PendingGroup, ScalingGroup

#: Entries of the base optimizers' states that are means of gradients (1) or of their squares (2).
POWERS = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
STATE = "equivalent_class"
NO_FREEDOMS = (
    "The network has no scaling freedoms, so the base optimizer is used as it is. The report of the callback names the "
    "operations that cost them."
)


class EquivalentClassOptimizer(Optimizer):
    """Run an optimizer in the equivalent-class space of a network (EC-SGD, Meng et al., arXiv:1802.03713).

    What the base optimizer does then depends on the network's function alone, not on which of the weights of an
    equivalent class compute it: two networks that differ by a rescaling of hidden units train alike. ``param_groups``,
    ``state`` and ``defaults`` are those of the base optimizer, and schedulers may hold either of the two.

    At the first step, and again at every refresh, the weights move to the balanced member of their class (the outputs
    do not change) and momentum is carried along. How a step is taken is the *rule*:

    - ``"unit"``: relative to the unit that takes it. The base optimizer's step in the incoming weights of a unit is
      scaled to their magnitude, after gradients are centred and clipped unit by unit. With SGD the learning rate is the
      relative length of a step, and 0.03 to 0.3 fits most networks, with and without momentum; with Adam and AdamW it
      keeps its meaning. Beside the base's own state it needs O(H). See :mod:`lightning_ecopt.optim.unit_rule`.
    - ``"path"``: the paper's. The base optimizer moves the m - H values of basis paths instead of the m weights. They
      are normalised so that at the start all but those of free skeleton weights, at most one in a unit, equal the
      weights; learning rate, momentum and every other option keep their meaning; weight decay acts on path values (the
      basis-path regularisation of the paper). At skeleton weights momentum starts anew at a refresh. See
      :mod:`lightning_ecopt.paths.coordinates`.

    Args:
        optimizer: the base: :class:`torch.optim.SGD`, :class:`~torch.optim.Adam` or :class:`~torch.optim.AdamW` with
            any of its options. Do not call its ``step`` yourself.
        group: of the module that owns the parameters; or a :class:`~lightning_ecopt.symmetry.PendingGroup`, if it is
            found while the closure of the first step runs.
        rule: ``"unit"`` or ``"path"``.
        refresh_interval: steps from one refresh to the next; ``None`` if only :meth:`refresh` asks for it.
        representative: ``"balanced"``, or ``"current"`` to stay at the weights as they are. Only the first depends on
            the class alone; the second is the paper's own setting.
        skeleton: of the rule ``"path"``, as all that follow: ``"max"`` takes the largest weights, ``"diagonal"`` is the
            paper's choice (unit i to unit i), for networks in which every unit has one weight tensor on each side.
        max_path_ratio: the guard: no path may change by more than this factor in one step, or change its sign.
            ``None`` is the paper's rule.
        free_start: value at which the coordinates of free skeleton weights start. It sets how fast the scale of a
            unit may move: larger is slower.

    Raises:
        TypeError: if the base optimizer is none of these, or is wrapped already.
        ValueError: if an option is out of range, or the group does not belong to the optimizer's parameters.

    Example::

        group = scaling_group(model, x)
        optimizer = EquivalentClassOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), group)
        loss_function(model(x), y).backward()
        optimizer.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        group: ScalingGroup | PendingGroup,
        *,
        rule: str = "unit",
        refresh_interval: int | None = 500,
        representative: str = "balanced",
        skeleton: str = "max",
        max_path_ratio: float | None = 2.0,
        free_start: float = 2.0,
    ) -> None:
        check_options(
            rule=rule,
            refresh_interval=refresh_interval,
            representative=representative,
            skeleton=skeleton,
            max_path_ratio=max_path_ratio,
            free_start=free_start,
        )
        check_base(optimizer)
        self.optimizer = optimizer
        self.rule = rule
        self.refresh_interval = refresh_interval
        self.representative = representative
        self.skeleton = skeleton
        self.max_path_ratio = max_path_ratio
        self.free_start = free_start
        self.__setstate__({})  # the hooks of an Optimizer, without parameters of its own
        self._pending: PendingGroup | None = None
        self._group: ScalingGroup | None = None
        self._own = torch.zeros(0, dtype=torch.bool)
        self._active: Tensor | None = None  # since the last refresh
        self._rule: Rule | None = None  # since the last refresh
        self._loaded: Mapping[str, Any] | None = None
        self._steps_since_refresh = 0
        self._refresh_due = True
        if isinstance(group, PendingGroup):
            self._pending = group
        else:
            self._bind(group)

    # What is shared with the base optimizer -------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of the base optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the base optimizer, in weight space but for what path coordinates hold at skeleton weights."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The default options of the base optimizer."""
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base optimizer; the new parameters must be in the scaling group. Refreshes at the next step.

        Raises:
            ValueError: if the scaling group does not know a parameter.
        """
        if self._group is not None:
            self._check_known(self._group, [p for p in _as_list(param_group["params"]) if p.requires_grad])
        self.optimizer.add_param_group(param_group)
        if self._group is not None:
            self._leave_rule()
            self._bind(self._group)
            self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r}, {self._group!r})"

    # The group --------------------------------------------------------------------------------------------------------

    @property
    def group(self) -> ScalingGroup | None:
        """The scaling group; ``None`` until it has been found."""
        return self._group

    def _bind(self, group: ScalingGroup) -> None:
        trainable = [p for options in self.param_groups for p in options["params"] if p.requires_grad]
        self._check_known(group, trainable)
        held = {id(p) for p in trainable}
        foreign = torch.zeros(group.scales.num_scales, dtype=torch.bool)
        for coupling in group.couplings:
            if id(group.parameters[coupling.parameter]) not in held:  # another optimizer's, or frozen by now
                for ids in (coupling.incoming, coupling.outgoing):
                    foreign[ids[ids >= 0]] = True
        own = ~group.scales.in_(foreign)
        if group.num_units == 0:
            warnings.warn(NO_FREEDOMS, stacklevel=3)
        self._group, self._own, self._pending = group, own, None
        self._rule, self._active, self._refresh_due = None, None, True

    def usable_units(self) -> Tensor:
        """Units whose freedom is used, ``bool[H]``: alive at the last refresh, no other optimizer's, and with paths if
        the rule is that of paths.

        Raises:
            RuntimeError: if the group has not been found yet.
        """
        if self._group is None:
            raise RuntimeError("The scaling group is not known before the first step.")
        active = self._group.alive().cpu() & self._own if self._active is None else self._active
        return active & self._with_paths(self._group) if self.rule == "path" else active

    def _with_paths(self, group: ScalingGroup) -> Tensor:
        """Units that something leads into and out of, no products among it, ``bool[H]``."""
        return group.scales.simple & ~group.scale_invariant

    def stop_watching(self) -> None:
        """Give the module back the method that a pending group watches."""
        if self._pending is not None:
            self._pending.cancel()

    def _check_known(self, group: ScalingGroup, parameters: list[Tensor]) -> None:
        names = {id(p): name for name, p in group.parameters.items()}
        unknown = [p for p in parameters if id(p) not in names]
        if unknown and len(unknown) == len(parameters):
            raise ValueError(
                "The scaling group was traced from another module: it has none of the optimizer's parameters. "
                "Call scaling_group on the module that this optimizer trains."
            )
        if unknown:
            shapes = ", ".join(str(tuple(p.shape)) for p in unknown[:3])
            raise ValueError(
                f"{len(unknown)} of the optimizer's parameters (shapes {shapes}) are not in the scaling group. Call "
                "scaling_group on the module that owns all of them, when all of them require a gradient."
            )
        unseen = [names[id(p)] for p in parameters if names[id(p)] in group.unseen]
        if unseen:
            raise ValueError(
                f"The traced call never used these parameters of the optimizer: {_listing(unseen)}. What was not seen "
                "cannot be rescaled safely: trace a call that uses them (check the example inputs), leave them out of "
                "the optimizer, or freeze them with requires_grad_(False)."
            )

    def _ensure_bound(self) -> bool:
        """Take over the pending group. False while there is none and nothing is to be done."""
        if self._group is None:
            assert self._pending is not None
            if self._pending.group is None:
                if all(p.grad is None for options in self.param_groups for p in options["params"]):
                    return False  # a skipped batch
                raise RuntimeError(
                    f"The first step came before the network was traced: nothing has called {self._pending.method}() "
                    f"of {type(self._pending.module).__name__} since the optimizer was made. Give the LightningModule "
                    "an example_input_array, pass a closure that calls it to step(), or make the optimizer with "
                    "EquivalentClassOptimizer(optimizer, scaling_group(module, inputs))."
                )
            self._bind(self._pending.group)
        return True

    # The step ---------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the base optimizer in the equivalent-class space.

        Args:
            closure: as for every torch optimizer: computes the gradients and returns the loss; it runs once, before
                anything moves.

        Raises:
            RuntimeError: if the network has not been traced by now.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if not self._ensure_bound():
                self.optimizer.step()
                return loss
            if self._refresh_due or self._steps_since_refresh == self.refresh_interval:
                self._refresh()
            self._steps_since_refresh += 1
            if self._rule is None:  # nothing to be done
                self.optimizer.step()
                return loss
            weights = self._parameters()
            with self._gradients(self._rule, weights):
                leave_ = self._rule.enter_(weights, self._moments(), self._averaging())
                try:
                    self.optimizer.step()
                finally:  # also when it fails: nothing may stay behind in other coordinates
                    leave_(self._moments())
            self._rule.accept()
        return loss

    def _parameters(self) -> dict[str, Tensor]:
        assert self._group is not None
        return {name: p.detach() for name, p in self._group.parameters.items()}

    @contextmanager
    def _gradients(self, rule: Rule, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While entered, the parameters have the gradients that the rule shows to the base optimizer."""
        assert self._group is not None
        own = self._group.parameters
        before = {name: p.grad for name, p in own.items() if p.grad is not None}
        try:
            for name, gradient in rule.gradients(weights, before).items():
                own[name].grad = gradient
            yield
        finally:
            for name, gradient in before.items():
                own[name].grad = gradient

    def _moments(self) -> dict[str, Moment]:
        """The base optimizer's means of gradients and of their squares, by entry."""
        assert self._group is not None
        found: dict[str, Moment] = {}
        for name, p in self._group.parameters.items():
            for entry, value in self.state[p].items() if p in self.state else ():
                if entry in POWERS and value is not None:
                    found.setdefault(entry, Moment(POWERS[entry], {})).tensors[name] = value
        return found

    def _averaging(self) -> dict[str, float]:
        """For each parameter of SGD by what its momentum, a sum of gradients, becomes a mean."""
        assert self._group is not None
        found = {}
        for options in self.param_groups:
            momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
            factor = (1 - momentum) / (1 - dampening) if 0 < momentum < 1 and dampening < 1 else 1.0
            found.update({id(p): factor for p in options["params"]})
        return {name: found.get(id(p), 1.0) for name, p in self._group.parameters.items()}

    # The refresh ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Balance and choose the skeleton again at the next step. Call it between steps, say once an epoch."""
        self._refresh_due = True
        if self._loaded is not None:  # not taken over yet
            self._loaded = {**self._loaded, "refresh_due": True}

    def _refresh(self) -> None:
        if self._loaded is not None:
            self._restore(self._loaded)
            if not self._refresh_due:
                return
        before = self._leave_rule()
        group = self._group
        assert group is not None
        self._steps_since_refresh, self._refresh_due = 0, False
        parameters = self._parameters()
        if len({p.device for p in parameters.values()}) > 1:
            raise RuntimeError(
                "The parameters are on several devices, and paths lead through all of them: put the module on one "
                "device (data parallelism is supported), or train without the equivalent-class space."
            )
        alive = group.alive().cpu()
        active = self._active = alive & self._own
        moments = self._moments()
        if self.representative == "balanced" and bool(active.any()):
            log_scale = group.balance_(active)
            group.rescale_({name: p.grad for name, p in group.parameters.items()}, log_scale, power=-1)
            for moment in moments.values():
                group.rescale_(moment.tensors, log_scale, power=-moment.power)
        if self.rule == "unit" and group.num_units > 0:
            self._rule = before or self._unit_rule()
        elif bool(self.usable_units().any()):
            # Units without paths, and those of other optimizers, are as ground; dormant ones are not, for no path leads
            # through them.
            edges = self._own & self._with_paths(group) | ~alive
            own = [coupling.restricted(edges) for coupling in group.couplings]
            skeleton = choose_skeleton(own, parameters, self.usable_units(), self.skeleton)
            self._rule = PathRule(group, parameters, skeleton, self.free_start, self.max_path_ratio)
            self._rule.restart_(moments)

    def _unit_rule(self) -> UnitRule:
        assert self._group is not None
        numbers = self._numbers()
        own = {name: p for name, p in self._parameters().items() if name in numbers}
        momentum = self._moments().get("momentum_buffer", Moment(1, {})).tensors
        average = self._averaging()
        means = {name: average[name] * value for name, value in momentum.items() if name in own}
        return UnitRule(self._group.couplings, own, not isinstance(self.optimizer, SGD), means)

    def _leave_rule(self) -> Rule | None:
        """Back to weight space; returns the rule that was left."""
        rule, self._rule = self._rule, None
        if rule is not None:
            rule.restart_(self._moments())
        return rule

    def statistics(self) -> PathStatistics | UnitStatistics | None:
        """Whether all is well; ``None`` before the first step. Waits for the device."""
        if self._active is None:
            return None
        dormant = int(self._own.sum()) - int(self._active.sum())
        if self._rule is not None:
            return self._rule.statistics(dormant)
        return UnitStatistics(0.0, dormant) if self.rule == "unit" else PathStatistics(1.0, 1.0, 0, dormant)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the base optimizer, which can load it by itself, and what path coordinates need to go on."""
        state: dict[str, Any] = self.optimizer.state_dict()
        if self._loaded is not None:
            state[STATE] = dict(self._loaded)
            return state
        counts: dict[str, Any] = {"steps_since_refresh": self._steps_since_refresh, "refresh_due": self._refresh_due}
        if self._active is not None:
            counts["active"] = self._active.clone()
        if self._rule is not None:
            numbers = self._numbers()
            state["state"] = {number: dict(entries) for number, entries in state["state"].items()}
            moments = self._moments()
            state[STATE] = {"rule": self.rule, **self._rule.state_dict(moments), **counts}
            plain = {
                entry: Moment(moment.power, {name: value.clone() for name, value in moment.tensors.items()})
                for entry, moment in moments.items()
            }
            self._rule.restart_(plain)
            for entry, moment in plain.items():
                for name, value in moment.tensors.items():
                    state["state"][numbers[name]][entry] = value
        elif not self._refresh_due:  # there was nothing to be done at the last refresh
            state[STATE] = counts
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class; or of the plain base optimizer, or another rule, and then the rule starts anew.

        Raises:
            ValueError: if it belongs to a network with other units.
        """
        state_dict = dict(state_dict)
        loaded = state_dict.pop(STATE, None)
        if loaded is not None and self._group is not None:
            self._check_fits(loaded, self._group)
        self.optimizer.load_state_dict(state_dict)
        self._rule, self._active, self._refresh_due, self._loaded = None, None, True, loaded

    def _check_fits(self, loaded: Mapping[str, Any], group: ScalingGroup) -> None:
        if "active" not in loaded:
            return
        units = len(loaded["active"])
        if units != group.num_units:
            raise ValueError(
                f"The checkpoint was made with {units} units, this network has {group.num_units}: load it into the "
                "network that it was made with, traced in the same way."
            )

    def _restore(self, loaded: Mapping[str, Any]) -> None:
        """Go on from a loaded state as if training had not stopped."""
        assert self._group is not None
        self._check_fits(loaded, self._group)
        self._loaded = None
        if loaded.get("rule", self.rule) != self.rule:
            return
        if "rule" in loaded:
            if self.rule == "unit":
                self._rule = self._unit_rule()
            else:
                skeleton = Skeleton.from_state_dict(loaded["skeleton"])
                start = float(loaded["free_start"])
                self._rule = PathRule(self._group, self._parameters(), skeleton, start, self.max_path_ratio)
            self._rule.load_state_dict(loaded, self._moments())
        if "active" in loaded:
            self._active = loaded["active"].cpu()
        self._steps_since_refresh = loaded["steps_since_refresh"]
        self._refresh_due = loaded["refresh_due"] or self._steps_since_refresh == self.refresh_interval

    def _numbers(self) -> dict[str, int]:
        """The number under which the base optimizer's state dict has each parameter."""
        assert self._group is not None
        order = {id(p): k for k, p in enumerate(p for options in self.param_groups for p in options["params"])}
        return {name: order[id(p)] for name, p in self._group.parameters.items() if id(p) in order}


def check_base(optimizer: Optimizer) -> None:
    """Raise unless ``optimizer`` can be run in the equivalent-class space.

    Raises:
        TypeError: with what to do instead.
    """
    if isinstance(optimizer, EquivalentClassOptimizer):
        raise TypeError(
            "The optimizer is an EquivalentClassOptimizer already: wrap it once, either in configure_optimizers "
            "(ec_sgd) or with the callback."
        )
    if not isinstance(optimizer, SGD | Adam | AdamW):
        raise TypeError(
            f"EquivalentClassOptimizer wraps torch.optim.SGD, Adam and AdamW, got {type(optimizer).__name__}: use one "
            "of them, or train without the equivalent-class space."
        )
    for options in optimizer.param_groups:
        for p in options["params"]:
            if type(p.data) is not Tensor or not p.dtype.is_floating_point:
                raise TypeError(
                    f"EquivalentClassOptimizer needs plain real parameters, got {type(p.data).__name__} of "
                    f"{p.dtype}: sharded parameters (FSDP, tensor parallelism), quantised and complex ones are not "
                    "supported. Train with DDP."
                )


def check_options(
    *,
    rule: str = "unit",
    refresh_interval: int | None = None,
    representative: str = "balanced",
    skeleton: str = "max",
    max_path_ratio: float | None = None,
    free_start: float = 1.0,
) -> None:
    """Raise ``ValueError`` for an option out of range."""
    if rule not in ("unit", "path"):
        raise ValueError(f"rule must be 'unit' or 'path', got {rule!r}")
    if skeleton not in ("max", "diagonal"):
        raise ValueError(f"skeleton must be 'max' or 'diagonal', got {skeleton!r}")
    if representative not in ("balanced", "current"):
        raise ValueError(f"representative must be 'balanced' or 'current', got {representative!r}")
    if max_path_ratio is not None and not (math.isfinite(max_path_ratio) and max_path_ratio > 1):
        raise ValueError(f"max_path_ratio must be a finite number greater than 1, or None, got {max_path_ratio!r}")
    if refresh_interval is not None and (
        not isinstance(refresh_interval, int) or isinstance(refresh_interval, bool) or refresh_interval < 1
    ):
        raise ValueError(f"refresh_interval must be a positive number of steps, or None, got {refresh_interval!r}")
    if not (math.isfinite(free_start) and free_start > 0):
        raise ValueError(f"free_start must be a finite number greater than 0, got {free_start!r}")


def _as_list(parameters: Any) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _listing(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
