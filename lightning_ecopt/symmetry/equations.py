"""The equations that the operations of one call impose on its unknown scales.

Beside what labels have to do with each other (:class:`~.scales.Scales`), these say how the elements of parameters scale
(:meth:`Equations.assign`). Nothing is solved here; :mod:`~lightning_ecopt.symmetry.solve` does that after the call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from lightning_ecopt.symmetry.labels import (
    FIXED,
    ZERO,
    Cases,
    IntArray,
    ParameterView,
    Value,
    align,
    compress,
    constant,
    varying,
)
from lightning_ecopt.symmetry.regions import Region, box, cut, overlap, without
from lightning_ecopt.symmetry.scales import Operation, Scales

#: A parameter with more elements than this gets no scale for each element.
MOST_ELEMENTS = 2**16
#: A parameter whose uses overlap in so many parts is held fixed.
MOST_PARTS = 64


@dataclass(eq=False)
class Use:
    """A box-shaped region of a parameter, and how its elements scale: by ``incoming / outgoing``.

    Args:
        region: slices of the parameter.
        incoming: label of the units that the elements lead into; it broadcasts to the region.
        outgoing: label of the units that the elements lead out of; it broadcasts to the region.
        additive: whether the elements are added, as a bias is.
    """

    region: Region
    incoming: IntArray
    outgoing: IntArray
    additive: bool

    def on(self, part: Region) -> Use:
        """The use of a part of the region."""
        incoming, outgoing = (cut(ids, self.region, part) for ids in (self.incoming, self.outgoing))
        return replace(self, region=part, incoming=incoming, outgoing=outgoing)

    def together(self, other: Use) -> tuple[Use, Use] | None:
        """Two uses that overlap, each extended to the other along axes on which the labels of neither change.

        So the first rows of a table that sequences of two lengths read stay one region. ``None`` if none is extended.
        """
        uses = self, other
        changing = varying(*(ids for use in uses for ids in (use.incoming, use.outgoing)))
        pairs = list(enumerate(zip(self.region, other.region, strict=True)))
        if all(a == b or axis in changing for axis, (a, b) in pairs):
            return None
        hull = {k: slice(min(a.start, b.start), max(a.stop, b.stop), 1) for k, (a, b) in pairs if a != b}
        first, second = (
            tuple(part if k in changing else hull.get(k, part) for k, part in enumerate(use.region)) for use in uses
        )
        return replace(self, region=first), replace(other, region=second)


@dataclass(eq=False)
class Equations(Scales):
    """Collects scales and equations; knows nothing of how operations are traced.

    Args:
        shapes: shapes of the parameters that may be rescaled, by name.
        uses: for each parameter how the elements of its regions scale.
        hidden_uses: the same, of elements that have met zeros only: these say nothing about ``outgoing``.
        seen: names of the parameters that an operation has consumed.

    Example::

        equations = Equations({"weight": (6, 4)})
        h = equations.fresh((1, 6))  # linear: a scale for each output channel
        equations.assign(ParameterView.whole("weight", (6, 4)), h.T, constant(FIXED, 2), additive=False)
        equations.hold_fixed(h)  # sigmoid
    """

    shapes: Mapping[str, tuple[int, ...]]
    uses: dict[str, list[Use]] = field(default_factory=dict)
    hidden_uses: dict[str, list[Use]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def hold_fixed(self, value: Value | Cases) -> None:
        """Demand that the elements do not change."""
        value = value.value if isinstance(value, Cases) else value
        if isinstance(value, ParameterView):
            self.assign(value, constant(FIXED, 0), constant(FIXED, 0), additive=False)
        else:
            self.match(value, constant(FIXED, value.ndim))

    def hold_all_fixed(self) -> None:
        """Demand that no parameter changes, and forget all that was demanded before."""
        for demands in (self.uses, self.hidden_uses, self.equalities, self.relations, self.fixings):
            demands.clear()
        for name, shape in self.shapes.items():
            self.hold_fixed(ParameterView.whole(name, shape))

    def materialise(self, view: ParameterView, uniform: Iterable[int] = ()) -> IntArray:
        """Give a parameter a label, so that it can be used like any other tensor.

        An earlier use of the same elements decides the label. Otherwise each element gets a new scale. If these would
        be more than ``MOST_ELEMENTS``, scales change along one axis only: the channels of an image, or the last one.

        Args:
            view: the parameter.
            uniform: axes of the view along which the operation will demand one scale.
        """
        first, *others = view.parts()
        ids = self._known(first)
        if ids is None:
            free = sorted(view.varying() - set(uniform))
            sizes = [max(axis.shape[k] for axis in view.axes) for k in range(view.ndim)]
            if prod(sizes[k] for k in free) > MOST_ELEMENTS:
                free = [1 if view.ndim > 3 and 1 in free else free[-1]]
            ids = self.fresh([size if k in free else 1 for k, size in enumerate(sizes)])
            self.assign(first, ids, constant(FIXED, 0), additive=False)
        for other in others:
            self.assign(other, ids, constant(FIXED, 0), additive=False)
        return ids

    def _known(self, view: ParameterView) -> IntArray | None:
        """The label of a view whose elements were used before; ``None`` if they were not, or not as one region."""
        region = box(view, self.shapes[view.name])
        for use in self.uses.get(view.name, []):
            if region is not None and use.region == region:
                labels = [
                    self._push_forward(view, self.uniform(ids, view.picked)) for ids in (use.incoming, use.outgoing)
                ]
                if prod(np.broadcast_shapes(*(ids.shape for ids in labels))) > MOST_ELEMENTS:
                    labels[1] = self.uniform(labels[1], range(labels[1].ndim))
                return self.combine((1, labels[0]), (-1, labels[1]), (1, view.factor))
        return None

    def multiply(self, view: ParameterView, exponent: int, ids: IntArray) -> ParameterView:
        """The view after a product with a tensor of label ``ids``, or after division by it: ``exponent`` -1."""
        return view.each(lambda part: replace(part, factor=self.combine((1, part.factor), (exponent, ids))))

    def is_box(self, view: ParameterView) -> bool:
        """Whether every part of the view shows all elements of a box-shaped region, so that it can be consumed."""
        return all(box(part, self.shapes[part.name]) is not None for part in view.parts())

    def _push_forward(self, view: ParameterView, ids: IntArray) -> IntArray:
        """Carry a label of the box that the view shows to the view."""
        nowhere = np.zeros((1,) * view.ndim, np.int64)
        positions = [np.unique(axis, return_inverse=True)[1].reshape(axis.shape) for axis in view.axes]
        return ids[tuple(p if size > 1 else nowhere for p, size in zip(positions, ids.shape, strict=True))]

    def assign(self, view: ParameterView, incoming: IntArray, outgoing: IntArray, *, additive: bool) -> None:
        """Record that the elements of ``view`` scale by ``incoming / outgoing``, labels that broadcast to the view.

        Every further use of the same elements must agree. A use whose elements are not a regular box of the parameter
        holds the whole parameter fixed. A use whose elements meet zeros only, as those of a recurrent weight in its
        first step, demands nothing: any other use decides.
        """
        for part in view.parts():
            self._assign(part, incoming, outgoing, additive)

    def _assign(self, view: ParameterView, incoming: IntArray, outgoing: IntArray, additive: bool) -> None:
        self.seen.add(view.name)
        if (view.factor > FIXED).any():
            incoming, outgoing = self._without_factor(view, incoming, outgoing)
        region, is_hidden = box(view, self.shapes[view.name]), bool((outgoing == ZERO).all())
        if region is None:
            if not is_hidden:
                self._fix_parameter(view.name, (incoming, outgoing))
            return
        use = Use(region, self._pull_back(view, incoming), self._pull_back(view, outgoing), additive)
        if is_hidden:
            self.hidden_uses.setdefault(view.name, []).append(use)
        else:
            self._add(view.name, use)

    def _add(self, name: str, use: Use) -> None:
        """Record a use of a region. Where elements have an earlier use, the two must agree."""
        own = self.uses.setdefault(name, [])
        for place, earlier in enumerate(own):
            shared = overlap(earlier.region, use.region)
            if shared is None:
                continue
            both = earlier.together(use)
            outside, beyond = (without(each.region, shared) for each in (earlier, use))
            if both is not None:
                del own[place]
                for each in both:
                    self._add(name, each)
            elif outside and len(own) >= MOST_PARTS:
                self._fix_parameter(name, (use.incoming, use.outgoing))
            else:
                own[place : place + 1] = [earlier.on(part) for part in (shared, *outside)]
                self._agree(own[place], use.on(shared))
                for part in beyond:
                    self._add(name, use.on(part))
            return
        own.append(use)

    def _without_factor(self, view: ParameterView, incoming: IntArray, outgoing: IntArray) -> tuple[IntArray, IntArray]:
        """The labels of the parameter alone, if its view times a factor scales by ``incoming / outgoing``."""
        incoming, outgoing, factor = (align(ids, view.ndim) for ids in (incoming, outgoing, view.factor))
        if varying(factor) & varying(outgoing) and not varying(factor) & varying(incoming):
            return incoming, self.combine((1, outgoing), (1, factor))
        return self.combine((1, incoming), (-1, factor)), outgoing

    def _agree(self, earlier: Use, use: Use) -> None:
        """Demand that two uses of one region have the same ``incoming / outgoing``."""
        earlier.additive &= use.additive
        pairs = ((earlier.incoming, use.incoming), (earlier.outgoing, use.outgoing))
        if any((ids == ZERO).any() for pair in pairs for ids in pair):  # elements that meet zeros need not agree
            earlier.incoming, earlier.outgoing = (self.equate(*pair) for pair in pairs)
            return
        terms = [(1, pairs[0][0]), (-1, pairs[0][1]), (-1, pairs[1][0]), (1, pairs[1][1])]
        for k, (first, second) in enumerate(pairs):
            if np.array_equal(first, second):
                one, other = pairs[1 - k]
                if one.shape == other.shape or 1 in (one.size, other.size):
                    self.equate(one, other)
                    return
                terms = terms[2:] if k == 0 else terms[:2]
        self.cancel(*terms)

    def _fix_parameter(self, name: str, labels: Iterable[IntArray]) -> None:
        for ids in labels:
            self.hold_fixed(ids)
        for use in self.uses.get(name, []):
            self.hold_fixed(use.incoming)
            self.hold_fixed(use.outgoing)
        ndim = len(self.shapes[name])
        whole = tuple(slice(0, size, 1) for size in self.shapes[name])
        self.uses[name] = [Use(whole, constant(FIXED, ndim), constant(FIXED, ndim), additive=False)]

    def _pull_back(self, view: ParameterView, ids: IntArray) -> IntArray:
        """Carry a label of a view back to the box of the parameter that the view shows."""
        ndim = view.ndim
        ids = align(ids, ndim)
        # The parameter is the same wherever the view only repeats it.
        repeated = [k for k in range(ndim) if ids.shape[k] > 1 and k not in view.varying()]
        ids = compress(self.uniform(ids, repeated))
        changing = varying(ids)
        # Axes of the parameter on which the label depends; along the others it has size 1.
        wanted = {axis for axis, index in enumerate(view.axes) if changing & varying(index)}
        positions, shape = [], []
        for axis, index in enumerate(view.axes):
            numbers, position = np.unique(index, return_inverse=True)
            shape.append(len(numbers) if axis in wanted else 1)
            positions.append(position.reshape(index.shape) if axis in wanted else np.zeros((1,) * ndim, np.int64))
        *positions, ids = np.broadcast_arrays(*positions, ids)
        result = np.full(shape, ZERO, dtype=np.int64)
        result[tuple(positions)] = ids
        self.equate(result[tuple(positions)], ids)  # one element reached twice must have one label
        return compress(result)

    def restricted(self, names: Collection[str]) -> Equations:
        """The same equations without the uses of parameters that are not among the names."""
        uses, hidden = (
            {name: own for name, own in of.items() if name in names} for of in (self.uses, self.hidden_uses)
        )
        return replace(self, uses=uses, hidden_uses=hidden, seen=self.seen & set(names))

    def renamed(self, names: Mapping[str, str]) -> Equations:
        """The same equations with other names of the parameters."""
        shapes = {names[name]: shape for name, shape in self.shapes.items()}
        uses, hidden = ({names[name]: own for name, own in of.items()} for of in (self.uses, self.hidden_uses))
        return replace(self, shapes=shapes, uses=uses, hidden_uses=hidden, seen={names[name] for name in self.seen})

    def absorb(self, other: Equations) -> None:
        """Demand what the equations of another call of the same parameters demand, too."""
        offset = self.num_scales - 1
        self.fresh((other.num_scales - 1,))

        def renumbered(ids: IntArray) -> IntArray:
            return np.where(ids > FIXED, ids + offset, ids)

        self.seen |= other.seen
        self.equalities += [renumbered(pairs) for pairs in other.equalities]
        self.relations += [replace(relation, scales=renumbered(relation.scales)) for relation in other.relations]
        self.fixings += [(operation, renumbered(ids)) for operation, ids in other.fixings]
        self.operation = Operation("another call", "")

        def moved(use: Use) -> Use:
            return replace(use, incoming=renumbered(use.incoming), outgoing=renumbered(use.outgoing))

        for name, uses in other.hidden_uses.items():
            self.hidden_uses.setdefault(name, []).extend(map(moved, uses))
        for name, uses in other.uses.items():
            for use in uses:
                self._add(name, moved(use))
