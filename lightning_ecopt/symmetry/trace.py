"""Finding the scaling group of a module: from one call under fake tensors, or from a real call as it happens."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.shards import Ranks, gathering_modules, is_sharded, release, stop_gathering_
from lightning_ecopt.symmetry.solve import solve
from lightning_ecopt.symmetry.structure import attributes_kept, inputs_kept, tensors_in, values_kept
from lightning_ecopt.symmetry.watch import Watch


def scaling_group(
    module: nn.Module, *args: Any, parameters: Iterable[Tensor] | None = None, **kwargs: Any
) -> ScalingGroup:
    """Find every rescaling of hidden units that leaves the function of ``module`` unchanged.

    One call ``module(*args, **kwargs)`` is traced, operation by operation, with fake tensors: nothing is computed and
    nothing in the module changes, so that it may be on the meta device. A module whose control flow depends on data, or
    a scripted one, cannot be called that way; it is called once for real, and its buffers, its attributes and random
    number generators are put back. Should it work by itself but not while it is watched, a warning says that all of it
    is held fixed. Compiled parts run uncompiled meanwhile.

    The parameters may be sharded by ``torch.distributed.fsdp.fully_shard`` (FSDP2): what is traced is the whole
    network, without any communication, and the group is the same on all ranks. Where only a real call is possible,
    trace the module first, shard it then, and take ``group.of(module)``.

    Args:
        module: any module; the outputs of its call are what must not change.
        *args: inputs of the call; their values do not matter.
        parameters: the parameters that may be rescaled, usually those that the optimizer updates. By default all that
            require a gradient. All others are held fixed.
        **kwargs: further inputs of the call.

    Returns:
        The group; ``group.num_units`` is the number of freedoms.

    Raises:
        ValueError: if one of ``parameters`` is not a parameter of ``module``, or is sharded in a way that is not
            supported, or a sharded module cannot be called with fake tensors.
        Exception: whatever the module raises when it is called.

    Example::

        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        group = scaling_group(model, torch.randn(1, 4))
        assert group.num_units == 8
    """
    trainable = select_parameters(module, parameters)
    if any(map(is_sharded, module.parameters())):
        try:
            return _trace_fake(module, trainable, args, kwargs)
        except Exception as error:
            raise ValueError(
                f"{type(module).__name__} has sharded parameters and cannot be called with fake tensors, which is the "
                f"only way to trace it then: {error!r}. If the call is right, trace the module before it is sharded: "
                "group = scaling_group(module, ...), then fully_shard(module), then group.of(module)."
            ) from error
    # Scripted modules take no fake parameters; control flow that depends on data takes no fake inputs.
    if not any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        try:
            return _trace_fake(module, trainable, args, kwargs)
        except Exception:  # a mistake of the module shows up again below
            pass
    try:
        return _trace_real(module, trainable, args, kwargs)
    except Exception as error:
        with values_kept(module), inputs_kept((args, kwargs)):
            module(*args, **kwargs)  # raises what the module raises by itself
        warnings.warn(
            f"{type(module).__name__} cannot be watched, so that all of it is held fixed: {error!r}", stacklevel=2
        )
        watch = Watch(module, trainable)
        watch.ground_all("call")
        return group_of(watch, trainable)


def select_parameters(module: nn.Module, parameters: Iterable[Tensor] | None) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` that may be rescaled, by name and in the module's order."""
    release(gathering_modules(module))
    own = dict(module.named_parameters())
    if parameters is not None:
        wanted = {id(p) for p in parameters}
        own = {name: p for name, p in own.items() if id(p) in wanted}
        if len(own) < len(wanted):
            raise ValueError(
                f"{len(wanted) - len(own)} of the given parameters are not parameters of {type(module).__name__}: "
                "pass the module that owns all of them."
            )
    trainable = {name: p for name, p in own.items() if p.requires_grad}
    Ranks(trainable)  # of a layout that is not supported it says so now
    return trainable


def _trace_fake(
    module: nn.Module, trainable: Mapping[str, nn.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ScalingGroup:
    gathering = gathering_modules(module)
    unfused = torch.backends.cudnn.flags(enabled=False)  # it runs recurrent networks as one operation
    with unfused, inputs_kept((args, kwargs)), FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(tensor: Tensor) -> Tensor:
            if not is_sharded(tensor):
                return mode.from_tensor(tensor)
            whole = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole

        state = {id(tensor): fake(tensor) for tensor in [*module.parameters(), *module.buffers()]}
        args, kwargs = tree_map_only(Tensor, fake, (args, kwargs))
        watch = Watch(module, {name: state[id(p)] for name, p in trainable.items()})
        with attributes_kept(module, state), torch.enable_grad():
            if gathering:
                stop_gathering_(module)
            _watch_call(watch, module, args, kwargs)
    return replace(group_of(watch, trainable), gathering=gathering)


def _trace_real(
    module: nn.Module, trainable: Mapping[str, nn.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ScalingGroup:
    watch = Watch(module, trainable)
    with values_kept(module), inputs_kept((args, kwargs)):
        _watch_call(watch, module, args, kwargs)
    return group_of(watch, trainable)


def _watch_call(watch: Watch, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    watch.accept(tensors_in((args, kwargs), objects=True))
    with watch.watching():
        output = module(*args, **kwargs)
    watch.ground(tensors_in(output, objects=True), "output")
    watch.ground_new(kept(module), "kept by the module")


def group_of(watch: Watch, trainable: Mapping[str, nn.Parameter]) -> ScalingGroup:
    """What a watch has found."""
    unseen = tuple(name for name in trainable if name not in watch.tracer.seen)
    return ScalingGroup.from_solution(trainable, solve(watch.tracer), unseen)


def kept(module: nn.Module) -> list[Tensor]:
    """Tensors in the attributes of a module and its submodules, without those that are computed for every call anew."""
    found = []
    for part in module.modules():
        computed = {
            getattr(hook, "name", getattr(hook, "_tensor_name", None))  # weights that are normalised, or pruned
            for hook in part._forward_pre_hooks.values()
            if type(hook).__module__.startswith("torch.nn.utils.")
        }
        found += tensors_in({name: value for name, value in vars(part).items() if name not in computed})
    return found


def check_ranks_agree(group: ScalingGroup, call: str, process_group: Any = None) -> None:
    """Raise on all ranks if they have found different groups: each would rescale its weights in its own way.

    Args:
        group: that of this rank.
        call: where it was found, for the message.
        process_group: the ranks; by default all.

    Raises:
        ValueError: if they differ.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size(process_group)
    own = group.fingerprint(), group.num_units, group.unseen
    torch.distributed.all_gather_object(found, own, process_group)
    if len({fingerprint for fingerprint, _, _ in found}) == 1:
        return
    unseen = sorted({name for _, _, names in found for name in names})
    raise ValueError(
        f"The {call} ran other operations on some ranks than on others (freedoms found: "
        f"{', '.join(str(units) for _, units, _ in found)}"
        + (f"; parameters not used by all: {listing(unseen)}" if unseen else "")
        + "), so that their weights would drift apart: give all ranks an example_input_array that takes the same way "
        "through the network."
    )


def listing(names: Sequence[str], limit: int = 5) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class Pending:
    """A scaling group that is found while training has begun.

    Args:
        check: called by :meth:`settle` with the group; what it raises goes to whoever wants to use the group.
    """

    group: ScalingGroup | None
    missing: str  # what has not happened while there is no group

    def __init__(self, check: Callable[[ScalingGroup], object] | None = None) -> None:
        self._check = check
        self._checked: ScalingGroup | None = None

    def cancel(self) -> None:
        """Stop watching."""

    def settle(self) -> ScalingGroup | None:
        """The group, to be used from now on, if there is one."""
        group = self.group
        if group is not None and group is not self._checked and self._check is not None:
            self._check(group)
        self._checked = group
        return group


class PendingGroup(Pending):
    """The scaling group of a module that is found from its next real call, as it happens.

    The method is replaced on the instance until it has been called once and has returned something; the call itself
    runs as ever, and what stands there has the signature, the attributes and the pickle of the method. What the method
    returns, and the tensors that it leaves in attributes, must not change.

    Args:
        module: the module, in a Lightning pipeline the ``LightningModule``.
        method: name of the method to watch: ``training_step``, so that the loss is watched too, or ``forward``.
        parameters: as in :func:`scaling_group`.
        check: as in :class:`Pending`.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        parameters: Iterable[Tensor] | None = None,
        check: Callable[[ScalingGroup], object] | None = None,
    ) -> None:
        super().__init__(check)
        self.module = module
        self.method = method
        self.trainable = select_parameters(module, parameters)
        sharded = [name for name, parameter in module.named_parameters() if is_sharded(parameter)]
        if sharded:
            raise ValueError(
                f"{type(module).__name__} has sharded parameters, {sharded[0]} first, which a real call gathers, so "
                "that it cannot be watched. Give the LightningModule an example_input_array, so that its forward call "
                "can be traced instead, or use scaling_group(module, inputs)."
            )
        self.group: ScalingGroup | None = None
        self._method: Callable[..., Any] = getattr(module, method)
        self._own = vars(module).get(method)  # an attribute of the instance, if the user has set one
        self._cancelled = False
        vars(module)[method] = _WatchedMethod(self, self._method)

    @property
    def missing(self) -> str:  # type: ignore[override]
        """What has not happened while there is no group."""
        return f"nothing has called {self.method}() of {type(self.module).__name__} since the optimizer was made"

    def cancel(self) -> None:
        """Give the module its method back, at once or when whoever has replaced it since gives it back."""
        self._cancelled = True
        while True:
            current = vars(self.module).get(self.method)
            if not isinstance(current, _WatchedMethod) or not current.pending._cancelled:
                return
            del vars(self.module)[self.method]
            if current.pending._own is not None:
                vars(self.module)[self.method] = current.pending._own

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, and watch it if no group has been found yet."""
        if self._cancelled or detect_fake_mode() is not None:  # a call that computes nothing is no real one
            return self._method(*args, **kwargs)
        watch = Watch(self.module, self.trainable)
        with watch.watching():
            output = self._method(*args, **kwargs)
        if output is not None:  # a training step may skip its batch
            name = "loss" if self.method == "training_step" else "output"
            watch.ground(tensors_in(output, objects=True), name)
            watch.ground_new(kept(self.module), "kept by the module")
            self.group = group_of(watch, self.trainable)
            self.cancel()
        return output


class _WatchedMethod:
    """Stands for a method of a module while a :class:`PendingGroup` waits for its next call.

    Lightning, Hugging Face and others read signatures (does ``training_step`` take a ``batch_idx``?), and look through
    one decorator on the way, so everything but the call is the method's own. A pickle holds the method itself; a deep
    copy of the module waits for a call of its own.
    """

    def __init__(self, pending: PendingGroup, method: Callable[..., Any]) -> None:
        self.pending = pending
        self._method = method
        self.__module__, self.__doc__ = method.__module__, method.__doc__  # which the class has, too

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pending.call(*args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # inspect and torch.jit.script look for the source of methods only
        return type(self._method)

    @property
    def __wrapped__(self) -> Any:
        return getattr(self._method, "__wrapped__", self._method)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method)

    def __getattr__(self, name: str) -> Any:
        if name == "_method":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._method, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._method,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _WatchedMethod:
        pending = copy.deepcopy(self.pending, memo)
        return _WatchedMethod(pending, pending._method)


def _itself(value: Any) -> Any:
    return value
