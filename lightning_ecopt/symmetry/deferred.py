"""A scaling group that is known now or later, as optimizers hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from lightning_ecopt.symmetry.group import ScalingGroup


class DeferredGroup(ABC):
    """A scaling group that is known now, or will be once training has begun.

    Args:
        check: called by :meth:`settle` with the group, once; what it raises goes to whoever wants to use the group.

    Example::

        deferred = GroupFromNextCall(model, "forward")
        assert deferred.settle() is None
        model(x)
        assert deferred.settle().num_units == 8
    """

    def __init__(self, check: Callable[[ScalingGroup], object] | None = None) -> None:
        self._check = check
        self._checked: ScalingGroup | None = None

    @property
    @abstractmethod
    def group(self) -> ScalingGroup | None:
        """The group as far as it is known; ``None`` if it is not."""

    @property
    @abstractmethod
    def missing(self) -> str:
        """What has not happened while there is no group, for messages."""

    def cancel(self) -> None:  # noqa: B027
        """Wait no longer. The group stays if it is known."""

    def settle(self) -> ScalingGroup | None:
        """The group, checked, to be used from now on; ``None`` if it is not known."""
        group = self.group
        if group is not None and group is not self._checked and self._check is not None:
            self._check(group)
        self._checked = group
        return group


class KnownGroup(DeferredGroup):
    """A scaling group that is known already.

    Args:
        group: the group.
    """

    def __init__(self, group: ScalingGroup) -> None:
        super().__init__()
        self._group = group

    @property
    def group(self) -> ScalingGroup:
        """The group."""
        return self._group

    @property
    def missing(self) -> str:
        """Nothing is."""
        return ""
