"""What ``configure_optimizers`` returns to train in the equivalent-class space, without a callback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from lightning_ecopt._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_ecopt.common.sharding import gathering_modules, is_sharded, plainly_named
from lightning_ecopt.common.warn import warn
from lightning_ecopt.optim import ECSGD, ECAdamW, ECMuon, EquivalentClassOptimizer
from lightning_ecopt.optim.arguments import check_module
from lightning_ecopt.optim.binding import parameters_of
from lightning_ecopt.optim.muon import hidden_matrices, marked
from lightning_ecopt.optim.named import AdamWArguments, MuonArguments, Params, SGDArguments
from lightning_ecopt.symmetry import DeferredGroup, GroupFromModuleCalls, GroupFromNextCall, ScalingGroup
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.followers import Followers, Given
from lightning_ecopt.symmetry.ranks import gather_if_different
from lightning_ecopt.symmetry.trace import select_parameters, trace_call

UNSUPPORTED_STRATEGIES = ("DeepSpeedStrategy", "XLAFSDPStrategy")

_Optimizer = TypeVar("_Optimizer", ECSGD, ECAdamW, ECMuon)


def ec_sgd(
    module: nn.Module, params: Params | None = None, *, lr: float = 0.03, **options: Unpack[SGDArguments]
) -> ECSGD:
    """EC-SGD for a module, to be returned from ``configure_optimizers``.

    The first ``training_step`` of a ``LightningModule`` is watched as it happens. Under manual optimization the steps
    in it are those of plain SGD, as what follows them may tell more; from the second ``training_step`` on they are of
    EC-SGD. If the module has an ``example_input_array``, its forward call is traced here, so that the freedoms are
    known before training; the training step may tell that there are fewer. Of another module the next forward call is
    watched, or all of the closure that the first step is given. When parameters are added later, or begin to require a
    gradient, the freedoms are found again.

    Args:
        module: the module that is trained, in ``configure_optimizers`` usually ``self``.
        params: parameters or parameter groups to optimise; by default all of the module's that require a gradient.
        lr: learning rate; with the rule ``"unit"`` it is the relative length of a step.
        **options: those of :class:`~lightning_ecopt.ECSGD`: ``momentum``, ``weight_decay``, ``rule`` and so on.

    Raises:
        TypeError: if an option is unknown.
        ValueError: for options out of range, parameters that are not the module's, and followers that do not fit.

    Example::

        def configure_optimizers(self):
            return ec_sgd(self, lr=0.03, momentum=0.9)
    """
    check_module("ec_sgd", "ECSGD", module, params)
    followers = options.pop("followers", None)  # names, perhaps, which only the module knows
    return _bound(ECSGD(_given(module, params), lr, **options), module, followers)


def ec_adamw(
    module: nn.Module, params: Params | None = None, *, lr: float = 3e-3, **options: Unpack[AdamWArguments]
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
        ValueError: for options out of range, and parameters that are not the module's.

    Example::

        def configure_optimizers(self):
            return ec_adamw(self, lr=3e-3)
    """
    check_module("ec_adamw", "ECAdamW", module, params)
    followers = options.pop("followers", None)  # names, perhaps, which only the module knows
    return _bound(ECAdamW(_given(module, params), lr, **options), module, followers)


def ec_muon(
    module: nn.Module, params: Params | None = None, *, lr: float = 3e-3, **options: Unpack[MuonArguments]
) -> ECMuon:
    """EC-Muon for a module, to be returned from ``configure_optimizers``.

    Muon steps the weight matrices of hidden layers: two-dimensional parameters with ``weight`` in their names. AdamW
    steps everything else: gains, biases and convolutions, the weights of ``nn.Embedding``, and the head, which is the
    matrix that was registered last. Where the module has several heads, or one that is registered ahead of hidden
    layers, give parameter groups that say ``use_muon``. The freedoms are found as by :func:`ec_sgd`.

    Args:
        module: the module that is trained, in ``configure_optimizers`` usually ``self``.
        params: parameters or parameter groups to optimise; by default all of the module's that require a gradient.
        lr: learning rate, of Muon and AdamW: one that suits AdamW suits both.
        **options: those of :class:`~lightning_ecopt.ECMuon`: ``weight_decay``, ``momentum``, ``rule`` and so on.

    Raises:
        RuntimeError: if torch has no Muon, as before 2.9.
        TypeError: if an option is unknown.
        ValueError: for options out of range, parameters that are not the module's, and parameter groups of which some
            say ``use_muon`` and some do not.

    Example::

        def configure_optimizers(self):
            return ec_muon(self, lr=3e-3)
    """
    check_module("ec_muon", "ECMuon", module, params)
    followers = options.pop("followers", None)  # names, perhaps, which only the module knows
    groups = marked(_given(module, params), hidden_matrices(module))
    return _bound(ECMuon(groups, lr, **options), module, followers)


def _given(module: nn.Module, params: Iterable[Any] | None) -> list[Any]:
    if params is None:
        return [p for p in module.parameters() if p.requires_grad]
    given = list(params)
    for part in given:
        if isinstance(part, dict) and isinstance(part["params"], Iterator):  # which can be read only once
            part["params"] = list(part["params"])
    own = {id(p) for p in module.parameters()}
    parts = [part["params"] if isinstance(part, dict) else part for part in given]
    flat = [p for part in parts for p in ([part] if isinstance(part, Tensor) else part)]
    foreign = sum(id(p) not in own for p in flat if isinstance(p, Tensor))
    if foreign:
        raise ValueError(
            f"{foreign} of the given parameters are not parameters of {type(module).__name__}: "
            "pass the module that owns all of them."
        )
    return given


def _bound(optimizer: _Optimizer, module: nn.Module, followers: Given | None) -> _Optimizer:
    if isinstance(module, LightningModule) and module._trainer is not None:
        check_strategy(type(optimizer).__name__, module._trainer, "return a plain optimizer")
    optimizer.bind(partial(find_group, module, followers=followers_of(module)), followers)
    if isinstance(module, LightningModule):
        follow_trainer(optimizer, module)
        _carry_rules(module)
    return optimizer


def check_strategy(what: str, trainer: Trainer, otherwise: str) -> None:
    """Refuse a strategy that takes parameters apart.

    Args:
        what: does not work with it.
        trainer: has the strategy.
        otherwise: the last way out.

    Raises:
        MisconfigurationException: with the strategies that work.
    """
    if {base.__name__ for base in type(trainer.strategy).__mro__} & set(UNSUPPORTED_STRATEGIES):
        raise MisconfigurationException(
            f"{what} does not work with {type(trainer.strategy).__name__}, whose parameters have lost their shapes: "
            f"use one device, strategy='ddp' or ModelParallelStrategy, or {otherwise}."
        )


class RuleStates(Callback):
    """Saves the states of the rules of sharded optimizers, and gives them back when training begins.

    ``torch.distributed.checkpoint``, by which a Trainer saves sharded optimizers, takes the state of the base alone.

    Args:
        trainer: whose optimizers they are.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self._trainer = trainer
        self._saved: Mapping[str, Any] = {}  # the state that a checkpoint has brought

    @property
    def state_key(self) -> str:
        """The name of the state in a checkpoint, the same for ``EquivalentClassOptimization`` and without it."""
        return "EquivalentClassOptimization"

    def running(self) -> list[EquivalentClassOptimizer]:
        """The optimizers whose rules are saved."""
        optimizers = [] if self._trainer is None else self._trainer.optimizers
        return [optimizer for optimizer in optimizers if isinstance(optimizer, EquivalentClassOptimizer)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what was brought to a fit that has not begun."""
        self._saved = {}

    def state_dict(self) -> dict[str, Any]:
        """The states of the rules, if parameters are sharded; otherwise they are in the optimizers' states."""
        if any(is_sharded(p) for optimizer in self.running() for p in parameters_of(optimizer)):
            return {"rules": [optimizer.rule_state() for optimizer in self.running()]}
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give optimizers the states back that are not in their own."""
        for optimizer, saved in zip(self.running(), self._saved.get("rules", ()), strict=False):
            optimizer.load_rule_state(saved)
        self._saved = {}


def _carry_rules(module: LightningModule) -> None:
    """Have the Trainer of a module save and restore what the rules of sharded optimizers need, if nobody does yet."""
    trainer: Any = module._trainer
    if trainer is None or any(isinstance(callback, RuleStates) for callback in trainer.callbacks):
        return
    carrier = RuleStates(trainer)
    # Most strategies restore the states of callbacks before there are optimizers.
    brought = trainer._checkpoint_connector._loaded_checkpoint.get("callbacks", {}).get(carrier.state_key, {})
    if brought or any(map(is_sharded, module.parameters())):
        carrier.load_state_dict(brought)
        trainer.callbacks.append(carrier)


def follow_trainer(optimizer: EquivalentClassOptimizer, module: LightningModule) -> None:
    """Let an optimizer know what the Trainer of a module knows."""
    optimizer.follow_epochs(partial(current_epoch, module))
    optimizer.follow_precision(partial(current_precision, module))


def current_epoch(module: LightningModule) -> int | None:
    """The epoch that the Trainer of a module is in; ``None`` outside of a Trainer."""
    return None if module._trainer is None else int(module._trainer.current_epoch)


def current_precision(module: LightningModule) -> str | None:
    """The precision of the Trainer of a module; ``None`` outside of a Trainer."""
    return None if module._trainer is None else str(module._trainer.precision)


def followers_of(module: nn.Module, given: Given | None = None) -> Followers:
    """The copies of a module's weights that follow them: in the module, and in the callbacks of its Trainer.

    Args:
        module: the module.
        given: those that are told by hand.
    """
    if not isinstance(module, LightningModule):
        return Followers(module, given)
    return Followers(module, given, partial(_callbacks, module), partial(_trained, module))


def _callbacks(module: LightningModule) -> dict[str, object]:
    callbacks = [] if module._trainer is None else list(module._trainer.callbacks)  # type: ignore[attr-defined]
    return {type(callback).__name__: callback for callback in reversed(callbacks)}


def _trained(module: LightningModule) -> set[int] | None:
    """The ``id`` of all that optimizers train; ``None`` if there are no optimizers yet."""
    optimizers = [] if module._trainer is None else module._trainer.optimizers
    return {id(p) for optimizer in optimizers for p in parameters_of(optimizer)} or None


def find_group(module: nn.Module, parameters: Iterable[Tensor], followers: Followers | None = None) -> DeferredGroup:
    """The group of a module: of its example inputs now, and of its first call later.

    The example inputs of a ``LightningModule`` are traced at once, and its first ``training_step`` as it happens; of
    another module, the next call of ``forward``. Parameters that are none of the module's are held fixed.

    Args:
        module: the module.
        parameters: those that are trained.
        followers: what follows them; by default what is found.

    Raises:
        ValueError: if followers that are told by hand do not fit.
    """
    parameters = list(parameters)
    followers = followers_of(module) if followers is None else followers
    followers.check(parameters)
    found = _deferred(module, parameters, followers)
    found.followers = followers
    return found


def _deferred(module: nn.Module, parameters: list[Tensor], followers: Followers) -> DeferredGroup:
    gathering_modules(_outermost(module))  # FSDP1 tells no other way of what parameters are pieces
    are_sharded = any(map(is_sharded, parameters)) or any(map(is_sharded, module.parameters()))
    if not isinstance(module, LightningModule):
        if are_sharded:
            return GroupFromModuleCalls(parameters, module=module)
        return GroupFromNextCall(module, "forward", parameters)
    gather = partial(_gather, module)
    equations = _trace_example(module, parameters, followers)
    if are_sharded:
        return GroupFromModuleCalls(parameters, gather, module, equations)
    return GroupFromNextCall(module, "training_step", parameters, gather, equations)


def _outermost(module: nn.Module) -> nn.Module:
    """What a strategy of Lightning has wrapped around a ``LightningModule``; another module itself."""
    trainer = module._trainer if isinstance(module, LightningModule) else None
    model = None if trainer is None else trainer.strategy.model
    return model if isinstance(model, nn.Module) else module


def _gather(module: LightningModule, group: ScalingGroup, equations: Equations) -> Sequence[Equations] | None:
    trainer = module._trainer
    return gather_if_different(group, equations) if trainer is not None and trainer.world_size > 1 else None


def _trace_example(module: LightningModule, parameters: Iterable[Tensor], followers: Followers) -> Equations | None:
    """The equations of the example inputs, if there are any that can be traced; otherwise a warning says why not."""
    if module.example_input_array is None or any(map(is_lazy, module.parameters())):
        return None
    try:
        return _traced_example(module, parameters, followers)
    except Exception as error:
        name = type(module).__name__
        warn(f"The example_input_array of {name} cannot be traced, so its first training step is watched: {error!r}")
        return None


def _traced_example(module: LightningModule, parameters: Iterable[Tensor], followers: Followers) -> Equations:
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
    chosen = select_parameters(module, parameters, plainly_named)
    copies = followers.seen_by_trace(chosen)
    with context:
        try:
            return trace_call(module, module, chosen, copies, tuple(args), dict(kwargs))
        except ValueError:  # batch norm in training mode, say, wants more than one value; other mistakes show up again
            with _evaluation_mode(module):
                return trace_call(module, module, chosen, copies, tuple(args), dict(kwargs))


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
