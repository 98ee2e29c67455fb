"""Other methods, to compare the equivalent-class forms with; each is written from its paper.

Some know of the rescaling freedom of ReLU networks. They work on whatever :func:`lightning_ecopt.scaling_group` can
trace, but what is built on path norms, the first and the third, needs a network without normalisation layers:

- :class:`PathSGD`: steepest descent in the geometry of path norms; invariant, as EC-SGD is.
- :class:`ENorm`: SGD, and after each step a move towards the balanced member of the class.
- :func:`path_condition_`: one move within the class before training.

Some take steps relative to the weights, without the class: of a tensor (:class:`LAMB`, :class:`LARS`), of a neuron
(:class:`Nero`). :class:`AdamMini` has one second moment for a row, and so less state.
"""

from peers.adam_mini import AdamMini, adam_mini
from peers.enorm import ENorm
from peers.path_norms import PathSGD, path_condition_, path_kappa
from peers.relative import LAMB, LARS, Nero

__all__ = [
    "LAMB",
    "LARS",
    "AdamMini",
    "ENorm",
    "Nero",
    "PathSGD",
    "adam_mini",
    "path_condition_",
    "path_kappa",
]
