"""The options of an equivalent-class optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from numbers import Integral, Number, Real
from typing import Any, ClassVar, Literal, TypedDict, TypeGuard, get_args

from lightning_ecopt.common.tensors import listing
from lightning_ecopt.kernels import Implementation

RuleName = Literal["unit", "path", "paper"]
Representative = Literal["balanced", "current"]
SkeletonChoice = Literal["max", "diagonal"]
RefreshInterval = Literal["auto", "epoch"] | int | None
Check = Literal["gradient"] | None

#: With ``refresh_interval="auto"``, steps from one refresh to the next: at least, where epochs are short, as a refresh
#: of a small network costs as much as some ten of its training steps; and where nobody tells the epoch.
FEWEST_STEPS, STEPS_WITHOUT_EPOCHS = 128, 500

#: What ``rule="paper"`` stands for: the setting of Meng et al., arXiv:1802.03713, and of its authors' public code. They
#: choose the skeleton weights once, unit i to unit i, and step in the values of the paths as these are, without bounds.
#: With skeleton weights of one, which :func:`~lightning_ecopt.set_skeleton_to_one_` sets, a path starts at one, too.
PAPER: Mapping[str, Any] = {
    "rule": "path",
    "refresh_interval": None,
    "representative": "current",
    "skeleton": "diagonal",
    "max_path_ratio": None,
    "free_start": 1.0,
}


@dataclass(frozen=True)
class Options:
    """What a user chooses of a step in the equivalent-class space: arguments of the optimizers and of the callback.

    Args:
        rule: how a step is taken. ``"unit"``: relative to the unit that takes it. ``"path"``: in the path coordinates
            of the paper. ``"paper"``: in the paper's exact setting, which is ``"path"`` with the options of
            :data:`PAPER`; they become the fields, so that ``Options(rule="paper").rule`` is ``"path"``.
        refresh_interval: when there is a refresh. ``"epoch"``: in the first step of each epoch, which a Trainer tells.
            ``"auto"``: likewise, but no sooner than 128 steps after the last; every 500 steps where nobody tells the
            epoch. A number: after so many steps. ``None``: only when ``refresh()`` asks for it.
        representative: ``"balanced"`` moves weights to the balanced member of their class at each refresh, so that
            training depends on the class alone. ``"current"`` leaves them where they are, as the paper does.
        skeleton: how the rule ``"path"`` chooses skeleton weights. ``"max"`` takes the largest weights. ``"diagonal"``
            is the paper's choice (unit i to unit i), for networks in which every unit has one weight tensor on each
            side.
        max_path_ratio: the guard of the rule ``"path"``: in one step the coordinate of a free skeleton weight, and so
            the scale of a unit, changes by at most this factor and keeps its sign. ``None`` is the paper's rule.
        free_start: value at which the rule ``"path"`` starts the coordinates of free skeleton weights. It sets how fast
            the scale of a unit may move: larger is slower.
        state_powers: for entries of the base optimizer's state that are not torch's: if a refresh multiplies weights by
            c, by which power of c does it divide the entry? 1 for means of gradients, 2 for means of their squares, -1
            for averages of weights, 0 for what has no scale.
        check: ``"gradient"`` holds units fixed that the gradient shows to change the loss, with a warning; see
            :mod:`lightning_ecopt.optim.gradient_check`. ``None`` trusts the trace.
        implementation: how the step runs, which changes its speed alone; see
            :func:`lightning_ecopt.kernels.choose_kernels`.
        defaults: values that nobody has chosen, where they are not those of the fields: ``"paper"`` replaces them.

    Raises:
        ValueError: if an option is out of range, or contradicts ``rule="paper"``.

    Example::

        Options(rule="path", refresh_interval=100)
    """

    rule: RuleName = "unit"
    refresh_interval: RefreshInterval = "auto"
    representative: Representative = "balanced"
    skeleton: SkeletonChoice = "max"
    max_path_ratio: float | None = 2.0
    free_start: float = 2.0
    state_powers: Mapping[str, int] | None = None
    check: Check = "gradient"
    implementation: Implementation = "auto"
    defaults: InitVar[Options | None] = None
    #: The values that ``rule="paper"`` has replaced, by name, until somebody sets the option or another rule.
    _replaced: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def of(cls, owner: type, **options: Any) -> Options:
        """The options of a class, which an error names.

        Raises:
            ValueError: as from the constructor: ``ECSGD: rule must be ...``.
        """
        try:
            return cls(**options)
        except ValueError as error:
            raise ValueError(f"{owner.__name__}: {error}") from None

    def __post_init__(self, defaults: Options | None) -> None:
        self._check()
        if self.rule == "paper":
            self._become_the_papers(type(self)() if defaults is None else defaults)
        # A copy, so that nothing gets in unchecked when the user changes his.
        object.__setattr__(self, "state_powers", dict(self.state_powers or {}))

    def arguments(self) -> dict[str, Any]:
        """All options by name, as the constructor takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def changed(self, owner: type, name: str, value: Any) -> Options:
        """The options with another value of one.

        ``rule="paper"`` replaces those that it stands for. Another rule puts back what it has replaced, but for options
        that were changed since.

        Args:
            owner: the class that an error names.
            name: of the option.
            value: the new one.

        Raises:
            ValueError: if it is out of range.

        Example::

            Options(rule="paper").changed(ECSGD, "rule", "unit") == Options()
        """
        back = self._replaced if name == "rule" and value != "paper" else {}
        made = Options.of(owner, **{**self.arguments(), **back, name: value}, defaults=self)
        if name != "rule":
            made._remember({other: before for other, before in self._replaced.items() if other != name})
        return made

    def _become_the_papers(self, defaults: Options) -> None:
        given = {name: getattr(self, name) for name in PAPER if name != "rule"}
        # A command line gives all options, so that one with its default cannot be told from one that was not given.
        for name, before in given.items():
            if before not in (PAPER[name], getattr(defaults, name)):
                raise ValueError(
                    f"rule='paper' sets {name} to {PAPER[name]!r}, got {shown(before)}: leave {name} out, or give "
                    "rule='path' and the options that you want"
                )
        for name, value in PAPER.items():
            object.__setattr__(self, name, value)
        self._remember({**given, **defaults._replaced})

    def _remember(self, replaced: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_replaced", replaced)

    def _check(self) -> None:
        implementations = get_args(Implementation)
        if self.implementation not in implementations:
            raise ValueError(
                f"implementation must be one of {listing(implementations)}, got {shown(self.implementation)}"
            )
        for name, kind in (("rule", RuleName), ("skeleton", SkeletonChoice), ("representative", Representative)):
            if getattr(self, name) not in get_args(kind):
                *others, last = map(repr, get_args(kind))
                raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {shown(getattr(self, name))}")
        ratio, interval, start = self.max_path_ratio, self.refresh_interval, self.free_start
        if ratio is not None and not (_is_finite(ratio) and ratio > 1):
            raise ValueError(f"max_path_ratio must be a finite number greater than 1, or None, got {shown(ratio)}")
        if not _is_interval(interval):
            raise ValueError(
                f"refresh_interval must be 'auto', 'epoch', a positive number of steps, or None, got {shown(interval)}"
            )
        if not (_is_finite(start) and start > 0):
            raise ValueError(f"free_start must be a finite number greater than 0, got {shown(start)}")
        if self.check not in ("gradient", None):
            raise ValueError(f"check must be 'gradient' or None, got {shown(self.check)}")
        if not isinstance(self.state_powers or {}, Mapping):
            raise ValueError(f"state_powers must be a mapping, got {shown(self.state_powers)}")
        for entry, power in self.degrees.items():
            if not _is_whole(power) or not -2 <= power <= 2:
                raise ValueError(f"state_powers must be whole numbers from -2 to 2, got {shown(power)} for {entry!r}")

    @property
    def degrees(self) -> Mapping[str, int]:
        """``state_powers``, empty if there are none: the degrees of :mod:`lightning_ecopt.steps.state` by entry."""
        return self.state_powers or {}


class Option:
    """An option as an attribute of an optimizer: a field of ``session.options``, as wrappers share the session."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else getattr(optimizer._session.options, self._name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        session = optimizer._session
        session.options = session.options.changed(type(optimizer), self._name, value)


class OptionArguments(TypedDict, total=False):
    """The fields of :class:`Options` as keyword arguments, so that a misspelt option is an error for a type checker."""

    rule: RuleName
    refresh_interval: RefreshInterval
    representative: Representative
    skeleton: SkeletonChoice
    max_path_ratio: float | None
    free_start: float
    state_powers: Mapping[str, int] | None
    check: Check
    implementation: Implementation


def interval_is_over(interval: RefreshInterval, steps: int, before: int | None, epoch: int | None) -> bool:
    """Whether the next step begins with a refresh.

    Args:
        interval: the option.
        steps: since the last refresh.
        before: the epoch of the last step, if there was one and it is known.
        epoch: that of the next step.
    """
    begins = None not in (before, epoch) and before != epoch
    if interval == "auto":
        return steps >= STEPS_WITHOUT_EPOCHS if epoch is None else begins and steps >= FEWEST_STEPS
    return begins if interval == "epoch" else interval is not None and steps >= interval


def _is_interval(value: object) -> bool:
    return value in (None, "auto", "epoch") or (_is_whole(value) and value >= 1)


def shown(value: object) -> str:
    """A value in a message: itself, if it is a number or a word, else its class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, Number | str | None) else type(value).__name__


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
