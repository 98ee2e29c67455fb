"""Any step of a torch optimizer, taken in the equivalent-class space."""

from __future__ import annotations

import math
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD, Optimizer

from lightning_ecopt.common.sharding import Ranks, is_sharded, local
from lightning_ecopt.common.tensors import listing, updates_by_difference
from lightning_ecopt.kernels import Coefficient
from lightning_ecopt.kernels.choose import Implementation, choose_kernels
from lightning_ecopt.optim.fused import BASES, FusedStep, averaging
from lightning_ecopt.steps import Skeleton, choose_skeleton
from lightning_ecopt.steps.path import PathRule
from lightning_ecopt.steps.rule import PathStatistics, Rule, UnitStatistics
from lightning_ecopt.steps.state import Moment, has_points, moments_of
from lightning_ecopt.steps.unit import UnitRule
from lightning_ecopt.symmetry import DeferredGroup, GroupFromModuleCalls, ScalingGroup

#: Optimizers whose steps are linear in the gradients; those of all others are of a size of their own.
LINEAR = (SGD, ASGD)
STATE = "equivalent_class"
#: Of steps and of checkpoints.
HOOKS = tuple(
    f"_optimizer_{event}_{when}_hooks"
    for event in ("step", "state_dict", "load_state_dict")
    for when in ("pre", "post")
)
NO_FREEDOMS = (
    "The network has no scaling freedoms, so the base optimizer is used as it is. The report of the callback names the "
    "operations that cost them."
)

Finder = Callable[[Sequence[Tensor]], ScalingGroup | DeferredGroup]


class EquivalentClassOptimizer(Optimizer):
    """Run an optimizer in the equivalent-class space of a network (EC-SGD, Meng et al., arXiv:1802.03713).

    What the base optimizer does then depends on the network's function alone, not on which of the weights of an
    equivalent class compute it: two networks that differ by a rescaling of hidden units train alike. ``param_groups``,
    ``state`` and ``defaults`` are those of the base optimizer, and schedulers may hold either of the two.

    At the first step, and again at every refresh, the weights move to the balanced member of their class (the outputs
    do not change) and momentum is carried along. How a step is taken is the *rule*:

    - ``"unit"``: relative to the unit that takes it. The base optimizer's step in the incoming weights of a unit is
      scaled to their magnitude, after gradients are centred and clipped unit by unit. With SGD and ASGD the learning
      rate is the relative length of a step, and 0.03 to 0.3 fits most networks, with and without momentum; with all
      others it keeps its meaning. Beside the base's own state it needs O(H). See
      :mod:`lightning_ecopt.steps.unit`.
    - ``"path"``: the paper's. The base optimizer moves the m - H values of basis paths instead of the m weights. They
      are normalised so that at the start all but those of free skeleton weights, at most one in a unit, equal the
      weights; learning rate, momentum and every other option keep their meaning; weight decay acts on path values (the
      basis-path regularisation of the paper). At skeleton weights momentum starts anew at a refresh. See
      :mod:`lightning_ecopt.steps.coordinates`.

    Args:
        optimizer: the base: any optimizer, of torch or not, but :class:`torch.optim.LBFGS`. Its hooks of steps become
            this one's. Do not call its ``step`` yourself.
        group: of the module that owns the parameters; or a function that finds it for a list of parameters, and is
            called again when other parameters are to be trained; or ``None``, if the calls of modules that use the
            parameters are to be watched until the first step. Instead of a group it may be a
            :class:`~lightning_ecopt.symmetry.DeferredGroup` one, which is found by then.
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
        state_powers: for entries of the state of optimizers that are not torch's: by the p-th power of what does a
            refresh divide them that makes weights larger? 1 for means of gradients, 2 for means of their squares, -1
            for averages of weights, 0 for what has no scale. A warning says if one is missing.
        implementation: how the step is run, which changes nothing but its speed: see
            :func:`lightning_ecopt.kernels.choose_kernels`.

    Raises:
        TypeError: if the base optimizer is wrapped already, or cannot be.
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
        group: ScalingGroup | DeferredGroup | Finder | None = None,
        *,
        rule: Literal["unit", "path"] = "unit",
        refresh_interval: int | None = 500,
        representative: Literal["balanced", "current"] = "balanced",
        skeleton: Literal["max", "diagonal"] = "max",
        max_path_ratio: float | None = 2.0,
        free_start: float = 2.0,
        state_powers: Mapping[str, int] | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        check_options(
            rule=rule,
            refresh_interval=refresh_interval,
            representative=representative,
            skeleton=skeleton,
            max_path_ratio=max_path_ratio,
            free_start=free_start,
            state_powers=state_powers,
            implementation=implementation,
        )
        check_base(optimizer)
        self.optimizer = optimizer
        self.rule = rule
        self.refresh_interval = refresh_interval
        self.representative = representative
        self.skeleton = skeleton
        self.max_path_ratio = max_path_ratio
        self.free_start = free_start
        self.state_powers = dict(state_powers or {})
        self.implementation = implementation
        self.__setstate__({})  # the hooks of an Optimizer, without parameters of its own
        self._find: Finder | None = None
        self._pending: DeferredGroup | None = None
        self._group: ScalingGroup | None = None
        self._bound: list[int] = []  # the parameters that required a gradient then
        self._names: Collection[str] = ()  # of the base's parameters in the group
        self._own = torch.zeros(0, dtype=torch.bool)
        self._active: Tensor | None = None  # since the last refresh
        self._rule: Rule | None = None  # since the last refresh
        self._fused: FusedStep | None = None  # of that rule
        self._loaded: Mapping[str, Any] | None = None
        self._steps_since_refresh = 0
        self._refresh_due = True
        self._unknown: set[str] = set()  # entries that a warning has named
        self.bind(GroupFromModuleCalls if group is None else group)
        for hooks in HOOKS:
            setattr(self, hooks, getattr(optimizer, hooks))  # they are to see weights
            setattr(optimizer, hooks, OrderedDict())

    # What is shared with the base optimizer -------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the base optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the base optimizer, where it moves; what :meth:`state_dict` has is that of weights."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options of the base optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """What an optimizer has beyond those of torch, such as ``train`` and ``eval`` of a schedule-free one."""
        if name == "optimizer" or name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self.optimizer, name)
        return self._in_coordinates(found) if name in ("train", "eval") else found

    def _in_coordinates(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the base optimizer that moves weights, to be called where the base takes its steps."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                if self._loaded is not None and self._group is not None:
                    self._restore(self._loaded)
                leave_ = None if self._rule is None else self._rule.visit_(self._parameters())
                try:
                    return method(*args, **kwargs)
                finally:
                    if leave_ is not None:
                        leave_()

        return call

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base optimizer. Refreshes at the next step, with the freedoms that the new parameters bring.

        Raises:
            ValueError: if the scaling group was given and does not know a parameter.
        """
        self.optimizer.add_param_group(param_group)
        if self._group is not None and self._find is None:
            try:
                self._check_known(self._group, [p for p in self.param_groups[-1]["params"] if p.requires_grad])
            except ValueError:
                self.param_groups.pop()
                raise
        self.renew()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r}, {self._group!r})"

    # The group --------------------------------------------------------------------------------------------------------

    @property
    def group(self) -> ScalingGroup | None:
        """The scaling group; ``None`` until it has been found."""
        return self._group

    @property
    def is_bound(self) -> bool:
        """Whether it has been told where its scaling group comes from."""
        return self._find is not GroupFromModuleCalls

    def bind(self, group: ScalingGroup | DeferredGroup | Finder) -> None:
        """Use a scaling group, in place of the one that was used so far if there is one. Refreshes at the next step.

        Args:
            group: as for the constructor.

        Raises:
            ValueError: if the group does not belong to the optimizer's parameters.
        """
        self._bound = [id(p) for p in self._trainable()]
        self._find = None
        self.stop_watching()
        if not isinstance(group, ScalingGroup | DeferredGroup):
            self._find = group
            group = group(self._trainable())
        if isinstance(group, ScalingGroup):
            self._bind(group)
        else:
            self._pending = group

    def renew(self) -> None:
        """Find the freedoms again if other parameters require a gradient now. Call it between steps.

        Every refresh begins with it. Parameters that a group which was given does not know stay in weight space.
        """
        trainable = [id(p) for p in self._trainable()]
        if trainable == self._bound:
            return
        if self._find is not None:
            self._loaded = None  # its moments, which the base optimizer has, are those of weights
            self.bind(self._find)
        elif self._group is not None and {id(p) for p in self._group.parameters.values()}.issuperset(trainable):
            self._bind(self._group)

    def _inner(self) -> EquivalentClassOptimizer | None:
        """Lightning and Fabric hand out objects of their own with the methods of this class; then, what is inside."""
        return self.optimizer if isinstance(self.optimizer, EquivalentClassOptimizer) else None

    def _trainable(self) -> list[Tensor]:
        return [p for options in self.param_groups for p in options["params"] if p.requires_grad]

    def _bind(self, group: ScalingGroup) -> None:
        trainable = self._trainable()
        self._check_known(group, trainable)
        held = {id(p) for p in trainable}
        foreign = torch.zeros(group.monomials.num_scales, dtype=torch.bool)
        for coupling in group.couplings:
            if id(group.parameters[coupling.parameter]) not in held:  # another optimizer's, or frozen by now
                for ids in (coupling.incoming, coupling.outgoing):
                    foreign[ids[ids >= 0]] = True
        if group.num_units == 0:
            warnings.warn(NO_FREEDOMS, stacklevel=3)
        if self.rule == "path" and any(map(is_sharded, group.parameters.values())):
            raise ValueError("The rule 'path' needs parameters that are not sharded: use rule='unit', or DDP.")
        with torch.no_grad():
            self._leave_rule()
        self._group, self._own, self._pending = group, ~group.monomials.in_(foreign), None
        is_fused = type(self.optimizer) in BASES and self.implementation != "wrapped"
        self._kernels = choose_kernels(self.implementation, list(group.parameters.values()), is_fused)
        self._bound = [id(p) for p in trainable]
        self._names = set(self._numbers())
        self._active, self._refresh_due = None, True

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
        return group.monomials.simple & ~group.scale_invariant

    def stop_watching(self) -> None:
        """Give the module back the method that a pending group watches."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None

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
                f"The traced call never used these parameters of the optimizer: {listing(unseen)}. What was not seen "
                "cannot be rescaled safely: trace a call that uses them (check the example inputs), leave them out of "
                "the optimizer, or freeze them with requires_grad_(False)."
            )

    def _ensure_bound(self) -> bool:
        """Take over the pending group. False while there is none and nothing is to be done."""
        found = None if self._pending is None else self._pending.settle()
        if found is not None:
            self._bind(found)
        if self._group is not None:
            return True
        if all(p.grad is None for options in self.param_groups for p in options["params"]):
            return False  # a skipped batch
        assert self._pending is not None
        raise RuntimeError(
            f"The first step came before the network was traced: {self._pending.missing}. Give the LightningModule "
            "an example_input_array, pass a closure that calls it to step(), or make the optimizer with "
            "EquivalentClassOptimizer(optimizer, scaling_group(module, inputs))."
        )

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
            if self._only_makes_state() or not self._ensure_bound():
                self.optimizer.step()
                return loss
            if self._refresh_due or self._steps_since_refresh == self.refresh_interval:
                self.renew()
                self._refresh()
            self._steps_since_refresh += 1
            if self._rule is None or all(p.grad is None for p in self._trainable()):  # nothing to be done
                self.optimizer.step()
                return loss
            weights, gradients = self._parameters(), self._dense_gradients()
            fused = self._fused
            assert fused is not None
            moments = fused.moments(gradients)
            if moments is None:
                self._take_wrapped(self._rule, fused.average, weights, gradients)
            else:
                fused.take(weights, gradients, moments)
                self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask the base
            self._rule.accept()
        return loss

    def _take_wrapped(
        self, rule: Rule, average: Coefficient, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        """The base optimizer's own step, with the weights and the gradients in other coordinates meanwhile."""
        frame = rule.frame(weights, gradients, average)
        with self._writable(gradients) as shown:
            undo = rule.show_(frame, shown)
            leave_ = rule.enter_(frame, weights, self._points())
            try:
                self.optimizer.step()
            finally:  # also when it fails: nothing may stay behind in other coordinates
                leave_(self._points())
                undo()

    def _only_makes_state(self) -> bool:
        """Whether ``torch.distributed.checkpoint`` makes the base's state, by a step with lr and gradients of zero."""
        if self.state or any(options.get("lr") != 0 for options in self.param_groups):
            return False
        own = {str(k): p for k, p in enumerate(p for options in self.param_groups for p in options["params"])}
        moves = [local(p.grad).any() for p in own.values() if p.grad is not None]
        return not bool(Ranks(own).any_(torch.stack(moves).any()) if moves else False)  # the same on all ranks

    def _parameters(self) -> dict[str, Tensor]:
        assert self._group is not None
        return {name: local(p.detach()) for name, p in self._group.parameters.items()}

    def _own_parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._parameters().items() if name in self._names}

    def _dense_gradients(self) -> dict[str, Tensor]:
        assert self._group is not None
        own = {name: p.grad for name, p in self._group.parameters.items() if name in self._names}
        return {name: local(g) for name, g in own.items() if g is not None and not g.is_sparse}

    @contextmanager
    def _writable(self, gradients: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """While entered, the parameters have gradients that can be changed there and back, most of them their own.

        Those that cannot are copied: of sixteen bits, which would be rounded; part of a graph; and in shared memory.
        """
        assert self._group is not None
        own = self._group.parameters
        memory = Counter(gradient.data_ptr() for gradient in gradients.values())
        before = {
            name: own[name].grad
            for name, g in gradients.items()
            if updates_by_difference(g) or g.requires_grad or memory[g.data_ptr()] > 1 or 0 in g.stride()
        }
        shown = dict(gradients)
        try:
            for name, gradient in before.items():
                assert gradient is not None
                own[name].grad = copy = gradient.clone()
                shown[name] = local(copy)
            yield shown
        finally:
            for name, gradient in before.items():
                own[name].grad = gradient

    def _moments(self) -> dict[str, Moment]:
        """What the base optimizer's state has for each weight, by entry."""
        assert self._group is not None
        moments, unknown = moments_of(self.state, self._group.parameters, self.state_powers)
        if unknown - self._unknown:
            self._unknown |= unknown
            warnings.warn(
                f"What a rescaling of the weights does to {listing(sorted(unknown))} in the state of "
                f"{type(self.optimizer).__name__} is not known: they stay as they are at a refresh. Tell it with "
                f"state_powers={{{sorted(unknown)[0]!r}: ...}}; 0 is what happens now.",
                stacklevel=2,
            )
        return moments

    def _points(self) -> dict[str, Moment]:
        """Averages of weights among them; few optimizers have any."""
        return self._moments() if has_points(self.state, self.state_powers) else {}

    # The refresh ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Balance and choose the skeleton again at the next step. Call it between steps, say once an epoch."""
        if (inner := self._inner()) is not None:
            return inner.refresh()
        self._refresh_due = True
        if self._loaded is not None:  # not taken over yet
            self._loaded = {**self._loaded, "refresh_due": True}

    @torch.no_grad()
    def start(self) -> None:
        """Balance before the first gradients are computed, if the group is known and no state was loaded.

        Only then gradients that are clipped by their norm, or looked at by others, depend on the class alone from the
        first step on.
        """
        if self._group is not None and self._refresh_due and self._loaded is None:
            self._refresh()

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
            dense = {
                name: p.grad for name, p in group.parameters.items() if p.grad is not None and not p.grad.is_sparse
            }
            group.rescale_(dense, log_scale, power=-1)
            for moment in moments.values():
                group.rescale_(moment.tensors, log_scale, power=-moment.power)
        if self.rule == "unit" and group.num_units > 0:
            self._use(before or self._unit_rule())
        elif bool(self.usable_units().any()):
            # Units without paths, and those of other optimizers, are as ground; dormant ones are not, for no path leads
            # through them.
            edges = self._own & self._with_paths(group) | ~alive
            own = [coupling.restricted(edges) for coupling in group.couplings]
            skeleton = choose_skeleton(own, parameters, self.usable_units(), self.skeleton)
            rule = PathRule(
                group, self._own_parameters(), self._kernels, skeleton, self.free_start, self.max_path_ratio
            )
            rule.start_(moments)
            self._use(rule)

    def _unit_rule(self) -> UnitRule:
        assert self._group is not None
        numbers = self._numbers()
        own = {name: p.detach() for name, p in self._group.parameters.items() if name in numbers}
        held = self._moments() if isinstance(self.optimizer, SGD) else {}
        momentum = held.get("momentum_buffer", Moment(1, {})).tensors
        average = {id(p): averaging(options) for options in self.param_groups for p in options["params"]}
        means = {
            name: average[id(self._group.parameters[name])] * local(value)
            for name, value in momentum.items()
            if name in own
        }
        normalized = not isinstance(self.optimizer, LINEAR)
        return UnitRule(self._group.couplings, own, self._kernels, normalized, means)

    def _use(self, rule: Rule) -> None:
        assert self._group is not None
        self._rule = rule
        self._fused = FusedStep(self.optimizer, rule, self._group.parameters, self.implementation != "wrapped")

    def _leave_rule(self) -> Rule | None:
        """Back to weight space; returns the rule that was left."""
        rule, self._rule = self._rule, None
        if rule is not None:
            rule.leave_(self._parameters(), self._moments())
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
        if (inner := self._inner()) is not None:
            return inner.state_dict()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self._saved()
        for changed in self._optimizer_state_dict_post_hooks.values():
            state = _given(changed(self, state), state)
        return state

    def _saved(self) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state_dict()
        own = self.rule_state()
        if own is not None:
            state[STATE] = own
        if isinstance(self._rule, PathRule) and self._loaded is None:  # its moments are not those of weights
            numbers = self._numbers()
            state["state"] = {number: dict(entries) for number, entries in state["state"].items()}
            plain = {
                entry: replace(moment, tensors={name: value.clone() for name, value in moment.tensors.items()})
                for entry, moment in self._moments().items()
            }
            self._rule.leave_(self._parameters(), plain)
            for entry, moment in plain.items():
                for name, value in moment.tensors.items():
                    state["state"][numbers[name]][entry] = value
        return state

    def rule_state(self) -> dict[str, Any] | None:
        """What a state dict has beside the state of the base optimizer; ``None`` before the first step."""
        if self._loaded is not None:  # not taken over yet
            return dict(self._loaded)
        counts: dict[str, Any] = {"steps_since_refresh": self._steps_since_refresh, "refresh_due": self._refresh_due}
        if self._active is not None:
            counts["active"] = self._active.clone()
        if self._rule is not None:
            return {"rule": self.rule, **self._rule.state_dict(self._moments()), **counts}
        return None if self._refresh_due else counts  # there was nothing to be done at the last refresh

    def load_rule_state(self, state: Mapping[str, Any] | None) -> None:
        """Take up what :meth:`rule_state` has saved, where the state of the base optimizer came by another way.

        Raises:
            ValueError: if it belongs to a network with other units.
        """
        if state is not None and self._group is not None:
            self._check_fits(state, self._group)
        self._rule, self._active, self._refresh_due, self._loaded = None, None, True, state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class; or of the plain base optimizer, or another rule, and then the rule starts anew.

        Raises:
            ValueError: if it belongs to a network with other units.
        """
        if (inner := self._inner()) is not None:
            return inner.load_state_dict(state_dict)
        self.renew()
        state_dict = dict(state_dict)
        for changed in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = dict(_given(changed(self, state_dict), state_dict))
        loaded = state_dict.pop(STATE, None)
        if loaded is not None and self._group is not None:
            self._check_fits(loaded, self._group)
        self.optimizer.load_state_dict(state_dict)
        self.load_rule_state(loaded)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

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
                rule: Rule = self._unit_rule()
            else:
                skeleton = Skeleton.from_state_dict(loaded["skeleton"])
                start = float(loaded["free_start"])
                parameters = self._own_parameters()
                rule = PathRule(self._group, parameters, self._kernels, skeleton, start, self.max_path_ratio)
            rule.load_state_dict(loaded, self._moments())
            self._use(rule)
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
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "LBFGS computes gradients several times in a step, at weights of its own: use another optimizer, or train "
            "without the equivalent-class space."
        )
    if optimizer.defaults.get("differentiable"):
        raise TypeError(
            "A step in the equivalent-class space is not differentiable: leave out differentiable=True, or train "
            "without the equivalent-class space."
        )
    for options in optimizer.param_groups:
        for p in options["params"]:
            if (type(p.data) is not Tensor and not is_sharded(p)) or not p.dtype.is_floating_point:
                raise TypeError(
                    f"EquivalentClassOptimizer needs real parameters, plain or sharded by fully_shard, got "
                    f"{type(p.data).__name__} of {p.dtype}: quantised and complex ones are not supported."
                )


def check_options(
    *,
    rule: str = "unit",
    refresh_interval: int | None = None,
    representative: str = "balanced",
    skeleton: str = "max",
    max_path_ratio: float | None = None,
    free_start: float = 1.0,
    state_powers: Mapping[str, int] | None = None,
    implementation: str = "auto",
) -> None:
    """Raise ``ValueError`` for an option out of range."""
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {listing(get_args(Implementation))}, got {implementation!r}")
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
    for entry, power in (state_powers or {}).items():
        if isinstance(power, bool) or not isinstance(power, int) or not -2 <= power <= 2:
            raise ValueError(f"state_powers must be whole numbers from -2 to 2, got {power!r} for {entry!r}")


def _given(changed: Any, state: Any) -> Any:
    return state if changed is None else changed
