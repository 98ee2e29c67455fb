"""Between two steps: whether somebody else has written to the weights, or has stepped past the optimizer.

A step that passes by is one of the base's own: a method beside ``step`` that moves weights, as ``first_step`` of SAM,
or the base's ``step`` itself, when the base is kept somewhere and called directly. It is plain training, whatever the
report of the freedoms says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ecopt.common.sharding import Ranks, can_be_rescaled, local, with_gradient
from lightning_ecopt.common.tensors import widest
from lightning_ecopt.common.warn import warn
from lightning_ecopt.optim import checkpoint
from lightning_ecopt.optim.binding import parameters_of
from lightning_ecopt.optim.session import Session
from lightning_ecopt.optim.stages import Idle, Running
from lightning_ecopt.optim.watching import Watching
from lightning_ecopt.optim.writers import WRITTEN, Writers

OF_TWO_PHASES = (
    "If it takes an optimizer, turn the two inside out: {name}(model.parameters(), base_optimizer=ECSGD, ...), with "
    "ECSGD or ECAdamW of lightning_ecopt and without the callback."
)
DIRECT = (
    "The step of {name} was called directly, past the {own} that wraps it: that is a plain step, not one in the "
    "equivalent-class space. Call the step of the {own}: in a LightningModule that of what self.optimizers() returns."
)
PASSING = (
    "{method} of {name} moves weights by itself, and the step of the {own} that wraps it is not called: that is plain "
    "training, not in the equivalent-class space. " + OF_TWO_PHASES + " Otherwise call step."
)
NEVER = (
    "The weights of {name} move, but the step of the {own} that wraps it has not been called: that is plain training, "
    "not in the equivalent-class space. Call the step of what self.optimizers() returns, and not that of an optimizer "
    "that is kept elsewhere. " + OF_TWO_PHASES
)


# Writers --------------------------------------------------------------------------------------------------------------


def hold_written(session: Session) -> None:
    """Hold units fixed to whose weights somebody else writes after each step. Call it just before a step."""
    units = session.writers.written(session.stage, lambda: session.kernels)
    if units is not None:
        units = session.binding.deferred.agreed(units)
        if bool(units.any()):
            session.hold(units, WRITTEN)


def note_weights(session: Session) -> None:
    """Note the weights just after a step."""
    if isinstance(session.stage, Idle | Running) and session.options.representative == "balanced":
        session.writers.note(
            session.stage, session.steps_since_refresh, session.watching.is_on, lambda: session.kernels
        )


# Steps that ranks have missed -----------------------------------------------------------------------------------------


def begin_with_others(session: Session) -> None:
    """Have all ranks begin anew if some may have missed steps, as those without batches in a ``Join`` context have.

    Their weights are the same when a context ends. What earlier steps have told is not: when to refresh, the state of
    the rule, which units are held fixed. The base's own state is left as it is, as without this package.
    """
    if session.binding.deferred.begin_join() and session.group is not None:
        session.use(session.group)
        session.watching, session.writers = Watching(), Writers()
        session.gradient_check.forget()


# Steps that pass by ---------------------------------------------------------------------------------------------------


def count_step(session: Session) -> None:
    """Take note of a call of ``step``."""
    session.steps += 1
    session.is_resting = False
    session.passed.clear()


def watch_base(session: Session) -> None:
    """Notice calls of the base's own ``step`` that come from elsewhere; the base is not kept from being released."""
    hooks = getattr(session.base, "_optimizer_step_pre_hooks", None)
    if hooks is not None:
        for number in [number for number, hook in hooks.items() if isinstance(hook, _StepHook)]:
            del hooks[number]  # of another that has wrapped it
        session.base.register_step_pre_hook(_StepHook(session))


class _StepHook:
    """Is called before each step of the base, but for those that the optimizer that wraps it takes itself."""

    def __init__(self, session: Session) -> None:
        self._session = ref(session)

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        session = self._session()
        # It shares its hooks with the optimizer that wraps it, of whose steps it hears, too.
        if session is not None and optimizer is session.base:
            _stepped_directly(session)


def _stepped_directly(session: Session) -> None:
    moves = any(options.get("lr") != 0 for options in session.base.param_groups)
    if session.is_resting or not moves or not with_gradient(parameters_of(session.base)):
        return
    _leave(session)
    _tell(session, DIRECT)


def passing(session: Session, name: str, found: Any) -> Any:
    """What an attribute of the base is for those who ask the optimizer that wraps it.

    Methods with a "step" in their names are called as ever. If one of them moves weights again before ``step`` is
    called, a warning says so.
    """
    if "step" not in name or not callable(found):
        return found

    def call(*args: Any, **kwargs: Any) -> Any:
        if name in session.passed:
            _leave(session)
            _tell(session, PASSING, method=name)
            return found(*args, **kwargs)
        before = lengths(session)
        result = found(*args, **kwargs)
        if _has_moved(session, before):
            session.passed.add(name)
        return result

    return call


def averaging(session: Session, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the base optimizer that averages weights, to be called where the base averages them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            checkpoint.restore(session)
            stage = session.stage
            if not isinstance(stage, Running):
                return method(*args, **kwargs)
            to_weights_ = stage.rule.average_in_coordinates_(session.weights(stage.network))
            try:
                return method(*args, **kwargs)
            finally:
                to_weights_()

    return call


def _has_moved(session: Session, before: str) -> bool:
    """Whether weights have other norms than before on one of the ranks that share them, which refresh together."""
    moved = torch.tensor([lengths(session) != before], device="cpu")
    return bool(Ranks({} if session.group is None else session.group.parameters).any_(moved))


def _leave(session: Session) -> None:
    """The base moves weights by itself: its state is to be at the weights, and what it does is no writer's work."""
    session.writers.forget()
    with torch.no_grad():
        session.leave_rule()
    session.refresh_due = True


def _tell(session: Session, message: str, **words: str) -> None:
    if not session.has_told:
        session.has_told = True
        warn(message.format(name=type(session.base).__name__, own="EquivalentClassOptimizer", **words))


def lengths(session: Session, but: frozenset[int] = frozenset()) -> str:
    """The norms of the weights of an optimizer, which change when somebody moves them; waits for the device.

    They are those of what this rank holds: ranks that share parameters see different ones.

    Args:
        session: of the optimizer.
        but: identities of parameters that do not count.
    """
    own = [local(p.detach()) for p in parameters_of(session.base) if id(p) not in but and can_be_rescaled(p)]
    norms: dict[torch.device, list[Tensor]] = {}
    for weight in own:
        norm = torch.linalg.vector_norm(weight, dtype=widest(weight.device))
        norms.setdefault(weight.device, []).append(norm)
    return repr([torch.stack(of).tolist() for of in norms.values()])  # in which nan is nan


class StepWatch:
    """Notices within an epoch that the weights of an optimizer move, although its ``step`` is not called.

    Weights that move in one batch alone may have been loaded, or made to fit a constraint, while gradients accumulate.
    It only warns, so that ranks that share parameters need not agree.

    Args:
        session: of the optimizer.
        others: parameters that other optimizers have, too.

    Example::

        watch = StepWatch(session)  # before a batch
        watch.look()  # after each batch
        watch.tell()  # after the epoch
    """

    def __init__(self, session: Session, others: frozenset[int] = frozenset()) -> None:
        self._session, self._others, self._steps = session, others, session.steps
        self._before = lengths(session, others)
        self._state = len(session.base.state)
        self._moves = 0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to be noticed."""
        return self._session.has_told or self._session.steps > self._steps

    def look(self) -> None:
        """Compare the weights with those of the last look."""
        if not self.is_over:
            before, self._before = self._before, lengths(self._session, self._others)
            self._moves += before != self._before

    def tell(self) -> None:
        """Warn, once, if the weights have moved."""
        has_signs = bool(self._session.passed) or len(self._session.base.state) > self._state
        if not self.is_over and self._moves >= (1 if has_signs else 2):
            _tell(self._session, NEVER)


def step_watches(optimizers: Iterable[Any], together: Iterable[Optimizer]) -> list[StepWatch]:
    """Watches for equivalent-class optimizers, which are run ``together`` with others."""
    counts = Counter(id(p) for optimizer in together for p in parameters_of(optimizer))
    shared = frozenset(key for key, count in counts.items() if count > 1)
    return [StepWatch(optimizer._session, shared) for optimizer in optimizers]
