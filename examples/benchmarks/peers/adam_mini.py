"""Adam-mini: AdamW with one second moment for a block of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AdamMini(torch.optim.Optimizer):
    """Adam-mini (Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv:2406.16793).

    Of each block of weights w with gradient g, where the second moment v is one number for the block:

        w <- w - lr weight_decay w
        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) mean(g^2)
        w <- w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    A block is a number of rows of a tensor, the option ``rows`` of its parameter group: one (an output neuron, a token
    of an embedding or a head; the default), or those of an attention head, for queries and keys. A tensor of one axis
    is one block. See :func:`adam_mini`.

    Args:
        params: to train, or groups of them, with ``rows``.
        lr: learning rate.
        betas: of the two means.
        eps: added to the root.
        weight_decay: factor of the weight decay, decoupled as in AdamW.
        rows: of a block.

    Raises:
        ValueError: if the rows of a tensor cannot be divided into blocks.

    Example::

        optimizer = AdamMini(model.parameters(), lr=0.001)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        rows: int = 1,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rows": rows}
        super().__init__(params, options)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim > 1 and len(parameter) % group["rows"]:
                    raise ValueError(f"a tensor of {len(parameter)} rows has no blocks of {group['rows']}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, parameter.grad, group)
        return loss

    def _step_of(self, w: Tensor, g: Tensor, options: dict[str, Any]) -> None:
        blocks = len(w) // options["rows"] if w.ndim > 1 else 1
        state = self.state[w]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(w), exp_avg_sq=w.new_zeros(blocks, 1))
        state["step"] += 1
        beta1, beta2 = options["betas"]
        w.mul_(1 - options["lr"] * options["weight_decay"])
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].lerp_(g.reshape(blocks, -1).square().mean(1, keepdim=True), 1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(options["eps"])
        m = state["exp_avg"].reshape(blocks, -1) / (1 - beta1 ** state["step"])
        w.sub_((options["lr"] * m / root).view_as(w))


def adam_mini(net: nn.Module, lr: float, **options: Any) -> AdamMini:
    """Adam-mini with the blocks of the paper: heads for queries and keys, rows for all other matrices.

    A module with layers ``q`` and ``k`` and a number ``heads`` is an attention layer.

    Args:
        net: of which all parameters are trained.
        lr: learning rate.
        **options: of :class:`AdamMini`.

    Example::

        optimizer = adam_mini(tasks.NETWORKS["decoder"](width=64, depth=3, heads=4, context=64), lr=0.001)
    """
    rows = {
        layer.weight: len(layer.weight) // module.heads
        for module in net.modules()
        if hasattr(module, "heads")
        for layer in (module.q, module.k)
    }
    groups: dict[int, list[Tensor]] = {}
    for parameter in net.parameters():
        groups.setdefault(rows.get(parameter, 1), []).append(parameter)
    return AdamMini([{"params": params, "rows": number} for number, params in groups.items()], lr=lr, **options)
