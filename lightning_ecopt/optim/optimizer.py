"""Any step of a torch optimizer, taken in the equivalent-class space."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from lightning_ecopt.kernels import Implementation
from lightning_ecopt.optim import checkpoint
from lightning_ecopt.optim.appearance import seen_as
from lightning_ecopt.optim.arguments import check_base, check_source, check_wrapped
from lightning_ecopt.optim.between import (
    averaging,
    begin_with_others,
    count_step,
    hold_written,
    note_weights,
    passing,
    watch_base,
)
from lightning_ecopt.optim.binding import Source, find_by_module_calls, trainable_parameters
from lightning_ecopt.optim.calls import HOOKS, StepCall, or_else
from lightning_ecopt.optim.following import followed
from lightning_ecopt.optim.layer_statistics import Layers
from lightning_ecopt.optim.options import (
    Check,
    Option,
    Options,
    RefreshInterval,
    Representative,
    RuleName,
    SkeletonChoice,
)
from lightning_ecopt.optim.session import Session
from lightning_ecopt.optim.stages import Idle, Ready, Running, Waiting
from lightning_ecopt.optim.undo import undone_if_refused
from lightning_ecopt.steps.rule import PathStatistics, UnitStatistics
from lightning_ecopt.symmetry import ScalingGroup


class EquivalentClassOptimizer(Optimizer):
    """Runs an optimizer in the equivalent-class space of a network (EC-SGD, Meng et al., arXiv:1802.03713).

    What the base optimizer does then depends on the network's function alone, not on which of the weights of an
    equivalent class compute it: two networks that differ by a rescaling of hidden units train alike. ``param_groups``,
    ``state`` and ``defaults`` are those of the base optimizer, and schedulers may hold either of the two.

    At the first step, and again at every refresh, the weights move to the balanced member of their class (the outputs
    do not change) and momentum is carried along. How a step is taken is the *rule*:

    - ``"unit"``: relative to the unit that takes it. The base optimizer's step in the incoming weights of a unit is
      scaled to their magnitude, after gradients are centred and clipped unit by unit. With SGD and ASGD, and what runs
      them (Lookahead), the learning rate is the relative length of a step, whatever the momentum, and 0.01 to 0.1 is a
      good start; with all others it keeps its meaning. Beside the base's own state it needs three numbers for each
      row of a weight. See :mod:`lightning_ecopt.steps.unit`.
    - ``"path"``: the paper's. The base optimizer moves the m - H values of basis paths instead of the m weights. At a
      refresh the coordinate of an element equals the element, but for at most one free skeleton weight in a unit, whose
      coordinate is ``free_start``. So learning rate, momentum and every other option keep their meaning; weight decay
      acts on path values (as the basis-path norm, arXiv:1809.07122, does). At skeleton weights momentum starts anew
      at a refresh. See :mod:`lightning_ecopt.steps.coordinates`.
    - ``"paper"``: the paper's exact setting: short for ``rule="path", representative="current", skeleton="diagonal",
      refresh_interval=None, max_path_ratio=None, free_start=1.0``, which the attributes show. Its authors start from
      skeleton weights of one: call :func:`~lightning_ecopt.set_skeleton_to_one_` before, as no optimizer does.

    ``isinstance(optimizer, torch.optim.SGD)`` holds if the base is one. All methods do the same when they are called on
    what Fabric's ``setup`` or Lightning's ``self.optimizers()`` return. Every option is an attribute, too. A changed
    ``refresh_interval`` counts at once, other options from the next refresh on; ``implementation`` is looked at when a
    group is bound. After ``"paper"`` another ``rule`` puts back what that has replaced, but for what was set since.

    Args:
        optimizer: the base: any optimizer, of torch or not, but those that need gradients at several weights in one
            step (:class:`torch.optim.LBFGS`, SAM; write ``SAM(params, base_optimizer=ECSGD)``). It shares its hooks
            with this one. Do not call its ``step`` yourself. Parameters that are complex, or tensors of another kind,
            it steps as ever.
        group: the scaling group of the module that owns the parameters; or a function that finds it for a list of
            parameters, and is called again when other parameters are to be trained; or ``None``, if the calls of
            modules that use the parameters are to be watched until the first step. Instead of a group it may be a
            :class:`~lightning_ecopt.symmetry.DeferredGroup`, which is found by then.
        rule: ``"unit"``, ``"path"`` or ``"paper"``.
        refresh_interval: ``"epoch"``: a refresh in the first step of each epoch, which a Trainer tells; ``"auto"``:
            likewise, but no sooner than 128 steps after the last, and every 500 steps where nobody tells the epoch; or
            a number of steps; or ``None`` if only :meth:`refresh` asks for it.
        representative: ``"balanced"``, or ``"current"`` to stay at the weights as they are. Only the first depends on
            the class alone; the second is the paper's own setting.
        skeleton: how the rule ``"path"`` chooses skeleton weights: ``"max"`` takes the largest, ``"diagonal"`` is the
            paper's choice (unit i to unit i), for networks whose units have one weight tensor on each side.
        max_path_ratio: the guard of the rule ``"path"``: in one step the coordinate of a free skeleton weight, and so
            the scale of a unit, changes by at most this factor and keeps its sign. ``None`` is the paper's rule.
        free_start: value at which the rule ``"path"`` starts the coordinates of free skeleton weights. It sets how fast
            the scale of a unit may move: larger is slower.
        state_powers: for entries of the state of optimizers that are not torch's: if a refresh multiplies weights by c,
            by which power of c does it divide the entry? 1 for means of gradients, 2 for means of their squares, -1 for
            averages of weights, 0 for what has no scale. A warning says if one is missing.
        check: ``"gradient"`` asks the gradient, now and then, whether the loss changes when units are rescaled, and
            holds those fixed for which it does, with a warning: a loss may read what the trace has not seen. ``None``
            trusts the trace; see :func:`~lightning_ecopt.check_invariance`.
        implementation: how the step is run, which changes nothing but its speed: see
            :func:`lightning_ecopt.kernels.choose_kernels`.
        followers: copies that are mixed with the weights, and what they follow: modules or tensors, as
            ``{target: online}``. They are rescaled whenever that is.

    Raises:
        TypeError: if the base optimizer is wrapped already, or cannot be.
        ValueError: if an option is out of range, or the group does not belong to the optimizer's parameters.

    Example::

        group = scaling_group(model, x)
        optimizer = EquivalentClassOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), group)
        loss_function(model(x), y).backward()
        optimizer.step()
    """

    rule = Option()
    refresh_interval = Option()
    representative = Option()
    skeleton = Option()
    max_path_ratio = Option()
    free_start = Option()
    state_powers = Option()
    check = Option()
    implementation = Option()

    def __init__(
        self,
        optimizer: Optimizer,
        group: Source | None = None,
        *,
        rule: RuleName = "unit",
        refresh_interval: RefreshInterval = "auto",
        representative: Representative = "balanced",
        skeleton: SkeletonChoice = "max",
        max_path_ratio: float | None = 2.0,
        free_start: float = 2.0,
        state_powers: Mapping[str, int] | None = None,
        check: Check = "gradient",
        implementation: Implementation = "auto",
        followers: Mapping[Any, Any] | None = None,
    ) -> None:
        options = Options.of(
            type(self),
            rule=rule,
            refresh_interval=refresh_interval,
            representative=representative,
            skeleton=skeleton,
            max_path_ratio=max_path_ratio,
            free_start=free_start,
            state_powers=state_powers,
            check=check,
            implementation=implementation,
        )
        check_wrapped(optimizer, group)
        check_base(optimizer)
        # Wrappers of Fabric and Lightning copy the attributes of this object, so what changes is in the session.
        session = Session(optimizer, options, find_by_module_calls if group is None else group, followers)
        self.__setstate__({"_session": session})  # in place of super().__init__, which would make parameter groups

    # The step ---------------------------------------------------------------------------------------------------------

    @_disable_dynamo  # as torch's own do, of which a compiled function calls the step as it is
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step of the base optimizer in the equivalent-class space.

        1. *Gradients*: the closure, if there is one, computes g = dL/dw.
        2. *Representative*: if a refresh is due, w moves to the balanced member of its class, g and the base's state
           are rescaled to match, and the rule begins there; the path rule chooses skeleton weights, with beta = 1.
        3. *Coordinates*: the rule says where the base steps, v = w / weight_scale, and with which gradients g_v: dL/dv
           in the path rule (the paper's inverse chain rule), centred and clipped g in the unit rule.
        4. *Step*: the base moves v to v'.
        5. *Weights*: w' = to_weights v' (weight allocation).

        Phases 3 to 5 are one pass over gradients and one over weights, gradients and state where the base is SGD, Adam
        or AdamW and has its state; otherwise weights and gradients are moved to coordinates in memory, and the base's
        own ``step`` runs. See :mod:`lightning_ecopt.optim.stepper`.

        Args:
            *args: what the base's own ``step`` takes. The first, or ``closure``, may be a closure, which computes the
                gradients and returns the loss; it runs once, before anything moves.
            **kwargs: likewise. A step with more than a closure is not fused.

        Returns:
            What the base's own ``step`` returns, or else the loss of the closure; ``None`` without one.

        Raises:
            RuntimeError: if the base calls its closure at other weights in the middle of a step; then nothing has
                changed.
            ValueError: if the rule does not work for the group that is found at this step.
        """
        session = self._session
        count_step(session)
        call = StepCall(session.base, args, kwargs, compare=not session.closure_comes_first)
        call.run_closure(session.binding.deferred.watch)
        session.place_gradients()
        with torch.no_grad(), undone_if_refused(session, call):
            result = self._take_step(call)
            note_weights(session)
        session.gradient_check.note_step(session.trained or trainable_parameters(session.base))
        return call.loss if result is None else result

    def _take_step(self, call: StepCall) -> Any:
        """Phases 2 to 5; returns what the base's own ``step`` has returned, if it was called."""
        session = self._session
        if session.is_in_first_call():
            return call.step(in_coordinates=True)  # it refuses what it would refuse at the next step
        if session.only_makes_state():
            return call.step()
        if not session.find_network():
            session.name_missing()
            return call.step()
        session.note_gradients()
        begin_with_others(session)
        hold_written(session)
        session.expect_unused()
        stage = self._refreshed()
        session.steps_since_refresh += 1
        session.watching.note_step()
        if not isinstance(stage, Running):
            return call.step()
        if session.heard.isdisjoint(map(id, session.trained)):
            followed(session, stage)
            return call.step()
        if not session.layers.is_wanted and stage.stepper.take_prepared(call):
            return None
        stage = followed(session, stage)
        w, g = session.weights(stage.network), session.gradients(stage.network)
        with session.layers.measured(stage, w):
            return stage.stepper.take(w, g, lambda: session.entries_if_averaged(stage.network), call)

    def _refreshed(self) -> Idle | Running:
        """The stage in which the next step is taken, after a refresh if one is due."""
        session = self._session
        is_over = session.interval_is_over()
        is_due = (session.refresh_due or is_over) and (not checkpoint.restore(session) or session.refresh_due)
        may_leave = is_due or session.gradient_check.is_looking or session.may_have_copies
        if may_leave and isinstance(session.stage, Running):
            followed(session, session.stage)  # else a step that is not prepared does so
        session.hold_unfrozen_copies()
        session.ask_gradient(is_due)  # which may hold units fixed; then a refresh is due, too
        if is_due or session.refresh_due:
            session.refresh(session.network)
        assert isinstance(session.stage, Idle | Running)  # in all other stages a refresh was due
        return session.stage

    # The refresh and the group ----------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Balance and choose the skeleton again at the next step. Call it between steps, say once an epoch."""
        session = self._session
        session.refresh_due = True
        if isinstance(session.stage, Waiting | Ready) and session.stage.saved:
            session.stage = replace(session.stage, saved={**session.stage.saved, "refresh_due": True})

    @torch.no_grad()
    def start(self) -> None:
        """Balance now instead of at the first step, if the group is known and no state was loaded.

        Call it before the first backward pass if gradients are clipped by their norm: only then do they depend on the
        class alone.
        """
        session = self._session
        session.place_gradients()
        is_known = not session.is_in_first_call() and session.find_network()
        if is_known and session.refresh_due and not getattr(session.stage, "saved", None):
            session.refresh(session.network)
            session.gradient_check.note_step(trainable_parameters(session.base))

    @property
    def group(self) -> ScalingGroup | None:
        """The scaling group; ``None`` until it has been found."""
        return self._session.group

    @property
    def followers(self) -> list[str]:
        """What is rescaled with the weights, in words: ``target follows online``."""
        return self._session.followers()

    @property
    def has_group_of_user(self) -> bool:
        """Whether it was given a scaling group itself, and not where to find one."""
        return isinstance(self._session.binding.source, ScalingGroup)

    def bind(self, group: Source, followers: Mapping[Any, Any] | None = None) -> None:
        """Use a scaling group, in place of the one that was used so far if there is one. Refreshes at the next step.

        Args:
            group: the scaling group; or a function that finds it for a list of parameters, and is called again when
                other parameters are to be trained; or a :class:`~lightning_ecopt.symmetry.DeferredGroup`.
            followers: in place of those that the optimizer was made with.

        Raises:
            ValueError: if the group does not belong to the optimizer's parameters, or followers do not fit.
        """
        check_source(group, "optimizer.bind(...)")
        self._session.bind(group, followers)

    def follow_epochs(self, epoch: Callable[[], int | None]) -> None:
        """Tell what epoch it is, as ``refresh_interval`` ``"auto"`` and ``"epoch"`` need to know.

        Args:
            epoch: returns the number of the current epoch, or ``None`` if there is none.
        """
        self._session.epoch = epoch

    def follow_precision(self, precision: Callable[[], str | None]) -> None:
        """Tell in what precision a trainer computes, as ``check="gradient"`` needs to know what rounding explains.

        Args:
            precision: returns it in Lightning's words, such as ``"bf16-mixed"``, or ``None`` if it is not known.
        """
        self._session.gradient_check.precision = precision

    @property
    def violation(self) -> float:
        """The largest |Q| / A of a unit that ``check="gradient"`` has held fixed so far; zero if there is none."""
        return self._session.gradient_check.violation

    def rest(self) -> None:
        """Leave the base optimizer's state at the weights, so that it can be used by itself. The next step goes on."""
        checkpoint.rest(self._session)

    def renew(self) -> None:
        """Find the freedoms again if there are parameters that nobody has asked about. Call it between steps.

        Each step looks up by itself which parameters require a gradient, and :meth:`add_param_group` calls this. Call
        it if a call that is to be traced comes first. A group that was given cannot grow: parameters that it does not
        know are stepped in weight space.
        """
        self._session.renew()

    def stop_watching(self) -> None:
        """Wait for the group no longer; a method of the module that was replaced to trace its next call is put back."""
        self._session.binding.deferred.cancel()

    def usable_units(self) -> Tensor:
        """Units whose freedom is used, ``bool[H]``.

        They were alive at the last refresh, are exclusive to this optimizer, and have paths if the rule is ``"path"``.

        Raises:
            RuntimeError: if the group has not been found yet.
        """
        return self._session.usable_units()

    def statistics(self) -> PathStatistics | UnitStatistics | None:
        """Whether all is well; ``None`` before the first step. Waits for the device."""
        return self._session.statistics()

    @property
    def layers(self) -> Layers:
        """Measures single steps layer by layer: relative length, clipped gradients, imbalance."""
        return self._session.layers

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the base optimizer, which can load it by itself, and what the rule needs to go on."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = checkpoint.saved(self._session)
        for changed in self._optimizer_state_dict_post_hooks.values():
            state = or_else(changed(self, state), state)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class; or of the plain base optimizer, or another rule, and then the rule starts anew.

        Raises:
            ValueError: if it belongs to a network with other units.
        """
        session = self._session
        if session.group is None:
            session.renew()  # for parameters that have been added and are frozen yet
        session.find_network()
        state_dict = dict(state_dict)
        for changed in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = dict(or_else(changed(self, state_dict), state_dict))
        checkpoint.load(session, state_dict)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def rule_state(self) -> dict[str, Any] | None:
        """What a state dict has beside the state of the base optimizer; ``None`` before the first step."""
        return checkpoint.saved_rule(self._session)

    def load_rule_state(self, state: Mapping[str, Any] | None) -> None:
        """Take up what :meth:`rule_state` has saved, where the state of the base optimizer came by another way.

        Raises:
            ValueError: if it belongs to a network with other units.
        """
        checkpoint.load_rule(self._session, state)

    # What is shared with the base optimizer ---------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The base optimizer."""
        return self._session.base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the base optimizer."""
        return self._session.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._session.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the base optimizer, in its coordinates; :meth:`state_dict` has it at the weights."""
        return self._session.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self._session.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options of the base optimizer."""
        return getattr(self._session.base, "defaults", {})  # which some wrappers lack

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._session.base.defaults = defaults

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Set gradients to ``None``, or to zero with ``set_to_none=False``, as the base optimizer does."""
        self._session.base.zero_grad(*args, **kwargs)
        self._session.gradient_check.has_zeroed = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer, and look for the freedoms that the new parameters bring."""
        self._session.base.add_param_group(param_group)
        self._session.renew()

    def __getattr__(self, name: str) -> Any:
        """What an optimizer has beyond those of torch, such as ``train`` and ``eval`` of a schedule-free one."""
        if name.startswith("_"):  # also the session, of a copy that is being made
            raise AttributeError(name)
        found = getattr(self._session.base, name)
        return averaging(self._session, found) if name in ("train", "eval") else passing(self._session, name, found)

    def __reduce__(self) -> tuple[Any, ...]:  # as in torch, neither hooks nor what a scheduler has put at `step`
        return object.__new__, (type(self),), {"_session": self._session}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        base = vars(self._session.base)
        vars(self).update({hooks: base.get(hooks, OrderedDict()) for hooks in HOOKS})
        super().__setstate__({})  # makes the step of the class call hooks, of the real class
        self._is_seen_as_base = True
        watch_base(self._session)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for isinstance; `type(optimizer)` is the real one
        is_ready = vars(self).get("_is_seen_as_base", False)
        return seen_as(type(self), type(self._session.base)) if is_ready else type(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._session.base!r}, {self._session.group!r})"
