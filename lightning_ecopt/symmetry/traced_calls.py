"""What is common to groups that are found in calls: the equations of all of them, and what is trained."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_ecopt.common.nested import tensors_in
from lightning_ecopt.common.sharding import exchange_device, may_be_sharded, shapes_of
from lightning_ecopt.common.tensors import listing
from lightning_ecopt.common.warn import warn
from lightning_ecopt.symmetry.deferred import DeferredGroup
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.group import ScalingGroup
from lightning_ecopt.symmetry.ranks import RanksOf
from lightning_ecopt.symmetry.saved_equations import packed, unpacked
from lightning_ecopt.symmetry.scales import Operation
from lightning_ecopt.symmetry.trace import Copies, all_fixed, hold_results_fixed, solved
from lightning_ecopt.symmetry.trace_mode import TraceMode

#: So many calls are not traced because they show little.
MOST_SKIPPED = 8
#: Takes the group and the equations of this rank, and gives all ranks that train together the equations of each of
#: them, in the order of the ranks; nothing if they have found the same group, ``None`` if there are no other ranks.
Gather = Callable[[ScalingGroup, Equations], Sequence[Equations] | None]


class GroupFromCalls(DeferredGroup):
    """The scaling group of parameters, from the equations of traced calls.

    Args:
        offered: the parameters that an optimizer has asked about.
        gather: collects the equations of all ranks, if several train together; called by :meth:`settle`.
        equations: of a call that has been traced already.
    """

    def __init__(
        self, offered: Iterable[Tensor], gather: Gather | None = None, equations: Equations | None = None
    ) -> None:
        super().__init__()
        self.gather = gather
        self._offered = list(offered)
        self._calls = [] if equations is None else [equations]
        self._packed: Tensor | None = None  # the equations in little memory, once they are for earlier phases alone
        self._trained: frozenset[str] = frozenset()  # names of what has been trained at any time
        self._groups: dict[frozenset[str], ScalingGroup] = {}  # from the calls so far, by the names of the trained
        self._settled: ScalingGroup | None = None
        self.is_final = False  # whether all parameters are trained and seen, so that the group stays what it is
        self._resumed: Equations | None = None  # of the run that is resumed, until a call has confirmed them
        self._has_news = False  # whether a call has been traced since they were loaded
        self._saved: Tensor | None = None  # the equations as checkpoints have them
        self._saved_version = -1  # when that was made
        self._has_grown = False  # whether further calls have told more than the first
        self._expected: frozenset[str] = frozenset()  # names of what was trained in a run that is resumed
        self.is_provisional = True  # whether no call that trains has been traced, only example inputs if anything
        self.has_ranks = False  # whether others train together with this process
        self._compresses = False  # whether they do something to gradients on the way
        self._version = self._skipped = 0

    @property
    def version(self) -> int:
        """Another number than before: a call has been traced, or something else is trained."""
        return self._version

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are traced, by name."""

    def _gathering(self) -> list[Any]:
        """The modules that gather sharded parameters for their calls."""
        return []

    @property
    def missing(self) -> str:
        """What has not happened while there is no group."""
        if self._skipped:
            return "the calls so far had a batch without rows, or modules that were lazy"
        return self._uncalled

    @property
    @abstractmethod
    def is_waiting(self) -> bool:
        """Whether the next call is to be traced."""

    @property
    @abstractmethod
    def _uncalled(self) -> str:
        """What nobody has called."""

    def note_trained(self) -> None:
        """Remember which parameters require a gradient now: from now on they belong to the group."""
        before = len(self._trained)
        self._trained |= {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        self._trained |= self._expected & self.parameters.keys()
        self._version += len(self._trained) > before

    def end_call(self) -> None:
        """Take note that there are other equations than before."""
        self._groups, self._has_news = {}, True
        self._version += 1

    def copies(self) -> Copies:
        """The tensors that follow parameters now, those included that are found at this moment."""
        return self.followers.seen_by_trace(self.parameters)

    def follow(self, group: ScalingGroup) -> bool:
        """Look for copies; one that no traced call has shown as such has the next call traced before it follows.

        One rank alone may have a copy. All ranks trace a call then and wait for that, as they rescale and gather
        together.
        """
        if self._is_agreed(self.followers.look(group.parameters)):
            self._reopen()
            self.look_again()
        return not self._is_agreed(self.followers.are_new and self.is_waiting)

    def _is_agreed(self, mark: bool) -> bool:
        return bool(self.agreed(torch.tensor([mark], device="cpu")))

    def _reopen(self) -> None:
        """Have the equations at hand again, so that others can be added."""
        if self._packed is not None:
            self._calls, self._packed, self.is_final = [unpacked(self._packed)], None, False

    def skips(self, module: nn.Module, inputs: Any) -> bool:
        """Whether not to trace a call that shows little: of a batch without rows, of modules that are lazy yet.

        Perhaps all calls have an input without elements, so that this has an end. Of several processes one may have
        such a batch while the others wait for what it has found; theirs show what its own does not.
        """
        are_several = may_be_sharded() and torch.distributed.get_world_size() > 1
        is_empty = not are_several and any(tensor.numel() == 0 for tensor in tensors_in(inputs))
        shows_little = is_empty or any(map(is_lazy, module.parameters()))
        self._skipped += shows_little
        return shows_little and self._skipped <= MOST_SKIPPED

    def equations(self) -> Equations | None:
        """The equations of all calls; ``None`` if there was none, or if one is running."""
        if len(self._calls) > 1:
            self._calls = [self._joined(self._calls)]
        return self._calls[0] if self._calls else None

    def _joined(self, parts: Iterable[Equations]) -> Equations:
        joined = Equations(shapes_of(self.parameters))
        for part in parts:
            joined.absorb(part)
        return joined

    @property
    def group(self) -> ScalingGroup | None:
        """The group as far as calls have been traced; ``None`` before the first, and during one."""
        if self.is_final:
            return self._settled
        equations = self.equations()
        if equations is None:
            return None
        if not self._trained:
            self.note_trained()
        return self._solved(self._trained, equations)

    def _solved(self, names: frozenset[str], equations: Equations) -> ScalingGroup:
        if names not in self._groups:
            try:
                found = solved(self.parameters, equations, names, self._gathering())
            except Exception as error:  # a fault of ours must not stop training
                warn(f"The freedoms cannot be solved for, so that all is held fixed: {error!r}")
                found = solved(self.parameters, all_fixed(self.parameters), names, self._gathering())
            self._groups[names] = self.held.applied(found)
        return self._groups[names]

    def hold(self, units: Tensor, why: Operation) -> None:
        """Hold units of the present group fixed from now on."""
        if self._settled is None:
            raise RuntimeError("Units are held fixed once a group is in use.")
        self.held.add(self._settled, units, why)
        self._settled = self.held.applied(self._settled)
        self._groups = {self._trained: self._settled}
        self._version += 1

    @property
    def _ranks(self) -> RanksOf | None:
        """The ranks of a module; under a Trainer all ranks train together."""
        return self.gather if isinstance(self.gather, RanksOf) else None

    def note_ranks(self, module: nn.Module) -> None:
        """Take note of the ranks that make a call of the module, which runs now."""
        ranks = RanksOf.calling(module)
        self.gather = self.gather or ranks
        self._compresses |= ranks is not None and ranks.compresses

    @property
    def has_exact_gradients(self) -> bool:
        """Whether gradients are those of the loss, and not compressed by a communication hook."""
        return not self._compresses

    @property
    def ranks_answer(self) -> bool:
        """Whether there are ranks that train together, all of which are still training."""
        return self.has_ranks and (self._ranks is None or not self._ranks.may_have_joined)

    def begin_join(self) -> bool:
        """Return whether ranks of which some may have missed steps are to begin anew."""
        return self._ranks is not None and self._ranks.begin_join()

    def agreed(self, units: Tensor) -> Tensor:
        """Units that are marked on one of the ranks that train together."""
        if self.ranks_answer:
            marks = units.to(exchange_device(self.parameters.values()), torch.int32)
            process_group = None if self._ranks is None else self._ranks.process_group
            torch.distributed.all_reduce(marks, torch.distributed.ReduceOp.MAX, process_group)
            units = (marks > 0).to(units.device)
        return units

    def settle(self) -> ScalingGroup | None:
        """The group of what is trained now, or has been; what ranks that train together have found is joined."""
        self.note_trained()
        if self._resumed is not None and self._has_news:
            self._confirm_resumed(self._resumed)
        group, equations = self.group, self.equations()
        if group is None or equations is None or group is self._settled:
            return group
        parts = None if self.gather is None else self.gather(group, equations)
        self.has_ranks = parts is not None
        if parts:
            equations, self._groups = self._joined(parts), {}
            self.replace(equations)  # the same on all ranks from now on, whichever part of it is solved for
            group = self._solved(self._trained, equations)
        before = self._settled
        if before is not None and before.fingerprint() == group.fingerprint():  # a further call has told nothing new
            group = self._groups[self._trained] = before
        elif before is not None and before.parameters.keys() == group.parameters.keys():
            self._has_grown = True
            if not self.held:  # of which other warnings have told
                _tell_lost(before, group)
        self._settled = group
        if not group.unseen and not self.is_waiting and self._trained >= self.parameters.keys():
            self.is_final, self._packed = True, packed(equations)
            self.replace(None)
        return group

    def replace(self, equations: Equations | None) -> None:
        """Use these equations in place of those of the calls so far."""
        self._calls = [] if equations is None else [equations]

    def _unpacked(self) -> Equations | None:
        return self.equations() if self._packed is None else unpacked(self._packed)

    @property
    def may_differ(self) -> bool:
        """Whether another run of the same network may know another group by now: not all was seen in the first call."""
        return self._has_grown or (self._settled is not None and bool(self._settled.unseen))

    def saved(self) -> dict[str, Any] | None:
        """What a checkpoint needs for another run to know the same group, whatever its own first call shows."""
        held = super().saved() or {}
        if self._packed is not None:
            return {"packed": self._packed, "is_waiting": self.is_waiting, **held}
        if self._saved is None or self._saved_version != self._version:
            equations = self.equations()
            self._saved = None if equations is None else packed(equations)
            self._saved_version = self._version
        return None if self._saved is None else {"packed": self._saved, "is_waiting": self.is_waiting, **held}

    def load(self, state: Mapping[str, Any] | None, names: Collection[str]) -> Callable[[], None]:
        """Add what :meth:`saved` returned in another run, in which the named parameters had been trained.

        Returns:
            A function that takes it back.
        """
        kept = ["_expected", "_calls", "_packed", "is_final", "_resumed", "_has_news", "_trained", "_settled"]
        kept.append("is_provisional")
        before, held = {name: getattr(self, name) for name in kept}, self.held.saved()

        def undo() -> None:
            vars(self).update(before)
            self.held.load(held)
            self.end_call()

        self.held.load((state or {}).get("held", ()))
        self._groups = {}
        self._expected = frozenset(names)
        equations = None if state is None else unpacked(state["packed"])
        if equations is not None and self._adopt(equations):
            own = self._unpacked()
            self._calls, self._packed, self.is_final = [*([] if own is None else [own]), equations], None, False
            self.is_provisional = False
            self._resumed = None if state is None or state.get("is_waiting") else equations
            self.end_call()
            self._has_news = False
        return undo

    def confirm(self) -> None:
        """Take note that another run has traced calls, and found the group that is known here."""
        self.is_provisional = False

    def _adopt(self, equations: Equations) -> bool:
        """Whether equations are those of the same parameters."""
        return equations.shapes == shapes_of(self.parameters)

    def _confirm_resumed(self, resumed: Equations) -> None:
        """Forget what a call has used that the resumed run had not by then, if that is all that it has told.

        The run that was interrupted found it later, if at all; the two are to end with the same bits.
        """
        self._resumed, equations = None, self.equations()
        if equations is None or self._settled is None:
            return
        again = solved(self.parameters, equations.restricted(resumed.seen), self._trained, self._gathering())
        again = self.held.applied(again)
        if again.fingerprint() == self._settled.fingerprint():
            self.replace(resumed)
            self._groups[self._trained] = self._settled
            self.cancel()

    def take_back(self, names: Collection[str]) -> ScalingGroup | None:
        """The group as it was when these parameters, and no others, had been trained."""
        wanted, equations = frozenset(names), self._unpacked()
        if equations is None or not self.parameters.keys() >= wanted:
            return None
        self._reopen()
        self._trained = wanted
        self._version += 1
        self._settled = self._solved(wanted, equations)
        return self._settled

    def covers(self, parameters: Iterable[Tensor]) -> bool:
        """Whether these are among the parameters that it was offered."""
        return {id(p) for p in self._offered}.issuperset(map(id, parameters))


def _tell_lost(before: ScalingGroup, group: ScalingGroup) -> None:
    """Warn if a further call has told that fewer units are free."""
    if group.num_units >= before.num_units:
        return
    counts = [each.scales_of_parameters() for each in (before, group)]
    names = [name for name, number in counts[0].items() if counts[1].get(name, 0) < number]
    costs = Counter(group.costs) - Counter(before.costs)
    reasons = [f"{one.name} ({one.module})" if one.module else one.name for one, _ in costs.most_common()]
    warn(
        f"{group.num_units} units are free, not {before.num_units} as an example input or an earlier call had shown: "
        f"{listing(reasons) or 'the call that was traced last'} holds fixed how {listing(names)} may be rescaled. For "
        "a loss or a penalty that is right. What is computed to be logged alone costs nothing outside of "
        "training_step, as in on_train_batch_end."
    )


def ended(mode: TraceMode, module: nn.Module, output: Any, name: str, copies: Copies = ()) -> Equations:
    """The equations of a call that has ended; whatever it leaves behind must not change, or follow its leader."""
    try:
        mode.tie_copies(copies)
        hold_results_fixed(mode, module, output, name, {id(copy) for _, copy in copies})
    except Exception as error:  # a fault of ours must not stop training
        warn(f"What {type(module).__name__} returns cannot be read, so that all is held fixed: {error!r}")
        mode.hold_all_fixed(name)
    return mode.equations
