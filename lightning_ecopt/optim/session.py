"""All that changes while one optimizer trains, in one object, which wrappers of the optimizer share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ecopt.common.flat import is_known, is_piece
from lightning_ecopt.common.sharding import Ranks, local, may_be_sharded, whole_shape, with_gradient
from lightning_ecopt.common.signals import uninterrupted
from lightning_ecopt.common.tensors import in_shared_memory, listing
from lightning_ecopt.common.warn import warn
from lightning_ecopt.kernels import Kernels, choose_kernels
from lightning_ecopt.optim.bases import momentum_to_mean, step_kinds
from lightning_ecopt.optim.binding import (
    NO_FREEDOMS,
    Binding,
    Network,
    Source,
    check_not_replaced,
    parameters_of,
    trainable_parameters,
)
from lightning_ecopt.optim.calls import states_in
from lightning_ecopt.optim.gradient_check import GradientCheck
from lightning_ecopt.optim.layer_statistics import Layers
from lightning_ecopt.optim.options import Options, interval_is_over
from lightning_ecopt.optim.placement import place_gradients_, place_state_
from lightning_ecopt.optim.rates import mistaken_rate
from lightning_ecopt.optim.stages import Idle, Ready, Resting, Running, Stage, Waiting
from lightning_ecopt.optim.stepper import Stepper
from lightning_ecopt.optim.watching import Watching
from lightning_ecopt.optim.writers import Writers
from lightning_ecopt.steps import RULES
from lightning_ecopt.steps.rule import PathStatistics, Rule, Setting, StepKind, UnitStatistics
from lightning_ecopt.steps.state import StateEntries, StateEntry, entries_of, has_weight_averages
from lightning_ecopt.symmetry import ScalingGroup
from lightning_ecopt.symmetry.followers import Given
from lightning_ecopt.symmetry.scales import Operation
from lightning_ecopt.symmetry.unfrozen import unfrozen_copies

UNUSED = (
    "No traced call has used these parameters, or they cannot be rescaled (complex ones, those of other modules): {}. "
    "They are trained as ever, and held fixed when others are rescaled; the freedoms are looked for again when they "
    "first get a gradient."
)
UNTRACED = (
    "This step comes before the network was traced, so that the base optimizer is used as it is until then: {}. Give "
    "the LightningModule an example_input_array, pass a closure that calls it to step(), or make the optimizer with "
    "EquivalentClassOptimizer(optimizer, scaling_group(module, inputs))."
)
SEVERAL_DEVICES = (
    "The parameters are on several devices, and paths lead through all of them, so that the base optimizer is used as "
    "it is: put the module on one device (data parallelism is supported)."
)


def _no_epoch() -> None:
    return None


class Session:
    """The base optimizer, the options, the group and the stage of one equivalent-class optimizer.

    Args:
        base: the optimizer that is run in the equivalent-class space.
        options: what the user has chosen.
        source: where the group comes from.
        followers: copies of the weights that are told by hand.

    Attributes:
        steps_since_refresh: number of steps since the last refresh.
        refresh_due: whether the next step refreshes.
        surprises: number of steps in which a parameter had a gradient that no traced call has used.
        has_stepped_plainly: whether the base has stepped by itself while the first call was traced.
        trained: the parameters that required a gradient at the last look.
        epoch: returns the number of the current epoch, if somebody knows it.
        last_epoch: of the last step.
        closure_comes_first: whether the base is known to call its closure before it moves anything.
        writers: watches whether somebody else writes to the weights.
        steps: number of calls of ``step``.
        is_resting: whether the base may be used by itself until the next of them.
        passed: names of methods of the base that have moved weights since the last of them.
        has_told: whether a warning has said that steps pass by.
        may_have_copies: whether nobody has looked yet for copies of the weights that are trained, too.
        heard: the ``id`` of the parameters that have a gradient in this step, on any rank.
        gradient_check: looks for units that may not be rescaled.
        watching: knows which steps behind refreshes are looked at.
        layers: measures single steps layer by layer.
    """

    def __init__(self, base: Optimizer, options: Options, source: Source, followers: Given | None = None) -> None:
        self.base = base
        self.options = options
        self.stage: Stage = Waiting()
        self.steps_since_refresh = 0
        self.refresh_due = True
        self._named: set[Any] = set()  # what warnings have said: messages, state entries, identities of parameters
        self.surprises, self.has_stepped_plainly, self._rate_is_judged = 0, False, False
        self.trained: list[Tensor] = []
        self.epoch: Callable[[], int | None] = _no_epoch
        self.last_epoch: int | None = None
        self._version = 0  # of the deferred group at the last look
        self.closure_comes_first = type(base).__module__.startswith("torch.optim.")
        self.heard: set[int] = set()
        self.writers = Writers()
        self.steps, self.is_resting, self.passed, self.has_told = 0, False, set[str](), False
        self.watching = Watching()
        self.layers = Layers()
        self._given, self.may_have_copies = followers or {}, True
        self.gradient_check = GradientCheck(trainable_parameters(base))
        self.binding = Binding(base, source, self._given)
        self.find_network()

    # The group

    @property
    def network(self) -> Network:
        """The group and the optimizer's part in it.

        Raises:
            RuntimeError: if the group has not been found.
        """
        if isinstance(self.stage, Waiting):
            raise RuntimeError("The scaling group is not known before the first step.")
        return self.stage.network

    @property
    def group(self) -> ScalingGroup | None:
        """The scaling group; ``None`` until it has been found."""
        return None if isinstance(self.stage, Waiting) else self.stage.network.group

    def bind(self, source: Source, followers: Given | None = None) -> None:
        """Take the group from another source. The present group, if there is one, is used until another is found.

        Raises:
            ValueError: if the group does not fit the optimizer, or followers do not; then nothing has changed.
        """
        given = self._given if followers is None else followers
        binding = Binding(self.base, source, given)
        try:
            found = binding.deferred.settle()
            if found is not None:  # perhaps the present one, of which the caller knows that it is to be used anew
                self.use(found)
        except BaseException:
            binding.cancel_unless_shared(self.binding)
            raise
        self.binding.cancel_unless_shared(binding)
        self.binding, self._version, self._given = binding, binding.deferred.version, given

    def renew(self) -> None:
        """Have the source look again if the optimizer has parameters that it was not asked about."""
        if self.binding.is_outgrown():
            self.bind(self.binding.source)

    def find_network(self) -> bool:
        """Look up what is trained now, and take over the group of that; returns whether one is known."""
        trained, deferred = trainable_parameters(self.base), self.binding.deferred
        is_known = not isinstance(self.stage, Waiting)
        has_changed = len(trained) != len(self.trained) or not all(map(is_, trained, self.trained))
        if is_known and not has_changed and deferred.version == self._version:
            return True
        if has_changed:
            check_not_replaced(self.trained, trained)
            self.renew()
            deferred = self.binding.deferred
        found = deferred.settle()
        self._version = deferred.version
        if found is not None and found is not self.group:
            self.use(found)
        elif has_changed and not isinstance(self.stage, Waiting):
            # The same group; but what is frozen now must not move, at no refresh, and what has thawed may.
            network = Network.of(self.base, self.stage.network.group, self.options)
            if network.names != self.stage.network.names:  # the rule has other rows then
                with torch.no_grad():
                    self.leave_rule()
            self.stage, self.refresh_due = replace(self.stage, network=network), True
            self._name_unused(network)
        self.trained = trained
        return not isinstance(self.stage, Waiting)

    def is_in_first_call(self) -> bool:
        """Whether the first traced call still runs, as under manual optimization: then the base steps by itself.

        So it does if the group is known from example inputs, as the call may tell more.
        """
        is_first = self.binding.deferred.note_step(p for p in parameters_of(self.base) if p.requires_grad)
        if is_first and isinstance(self.stage, Running):  # its weights were balanced before
            self.leave_rule()
            self.refresh_due = True
        self.has_stepped_plainly |= is_first
        return is_first

    def use(self, group: ScalingGroup) -> None:
        """Use a group from now on, and refresh at the next step. A state that was loaded stays if it fits the group.

        Raises:
            ValueError: if the rule does not work for the group.
        """
        network = Network.of(self.base, group, self.options)
        saved = self.stage.saved if isinstance(self.stage, Waiting | Ready) else {}
        with torch.no_grad():
            self.leave_rule()
        self.stage, self.refresh_due, self.trained = Ready(network, saved), True, trainable_parameters(self.base)
        if group.num_units == 0:
            self._warn_once(NO_FREEDOMS)
        self._name_unused(network)

    def forget_version(self) -> None:
        """Have the next step look whether the source has another group than the one that is used."""
        self._version = -1

    def hold(self, units: Tensor, why: Operation) -> None:
        """Hold units of the present group fixed from now on, and go on in the group of the others.

        Args:
            units: ``bool[H]``; the same on all ranks that train together.
            why: for the report.
        """
        self.binding.deferred.hold(units, why)
        self.find_network()

    def hold_unfrozen_copies(self) -> None:
        """Before the first balance, hold fixed what looks like a target network and is trained, and what it follows."""
        if self.may_have_copies and self.options.representative == "balanced":
            self.may_have_copies = False
            copies = unfrozen_copies(self.binding.deferred.followers.module, self.network.group)
            if copies is not None:
                self._warn_once(str(copies))
                self.hold(copies.units, Operation("an unfrozen copy", ", ".join(copies.names)))

    def ask_gradient(self, is_refresh: bool) -> None:
        """Hold units fixed that the gradient shows to change the loss; a refresh is due then."""
        if is_refresh:
            self.watching.note_refresh()
        if self.options.check == "gradient" and self.binding.deferred.has_exact_gradients:
            verdict = self.gradient_check.look(
                self.network.group,
                self.binding.deferred,
                self.trained,
                is_refresh,
                self.watching.is_on,
                lambda: self.kernels,
            )
            if verdict is not None:
                self._warn_once(verdict.message)
                self.hold(verdict.units, verdict.why)

    def note_gradients(self) -> None:
        """Look which parameters have a gradient."""
        self.heard = with_gradient(parameters_of(self.base))

    def expect_unused(self) -> None:
        """Have one more call traced if a parameter has a gradient that no traced call has used.

        A call costs several times its time while it is traced, and may miss the parameter again, as a layer that is
        skipped at random. So it is tried in the 1st, 2nd, 4th, 8th ... step that has such a gradient.
        """
        if any(id(p) in self.heard for p in self.network.sought):
            self.surprises += 1
            if self.surprises & (self.surprises - 1) == 0:
                self.binding.deferred.look_again()

    def name_missing(self) -> None:
        """Warn, once, that a step comes before any call was traced."""
        missing = self.binding.deferred.missing
        if missing and any(p.grad is not None for p in parameters_of(self.base)):
            self._warn_once(UNTRACED.format(missing))

    def _name_unused(self, network: Network) -> None:
        """Warn, once, of parameters that the optimizer trains and no traced call has used."""
        names = {id(p): name for name, p in network.group.parameters.items()}
        new = [p for p in network.unused if id(p) not in self._named]
        if new:
            self._named |= {id(p) for p in new}
            known = [names.get(id(p), f"one of shape {list(whole_shape(p))}") for p in new]
            self._warn_once(UNUSED.format(listing(known)))

    def _warn_once(self, message: str) -> None:
        if message not in self._named:
            self._named.add(message)
            warn(message)

    # Weights, gradients and state, by parameter name

    def weights(self, network: Network) -> dict[str, Tensor]:
        """What this rank holds of the weights of the group."""
        return {name: local(p.detach()) for name, p in network.group.parameters.items()}

    def place_gradients(self) -> None:
        """Place the gradients that a step looks at as their parameters are: the optimizer's, and all of the group."""
        if may_be_sharded():
            place_gradients_(parameters_of(self.base))
            place_gradients_(() if self.group is None else self.group.parameters.values())

    def gradients(self, network: Network) -> dict[str, Tensor]:
        """What this rank holds of the dense gradients of the optimizer's own weights.

        Where it holds nothing of a weight under FSDP1, and others have a gradient, that is an empty tensor.
        """
        found: dict[str, Tensor] = {}
        for name, p in network.parameters.items():
            if id(p) in self.heard and (p.grad is None or not p.grad.is_sparse):
                found[name] = torch.zeros_like(p) if p.grad is None else local(p.grad)
        return found

    def entries(self, network: Network) -> dict[str, StateEntry]:
        """The entries of the base's state that have one number for each weight."""
        place_state_(self.base)
        entries: dict[str, StateEntry] = {}
        unknown: set[str] = set()
        for number, state in enumerate(states_in(self.base)):
            found, nameless = entries_of(state, network.group.parameters, self.options.degrees)
            # Two optimizers, one within the other, may use one name.
            entries |= {name if name not in entries else f"{name} {number}": entry for name, entry in found.items()}
            unknown |= nameless
        if unknown - self._named:
            self._named |= unknown
            self._warn_once(
                f"What a rescaling of the weights does to {listing(sorted(unknown))} in the state of "
                f"{type(self.base).__name__} is not known: they stay as they are at a refresh. Tell it with "
                f"state_powers={{{sorted(unknown)[0]!r}: ...}}; 0 is what happens now."
            )
        return entries

    # Stages

    def interval_is_over(self) -> bool:
        """Whether the interval between refreshes, which may change at any time, is over."""
        before, self.last_epoch = self.last_epoch, self.epoch()
        return interval_is_over(self.options.refresh_interval, self.steps_since_refresh, before, self.last_epoch)

    def refresh(self, network: Network) -> None:
        """Move to the representative of the class and begin with the rule there.

        1. Leave the coordinates: the base's state gets entries of weights.
        2. Balance; gradients and state are rescaled as if they had been those of the balanced weights.
        3. Begin with the rule: the path rule chooses its skeleton weights, the unit rule goes on.
        """
        self.refresh_due = True  # until all of it has succeeded
        before = self.leave_rule()
        if not self._can_use(network):
            self.stage = Idle(network, torch.zeros(network.group.num_units, dtype=torch.bool, device="cpu"))
            self.steps_since_refresh, self.refresh_due = 0, False
            return
        alive = network.group.alive().cpu()
        active, entries = alive & network.exclusive, self.entries(network)
        with uninterrupted():  # weights and state belong together
            is_wanted = self.options.representative == "balanced" and bool(active.any())
            if is_wanted and self.binding.deferred.follow(network.group):
                self._balance(network.group, active, entries)
            setting = self.setting(network, alive)
            rule = RULES[self.options.rule].begin(setting, entries, None if before is None else before.rule)
            self._judge_rate(has_begun=before is not None)
            if rule is None:
                self.stage = Idle(network, active)
            elif before is not None and before.rule is rule:  # its stepper has prepared the next step
                self.stage = replace(before, network=network, active=active)
            else:
                self.stage = self.running(network, active, rule)
        self.steps_since_refresh, self.refresh_due = 0, False

    def _judge_rate(self, has_begun: bool) -> None:
        """Warn, once, of a rate that is far outside of the useful range; when training begins it may still be small."""
        if self._rate_is_judged:
            return
        side, message = mistaken_rate(self.base, self.options.rule) or (None, "")
        if side == "large" or (side == "small" and has_begun):
            self._warn_once(message)
        self._rate_is_judged = side != "small" or has_begun

    def _can_use(self, network: Network) -> bool:
        """Whether there is anything for the rule to do."""
        if len({w.device for w in self.weights(network).values()}) > 1:
            self._warn_once(SEVERAL_DEVICES)
            return False
        return network.group.num_units > 0 and bool(network.names)

    def _balance(self, group: ScalingGroup, active: Tensor, entries: StateEntries) -> None:
        kernels = self.kernels
        log_scale = group.balance_(active, kernels)
        self.binding.deferred.followers.rescale_(group, log_scale)
        gradients = {
            name: p.grad for name, p in group.parameters.items() if p.grad is not None and not p.grad.is_sparse
        }
        for name in in_shared_memory({name: local(gradient) for name, gradient in gradients.items()}):
            gradient = gradients[name]  # which would be rescaled several times
            group.parameters[name].grad = gradients[name] = gradient.clone(memory_format=torch.contiguous_format)
        group.rescale_(gradients, log_scale, power=-1, kernels=kernels)
        for entry in entries.values():
            group.rescale_(entry.tensors, log_scale, power=-entry.degree, kernels=kernels)

    def leave_rule(self) -> Running | None:
        """Leave the coordinates of the rule: the base's state gets entries of weights. Returns the stage left."""
        stage = self.stage
        if not isinstance(stage, Running):
            return None
        if not stage.rule.has_weight_entries():
            stage.rule.to_weight_entries_(self.entries(stage.network), self.weights(stage.network))
        self.stage = Ready(stage.network)
        return stage

    def setting(self, network: Network, alive: Tensor) -> Setting:
        """What the rule is made of, with the units that are ``alive``, ``bool[H]``."""
        return Setting(
            group=network.group,
            weights=self.weights(network),
            parameters=network.parameters,
            kernels=choose_kernels(self.options.implementation, list(network.group.parameters.values())),
            alive=alive,
            exclusive=network.exclusive,
            is_balanced=self.options.representative == "balanced",
            kinds=self._kinds(network),
            means=lambda: self._mean_gradients(network),
            skeleton=self.options.skeleton,
            free_start=self.options.free_start,
            max_path_ratio=self.options.max_path_ratio,
        )

    @property
    def kernels(self) -> Kernels:
        """Those of the rule or, if none is running, as within a refresh, new ones of the kind that is chosen."""
        if isinstance(self.stage, Running):
            return self.stage.rule.kernels
        return choose_kernels(self.options.implementation, list(self.network.group.parameters.values()))

    def _kinds(self, network: Network) -> dict[str, StepKind]:
        """The kind of the base's steps in its own parameters, by name."""
        kinds = step_kinds(self.base)
        return {name: kinds[id(p)] for name, p in network.parameters.items()}

    def _mean_gradients(self, network: Network) -> dict[str, Tensor]:
        """The means of gradients in the momentum of SGD, by parameter name, where its steps are linear."""
        momentum = self.entries(network).get("momentum_buffer", StateEntry(1, {})).tensors
        factor = {id(p): momentum_to_mean(options) for options in self.base.param_groups for p in options["params"]}
        return {
            name: factor[id(network.parameters[name])] * local(momentum[name])
            for name, kind in self._kinds(network).items()
            if kind == "linear" and name in momentum
        }

    def running(self, network: Network, active: Tensor, rule: Rule) -> Running:
        """The stage in which the base steps in the coordinates of a rule."""
        may_fuse = self.options.implementation != "wrapped"
        return Running(network, active, rule, Stepper(self.base, rule, network.group.parameters, may_fuse))

    def entries_if_averaged(self, network: Network) -> StateEntries:
        """The base's state if some of it averages weights, as in few optimizers; else nothing, which costs nothing."""
        return (
            self.entries(network)
            if any(has_weight_averages(of, self.options.degrees) for of in states_in(self.base))
            else {}
        )

    # What is told

    def usable_units(self) -> Tensor:
        """Units whose freedom is used, ``bool[H]``."""
        stage, network = self.stage, self.network
        active = stage.active if isinstance(stage, Idle | Running) else network.active_units()
        return active & RULES[self.options.rule].usable_units(network.group)

    def followers(self) -> list[str]:
        """What is rescaled with the weights, in words."""
        return [] if self.group is None else self.binding.deferred.followers.lines(self.group.parameters)

    def statistics(self) -> PathStatistics | UnitStatistics | None:
        """Whether all is well; ``None`` before the first step."""
        stage = self.stage
        if isinstance(stage, Resting) and stage.running is not None:
            stage = stage.running
        if not isinstance(stage, Idle | Running):
            return None
        dormant = int(stage.network.exclusive.sum()) - int(stage.active.sum())
        if isinstance(stage, Running):
            return stage.rule.statistics(dormant)
        return RULES[self.options.rule].idle_statistics(dormant)

    def only_makes_state(self) -> bool:
        """Whether ``torch.distributed.checkpoint`` makes the base's state, by a step with lr and gradients of zero."""
        groups = self.base.param_groups
        if any(options.get("lr") != 0 for options in groups) or any(states_in(self.base)):
            return False
        own = {str(k): p for k, p in enumerate(parameters_of(self.base)) if not is_piece(p) or is_known(p)}
        moves = [local(p.grad).any() for p in own.values() if p.grad is not None]
        moves_any = torch.stack(moves).any() if moves else torch.zeros((), dtype=torch.bool, device="cpu")
        return not bool(Ranks(own).any_(moves_any))  # the same on all ranks
