"""Which rescalings of hidden units leave a network unchanged.

The way from a module to its units: :mod:`~.trace` calls the module, :mod:`~.trace_mode` sees its operations, the
:mod:`~.rules` write :mod:`~.equations` between :mod:`~.labels`, :mod:`~.solve` finds what remains free, and that is the
:class:`ScalingGroup`. :func:`stand_in` teaches a trace an operation, :func:`check_freedoms` counts what it has found.

Glossary. H is the number of units, m the number of weights.

==================  ================================================================================================
unit                a freedom of the network: its scale c > 0 multiplies some weights and divides others
scale               the number of an unknown factor, in a label; after solving, a product of powers of units
label               for each element of a tensor the scale by which it is multiplied when the network is rescaled
fixed               not multiplied by anything: inputs, outputs, and what no rule knows; users read "held fixed"
zero                an element that is always zero, so that it fits any scale
case                one of several labels among which data choose row by row, as among the experts of a mixture
trace               one call of the module, seen as ATen operations, with fake or with real tensors
rule (operation)    a function from the labels of an operation's inputs to the labels of its outputs
stand-in            a function that scales as an operation without a rule does, and is traced in its place
equation            a condition on scales under which the labels are right
relation            an equation that is more than the equality of two scales, such as c = a * b
coupling            a box-shaped region of a parameter, and the scales that multiply and divide its elements
incoming            the weights that lead into a unit, which its scale multiplies
outgoing            the weights that lead out of a unit, which its scale divides
monomial            a product of powers of units, as a gate's output times another's has
degree              the power of c by which a state entry is divided if weights are multiplied by c: 1 for momentum
group               all rescalings of a network, one factor for each unit
class               all weights that the group makes of given ones; they compute the same function
representative      the member of a class that computation uses: the balanced one, or the current one
balanced            of least sum of squares in its class: incoming and outgoing squares of each unit are equal
skeleton weight     one incoming weight of a unit, which pins its scale (*fixed*), or one outgoing weight, through
                    which its paths leave (*free*, unless it is another unit's fixed one)
basis path          the path of skeleton weights through one other weight; there are m - H of them
path value          the product of the weights along a basis path; divided by a constant, it is the path coordinate
row                 the weights of one parameter that lead into one unit, or into one value that is held fixed
place               a box of elements of a row, with an entry in the vectors of kernels; a row has one or several
alive, dormant      a unit on a path of non-zero weights from inputs to outputs; a unit on none
exclusive           a unit all of whose weights one optimizer holds
active              a unit that an optimizer rescales: alive and exclusive at the last refresh
refresh             a return to the representative, where the skeleton is chosen again
fused, wrapped      a step in one pass over weights, gradients and state; the base's own step between two scalings
rule (step)         how a step uses the units: ``unit`` scales steps to the size of rows, ``path`` moves path values
==================  ================================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_ecopt.common.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_ecopt.symmetry.check import check_freedoms, check_stand_in
    from lightning_ecopt.symmetry.coupling import Coupling
    from lightning_ecopt.symmetry.deferred import DeferredGroup, KnownGroup
    from lightning_ecopt.symmetry.describe import UnitSet
    from lightning_ecopt.symmetry.group import ScalingGroup
    from lightning_ecopt.symmetry.invariance import Invariance, check_invariance
    from lightning_ecopt.symmetry.module_calls import GroupFromModuleCalls
    from lightning_ecopt.symmetry.monomials import Monomials
    from lightning_ecopt.symmetry.pending import GroupFromNextCall
    from lightning_ecopt.symmetry.stand_ins import stand_in
    from lightning_ecopt.symmetry.trace import scaling_group

__all__ = [
    "Coupling",
    "DeferredGroup",
    "GroupFromModuleCalls",
    "GroupFromNextCall",
    "Invariance",
    "KnownGroup",
    "Monomials",
    "ScalingGroup",
    "UnitSet",
    "check_freedoms",
    "check_invariance",
    "check_stand_in",
    "scaling_group",
    "stand_in",
]

# Tracing needs torch._dynamo, which takes longer to import than all the rest.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Coupling": "coupling",
        "DeferredGroup": "deferred",
        "GroupFromModuleCalls": "module_calls",
        "GroupFromNextCall": "pending",
        "Invariance": "invariance",
        "KnownGroup": "deferred",
        "Monomials": "monomials",
        "ScalingGroup": "group",
        "UnitSet": "describe",
        "check_invariance": "invariance",
        "check_freedoms": "check",
        "check_stand_in": "check",
        "scaling_group": "trace",
        "stand_in": "stand_ins",
    },
)
