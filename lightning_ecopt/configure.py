"""What ``configure_optimizers`` returns to train in the equivalent-class space, without a callback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_ecopt._lightning import LightningModule, MisconfigurationException
from lightning_ecopt.optim import ECSGD, ECAdamW
from lightning_ecopt.symmetry import DeferredGroup, GroupFromModuleCalls, GroupFromNextCall, ScalingGroup, scaling_group
from lightning_ecopt.symmetry.pending import check_ranks_agree


def ec_sgd(
    module: nn.Module, params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None, **options: Any
) -> ECSGD:
    """EC-SGD for a module, to be returned from ``configure_optimizers``.

    If a ``LightningModule`` has an ``example_input_array``, its forward call is traced here; otherwise its first
    ``training_step`` is watched as it happens, or, under manual optimization, the calls of its parts until the first
    step. Of another module the next forward call is watched. When parameters are added later, or begin to require a
    gradient, the freedoms are found again.

    Args:
        module: the module that is trained, in ``configure_optimizers`` usually ``self``.
        params: parameters or parameter groups to optimise; by default all of the module's that require a gradient.
        options: of :class:`~lightning_ecopt.ECSGD`: ``lr``, ``momentum``, ``rule`` and so on.

    Raises:
        TypeError: for options that there are not.
        ValueError: for options out of range, and parameters that are not the module's or that the example never used.

    Example::

        def configure_optimizers(self):
            return ec_sgd(self, lr=0.1, momentum=0.9)
    """
    return _bound(ECSGD(_given(module, params), **options), module)


def ec_adamw(
    module: nn.Module, params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None, **options: Any
) -> ECAdamW:
    """EC-AdamW for a module, to be returned from ``configure_optimizers``; as :func:`ec_sgd`.

    Args:
        module: the module that is trained, in ``configure_optimizers`` usually ``self``.
        params: parameters or parameter groups to optimise; by default all of the module's that require a gradient.
        options: of :class:`~lightning_ecopt.ECAdamW`: ``lr``, ``betas``, ``rule`` and so on.

    Raises:
        TypeError: for options that there are not.
        ValueError: for options out of range, and parameters that are not the module's or that the example never used.

    Example::

        def configure_optimizers(self):
            return ec_adamw(self, lr=1e-3)
    """
    return _bound(ECAdamW(_given(module, params), **options), module)


def _given(module: nn.Module, params: Iterable[Any] | None) -> list[Any]:
    return [p for p in module.parameters() if p.requires_grad] if params is None else list(params)


def _bound(optimizer: Any, module: nn.Module) -> Any:
    optimizer.bind(partial(find_group, module))
    return optimizer


def find_group(module: nn.Module, parameters: Iterable[Tensor]) -> ScalingGroup | DeferredGroup:
    """Trace the example inputs of a ``LightningModule`` now, or watch the first call of the module that is made."""
    if not isinstance(module, LightningModule):
        return GroupFromNextCall(module, "forward", parameters)
    agree = partial(_check_ranks_agree, module)
    if module.example_input_array is not None:
        group = _trace_example(module, parameters)
        agree(group)
        return group
    if not module.automatic_optimization:  # forward and backward calls interleave
        return GroupFromModuleCalls(parameters, agree)
    return GroupFromNextCall(module, "training_step", parameters, agree)


def _check_ranks_agree(module: LightningModule, group: ScalingGroup) -> None:
    trainer = module._trainer
    if trainer is not None and trainer.world_size > 1:
        call = "first training step" if module.example_input_array is None else "example_input_array"
        try:
            check_ranks_agree(group, f"{call} of {type(module).__name__}")
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None


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
