"""Optimizers in forms that users write and packages have, and that are unlike torch's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer


class Bare(Optimizer):
    """Runs another optimizer, and never calls the constructor of its class: no hooks, no defaults."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.inner = optimizer

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.inner.add_param_group(group)

    def state_dict(self) -> Any:
        return {"within": self.inner.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state["within"])


class Lookahead(Bare):
    """Pulls the weights towards slow ones after every second step; a form of Zhang et al., arXiv:1907.08610."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.slow: dict[Any, Any] = defaultdict(dict)
        for group in self.param_groups:
            group["count"] = 0
            for p in group["params"]:
                self.slow[p]["slow_params"] = p.detach().clone()

    @property
    def state(self) -> Any:
        return self.slow

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["count"] += 1
            if group["count"] % 2 == 0:
                for p in group["params"]:
                    slow = self.slow[p]["slow_params"].lerp_(p, 0.5)
                    p.copy_(slow)
        return loss

    def state_dict(self) -> Any:
        numbers = {p: k for k, p in enumerate(p for group in self.param_groups for p in group["params"])}
        return {"slow": {numbers[p]: dict(of) for p, of in self.slow.items()}, **super().state_dict()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        own = [p for group in self.param_groups for p in group["params"]]
        self.slow.update(
            {own[k]: {name: value.clone() for name, value in of.items()} for k, of in state["slow"].items()}
        )


class Strict(SGD):
    """Takes a closure and nothing less, as optimizers of older versions do."""

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


class Noisy(SGD):
    """Its step takes more than a closure, and returns something of its own."""

    def step(self, closure: Any = None, scale: float = 1.0, *, noise: float = 0.0) -> Any:
        super().step(closure)
        return {"scale": scale, "noise": noise}


class Sharpness(Optimizer):
    """SAM (Foret et al., arXiv:2010.01412), which calls the closure at weights uphill, in one of several ways.

    Args:
        base_optimizer: class of the optimizer that takes the step.
        through_data: whether to move ``p.data``, of which autograd sees nothing.
        zero_grad: whether to clear the gradients before the closure is called, and how.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        base_optimizer: Callable[..., Optimizer],
        through_data: bool = False,
        zero_grad: str | None = "none",
        **options: Any,
    ) -> None:
        super().__init__(params, options)
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.through_data, self.clears = through_data, zero_grad

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        own = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        for p in own:
            self.state[p]["old"] = p.detach().clone()
            (p.data if self.through_data else p).add_(p.grad, alpha=0.1)
        if self.clears is not None:
            self.zero_grad(set_to_none=self.clears == "none")
        with torch.enable_grad():
            loss = closure()
        for p in own:
            p.copy_(self.state[p].pop("old"))
        self.base_optimizer.step()
        return loss


#: Optimizers that run others, and one in a form of its own.
FORMS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "bare": lambda params: Bare(SGD(params, lr=0.05, momentum=0.9)),
    "bare adam": lambda params: Bare(AdamW(params, lr=0.01)),
    "lookahead": lambda params: Lookahead(SGD(params, lr=0.05, momentum=0.9)),
    "lookahead of a bare one": lambda params: Lookahead(Bare(AdamW(params, lr=0.01))),
    "strict": lambda params: Strict(params, lr=0.05, momentum=0.9),
    "noisy": lambda params: Noisy(params, lr=0.05, momentum=0.9),
}
