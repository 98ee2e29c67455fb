"""One rule per ATen operation: from the labels of its inputs to the labels of its outputs.

A rule is a function of a :class:`Call`. It returns the label of each output, and writes to ``call.equations`` the
equations under which these labels are right. An operation without a rule has all that it touches held fixed: that costs
freedoms, never correctness. So an operation is worth a rule if networks put it between their units.

How to add one, for the example of ``aten::hypot``, which is ``sqrt(x**2 + y**2)``:

1. Find the name. :func:`~lightning_ecopt.symmetry.aten.base_name` gives it to overloads, in-place and ``out=`` forms
   alike, and ``group.summary()`` prints it, with the freedoms that the missing rule costs. Operations that torch
   itself takes apart, such as ``aten::matmul``, are seen as their parts and need no rule.
2. Ask what happens to the output if the inputs are multiplied by positive factors. Here ``f(c x, c y) = c f(x, y)``,
   and nothing can be said if the factors differ. So both labels must agree, and are the label of the output.
3. Write that down in the file of the family, in the names of the operation's schema,
   ``hypot(Tensor self, Tensor other) -> Tensor``::

       @rule("hypot")
       def hypotenuse(call: Call) -> IntArray:  # f(c x, c y) = c f(x, y) for c > 0
           return call.equations.equate(call.broadcast("self"), call.broadcast("other"))

4. Add a row to the table of the family in ``tests/symmetry/rules``; CONTRIBUTING.md says how.

What a rule is mostly made of:

===================================================  =============================================================
``call.ids(name)``                                   the label of an argument, as one array
``call.value(name)``                                 the same, but a parameter stays a :class:`ParameterView`
``call.label(name)``                                 the same, perhaps in factors: a :class:`Product`
``call.broadcast(name)``                             the label with as many axes as the output
``call.uniform(name, axes)``                         demand one scale along axes: whatever is summed, or chosen among
``call.hold_fixed(name)``                            demand that an argument does not change
``call.equations.equate(a, b)``                      demand equal labels: whatever is added
``call.equations.combine((1, a), (-1, b))``          the label of a quotient, with new scales
``call.equations.product(a, b)``                     the label of a product, perhaps in factors
``call.equations.fresh(shape)``                      new scales
``call.equations.assign(parameter, a, b, ...)``      the elements of a parameter scale by ``a / b``
``constant(FIXED, ndim)``, ``constant(ZERO, ndim)``  the label of what must not change, and of zeros
===================================================  =============================================================

Where data choose among experts, a rule is asked about all of them at once if its operation keeps rows apart: the table
in :mod:`~lightning_ecopt.symmetry.rules.cases` says which operations do.

Two rules for rules: along batch, position and pixel axes a label must have size 1, as those have other sizes in the
next call; and whoever is in doubt holds fixed.
"""

from __future__ import annotations

from lightning_ecopt.symmetry.rules import (
    attention,
    cases,
    complex_numbers,
    contractions,
    factories,
    gradients,
    images,
    indexing,
    normalization,
    pointwise,
    recurrent,
    reductions,
    views,
)
from lightning_ecopt.symmetry.rules.registry import RULES, Call, rule

__all__ = [
    "RULES",
    "Call",
    "attention",
    "cases",
    "complex_numbers",
    "contractions",
    "factories",
    "gradients",
    "images",
    "indexing",
    "normalization",
    "pointwise",
    "recurrent",
    "reductions",
    "rule",
    "views",
]
