"""A scaling group that is known now or later, as optimizers hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor

from lightning_ecopt.symmetry.followers import Followers
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.held import HeldUnits
from lightning_ecopt.symmetry.scales import Operation


class Checks(WeakSet[Any]):
    """Objects of optimizers, which may end before their group does."""

    def __reduce__(self) -> tuple[type[Checks], tuple[list[Any]]]:
        return Checks, (list(self),)


class DeferredGroup(ABC):
    """A scaling group that is known now, or will be once training has begun, and may grow when more is trained.

    Example::

        deferred = GroupFromNextCall(model, "forward")
        assert deferred.settle() is None
        model(x)
        assert deferred.settle().num_units == 8

    Attributes:
        held: units that are held fixed, although the traced calls leave them free.
        followers: copies of the weights that are rescaled with them.
        checks: one object for each optimizer that has the group from here, which sees the others'.
    """

    def __init__(self) -> None:
        self.held = HeldUnits()
        self.followers = Followers()
        self.checks = Checks()

    @property
    @abstractmethod
    def group(self) -> ScalingGroup | None:
        """The group as far as it is known; ``None`` if it is not."""

    @property
    @abstractmethod
    def missing(self) -> str:
        """What has not happened while there is no group, for messages."""

    @property
    def version(self) -> int:
        """Another number than before means that :meth:`settle` may return another group."""
        return 0

    @abstractmethod
    def settle(self) -> ScalingGroup | None:
        """The group of what is trained now, or has been, to be used from now on; ``None`` if it is not known.

        It is the same object while nothing has changed. All ranks that train together call it together.
        """

    @abstractmethod
    def covers(self, parameters: Iterable[Tensor]) -> bool:
        """Whether the group was looked for with these parameters in view, so that nobody has to look again."""

    def watch(self, closure: Callable[[], Any]) -> Any:
        """Return what a closure returns that computes a loss for a step, and trace it if more may be told by it."""
        return closure()

    def note_step(self, parameters: Iterable[Tensor]) -> bool:
        """Take note of a step of an optimizer with these parameters; returns whether it has to leave scales alone.

        It has to in the midst of the first call that uses them and is traced: nobody knows what the rest will demand.
        """
        return False

    def cancel(self) -> None:  # noqa: B027
        """Wait no longer. The group stays if it is known."""

    @abstractmethod
    def hold(self, units: Tensor, why: Operation) -> None:
        """Hold units of the present group fixed from now on, for all optimizers that have the group from here.

        Args:
            units: ``bool[H]``; the same on all ranks that train together.
            why: for the report.
        """

    def follow(self, group: ScalingGroup) -> bool:
        """Look for copies of what is trained, which are to follow it from now on.

        Returns:
            Whether the weights may be rescaled now, with all that follows them.
        """
        self.followers.look(group.parameters)
        return True

    def agreed(self, units: Tensor) -> Tensor:
        """Units (``bool[H]``) that are marked on one of the ranks that train together, which all call it together."""
        return units

    @property
    def has_exact_gradients(self) -> bool:
        """Whether gradients are those of the loss, as far as is known."""
        return True

    def begin_join(self) -> bool:
        """Return whether ranks that train together, of which some may have missed steps, are to begin anew."""
        return False

    def look_again(self) -> None:  # noqa: B027
        """Watch one more call: a parameter that no call has used has got a gradient."""

    @property
    def may_differ(self) -> bool:
        """Whether another run of the same network may know another group by now: not all was seen in the first call."""
        return False

    def saved(self) -> dict[str, Any] | None:
        """What a checkpoint needs for another run to know the same group; ``None`` if nothing does."""
        return {"held": self.held.saved()} if self.held else None

    @abstractmethod
    def load(self, state: Mapping[str, Any] | None, names: Collection[str]) -> Callable[[], None]:
        """Add what :meth:`saved` returned in another run, in which the named parameters had been trained.

        The units that were held then are held, and no others.

        Returns:
            A function that takes it back.

        Raises:
            ValueError: if it is damaged.
        """

    def confirm(self) -> None:  # noqa: B027
        """Take note that another run has traced calls, and found the group that is known here."""

    def take_back(self, names: Collection[str]) -> ScalingGroup | None:
        """The group as it was when these parameters, and no others, had been trained; ``None`` if that is unknown."""
        group = self.group
        return group if group is not None and group.parameters.keys() == set(names) else None


class KnownGroup(DeferredGroup):
    """A scaling group that is known already.

    Args:
        group: the group.
    """

    #: By the identity of what was given, which each keeps alive.
    _shared: ClassVar[WeakValueDictionary[int, KnownGroup]] = WeakValueDictionary()

    @classmethod
    def of(cls, group: ScalingGroup) -> KnownGroup:
        """The one object for a group: optimizers that are given the same group hold the same units fixed."""
        return cls._shared.setdefault(id(group), cls(group))

    def __init__(self, group: ScalingGroup) -> None:
        super().__init__()
        self._given = self._group = group
        self._version = 0

    @property
    def group(self) -> ScalingGroup:
        """The group, without units that are held."""
        return self._group

    @property
    def version(self) -> int:
        """How often other units have been held."""
        return self._version

    @property
    def missing(self) -> str:
        """Nothing is."""
        return ""

    def settle(self) -> ScalingGroup:
        """The group, without units that are held."""
        return self._group

    def hold(self, units: Tensor, why: Operation) -> None:
        """Hold units of the present group fixed from now on."""
        self.held.add(self._group, units, why)
        self._apply_held()

    def load(self, state: Mapping[str, Any] | None, names: Collection[str]) -> Callable[[], None]:
        """Hold the units that were held in another run, and no others."""
        before = self.held.saved()

        def hold(marks: Any) -> None:
            self.held.load(marks)
            self._apply_held()

        hold((state or {}).get("held", ()))
        return partial(hold, before)

    def _apply_held(self) -> None:
        self._group = self.held.applied(self._given)
        self._version += 1

    def covers(self, parameters: Iterable[Tensor]) -> bool:
        """Whether the group knows all of them that are trained."""
        known = {id(p) for p in self._group.parameters.values()}
        return all(id(p) in known for p in parameters if p.requires_grad)
