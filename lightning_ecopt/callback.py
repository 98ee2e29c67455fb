"""The line that turns a pipeline's optimizer into its equivalent-class form."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ecopt._lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_only,
)
from lightning_ecopt.common.tensors import listing
from lightning_ecopt.common.warn import warn
from lightning_ecopt.configure import RuleStates, check_strategy, find_group, follow_trainer, followers_of
from lightning_ecopt.kernels.choose import Implementation
from lightning_ecopt.optim import EquivalentClassOptimizer
from lightning_ecopt.optim.arguments import check_base
from lightning_ecopt.optim.between import StepWatch, step_watches
from lightning_ecopt.optim.binding import parameters_of
from lightning_ecopt.optim.options import Check, Options, RefreshInterval, Representative, RuleName, SkeletonChoice
from lightning_ecopt.optim.rates import meaning
from lightning_ecopt.steps import RULES
from lightning_ecopt.symmetry import DeferredGroup, ScalingGroup
from lightning_ecopt.symmetry.followers import Given, check_given
from lightning_ecopt.symmetry.report import in_brief, print_report


class EquivalentClassOptimization(RuleStates):
    """Train in the equivalent-class space: the optimizer of ``configure_optimizers`` becomes its equivalent-class form.

    Nothing else changes: optimizers keep all their options, parameter groups and schedulers, in whatever form
    ``configure_optimizers`` returns them, and checkpoints can be exchanged with runs without the callback. When the fit
    ends, the optimizers of ``configure_optimizers`` can be used by themselves again. See
    :class:`~lightning_ecopt.EquivalentClassOptimizer` for what a step does. An optimizer that is one already (an
    :class:`~lightning_ecopt.ECSGD`, say) keeps its own options, and is only told the freedoms, unless it was given a
    :class:`~lightning_ecopt.ScalingGroup`.

    The first training step is watched as it happens, which costs no extra call; the loss, and whatever else a backward
    pass in it starts from, is what must not change. If the ``LightningModule`` has an ``example_input_array``, its
    forward call is traced before training, too, so that the freedoms are known by then; the training step may tell that
    there are fewer. Under manual optimization it is watched through all backward passes and steps of optimizers: these
    are the base optimizer's own that once, and equivalent-class steps from the second training step on; or, if some
    step less often, as in every fifth batch, from when all have stepped, and after eight training steps. Parameters
    that no watched step has used are held fixed, named in a warning, and looked for again in a training step when they
    first get a gradient. Each step looks up which parameters require a gradient; when further ones are added, another
    training step is watched.

    Args:
        rule: how a step is taken: ``"unit"``, relative to the unit that takes it; ``"path"``, in the path coordinates
            of the paper (EC-SGD); or ``"paper"``, in these with all options as in the paper, see
            :class:`~lightning_ecopt.EquivalentClassOptimizer`.
        refresh_interval: when weights are balanced (and skeleton weights chosen) again: every ``"epoch"``; with
            ``"auto"`` every epoch, or every few that have 128 steps together; after a number of steps; or never
            (``None``).
        representative: ``"balanced"``, or ``"current"`` to stay at the weights as they are (then what happens does not
            depend on the class alone).
        skeleton: how the rule ``"path"`` chooses skeleton weights: ``"max"`` takes the largest weights, ``"diagonal"``
            is the paper's choice, for plain networks.
        max_path_ratio: the guard of the rule ``"path"``: in one step the coordinate of a free skeleton weight, and so
            the scale of a unit, changes by at most this factor and keeps its sign. ``None`` is the paper's rule.
        free_start: value at which the rule ``"path"`` starts the coordinates of free skeleton weights; scales move more
            slowly with a larger one.
        state_powers: how the state of an optimizer that is not torch's scales; see
            :class:`~lightning_ecopt.EquivalentClassOptimizer`.
        check: ``"gradient"`` asks the gradient, now and then, whether the loss changes when units are rescaled, and
            holds those fixed for which it does, with a warning: a loss may read what the trace has not seen. ``None``
            trusts the trace; see :func:`~lightning_ecopt.check_invariance`.
        implementation: how the step is run, which changes its speed alone: ``"auto"``, or one of the ways that
            :func:`~lightning_ecopt.kernels.choose_kernels` lists.
        followers: copies of the weights that are mixed with them, by name, and what they follow, as in
            ``{"target": "online"}``: they are rescaled whenever that is. Those that are near it at the start are found.
        verbose: what is printed when the freedoms are known: ``True``, one line, and one for each kind of operation
            that costs freedoms and could be changed, up to three; ``"table"``, all units and operations; ``False``,
            nothing.
        log: log whether all is well with the logger, as ``ecopt/...``, every ``log_every_n_steps``: the number of
            dormant units, the largest violation of invariance that was found in units that are held fixed since, and
            the share of clipped gradients (unit) or the extremes of beta and the number of guarded paths (path).
            ``"layers"`` also logs, for each layer, the relative length of the step, the share of clipped gradients and
            the largest imbalance of its units; in steps that are logged this needs a copy of the weights.
        refresh: an old name of ``refresh_interval``, which goes in version 0.2.

    Attributes:
        group: the :class:`~lightning_ecopt.ScalingGroup`, once it is known.

    Raises:
        ValueError: if an option is out of range, or is none of the words that it may be.
        MisconfigurationException: at the start of ``fit``, if the strategy shards parameters in a way that is not
            supported. An optimizer that cannot be run in the equivalent-class space, such as LBFGS, is left as it is,
            with a warning.

    Example::

        trainer = Trainer(callbacks=[EquivalentClassOptimization()])
        trainer.fit(model, data)
    """

    def __init__(
        self,
        rule: RuleName = "unit",
        refresh_interval: RefreshInterval = "auto",
        representative: Representative = "balanced",
        skeleton: SkeletonChoice = "max",
        max_path_ratio: float | None = 2.0,
        free_start: float = 2.0,
        state_powers: Mapping[str, int] | None = None,
        check: Check = "gradient",
        implementation: Implementation = "auto",
        followers: Mapping[str, str] | None = None,
        verbose: bool | Literal["table"] = True,
        log: bool | Literal["layers"] = True,
        refresh: Literal["epoch", ""] | int | None = "",
    ) -> None:
        if refresh != "":
            message = "refresh is called refresh_interval now; the old name goes in version 0.2"
            warnings.warn(message, FutureWarning, stacklevel=2)
            refresh_interval = refresh
        super().__init__()
        self._options = Options.of(
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
        check_given(followers)
        if verbose not in (True, False, "table"):
            raise ValueError(f"{type(self).__name__}: verbose must be True, False or 'table', not {verbose!r}")
        self._given = followers
        self._verbose = verbose
        if log not in (True, False, "layers"):
            raise ValueError(f"log must be True, False or 'layers', got {log!r}")
        self._logs = log  # Lightning puts its own function at `log`
        self._place: int | None = None  # among the Trainer's callbacks, until it was moved to the front
        self._finder: _Finder | None = None
        self._optimizers: list[EquivalentClassOptimizer] = []
        self._reported: list[ScalingGroup] = []
        self._watches: list[StepWatch] | None = None  # until the first batch of a fit

    @property
    def group(self) -> ScalingGroup | None:
        """The scaling group of the module being trained; ``None`` until it is known."""
        return None if self._finder is None else self._finder.found.group

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that take parameters apart."""
        if stage != "fit":
            return
        self._saved, self._finder, self._optimizers, self._reported = {}, None, [], []
        self._watches = None
        check_strategy("EquivalentClassOptimization", trainer, "remove the callback")
        # Ahead of Lightning's tuners, which train on the start of a fit: they are to do it with our optimizers.
        if self._place is None and self in trainer.callbacks:  # type: ignore[attr-defined]
            self._place = trainer.callbacks.index(self)  # type: ignore[attr-defined]
            self._move(trainer, 0)

    def _move(self, trainer: Trainer, place: int) -> None:
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others[:place], self, *others[place:]]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the freedoms and wrap the optimizers."""
        bases = [base for base in trainer.strategy.optimizers if self._can_run(base)]
        if not bases:
            return
        try:
            self._finder = _Finder(pl_module, bases, self._given)
            self._optimizers = [self._equivalent(base, self._finder) for base in bases]
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error
        finally:
            for base in bases:
                if isinstance(base, EquivalentClassOptimizer) and base not in self._optimizers:
                    base.stop_watching()
        for optimizer in self._optimizers:
            follow_trainer(optimizer, pl_module)
        if self._optimizers:
            ours = {id(base): optimizer for base, optimizer in zip(bases, self._optimizers, strict=True)}
            trainer.strategy.optimizers = [ours.get(id(base), base) for base in trainer.strategy.optimizers]
        self._report()

    @staticmethod
    def _can_run(base: Optimizer) -> bool:
        """Whether an optimizer can be run in the equivalent-class space; warns if it cannot."""
        try:
            check_base(base.optimizer if isinstance(base, EquivalentClassOptimizer) else base)
        except TypeError as error:
            warn(f"EquivalentClassOptimization leaves {type(base).__name__} as it is. {error}")
            return False
        return True

    def _equivalent(self, base: Optimizer, finder: _Finder) -> EquivalentClassOptimizer:
        if not isinstance(base, EquivalentClassOptimizer):
            made = EquivalentClassOptimizer(base, finder, **self._options.arguments())
            made._session.options = self._options  # which know what rule="paper" has replaced here
            return made
        if not base.has_group_of_user:
            base.bind(finder)
        defaults = Options()
        chosen = {name: value for name, value in self._options.arguments().items() if value != getattr(defaults, name)}
        unused = [name for name, value in chosen.items() if value != getattr(base, name)]
        if unused:
            warn(
                f"EquivalentClassOptimization: {listing(unused)} not used, because configure_optimizers returns an "
                f"{type(base).__name__}, which has options of its own: give them there."
            )
        return base

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look for parameters that have been added, before the training step that uses them is called."""
        for optimizer in self._optimizers:
            optimizer.renew()
        if self._watches is None:
            self._watches = step_watches(self._optimizers, trainer.optimizers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report once the freedoms are known, and log."""
        for watch in self._watches or ():
            watch.look()
        self._report()
        if not self._logs or not trainer._logger_connector.should_update_logs:
            return
        for number, optimizer in enumerate(self._optimizers):
            prefix = "ecopt" if len(self._optimizers) == 1 else f"ecopt/{number}"
            statistics = optimizer.statistics()
            if statistics is not None:
                values = {f"{prefix}/{name}": float(value) for name, value in vars(statistics).items()}
                values[f"{prefix}/violation"] = optimizer.violation
                values |= self._of_layers(optimizer, prefix) if self._logs == "layers" else {}
                # The batch may be an iterator, whose size Lightning could not tell; for a step it does not matter.
                pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    @staticmethod
    def _of_layers(optimizer: EquivalentClassOptimizer, prefix: str) -> dict[str, float]:
        """What the last step has done to each layer, if it was measured."""
        return {
            f"{prefix}/{name}/{layer}": value
            for layer, statistics in optimizer.layers.statistics().items()
            for name, value in vars(statistics).items()
            if value is not None
        }

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if weights move although no step is taken in the equivalent-class space."""
        for watch in self._watches or ():
            watch.tell()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module, the optimizers and the order of the callbacks as they were."""
        if self._finder is not None:
            self._finder.found.cancel()
        for optimizer in self._optimizers:
            optimizer.rest()
        if self._place is not None and self in trainer.callbacks:  # type: ignore[attr-defined]
            self._move(trainer, self._place)
            self._place = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave everything as it was: Lightning calls no ``teardown`` after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def running(self) -> list[EquivalentClassOptimizer]:
        """The optimizers of the fit that are run in the equivalent-class space."""
        return self._optimizers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give sharded optimizers their states back, which distributed checkpoints leave out; balance new ones."""
        epoch = self._saved.get("epoch")
        super().on_train_start(trainer, pl_module)
        if epoch not in (None, trainer.current_epoch):  # of version 0.1
            for optimizer in self._optimizers:
                if optimizer.refresh_interval in ("auto", "epoch"):
                    optimizer.refresh()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Balance before the first gradients are clipped; the first training step has been watched by then.

        And have the step measured layer by layer if that is to be logged.
        """
        if not isinstance(optimizer, EquivalentClassOptimizer):
            return
        if self._logs == "layers" and trainer._logger_connector.should_update_logs:
            optimizer.layers.measure_next()
        if trainer.gradient_clip_val is not None:
            optimizer.start()

    def _report(self) -> None:
        """Print what the freedoms are, and later, in one line, if there are fewer of them."""
        if not self._verbose:
            return
        for group in {id(optimizer.group): optimizer.group for optimizer in self._optimizers}.values():
            if group is None or group in self._reported:
                continue
            before = self._reported[-1] if self._reported else None
            self._reported.append(group)
            names = group.parameters.keys()
            if before is not None and before.parameters.keys() == names and group.num_units < before.num_units:
                text = f"{group.num_units} of {before.num_units} units are free now; callback.group.summary() says why."
                rank_zero_only(print)(text)
            else:
                self._print(group)

    def _print(self, group: ScalingGroup) -> None:
        own = [optimizer for optimizer in self._optimizers if optimizer.group is group]
        usable = torch.zeros(group.num_units, dtype=torch.bool, device="cpu")
        for optimizer in own:
            usable |= optimizer.usable_units()
        needs_paths = any(RULES[optimizer.rule].needs_paths for optimizer in own)
        overview = group.overview(usable, needs_paths, own[0].followers)
        rates = list(dict.fromkeys(meaning(optimizer.optimizer, optimizer.rule) for optimizer in own))
        lines = rates if group.num_units else []  # without freedoms a rate means what it always does
        if self._verbose == "table":
            rank_zero_only(print_report)(overview)
        else:
            first, *others = in_brief(overview, 'verbose="table" or callback.group.summary()')
            lines = ["; ".join([first, *lines]), *others]
        for line in lines:
            rank_zero_only(print)(line)


class _Finder:
    """Finds one group for all optimizers of a module, and finds it again when they get further parameters.

    Args:
        module: the module that is trained.
        optimizers: all of them, because a unit may be shared.
        followers: those that are told by hand.

    Attributes:
        found: the group, which may be found later.
    """

    def __init__(self, module: LightningModule, optimizers: list[Optimizer], followers: Given | None) -> None:
        self._module, self._optimizers = module, optimizers
        self._followers = followers_of(module, followers)
        self.found = find_group(module, self._held(), self._followers)

    def __call__(self, parameters: Iterable[Tensor] = ()) -> DeferredGroup:
        """The group of all optimizers, whichever of them asks; what they hold now decides."""
        held = self._held()
        if not self.found.covers(held):
            self.found.cancel()
            self.found = find_group(self._module, held, self._followers)
        return self.found

    def _held(self) -> list[Tensor]:
        return [p for optimizer in self._optimizers for p in parameters_of(optimizer)]
