"""Finding the scaling group of a module: one call of it is traced, then the equations of the trace are solved.

A call can be traced in two ways. With fake tensors, which have a shape and no values, it costs neither memory nor
arithmetic. Where that is impossible, as for control flow that depends on values, the module is called for real.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from lightning_ecopt.common.flat import originals
from lightning_ecopt.common.nested import named_tensors_in, tensors_in
from lightning_ecopt.common.sharding import (
    Ranks,
    can_be_rescaled,
    gathering_modules,
    is_sharded,
    named_parameters,
    release,
    shapes_of,
    stop_gathering_,
    whole_shape,
)
from lightning_ecopt.common.warn import warn
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.isolation import attributes_kept, fake_tensors, inputs_kept, values_kept
from lightning_ecopt.symmetry.labels import ParameterView
from lightning_ecopt.symmetry.scales import Operation
from lightning_ecopt.symmetry.solve import solve
from lightning_ecopt.symmetry.trace_mode import TraceMode

#: Tensors that are rescaled with a parameter, each with the parameter's name.
Copies = Sequence[tuple[str, Tensor]]


def scaling_group(
    module: nn.Module,
    *args: Any,
    parameters: Iterable[Tensor] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> ScalingGroup:
    """Find every rescaling of hidden units that leaves the function of ``module`` unchanged.

    One call ``module(*args, **kwargs)`` is traced, operation by operation, with fake tensors: nothing is computed and
    nothing in the module changes, so that it may be on the meta device. A module whose control flow depends on data, or
    a scripted one, is traced in a real call instead, after which its buffers, attributes and random number generators
    are put back. If this fails, too, the module is called untraced: its own error is raised, or a warning says that all
    of it is held fixed. Compiled parts run uncompiled meanwhile.

    The parameters may be sharded by ``torch.distributed.fsdp.fully_shard`` (FSDP2): what is traced is the whole
    network, without any communication, and the group is the same on all ranks. Where only a real call is possible,
    trace the module first, shard it then, and take ``group.of(module)``.

    All that the call returns must stay as it is: keys and values that a language model returns for later calls, too.
    The report names the parts of the output that cost freedoms, such as ``output['past_key_values'].layers[0].keys``.
    If your loss does not look at them, say what counts, ``outputs=lambda output: output.logits``, or have the module
    return no more than that, ``use_cache=False``. The Lightning callback watches the training step, where the loss is
    all that counts; ``forward`` should return no more than the loss looks at if there is an ``example_input_array``.

    Args:
        module: any module; the outputs of its call are what must not change.
        *args: inputs of the call. Their values matter only in a real call, whose control flow they may decide.
        parameters: the parameters that may be rescaled, usually the optimizer's; by default all. Those that require
            no gradient, complex and quantised ones, and all others, are held fixed.
        outputs: takes what the call returns, and returns the tensors in it that count, in a structure of any kind, or
            something computed from them, such as the loss; by default everything counts.
        **kwargs: further inputs of the call.

    Returns:
        The group; ``group.num_units`` is the number of freedoms.

    Raises:
        TypeError: if ``module`` is none, or ``outputs`` is no function.
        ValueError: if ``outputs`` returns no tensor, or one of ``parameters`` is not a parameter of ``module``, or is
            sharded in a way that is not supported, or a sharded module cannot be called with fake tensors.
        Exception: whatever the module raises when it is called.

    Example::

        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        group = scaling_group(model, torch.randn(1, 4))
        assert group.num_units == 8
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            "scaling_group takes the module first, then the inputs of its call, but got "
            f"{type(module).__name__}: scaling_group(model, inputs)."
        )
    if outputs is not None and not callable(outputs):
        raise TypeError(
            "outputs takes a function of what the module returns, but got "
            f"{type(outputs).__name__}: scaling_group(model, inputs, outputs=lambda output: output.logits)."
        )
    given = None if parameters is None else list(parameters)
    chosen = select_parameters(module, given)
    foreign = {id(p) for p in given or ()} - {id(p) for _, p in named_parameters(module)}
    if foreign:
        raise ValueError(
            f"{len(foreign)} of the given parameters are not parameters of {type(module).__name__}: "
            "pass the module that owns all of them."
        )
    trained = {name: parameter for name, parameter in chosen.items() if parameter.requires_grad}
    call = module if outputs is None else partial(_counted, module, outputs)
    equations = trace_call(module, call, trained, (), args, kwargs)
    return solved(trained, equations, gathering=gathering_modules(module))


def _counted(module: nn.Module, outputs: Callable[[Any], Any], /, *args: Any, **kwargs: Any) -> Any:
    """What counts of what the module returns."""
    counted = outputs(module(*args, **kwargs))
    if not tensors_in(counted, objects=True):
        raise ValueError(f"outputs returned no tensor of what {type(module).__name__} returns, but {counted!r}")
    return counted


def select_parameters(
    module: nn.Module,
    parameters: Iterable[Tensor] | None = None,
    named: Callable[[nn.Module], Iterable[tuple[str, nn.Parameter]]] = named_parameters,
) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` that may be rescaled, by name and in the module's order.

    Args:
        module: the module.
        parameters: leaves out all but these; by default none is.
        named: how they are called, by default as the module calls them; for an optimizer ``plainly_named``.

    Raises:
        ValueError: if one is sharded in a way that is not supported.
    """
    # After a forward pass FSDP may have left whole parameters in place of the sharded ones, which optimizers hold.
    release(gathering_modules(module))
    wanted = None if parameters is None else {id(p) for p in parameters}
    own = {
        name: parameter
        for name, parameter in named(module)
        if can_be_rescaled(parameter) and (wanted is None or id(parameter) in wanted)
    }
    # Raises if they are sharded in a way that is not supported; those are to be frozen.
    Ranks({name: parameter for name, parameter in own.items() if parameter.requires_grad})
    return {name: parameter for name, parameter in own.items() if parameter.requires_grad or _is_supported(parameter)}


def _is_supported(parameter: Tensor) -> bool:
    try:
        Ranks({"parameter": parameter})
    except ValueError:
        return False
    return True


def solved(
    parameters: Mapping[str, nn.Parameter],
    equations: Equations,
    trained: Collection[str] | None = None,
    gathering: Sequence[nn.Module] = (),
) -> ScalingGroup:
    """Solve the equations of traced calls: what remains free is the group.

    Args:
        parameters: those that were traced, by name.
        equations: of one call or several.
        trained: names of the parameters that may be rescaled, by default all; the others are held fixed.
        gathering: modules that gather sharded parameters for their calls.
    """
    own = {name: parameter for name, parameter in parameters.items() if trained is None or name in trained}
    unseen = tuple(name for name in own if name not in equations.seen)
    group = ScalingGroup.from_solution(own, solve(equations, [name for name in own if name in equations.seen]), unseen)
    return replace(group, gathering=gathering) if gathering else group


@dataclass(frozen=True, eq=False)
class _Call:
    """A call that is to be traced.

    Args:
        module: the module that it calls.
        function: what is called, usually the module.
        parameters: those whose scales are looked for, by name.
        copies: tensors that are rescaled with a parameter.
        args: inputs.
        kwargs: further inputs.
    """

    module: nn.Module
    function: Callable[..., Any]
    parameters: Mapping[str, nn.Parameter]
    copies: Copies
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def trace(module: nn.Module, parameters: Mapping[str, nn.Parameter], /, *args: Any, **kwargs: Any) -> Equations:
    """Trace one call ``module(*args, **kwargs)``, as :func:`scaling_group` says.

    Args:
        module: the module.
        parameters: those whose scales are looked for, by name.
        *args: inputs of the call.
        **kwargs: further inputs of the call.
    """
    return trace_call(module, module, parameters, (), args, kwargs)


def trace_call(
    module: nn.Module,
    call: Callable[..., Any],
    parameters: Mapping[str, nn.Parameter],
    copies: Copies,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Equations:
    """Trace ``call(*args, **kwargs)``, which calls the module, in view of copies that are rescaled with parameters."""
    traced = _Call(module, call, parameters, copies, args, kwargs)
    if any(is_sharded(parameter) for _, parameter in named_parameters(module)):
        try:
            return _trace_fake(traced)
        except Exception as error:
            raise ValueError(
                f"{type(module).__name__} has sharded parameters and cannot be called with fake tensors, which is the "
                f"only way to trace it then: {error!r}. If the call is right, trace the module before it is sharded: "
                "group = scaling_group(module, ...), then fully_shard(module), then group.of(module)."
            ) from error
    # Scripted modules take no fake parameters; control flow that depends on data takes no fake inputs.
    if not any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        try:
            return _trace_fake(traced)
        except Exception:  # a mistake of the module shows up again below
            pass
    try:
        return _trace_real(traced)
    except Exception as error:
        with values_kept(module), inputs_kept((args, kwargs)):
            call(*args, **kwargs)  # raises what the module raises by itself
        warn(f"{type(module).__name__} cannot be watched, so that all of it is held fixed: {error!r}")
        return all_fixed(parameters)


def all_fixed(parameters: Mapping[str, nn.Parameter], held: Collection[str] | None = None) -> Equations:
    """The equations under which none of the parameters, or none of those that are named, can be rescaled."""
    shapes = shapes_of(parameters)
    equations = Equations(shapes)
    equations.operation = Operation("call", "")
    for name in shapes if held is None else held:
        equations.hold_fixed(ParameterView.whole(name, shapes[name]))
    return equations


def _trace_fake(call: _Call) -> Equations:
    """Trace a call of the module in which fake tensors stand for its parameters, its buffers and the inputs."""
    module = call.module
    with inputs_kept((call.args, call.kwargs)), fake_tensors() as fake_mode:
        fake = partial(_fake, fake_mode)
        own: list[Tensor] = [parameter for _, parameter in named_parameters(module)]
        own += [*module.buffers(), *call.parameters.values(), *(copy for _, copy in call.copies)]
        state = {id(tensor): fake(tensor) for tensor in own}
        # A call that runs may have whole tensors in the places of parameters.
        state |= {key: state[id(parameter)] for key, parameter in originals().items() if id(parameter) in state}
        args, kwargs = tree_map_only(Tensor, fake, (call.args, call.kwargs))
        mode = TraceMode(module, {name: state[id(parameter)] for name, parameter in call.parameters.items()})
        mode.add_copies((name, state[id(copy)]) for name, copy in call.copies)
        with attributes_kept(module, state):
            if any(map(is_sharded, own)):
                stop_gathering_(module)
            _run(mode, replace(call, args=args, kwargs=kwargs))
    return mode.equations


def _fake(fake_mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor of the same shape; of a sharded one a fake tensor of the whole."""
    if not is_sharded(tensor):
        return fake_mode.from_tensor(tensor)
    shape = whole_shape(tensor)
    whole = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.shape == shape:  # otherwise a piece under FSDP1, which is contiguous as a whole
        whole = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole


def _trace_real(call: _Call) -> Equations:
    """Trace a call of the module as it is, and put back what the call changes."""
    mode = TraceMode(call.module, call.parameters)
    mode.add_copies(call.copies)
    with values_kept(call.module), inputs_kept((call.args, call.kwargs)):
        _run(mode, call)
    return mode.equations


def _run(mode: TraceMode, call: _Call) -> None:
    mode.register_inputs(tensors_in((call.args, call.kwargs), objects=True))
    with mode.tracing():
        output = call.function(*call.args, **call.kwargs)
    hold_results_fixed(mode, call.module, output)


def hold_results_fixed(
    mode: TraceMode, module: nn.Module, output: Any, name: str = "output", copies: Collection[int] = ()
) -> None:
    """Demand that all that a call leaves behind stays as it is: its output, and what the module keeps of it.

    Args:
        mode: has traced the call.
        module: the module.
        output: what the call has returned.
        name: of the output, for the report.
        copies: the ``id`` of tensors that follow a parameter.
    """
    for part, tensor in named_tensors_in(output, name, objects=True):
        mode.hold_fixed([tensor], part)
    mode.hold_new_fixed([tensor for tensor in _kept(module) if id(tensor) not in copies], "kept by the module")


def _kept(module: nn.Module) -> list[Tensor]:
    """Tensors in the attributes of a module and its submodules, without weights that every call computes anew."""
    found = []
    for part in module.modules():
        computed = {
            getattr(hook, "name", getattr(hook, "_tensor_name", None))  # weights that are normalised, or pruned
            for hook in part._forward_pre_hooks.values()
            if type(hook).__module__.startswith("torch.nn.utils.")
        }
        computed.update(part._parameters.keys())  # whole ones, while a call under FSDP1 runs
        found += tensors_in({name: value for name, value in vars(part).items() if name not in computed})
    return found
