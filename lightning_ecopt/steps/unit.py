"""The unit rule: steps relative to the unit that takes them.

At the balanced member of the class, the one of least sum of squares, a *row* k is all the elements of one parameter
that lead into one unit, or into one value that is held fixed. With w its weights and g their gradients:

    rho_k = sqrt(mean(w**2))                    magnitude of the row, measured when a group is first used, then kept
    c     = g - 0.9 mean(g)                     centred gradient
    q_k   = running mean of mean(c**2)          over about 100 steps, this one included
    g_v   = c min(1, sqrt(q_k / mean(c**2)))    clipped to its running size: what the base optimizer is shown
    w'    = w + s_k (step of the base)

    SGD, ASGD:    s_k = f(momentum) rho_k / sqrt(q_k)           lr is the relative length of a step
    all others:   s_k = max(rho_k / rho, 1/3)                   lr keeps its meaning
    and matrices that the base treats whole, as Muon does:  s_k = |W| / |W_1|,  g_v = g

The step depends on the class alone, because the balanced member does and all of the above are functions of weights and
gradients there. Nero (Liu et al., "Learning by Turning", arXiv:2102.07227) takes the same relative step, and projects
each row to mean zero and a fixed norm. Here rho_k keeps its value of the start, which fixes the lengths of steps, too.

Why gradients are centred: the gradient of row k is the sum over the data of delta_k a, where a are the values that the
row reads. Behind a ReLU a is positive. Then one eigenvalue of the row's metric E[a a^T] is far above the others; it
belongs to the mean of a, and at the balanced member the mean is close to the direction of equal entries. Dividing the
gradient's component in this direction by 10 acts like a natural gradient there, for the price of one mean
per row. Taking the component out altogether is gradient centralization (Yong et al., arXiv:2004.01461). Rows that read
powers of free units, as of a squared ReLU, are not: few of their values are large, the mean's share is smaller.

**What lr means with SGD.** A step of SGD without momentum has the relative length lr: s_k g_v is rho_k long (root mean
square). Momentum mu adds gradients up: to 1 / (1 - mu) times their size if they are all the same, to 1 / sqrt(1 - mu^2)
times it if they are independent. f(mu), the geometric mean of 1 - mu and sqrt(1 - mu^2), is right for both to within
((1 + mu) / (1 - mu))^(1/4), which is 2.1 for 0.9; with Nesterov's momentum, too. The first step is f(mu) lr, which is
0.21 lr for 0.9, as nothing has added up yet (0.40 lr with Nesterov's). Dampening d divides f by 1 - d.

**What lr means with all others.** Their steps have a size of their own: Adam's first one moves every weight by lr. So
does that of a row of typical size: rho is the median, over the parameters, of the root mean squares of their elements
(in rows of several elements, not all zero); between two parameters it is their geometric mean. Of three or more
parameters none can move it far, however large it is: an embedding drawn from N(0, 1) does not change the steps of all
others. No row moves by less than a third of what the base would move it by. By more than three times of it move only
rows that are three times as large as rho: those of such an embedding, by lr / rho (14 lr among torch's linear layers
that read 64 values, 55 lr among those of 1,024), or of a first layer that reads few values.

rho is measured where the gains of normalisation layers are one, which is another member of the class. Networks are made
there, and the rates that people use are for weights of that size. Balancing turns gains of 1 into, say, 0.5, and
doubles the matrices behind them: s_k = rho_k / rho gives these twice the step, which is the same share of them. A
matrix W that the base treats whole takes a step of the same relative length as it would as W_1, which it is there; the
norms are those of the start, and s_k is between 1/10 and 10.

**Rows of one element** (biases, gains) have no direction. They are not centred, and take the base's own steps, s_k = 1,
unless the base is SGD or ASGD: then the rho_k of a gain is a tenth of its own magnitude, of a bias a tenth of the norm
of the weights into the same unit. Rows of several elements that are added, as positions are, are not centred either.
They begin small, and grow: they move by no less than the base would move them, and with SGD rho_k is at least typical.

With SGD and ASGD a row has at least a tenth of the typical rho_k (the median over the parameters, as for rho, but at
the balanced member), one of zeros all of it; rows of one element have at least a hundredth of the typical norm (the
median, over the parameters, of the root mean square norms of their rows), and a bias without weights into its unit has
a tenth of it. Elsewhere s_k = 1 for a row of zeros. sqrt(q_k) counts as at least 1e-5 rms_j(rho_j sqrt(q_j)) / rho_k,
with the root mean square over all rows j. So a gradient that is rounding, as before a batch norm, makes no full step.

Weight decay is lr * weight_decay * w, without s_k, where it is decoupled or the base is SGD without momentum; elsewhere
the base adds weight_decay * w / s_k to g_v, which enters its momentum or second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.common.sharding import local
from lightning_ecopt.common.tensors import Tensors, ordinary_tensors, updates_by_difference
from lightning_ecopt.kernels import Coefficient, Kernels
from lightning_ecopt.kernels.clipping import MEMORY, ClippedRows, Clipping, RowGradients, seen_of
from lightning_ecopt.kernels.lines import LineKernels, Step
from lightning_ecopt.steps.rows import Rows
from lightning_ecopt.steps.rule import (
    Advance,
    Allocation,
    Coefficients,
    Reparametrization,
    Rule,
    Setting,
    StepKind,
    UnitStatistics,
)
from lightning_ecopt.steps.state import StateEntries, weight_averages
from lightning_ecopt.symmetry import ScalingGroup
from lightning_ecopt.symmetry.coupling import NO_UNIT
from lightning_ecopt.symmetry.gains import scale_to_gains_of_one

SINGLE = 0.1  # share of a full step of SGD that rows of one element take
FLOOR = 0.1  # smallest magnitude of a row for SGD, relative to the typical one
LEAST = 1 / 3  # share of a step of the base's own size that a row takes
MOST = 10.0  # times as long, or as short, as the base's may be the step in a whole matrix


def _at_least_a_share(rho: Tensor, typical: Tensor) -> Tensor:
    """Magnitudes that are at least ``FLOOR * typical``; ``typical`` for rows of zeros, which have none of their own."""
    return torch.where(rho > 0, torch.maximum(rho, FLOOR * typical), typical)


def _median_root(squares: Tensor) -> Tensor:
    """The median of the square roots of a vector's positive entries, a scalar; 1 without any.

    Between two entries it is their geometric mean.
    """
    logs = squares[squares > 0].log().sort().values
    count = len(logs)
    middle = logs[(count - 1) // 2 : count // 2 + 1]
    return (0.5 * middle.mean()).exp() if count else squares.new_ones(())


class UnitRule:
    """Scales each row's step of a base optimizer to the magnitude of the row.

    The magnitudes rho_k are measured when the rule is made, and a refresh keeps the rule. Were they taken anew at each
    refresh, norms and steps would drive each other up, exponentially in the number of epochs.

    Args:
        group: the scaling group; rows of parameters that are not among ``parameters`` are left out.
        parameters: the base optimizer's own, by name, at the balanced member; all on one device. If they are sharded,
            all ranks take their steps together.
        kernels: make the passes over weights and gradients.
        kinds: of the base's steps, by parameter name.
        typical: the same weights where gains are one, by name; by default ``parameters``.
        means: of gradients, by name, from the base's momentum: mean(means**2) counts as one earlier mean(c**2).
    """

    @ordinary_tensors()
    def __init__(
        self,
        group: ScalingGroup,
        parameters: Tensors,
        kernels: Kernels,
        kinds: Mapping[str, StepKind],
        typical: Tensors | None = None,
        means: Tensors | None = None,
    ) -> None:
        narrowest = min((p.dtype for p in parameters.values()), key=lambda kind: torch.finfo(kind).bits)
        # s_k, and a weight divided by it, stay within the range of the weights' type.
        tiny = torch.finfo(narrowest).tiny ** 0.75
        self.kernels = kernels
        self.rows = Rows(group.couplings, parameters)
        self._linear, self._whole = self._of_kind(kinds, "linear"), self._of_kind(kinds, "whole")
        self._all_linear = self._linear is not None and bool(self._linear.all())
        size = self.rows.sizes
        self._clipped: Tensor | int = 0
        self._steps = 0
        self._moving: set[str] = set()  # names of the parameters that have a gradient in this step
        # Momentum keeps its type when somebody gives the parameters another one.
        means = {name: mean.to(parameters[name].dtype) for name, mean in (means or {}).items()}
        self._second = (1 - MEMORY) * self._sums_and_squares(means)[1] / size
        self._seen = (self._second > 0).to(torch.int16)
        reads_powers = self.rows.where(lambda each: group.monomials.has_powers(each.outgoing))
        uncentred = self.rows.single | self.rows.additive() | reads_powers
        self._clipped_rows = ClippedRows.of(size, uncentred, self._whole, tiny)
        weights = {name: local(parameter) for name, parameter in parameters.items()}
        squares = self._sums_and_squares(weights)[1]
        rho, reference = self._magnitudes(squares, squares if typical is None else self._sums_and_squares(typical)[1])
        self._own = None if self._all_linear else self._own_scale(rho, reference)
        # Where no step is linear, s_k is all that is needed.
        self._rho, self._reference = (None, None) if self._linear is None else (rho, reference)
        self._factors: Tensor | None = None  # of gradients in the last step, if it is measured
        # Taken over when the step succeeds.
        self._next: tuple[Tensor, Tensor, Tensor | int, Tensor | None] = (self._second, self._seen, 0, None)

    name, needs_paths, is_measured = "unit", False, False
    _rho: Tensor | None
    _reference: Tensor | None

    @staticmethod
    def usable_units(group: ScalingGroup) -> Tensor:
        """All units, ``bool[H]``."""
        return torch.ones(group.num_units, dtype=torch.bool, device="cpu")

    @staticmethod
    def check(group: ScalingGroup) -> None:
        """The rule works for every group."""

    @staticmethod
    def check_state(group: ScalingGroup, parameters: Tensors, state: Mapping[str, Any]) -> None:
        """The rows must be as many as those of the checkpoint.

        Raises:
            ValueError: if they are not.
        """
        rows = len(Rows(group.couplings, parameters))
        vectors = [
            state["rho" if "rho" in state else "own"],
            state["second"],
            state["seen" if "seen" in state else "weight"],
        ]
        if "rho" in state and state["reference"].ndim:  # else it is the same for all rows
            vectors.append(state["reference"])
        others = [vector.numel() for vector in vectors if vector.shape != (rows,)]
        if others:
            raise ValueError(
                f"The checkpoint was made with {others[0]} rows of weights, this optimizer has {rows}: load it into "
                "the network and the parameter groups that it was made with."
            )

    @staticmethod
    def idle_statistics(dormant: int) -> UnitStatistics:
        """Nothing was clipped."""
        return UnitStatistics(0.0, dormant)

    @classmethod
    def begin(cls, setting: Setting, entries: StateEntries, before: Rule | None) -> Rule | None:
        """The rule that was used so far, which keeps the magnitudes of the start; or a new one."""
        if setting.group.num_units == 0:
            return None
        return before if isinstance(before, cls) else cls._make(setting)

    @classmethod
    def resume(cls, setting: Setting, state: Mapping[str, Any], entries: StateEntries) -> UnitRule:
        """Take over the sizes of steps and running second moments."""
        rule = cls._make(setting)
        rule._load(state)
        return rule

    def _load(self, state: Mapping[str, Any]) -> None:
        self._second.copy_(state["second"])
        self._seen.copy_(state["seen"] if "seen" in state else seen_of(state["weight"]))  # version 0.1.0 had their sum
        # Rows of a matrix that was treated whole, or is now, have sizes of another meaning: those are measured anew.
        none = torch.zeros_like(self._second, dtype=torch.bool)
        whole = none if self._whole is None else self._whole
        same = state.get("whole", none).to(none.device) == whole
        if "rho" in state:
            rho, reference = (state[name].to(self._second) for name in ("rho", "reference"))
            if self._own is not None:
                self._own = torch.where(same, self._own_scale(rho, reference), self._own)
            if self._rho is not None and self._reference is not None:
                reference = torch.where(same, reference, self._reference)
                self._rho = torch.where(same, rho, self._rho)
                # Without whole matrices it is rho, the same for all rows.
                is_vector = self._whole is not None or not len(none)
                self._reference = reference if is_vector else reference[same.byte().argmax()]
        elif self._own is not None:  # s_k does not tell rho_k, which steps of SGD need: it stays as it is measured now
            self._own = torch.where(same, state["own"].to(self._second), self._own)

    @classmethod
    def _make(cls, setting: Setting) -> UnitRule:
        typical = None
        if setting.is_balanced and set(setting.kinds.values()) != {"linear"}:
            log_scale = scale_to_gains_of_one(setting.group, setting.active)
            if log_scale is not None:
                typical = {name: setting.weights[name].clone() for name in setting.parameters}
                setting.group.rescale_(typical, log_scale)
        means = setting.means()
        return cls(setting.group, setting.parameters, setting.kernels, setting.kinds, typical, means)

    def _of_kind(self, kinds: Mapping[str, StepKind], kind: StepKind) -> Tensor | None:
        """Rows of parameters in which the base's steps are of a kind, ``bool[R]``; ``None`` if there are none."""
        chosen = [kinds[name] == kind for name in self.rows.names]
        if all(chosen):
            return torch.tensor(any(chosen), device=self.rows.device).expand(len(self.rows))  # in no memory
        return self.rows.spread(torch.tensor(chosen, device=self.rows.device)) if any(chosen) else None

    def _sums_and_squares(self, tensors: Tensors) -> Tensor:
        """Sums and sums of squares of all rows, ``[2, R]``; zero for tensors that are missing."""
        return self.rows.reduced(self.kernels, "sums_and_squares", tensors)

    def _magnitudes(self, squares: Tensor, typical: Tensor) -> tuple[Tensor, Tensor]:
        """rho_k, ``[R]``, and what it is divided by in s_k: rho, a scalar, or ``[R]`` if there are whole matrices.

        Args:
            squares: sums of squares of the weights of each row, ``[R]``.
            typical: the same where gains are one.
        """
        rows, sizes = self.rows, self.rows.sizes
        own = (squares / sizes).sqrt()
        counted = ((squares > 0) & ~rows.single).to(squares)
        size = rows.by_parameter(sizes * counted)
        total, usual = rows.by_parameter(squares * counted), rows.by_parameter(typical * counted)
        reference = _median_root(usual / size)
        if self._whole is not None:
            own = torch.where(self._whole, rows.spread((total / size).sqrt()), own)
            reference = torch.where(self._whole, rows.spread((usual / size).sqrt()), reference)
        if self._linear is None:
            return own, reference
        typical_norm = _median_root(total / rows.by_parameter(counted))
        units, additive = rows.units(), rows.additive()
        no_unit = int(units.max()) + 1 if len(rows) else 0  # a number for rows that lead into no unit
        into = SegmentSum(torch.where(units == NO_UNIT, no_unit, units), no_unit + 1)
        into_unit = into(torch.where(additive, 0.0, squares)).sqrt()
        into_unit[no_unit] = typical_norm
        single = SINGLE * _at_least_a_share(torch.where(additive, into_unit[units], squares.sqrt()), typical_norm)
        usual = _median_root(total / size)
        several = torch.where(additive, torch.maximum(own, usual), _at_least_a_share(own, usual))
        return torch.where(self._linear, torch.where(rows.single, single, several), own), reference

    def _own_scale(self, rho: Tensor, reference: Tensor) -> Tensor:
        """s_k, ``[R]``, of rows in which the base's steps are not linear; elsewhere it has no meaning."""
        is_scaled = (rho > 0) & ~self.rows.single
        ratio = rho / reference
        scale = torch.maximum(ratio, torch.where(self.rows.additive(), torch.ones_like(ratio), LEAST))
        if self._whole is not None:  # where |W_1| has no square in its type, it tells nothing
            known = (reference > 0) & reference.isfinite()
            scale = torch.where(self._whole, torch.where(known, ratio, 1.0).clamp(1 / MOST, MOST), scale)
        return torch.where(is_scaled, scale, 1.0)

    @ordinary_tensors()
    def reparametrization(self, weights: Tensors, gradients: Tensors, to_step: Coefficient) -> Reparametrization:
        """The base steps at v = w / s_k, so that its step in v is s_k times as long in w."""
        self._moving = set(gradients)
        present = self.rows.present(gradients)
        if present is not None:
            present = self.rows.spread(present)
        sums, squares = self._sums_and_squares(gradients).unbind()
        clipped = self.kernels.clipping(self._row_gradients(sums, squares, to_step, present))
        self._note(clipped)
        return Reparametrization(clipped.step, clipped.scale, clipped.shift)

    def step_(self, kernels: LineKernels[Any], step: Step, coefficients: Coefficients, to_step: Coefficient) -> None:
        """One call: sums, clipping, and the pass of the base."""
        clipped = kernels.step_(
            step,
            lambda sums, squares: self._row_gradients(sums, squares, to_step),
            lambda of: coefficients(self.rows.spread, Reparametrization(of.step, of.scale, of.shift)),
            coefficients,
        )
        self._note(clipped)

    def _row_gradients(
        self, sums: Tensor, squares: Tensor, to_step: Coefficient, present: Tensor | None = None
    ) -> RowGradients:
        return RowGradients(
            sums,
            squares,
            self._second,
            self._seen,
            self._clipped_rows,
            present,
            self._rho,
            to_step,
            self._own,
            self._linear,
        )

    def _note(self, clipped: Clipping) -> None:
        """For :meth:`commit`."""
        factors = clipped.scale if self.is_measured else None
        self._next = (clipped.second, clipped.seen, self._clipped + clipped.num_clipped, factors)

    def transform_gradients_(self, here: Reparametrization, gradients: Tensors) -> Callable[[], None]:
        """Centre and clip gradients in place; returns the way back."""
        assert here.grad_shift is not None
        times, plus = 1 / here.grad_scale, -here.grad_shift / here.grad_scale
        self.rows.apply_(self.kernels, "affine_", gradients, times=here.grad_scale, plus=here.grad_shift)
        return lambda: self.rows.apply_(self.kernels, "affine_", gradients, times=times, plus=plus)

    def to_coordinates_(
        self, here: Reparametrization, weights: Tensors, entries: StateEntries
    ) -> Callable[[StateEntries], None]:
        """Divide weights that have gradients, and averages of them, by s_k; returns the way back."""

        def scale_(tensors: Tensors, factors: Tensor) -> None:
            moving = {name: local(tensor) for name, tensor in tensors.items() if name in self._moving}
            self.rows.apply_(self.kernels, "affine_", moving, times=factors)

        low = {name: w for name, w in weights.items() if name in self._moving and updates_by_difference(w)}
        before = {name: weight.clone() for name, weight in low.items()}
        with ExitStack() as failed:
            for name, weight in low.items():
                failed.callback(weight.copy_, before[name])
            for tensors in (weights, *weight_averages(entries)):
                scale_(tensors, 1 / here.weight_scale)
                failed.callback(scale_, tensors, here.weight_scale)
            for weight in low.values():  # where float16 ends, the step, which is all that returns, still finds room
                weight.clamp_(-torch.finfo(weight.dtype).max / 2, torch.finfo(weight.dtype).max / 2)
            entered = {name: weight.clone() for name, weight in low.items()}
            failed.pop_all()

        def to_weights_(entries: StateEntries) -> None:
            for name, weight in low.items():  # only the step is scaled back, so that no weight is rounded twice
                weight.sub_(entered[name])
            for tensors in (weights, *weight_averages(entries)):
                scale_(tensors, here.weight_scale)
            for name, weight in low.items():
                weight.add_(before[name])

        return to_weights_

    def allocate(
        self,
        here: Reparametrization,
        weights: Tensors,
        gradients: Tensors,
        entries: Sequence[Tensors],
        advance: Advance,
    ) -> Allocation:
        """Coordinates are multiplied by the s_k by which weights were divided."""
        return Allocation()

    def average_in_coordinates_(self, weights: Tensors) -> Callable[[], object]:
        """Averages of weights are kept at the weights, so that nothing moves."""
        return lambda: None

    def commit(self) -> None:
        """Take over the running second moments of the last step."""
        self._second, self._seen, self._clipped, self._factors = self._next
        self._steps += 1

    def to_weight_entries_(self, entries: StateEntries, weights: Tensors) -> None:
        """Do nothing: the base's state has entries of weights."""

    def has_weight_entries(self) -> bool:
        """The base's state has entries of weights."""
        return True

    def statistics(self, dormant: int) -> UnitStatistics:
        """The share of gradients that were clipped since the start."""
        return UnitStatistics(int(self._clipped) / max(1, self._steps * len(self.rows)), dormant)

    def clipped_rows(self) -> Tensor | None:
        """The rows whose gradients were clipped in the last step, ``bool[R]``, if that was measured."""
        return None if self._factors is None else self._factors < 1

    def state_dict(self, entries: StateEntries) -> dict[str, Any]:
        """``second``, ``seen``, and what tells the sizes of steps, ``[R]`` all.

        That is ``rho`` and ``reference``, which is rho, a scalar, or |W_1|; where no step is linear ``own``, which is
        s_k; and ``whole``, if there are whole matrices.
        """
        found = {
            "rho": self._rho,
            "reference": self._reference,
            "own": self._own if self._rho is None else None,  # else it follows from rho
            "second": self._second,
            "seen": self._seen.int(),  # not every backend of torch.distributed exchanges int16
            "whole": self._whole,
        }
        return {name: vector.clone() for name, vector in found.items() if vector is not None}
