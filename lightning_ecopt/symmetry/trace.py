"""Finding the scaling group of a module: from one call under fake tensors, or from a real call as it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.solve import solve
from lightning_ecopt.symmetry.watch import Watch


def scaling_group(
    module: nn.Module, *args: Any, parameters: Iterable[Tensor] | None = None, **kwargs: Any
) -> ScalingGroup:
    """Find every rescaling of hidden units that leaves the function of ``module`` unchanged.

    One call ``module(*args, **kwargs)`` is traced, operation by operation, with fake tensors: nothing is computed and
    nothing in the module changes. A module whose control flow depends on data cannot be called that way; it is called
    once for real, and its buffers and the random number generators are put back.

    Args:
        module: any module; the outputs of its call are what must not change.
        *args: inputs of the call; their values do not matter.
        parameters: the parameters that may be rescaled, usually those that the optimizer updates. By default all that
            require a gradient. All others are held fixed.
        **kwargs: further inputs of the call.

    Returns:
        The group; ``group.num_units`` is the number of freedoms.

    Raises:
        ValueError: if one of ``parameters`` is not a parameter of ``module``.
        Exception: whatever the module raises when it is called.

    Example::

        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        group = scaling_group(model, torch.randn(1, 4))
        assert group.num_units == 8
    """
    trainable = select_parameters(module, parameters)
    try:
        return _trace_fake(module, trainable, args, kwargs)
    except Exception:  # data-dependent control flow, an operation without a fake form; a mistake shows up again below
        return _trace_real(module, trainable, args, kwargs)


def select_parameters(module: nn.Module, parameters: Iterable[Tensor] | None) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` that may be rescaled, by name and in the module's order."""
    if parameters is None:
        return {name: p for name, p in module.named_parameters() if p.requires_grad}
    wanted = {id(p) for p in parameters}
    own = {name: p for name, p in module.named_parameters() if id(p) in wanted}
    if len(own) < len(wanted):
        raise ValueError(
            f"{len(wanted) - len(own)} of the given parameters are not parameters of {type(module).__name__}: "
            "pass the module that owns all of them."
        )
    return {name: p for name, p in own.items() if p.requires_grad}


def _trace_fake(
    module: nn.Module, trainable: Mapping[str, nn.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ScalingGroup:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor)

        state = {name: fake(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
        args, kwargs = tree_map_only(Tensor, fake, (args, kwargs))
        watch = Watch(module, {name: state[name] for name in trainable})
        with _attributes_restored(module, watch), torch.enable_grad():
            with watch.watching():
                output = functional_call(module, state, args, kwargs)
            watch.ground(output, "output")
    return _group(watch, trainable)


def _trace_real(
    module: nn.Module, trainable: Mapping[str, nn.Parameter], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ScalingGroup:
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    watch = Watch(module, trainable)
    try:
        with torch.random.fork_rng(devices), _attributes_restored(module, watch), torch.enable_grad():
            with watch.watching():
                output = module(*args, **kwargs)
            watch.ground(output, "output")
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
    return _group(watch, trainable)


def _group(watch: Watch, trainable: Mapping[str, nn.Parameter]) -> ScalingGroup:
    unseen = tuple(name for name in trainable if name not in watch.tracer.seen)
    return ScalingGroup.from_solution(trainable, solve(watch.tracer), unseen)


@contextmanager
def _attributes_restored(module: nn.Module, watch: Watch) -> Iterator[None]:
    """Ground the tensors that the call leaves in attributes of the module, then put the attributes back."""
    before = {part: dict(vars(part)) for part in module.modules()}
    try:
        yield
        _ground_attributes(module, watch)
    finally:
        for part, attributes in before.items():
            vars(part).clear()
            vars(part).update(attributes)


def _ground_attributes(module: nn.Module, watch: Watch) -> None:
    for part in module.modules():
        own = ("_parameters", "_buffers", "_modules")
        watch.ground([value for name, value in vars(part).items() if name not in own], "kept by the module")


class PendingGroup:
    """The scaling group of a module that is found from its next real call, as it happens.

    The method is replaced on the instance until it has been called once and has returned something; the call itself
    runs as ever. What it returns, and the tensors that it leaves in attributes, must not change.

    Args:
        module: the module, in a Lightning pipeline the ``LightningModule``.
        method: name of the method to watch: ``training_step``, so that the loss is watched too, or ``forward``.
        parameters: as in :func:`scaling_group`.
    """

    def __init__(self, module: nn.Module, method: str, parameters: Iterable[Tensor] | None = None) -> None:
        self.module = module
        self.method = method
        self.trainable = select_parameters(module, parameters)
        self.group: ScalingGroup | None = None
        self._method: Callable[..., Any] = getattr(module, method)
        self._own = vars(module).get(method)  # an attribute of the instance, if the user has set one
        self._cancelled = False
        vars(module)[method] = self._watched

    def cancel(self) -> None:
        """Give the module its method back, at once or when whoever has replaced it since gives it back."""
        self._cancelled = True
        while True:
            current = vars(self.module).get(self.method)
            pending = getattr(current, "__self__", None)
            if not isinstance(pending, PendingGroup) or not pending._cancelled:
                return
            del vars(self.module)[self.method]
            if pending._own is not None:
                vars(self.module)[self.method] = pending._own

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        if self._cancelled:
            return self._method(*args, **kwargs)
        watch = Watch(self.module, self.trainable)
        with watch.watching():
            output = self._method(*args, **kwargs)
        if output is not None:  # a training step may skip its batch
            watch.ground(output, "loss")
            _ground_attributes(self.module, watch)
            self.group = _group(watch, self.trainable)
            self.cancel()
        return output
