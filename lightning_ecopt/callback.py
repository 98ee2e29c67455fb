"""The line that turns a pipeline's optimizer into its equivalent-class form."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ecopt._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_only,
    rank_zero_warn,
)
from lightning_ecopt.configure import find_group
from lightning_ecopt.optim import EquivalentClassOptimizer
from lightning_ecopt.optim.optimizer import NO_FREEDOMS, check_base, check_options
from lightning_ecopt.report import print_report
from lightning_ecopt.symmetry import PendingGroup, ScalingGroup

UNSUPPORTED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


class EquivalentClassOptimization(Callback):
    """Train in the equivalent-class space: the optimizer of ``configure_optimizers`` becomes its equivalent-class form.

    Nothing else changes: SGD, Adam and AdamW keep all their options, parameter groups and schedulers, in whatever form
    ``configure_optimizers`` returns them, and checkpoints can be exchanged with runs without the callback. See
    :class:`~lightning_ecopt.EquivalentClassOptimizer` for what a step does.

    If the ``LightningModule`` has an ``example_input_array``, its forward call is traced before training; otherwise the
    first training step is watched as it happens, which costs no extra call. The outputs of what is traced (or the loss)
    are what must not change, so give an ``example_input_array`` only if training uses the module by its ``forward``.

    Args:
        rule: how a step is taken: ``"unit"``, relative to the unit that takes it, or ``"path"``, in the path
            coordinates of the paper (EC-SGD).
        refresh: when weights are balanced (and skeleton weights chosen) again: every ``"epoch"``, after a number of
            steps, or never (``None``).
        representative: ``"balanced"``, or ``"current"`` to stay at the weights as they are (then what happens does not
            depend on the class alone).
        skeleton: of the rule ``"path"``, as the next two: ``"max"`` takes the largest weights, ``"diagonal"`` is the
            paper's choice, for plain networks.
        max_path_ratio: no path may change by more than this factor in one step; ``None`` is the paper's rule.
        free_start: value at which the coordinates of free skeleton weights start; larger lets scales move more slowly.
        verbose: print a report of the freedoms when they are known.
        log: log whether all is well with the logger, as ``ecopt/...``, every ``log_every_n_steps``: the number of
            dormant units, and the share of clipped gradients (unit) or the extremes of beta and the number of guarded
            paths (path).

    Attributes:
        group: the :class:`~lightning_ecopt.ScalingGroup`, once it is known.

    Raises:
        ValueError: if an option is out of range.
        MisconfigurationException: at the start of ``fit``, if the strategy shards parameters, or an optimizer is none
            of these or is wrapped already.

    Example::

        trainer = Trainer(callbacks=[EquivalentClassOptimization()])
        trainer.fit(model, data)
    """

    def __init__(
        self,
        rule: Literal["unit", "path"] = "unit",
        refresh: Literal["epoch"] | int | None = "epoch",
        representative: Literal["balanced", "current"] = "balanced",
        skeleton: Literal["max", "diagonal"] = "max",
        max_path_ratio: float | None = 2.0,
        free_start: float = 2.0,
        verbose: bool = True,
        log: bool = True,
    ) -> None:
        if isinstance(refresh, str) and refresh != "epoch":
            raise ValueError(f"refresh must be 'epoch', a positive number of steps, or None, got {refresh!r}")
        self._options: dict[str, Any] = {
            "rule": rule,
            "refresh_interval": None if isinstance(refresh, str) else refresh,
            "representative": representative,
            "skeleton": skeleton,
            "max_path_ratio": max_path_ratio,
            "free_start": free_start,
        }
        check_options(**self._options)
        self.refresh = refresh
        self._verbose = verbose
        self._logs = log  # Lightning puts its own function at `log`
        self._epoch: int | None = None  # of the last refresh
        self._found: ScalingGroup | PendingGroup | None = None
        self._optimizers: list[EquivalentClassOptimizer] = []
        self._reported = False

    @property
    def group(self) -> ScalingGroup | None:
        """The scaling group of the module being trained; ``None`` until it is known."""
        return self._found.group if isinstance(self._found, PendingGroup) else self._found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that shard parameters."""
        if stage != "fit":
            return
        self._epoch, self._found, self._optimizers, self._reported = None, None, [], False
        names = {base.__name__ for base in type(trainer.strategy).__mro__}
        if names & set(UNSUPPORTED_STRATEGIES):
            raise MisconfigurationException(
                f"EquivalentClassOptimization does not work with {type(trainer.strategy).__name__}, which shards "
                "parameters: use one device or strategy='ddp', or remove the callback."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the freedoms and wrap the optimizers."""
        bases = list(trainer.strategy.optimizers)
        try:
            for base in bases:
                if isinstance(base, EquivalentClassOptimizer):
                    base.stop_watching()
                check_base(base)
            parameters: list[Tensor] = [p for base in bases for group in base.param_groups for p in group["params"]]
            self._found = find_group(pl_module, parameters)
            if self.group is not None and self.group.num_units == 0:
                rank_zero_warn(NO_FREEDOMS)
            else:
                self._optimizers = [EquivalentClassOptimizer(base, self._found, **self._options) for base in bases]
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error
        if self._optimizers:
            trainer.strategy.optimizers = list(self._optimizers)
        self._report()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for a refresh at the first step of an epoch."""
        if self.refresh == "epoch" and self._epoch != trainer.current_epoch:
            if self._epoch is not None:
                for optimizer in self._optimizers:
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
        """Stop watching a module that never took its first step."""
        if isinstance(self._found, PendingGroup):
            self._found.cancel()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise: after an exception there is no teardown."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """When the last refresh was; the rest is in the optimizers' states."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self._epoch = state_dict["epoch"]

    def _report(self) -> None:
        if self.group is not None and not self._reported:
            self._reported = True
            if self._verbose:
                usable = torch.zeros(self.group.num_units, dtype=torch.bool)
                for optimizer in self._optimizers:
                    usable |= optimizer.usable_units()
                rank_zero_only(print_report)(self.group, usable=usable, rule=self._options["rule"])
