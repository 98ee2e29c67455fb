"""What ``configure_optimizers`` returns to train in the equivalent-class space, without a callback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_ecopt._lightning import LightningModule, MisconfigurationException
from lightning_ecopt.optim import ECSGD, ECAdamW
from lightning_ecopt.optim.arguments import check_module
from lightning_ecopt.optim.named import AdamWArguments, Params, SGDArguments
from lightning_ecopt.symmetry import (
    DeferredGroup,
    GroupFromModuleCalls,
    GroupFromNextCall,
    KnownGroup,
    ScalingGroup,
    scaling_group,
)
from lightning_ecopt.symmetry.pending import check_ranks_agree


def ec_sgd(
    module: nn.Module, params: Params | None = None, *, lr: float = 1e-3, **options: Unpack[SGDArguments]
) -> ECSGD:
    """EC-SGD for a module, to be returned from ``configure_optimizers``.

    If a ``LightningModule`` has an ``example_input_array``, its forward call is traced here; otherwise its first
    ``training_step`` is watched as it happens, or, under manual optimization, the calls of its parts until the first
    step. Of another module the next forward call is watched. When parameters are added later, or begin to require a
    gradient, the freedoms are found again.

    Args:
        module: the module that is trained, in ``configure_optimizers`` usually ``self``.
        params: parameters or parameter groups to optimise; by default all of the module's that require a gradient.
        lr: learning rate; with the rule ``"unit"`` it is the relative length of a step.
        **options: those of :class:`~lightning_ecopt.ECSGD`: ``momentum``, ``weight_decay``, ``rule`` and so on.

    Raises:
        TypeError: if an option is unknown.
        ValueError: for options out of range, and parameters that are not the module's or that the example never used.

    Example::

        def configure_optimizers(self):
            return ec_sgd(self, lr=0.1, momentum=0.9)
    """
    check_module("ec_sgd", "ECSGD", module, params)
    optimizer = ECSGD(_given(module, params), lr, **options)
    optimizer.bind(partial(find_group, module))
    return optimizer


def ec_adamw(
    module: nn.Module, params: Params | None = None, *, lr: float = 1e-3, **options: Unpack[AdamWArguments]
) -> ECAdamW:
    """EC-AdamW for a module, to be returned from ``configure_optimizers``.

    The freedoms are found as by :func:`ec_sgd`.

    Args:
        module: the module that is trained, in ``configure_optimizers`` usually ``self``.
        params: parameters or parameter groups to optimise; by default all of the module's that require a gradient.
        lr: learning rate.
        **options: those of :class:`~lightning_ecopt.ECAdamW`: ``betas``, ``weight_decay``, ``rule`` and so on.

    Raises:
        TypeError: if an option is unknown.
        ValueError: for options out of range, and parameters that are not the module's or that the example never used.

    Example::

        def configure_optimizers(self):
            return ec_adamw(self, lr=1e-3)
    """
    check_module("ec_adamw", "ECAdamW", module, params)
    optimizer = ECAdamW(_given(module, params), lr, **options)
    optimizer.bind(partial(find_group, module))
    return optimizer


def _given(module: nn.Module, params: Iterable[Any] | None) -> list[Any]:
    return [p for p in module.parameters() if p.requires_grad] if params is None else list(params)


def find_group(module: nn.Module, parameters: Iterable[Tensor]) -> DeferredGroup:
    """The group of a module: of its example inputs now, or of its first call later.

    The example inputs of a ``LightningModule`` are traced at once. Without any, its first ``training_step`` is traced
    or, under manual optimization, the calls of its parts; of another module, the next call of ``forward``.
    """
    if not isinstance(module, LightningModule):
        return GroupFromNextCall(module, "forward", parameters)
    agree = partial(_check_ranks_agree, module)
    if module.example_input_array is not None:
        group = _trace_example(module, parameters)
        agree(group)
        return KnownGroup(group)
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
        except ValueError:  # batch norm in training mode, say, wants more than one value; other mistakes show up again
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
