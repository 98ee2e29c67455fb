"""Muon as it is used: matrices by Muon, all else by AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lightning_ecopt


def is_matrix(net: nn.Module) -> dict[Tensor, bool]:
    """Of each parameter, whether it is Muon's: a weight of a linear layer, but of the last, the head."""
    linear = [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)]
    hidden = set(linear[:-1])
    return {p: p in hidden for p in net.parameters()}


def muon_adamw(net: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Muon (Jordan et al., 2024) for hidden matrices, AdamW for the rest, with one rate.

    Steps of matrices have the root mean square of AdamW's (Liu et al., "Muon is Scalable for LLM Training",
    arXiv:2502.16982), so that one rate does for both.

    Args:
        net: of which all parameters are trained.
        lr: learning rate.
        **options: of ``MuonAdamW``.
    """
    is_muon = is_matrix(net)
    groups = [{"params": [p for p, is_m in is_muon.items() if is_m is use], "use_muon": use} for use in (True, False)]
    return KIND([group for group in groups if group["params"]], lr=lr, **options)


class MuonAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` and ``torch.optim.AdamW`` as one optimizer; groups say ``use_muon``."""

    def __init__(self, params: list[dict[str, Any]], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        kinds: dict[bool, Callable[..., torch.optim.Optimizer]] = {
            True: lambda groups: torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"),
            False: torch.optim.AdamW,
        }
        self._parts = [kinds[group["use_muon"]]([self._shared(group)]) for group in self.param_groups]

    @staticmethod
    def _shared(group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in ("params", "lr", "weight_decay")}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, part in zip(self.param_groups, self._parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
            self.state.update(part.state)
        return loss


KIND = getattr(lightning_ecopt, "MuonAdamW", MuonAdamW)  # the package's own, as soon as it has one
