"""The line that turns a pipeline's optimizer into its equivalent-class form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ecopt._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_only,
)
from lightning_ecopt.common.sharding import is_sharded
from lightning_ecopt.configure import find_group
from lightning_ecopt.kernels.choose import Implementation
from lightning_ecopt.optim import EquivalentClassOptimizer
from lightning_ecopt.optim.optimizer import check_base
from lightning_ecopt.optim.options import Options, Representative, RuleName, SkeletonChoice, is_interval, shown
from lightning_ecopt.steps import RULES
from lightning_ecopt.symmetry import DeferredGroup, ScalingGroup

UNSUPPORTED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


class EquivalentClassOptimization(Callback):
    """Train in the equivalent-class space: the optimizer of ``configure_optimizers`` becomes its equivalent-class form.

    Nothing else changes: optimizers keep all their options, parameter groups and schedulers, in whatever form
    ``configure_optimizers`` returns them, and checkpoints can be exchanged with runs without the callback. See
    :class:`~lightning_ecopt.EquivalentClassOptimizer` for what a step does. An :class:`~lightning_ecopt.ECSGD` or
    :class:`~lightning_ecopt.ECAdamW` keeps its own options and is only told the freedoms.

    If the ``LightningModule`` has an ``example_input_array``, its forward call is traced before training; otherwise the
    first training step is watched as it happens, which costs no extra call (under manual optimization, the calls of the
    modules in it). The outputs of what is traced (or the loss) are what must not change, so give an
    ``example_input_array`` only if training uses the module by its ``forward``. When parameters thaw or are added, the
    freedoms are found again.

    Args:
        rule: how a step is taken: ``"unit"``, relative to the unit that takes it, or ``"path"``, in the path
            coordinates of the paper (EC-SGD).
        refresh: when weights are balanced (and skeleton weights chosen) again: every ``"epoch"``, after a number of
            steps, or never (``None``).
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
        implementation: how the step is run, which changes its speed alone: ``"auto"``, or one of the ways that
            :func:`~lightning_ecopt.kernels.choose_kernels` lists.
        verbose: print a report of the freedoms when they are known.
        log: log whether all is well with the logger, as ``ecopt/...``, every ``log_every_n_steps``: the number of
            dormant units, and the share of clipped gradients (unit) or the extremes of beta and the number of guarded
            paths (path).

    Attributes:
        group: the :class:`~lightning_ecopt.ScalingGroup`, once it is known.

    Raises:
        ValueError: if an option is out of range.
        MisconfigurationException: at the start of ``fit``, if the strategy shards parameters in a way that is not
            supported, or an optimizer cannot be wrapped or is wrapped already.

    Example::

        trainer = Trainer(callbacks=[EquivalentClassOptimization()])
        trainer.fit(model, data)
    """

    def __init__(
        self,
        rule: RuleName = "unit",
        refresh: Literal["epoch"] | int | None = "epoch",
        representative: Representative = "balanced",
        skeleton: SkeletonChoice = "max",
        max_path_ratio: float | None = 2.0,
        free_start: float = 2.0,
        state_powers: Mapping[str, int] | None = None,
        implementation: Implementation = "auto",
        verbose: bool = True,
        log: bool = True,
    ) -> None:
        if refresh != "epoch" and not is_interval(refresh):
            raise ValueError(
                f"{type(self).__name__}: refresh must be 'epoch', a positive number of steps, or None, got "
                f"{shown(refresh)}"
            )
        interval = None if isinstance(refresh, str) else refresh
        self._options = Options.of(
            type(self),
            rule=rule,
            refresh_interval=interval,
            representative=representative,
            skeleton=skeleton,
            max_path_ratio=max_path_ratio,
            free_start=free_start,
            state_powers=state_powers,
            implementation=implementation,
        )
        self.refresh = refresh
        self._verbose = verbose
        self._logs = log  # Lightning puts its own function at `log`
        self._epoch: int | None = None  # of the last refresh
        self._saved: list[Any] | None = None  # states of rules that a checkpoint has brought
        self._finder: _Finder | None = None
        self._optimizers: list[EquivalentClassOptimizer] = []
        self._reported: list[ScalingGroup] = []

    @property
    def group(self) -> ScalingGroup | None:
        """The scaling group of the module being trained; ``None`` until it is known."""
        return None if self._finder is None else self._finder.found.group

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that take parameters apart."""
        if stage != "fit":
            return
        self._epoch, self._saved, self._finder, self._optimizers, self._reported = None, None, None, [], []
        names = {base.__name__ for base in type(trainer.strategy).__mro__}
        if names & set(UNSUPPORTED_STRATEGIES):
            raise MisconfigurationException(
                f"EquivalentClassOptimization does not work with {type(trainer.strategy).__name__}, whose parameters "
                "have lost their shapes: use one device, strategy='ddp' or ModelParallelStrategy, or remove the "
                "callback."
            )
        # Ahead of Lightning's tuners, which train on the start of a fit: they are to do it with our optimizers.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the freedoms and wrap the optimizers."""
        bases = list(trainer.strategy.optimizers)
        try:
            for base in bases:
                if isinstance(base, EquivalentClassOptimizer) and not base.is_bound:
                    check_base(base.optimizer)
                else:
                    check_base(base)
            self._finder = _Finder(pl_module, bases)
            self._optimizers = [self._equivalent(base, self._finder) for base in bases]
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error
        finally:
            for base in bases:
                if isinstance(base, EquivalentClassOptimizer) and base not in self._optimizers:
                    base.stop_watching()
        if self._optimizers:
            trainer.strategy.optimizers = list(self._optimizers)
        self._report()

    def _equivalent(self, base: Optimizer, finder: _Finder) -> EquivalentClassOptimizer:
        if not isinstance(base, EquivalentClassOptimizer):
            return EquivalentClassOptimizer(base, finder, **vars(self._options))
        base.bind(finder)
        return base

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the first step of an epoch, look for parameters that have thawed, and ask for a refresh."""
        if self._epoch != trainer.current_epoch:
            for optimizer in self._optimizers:
                optimizer.renew()
                if self.refresh == "epoch" and self._epoch is not None:
                    optimizer.refresh()
            self._epoch = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report once the freedoms are known, and log."""
        self._report()
        if not self._logs or not trainer._logger_connector.should_update_logs:
            return
        for number, optimizer in enumerate(self._optimizers):
            prefix = "ecopt" if len(self._optimizers) == 1 else f"ecopt/{number}"
            statistics = optimizer.statistics()
            if statistics is not None:
                values = {f"{prefix}/{name}": float(value) for name, value in vars(statistics).items()}
                pl_module.log_dict(values, on_step=True, on_epoch=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching a module that has never taken its first step."""
        if self._finder is not None:
            self._finder.found.cancel()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching: Lightning calls no ``teardown`` after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """When the last refresh was. The rest is in the optimizers' states, unless parameters are sharded."""
        state: dict[str, Any] = {"epoch": self._epoch}
        groups = [options for optimizer in self._optimizers for options in optimizer.param_groups]
        if any(is_sharded(p) for options in groups for p in options["params"]):
            state["rules"] = [optimizer.rule_state() for optimizer in self._optimizers]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self._epoch, self._saved = state_dict["epoch"], state_dict.get("rules")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give sharded optimizers their states back, which distributed checkpoints leave out; balance new ones."""
        for optimizer, saved in zip(self._optimizers, self._saved or [], strict=False):
            optimizer.load_rule_state(saved)
        self._saved = None
        if trainer.gradient_clip_val is not None:
            for optimizer in self._optimizers:
                optimizer.start()

    def _report(self) -> None:
        if not self._verbose:
            return
        for group in {id(optimizer.group): optimizer.group for optimizer in self._optimizers}.values():
            if group is not None and group not in self._reported:
                self._reported.append(group)
                usable = torch.zeros(group.num_units, dtype=torch.bool)
                for optimizer in self._optimizers:
                    if optimizer.group is group:
                        usable |= optimizer.usable_units()
                rank_zero_only(group.summary)(usable=usable, needs_paths=RULES[self._options.rule].needs_paths)


class _Finder:
    """Finds one group for all optimizers of a module, and finds it again when other parameters are trained.

    Args:
        module: the module that is trained.
        optimizers: all of them, because a unit may be shared.

    Attributes:
        found: the group, which may be found later.
    """

    def __init__(self, module: LightningModule, optimizers: list[Optimizer]) -> None:
        self._module, self._optimizers = module, optimizers
        self._trained = self._trainable()
        self.found = find_group(module, self._held())

    def __call__(self, parameters: Iterable[Tensor] = ()) -> DeferredGroup:
        """The group of all optimizers, whichever of them asks; what is trainable now decides."""
        if self._trainable() != self._trained:
            self.found.cancel()
            self._trained = self._trainable()
            self.found = find_group(self._module, self._held())
        return self.found

    def _held(self) -> list[Tensor]:
        return [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]

    def _trainable(self) -> list[int]:
        return [id(p) for p in self._held() if p.requires_grad]
