"""What ``configure_optimizers`` returns to train in the equivalent-class space, without a callback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_ecopt._lightning import LightningModule, MisconfigurationException
from lightning_ecopt.optim import EquivalentClassOptimizer
from lightning_ecopt.optim.optimizer import check_options
from lightning_ecopt.symmetry import PendingGroup, ScalingGroup, scaling_group


def ec_sgd(
    module: nn.Module,
    params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    foreach: bool | None = None,
    **options: Any,
) -> EquivalentClassOptimizer:
    """EC-SGD for a module, to be returned from ``configure_optimizers``.

    If a ``LightningModule`` has an ``example_input_array``, its forward call is traced here; otherwise its first
    ``training_step`` is watched as it happens. Of another module the next forward call is watched.

    Args:
        module: the module that is trained, in ``configure_optimizers`` usually ``self``.
        params: parameters or parameter groups to optimise; by default all of the module's that require a gradient.
        lr: learning rate, and the other options of :class:`torch.optim.SGD`:
        momentum: as there.
        dampening: as there.
        weight_decay: as there.
        nesterov: as there.
        maximize: as there.
        foreach: as there.
        options: of :class:`~lightning_ecopt.EquivalentClassOptimizer`: ``rule``, ``refresh_interval`` and so on.

    Raises:
        TypeError: for options that there are not.
        ValueError: for options out of range, and parameters that are not the module's or that the example never used.

    Example::

        def configure_optimizers(self):
            return ec_sgd(self, lr=0.1, momentum=0.9)
    """
    check_options(**options)
    optimizer = SGD(
        _given(module, params),
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        foreach=foreach,
    )
    return _wrapped(module, optimizer, options)


def ec_adamw(
    module: nn.Module,
    params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    foreach: bool | None = None,
    **options: Any,
) -> EquivalentClassOptimizer:
    """EC-AdamW for a module, to be returned from ``configure_optimizers``; see :func:`ec_sgd`.

    Args:
        module: the module that is trained, in ``configure_optimizers`` usually ``self``.
        params: parameters or parameter groups to optimise; by default all of the module's that require a gradient.
        lr: learning rate, and the other options of :class:`torch.optim.AdamW`:
        betas: as there.
        eps: as there.
        weight_decay: as there.
        amsgrad: as there.
        maximize: as there.
        foreach: as there.
        options: of :class:`~lightning_ecopt.EquivalentClassOptimizer`: ``rule``, ``refresh_interval`` and so on.

    Raises:
        TypeError: for options that there are not.
        ValueError: for options out of range, and parameters that are not the module's or that the example never used.

    Example::

        def configure_optimizers(self):
            return ec_adamw(self, lr=1e-3)
    """
    check_options(**options)
    optimizer = AdamW(
        _given(module, params),
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        foreach=foreach,
    )
    return _wrapped(module, optimizer, options)


def _given(module: nn.Module, params: Iterable[Any] | None) -> list[Any]:
    return [p for p in module.parameters() if p.requires_grad] if params is None else list(params)


def _wrapped(module: nn.Module, optimizer: Optimizer, options: dict[str, Any]) -> EquivalentClassOptimizer:
    own = [p for group in optimizer.param_groups for p in group["params"]]
    return EquivalentClassOptimizer(optimizer, find_group(module, own), **options)


def find_group(module: nn.Module, parameters: Iterable[Tensor]) -> ScalingGroup | PendingGroup:
    """Trace the example inputs of a ``LightningModule`` now, or watch the first call of the module that is made."""
    if not isinstance(module, LightningModule):
        return PendingGroup(module, "forward", parameters)
    if module.example_input_array is not None:
        return _trace_example(module, parameters)
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(module).__name__} uses manual optimization, where forward and backward calls interleave: set its "
            "example_input_array, so that its forward call can be traced before training."
        )
    return PendingGroup(module, "training_step", parameters)


def _trace_example(module: LightningModule, parameters: Iterable[Tensor]) -> ScalingGroup:
    example = module.transfer_batch_to_device(module.example_input_array, module.device, 0)
    trainer = module._trainer
    context: Any = nullcontext()
    if trainer is not None:
        example = trainer.precision_plugin.convert_input(example)
        context = trainer.precision_plugin.forward_context()
    args: Iterable[Any] = example if isinstance(example, tuple | list) else (example,)
    kwargs: Mapping[str, Any] = {}
    if isinstance(example, Mapping):
        args, kwargs = (), example
    with context:
        try:
            return scaling_group(module, *args, parameters=parameters, **kwargs)
        except ValueError:  # batch norm in training mode wants more than one value per channel
            with _evaluation_mode(module):
                return scaling_group(module, *args, parameters=parameters, **kwargs)


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
