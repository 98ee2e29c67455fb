"""Muon for matrices and AdamW for everything else, as Muon is used, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import AdamW, Optimizer

from lightning_ecopt.common.flat import is_piece

AdjustLR = Literal["match_rms_adamw", "original"]
#: Of the polynomial by which Muon makes singular values equal (Jordan, https://kellerjordan.github.io/posts/muon/).
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
#: Which of some parameters are for Muon, by ``id``.
Choice = Callable[[Sequence[Tensor]], Container[int]]


class MuonAdamW(Optimizer):
    """Muon for the weight matrices of hidden layers, AdamW for everything else.

    Muon turns the momentum of a matrix into the nearest orthogonal one and steps along that. It is made for hidden
    layers, so that embeddings, the head, gains and biases are left to AdamW. Both are torch's, and share the parameter
    groups and the state of this optimizer: a group with ``use_muon=True`` is Muon's, one with ``use_muon=False`` is
    AdamW's. Each group has the options of both, of which one uses its own.

    One learning rate does for both. With ``adjust_lr_fn="match_rms_adamw"`` the root mean square of a step in a matrix
    is 0.2 ``lr``, as it usually is with AdamW, so that the rate and the weight decay that suit AdamW suit Muon (Liu et
    al., "Muon is Scalable for LLM Training", arXiv:2502.16982).

    If no group says ``use_muon``, matrices are Muon's but for the last that is given, which is taken for the head.
    Embeddings are matrices, too, but not for :func:`~lightning_ecopt.ec_muon`, which knows the module. Give groups that
    say ``use_muon`` where the head is another matrix, or there are several heads.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        weight_decay: share of the weights, times ``lr``, that each step takes away.
        momentum: factor by which Muon's mean of gradients fades.
        nesterov: whether Muon looks ahead along the momentum.
        ns_coefficients: of the polynomial that Muon applies to singular values.
        ns_steps: how often it does.
        adjust_lr_fn: Muon's rate for a matrix ``[A, B]``: 0.2 sqrt(max(A, B)) ``lr`` with ``"match_rms_adamw"``, and
            sqrt(max(1, A / B)) ``lr`` with ``"original"``, for which ``lr`` is some 20 times AdamW's.
        adamw_lr: learning rate of AdamW's groups that have none of their own; by default ``lr``.
        betas: factors by which AdamW's mean of gradients and its mean of their squares fade.
        eps: is added to the root of AdamW's mean of squares; and the least norm that Muon divides a matrix by.
        amsgrad: whether AdamW divides by the largest mean of squares so far.
        foreach: whether AdamW groups tensors.
        fused: whether AdamW takes torch's fused step.

    Raises:
        RuntimeError: if torch has no Muon, as before 2.9.
        ValueError: if an option is out of range, if some groups say ``use_muon`` and some do not, or if a group of
            Muon's has a parameter that is not a matrix.

    Example::

        optimizer = MuonAdamW(
            [{"params": hidden_matrices, "use_muon": True}, {"params": others, "use_muon": False}], lr=1e-3
        )
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLR = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        rate = lr if adamw_lr is None else adamw_lr
        muon, adamw = _empty(
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "ns_steps": ns_steps,
                "eps": eps,
                "adjust_lr_fn": adjust_lr_fn,
            },
            {"lr": rate, "betas": betas, "eps": eps, "amsgrad": amsgrad, "foreach": foreach, "fused": fused},
        )
        self._parts = muon, adamw
        super().__init__(marked(params, _matrices_but_the_last), {**adamw.defaults, **muon.defaults, "adamw_lr": rate})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that does not say ``use_muon`` is added as two, of matrices for Muon and of the others.

        Raises:
            ValueError: if it is for Muon and has a parameter that is not a matrix.
        """
        for group in _divided(param_group, lambda p: _is_matrix(p)):
            if not group["use_muon"]:
                group.setdefault("lr", self.defaults["adamw_lr"])
            super().add_param_group(group)
            shapes = [list(p.shape) for p in group["params"] if group["use_muon"] and not _is_matrix(p)]
            if shapes:
                del self.param_groups[-1]
                raise ValueError(
                    f"Muon takes matrices of real numbers, but a group with use_muon=True has a parameter of shape "
                    f"{shapes[0]}: put it into a group with use_muon=False."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the closure, if there is one, computes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._shared():
            part.step()
        return loss

    def _shared(self) -> tuple[Optimizer, Optimizer]:
        """Muon and AdamW, with the present groups of each, which a checkpoint may have replaced, and the state."""
        for part, is_muon in zip(self._parts, (True, False), strict=True):
            part.param_groups = [group for group in self.param_groups if bool(group["use_muon"]) is is_muon]
            part.state = self.state
        return self._parts

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has defaults, groups and state alone; a checkpoint of another version of torch may lack options.
        if any("use_muon" not in group for group in state["param_groups"]):
            raise ValueError(
                "The parameter groups of this state do not say use_muon, as it was saved by another optimizer."
            )
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._parts = _empty({}, {})
        for part in self._shared():
            part.__setstate__({})


def marked(params: Iterable[Any], choose: Choice) -> list[dict[str, Any]]:
    """Parameter groups that all say ``use_muon``.

    Args:
        params: parameters, or groups of them all of which or none of which say it.
        choose: says of the parameters of all groups that do not say it, which are for Muon.

    Raises:
        TypeError: if one tensor is given.
        ValueError: if some groups say it and some do not, or if FSDP1 has flattened the parameters.
    """
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or of groups of them, got one Tensor.")
    given = list(params)
    groups = given if all(isinstance(one, dict) for one in given) else [{"params": given}]
    groups = [{**group, "params": _listed(group["params"])} for group in groups]
    said = ["use_muon" in group for group in groups]
    if any(said) and not all(said):
        raise ValueError(
            "Some parameter groups say use_muon and some do not. Say it in all of them: use_muon=True for the matrices "
            "of hidden layers, use_muon=False for embeddings, the head, gains and biases."
        )
    open_ = [_tensor(p) for group in groups if "use_muon" not in group for p in group["params"]]
    if any(map(is_piece, open_)):  # none of which looks like a matrix
        raise ValueError(
            "Muon takes whole matrices, and FullyShardedDataParallel leaves pieces of them: use DDP, or another "
            "optimizer."
        )
    muons = choose(open_)
    return [part for group in groups for part in _divided(group, lambda p: id(p) in muons)]


def hidden_matrices(module: nn.Module) -> Choice:
    """Chooses, of some parameters, the weight matrices of a module's hidden layers.

    They are the two-dimensional parameters with ``weight`` in their names, as those of linear, recurrent and attention
    layers, but for those of ``nn.Embedding`` and ``nn.EmbeddingBag``, also where another layer shares them, and the
    *head*: the one that the module has registered last, outside of embeddings.

    The module alone tells, and no call of it, so that parameter groups, and with them checkpoints, do not depend on
    inputs. So one matrix is taken for the head. If there are several heads, the others are taken for hidden layers; so
    is a head that is registered ahead of them. If no head is registered or among the parameters, as where outputs are
    ``F.linear(x, embedding.weight)``, the last hidden matrix is taken for it. Groups that say ``use_muon`` are not
    divided.
    """
    return partial(_hidden_matrices, module)


def _hidden_matrices(module: nn.Module, params: Sequence[Tensor]) -> Container[int]:
    chosen = {id(p) for p in params if _is_matrix(p)}
    embeddings: list[int] = []
    others: list[int] = []  # as registered; a matrix that several layers share, as often as they do
    for part in module.modules():
        own = [id(p) for name, p in part.named_parameters(recurse=False) if "weight" in name and id(p) in chosen]
        (embeddings if isinstance(part, nn.Embedding | nn.EmbeddingBag) else others).extend(own)
    return set(others).difference(embeddings, others[-1:])


def _matrices_but_the_last(params: Sequence[Tensor]) -> Container[int]:
    return {id(p) for p in [p for p in params if _is_matrix(p)][:-1]}


def _is_matrix(p: Any) -> bool:
    return isinstance(p, Tensor) and not is_lazy(p) and p.ndim == 2 and not p.is_complex()


def _divided(group: dict[str, Any], is_muons: Callable[[Tensor], bool]) -> list[dict[str, Any]]:
    """A group that says ``use_muon`` as it is, another as one for Muon and one for AdamW, unless one would be empty."""
    if "use_muon" in group:
        return [group]
    params = _listed(group["params"])
    if isinstance(params, set):  # an error, for torch to tell
        return [{**group, "use_muon": False}]
    muons = [p for p in params if is_muons(_tensor(p))]
    others = [p for p in params if not is_muons(_tensor(p))]
    parts = [{**group, "params": muons, "use_muon": True}, {**group, "params": others, "use_muon": False}]
    return [part for part in parts if part["params"]] or parts[1:]


def _listed(params: Any) -> Any:
    return [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)


def _tensor(p: Any) -> Any:
    """A parameter that may have been given with its name, as ``module.named_parameters()`` has it."""
    return p[1] if isinstance(p, tuple) else p


def _empty(muon: dict[str, Any], adamw: dict[str, Any]) -> tuple[Optimizer, Optimizer]:
    """Torch's Muon and AdamW with some options, which they check, and without parameters.

    Raises:
        RuntimeError: if torch has no Muon.
    """
    kind = getattr(torch.optim, "Muon", None)
    if kind is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no Muon: install torch 2.9 or later, or pass another Muon to "
            "EquivalentClassOptimizer, whose groups say use_muon."
        )
    parts = kind([torch.zeros(1, 1, device="cpu")], **muon), AdamW([torch.zeros(1, device="cpu")], **adamw)
    for part in parts:
        part.param_groups.clear()
    return parts
