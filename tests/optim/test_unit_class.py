"""The rule "unit": a run depends on the class of the network alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.networks import DenseNet, ResidualMLP, ResNet, mlp, plain_cnn
from tests.optim.bases import WITH_FORMULAS
from tests.optim.training import distance, only_refresh, problem, rescaled, train
from tests.optim.unit_rule import data, unit
from tests.selection import examples, few

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "mlp": (lambda: mlp(6, 8, 8, 3), (6,), 3, False),
    "prelu": (lambda: mlp(6, 8, 8, 3, activation=nn.PReLU), (6,), 3, True),
    "cnn": (plain_cnn, (1, 8, 8), 3, False),
    "residual": (ResidualMLP, (3,), 2, True),
    "resnet": (ResNet, (1, 6, 6), 3, False),
    "dense": (DenseNet, (1, 5, 5), 3, False),
}


@pytest.mark.parametrize(
    ("name", "base"),
    few(
        [("mlp", base) for base in ("sgd", "decay", "momentum", "dampening", "adam", "adam_l2", "adamw")]
        + [("prelu", "adam"), ("cnn", "nesterov"), ("cnn", "amsgrad"), ("residual", "momentum")]
        + [("dense", "momentum"), ("resnet", "amsgrad")],
        [("mlp", "adamw"), ("residual", "momentum")],
    ),
)
def test_a_run_depends_on_the_class_alone(name: str, base: str) -> None:
    torch.manual_seed(3)
    build, shape, outputs, regression = NETWORKS[name]
    module = build().double()
    x, y = data(shape, outputs, regression=regression)
    other = rescaled(module, x)
    assert distance(module, other, x) < 1e-12
    hidden = [name for name, p in module.named_parameters() if p.ndim > 1 and "head" not in name]
    assert any(not torch.allclose(module.get_parameter(name), other.get_parameter(name), rtol=0.3) for name in hidden)
    start = copy.deepcopy(module)
    for one in (module, other):
        optimizer = unit(one, x, base, refresh_interval=17)
        losses = train(one, optimizer, x, y, range(104))
        assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
        # Between two refreshes the members need not be the same, but here both have gone on from one.
        only_refresh(optimizer)
    assert distance(module, other, x) < 1e-12
    assert distance(start, module, x) > 1e-2
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("base", ["momentum", "amsgrad"])
def test_a_run_that_is_rescaled_on_the_way_goes_on_as_if_it_were_not(base: str) -> None:
    torch.manual_seed(5)
    module = ResidualMLP().double()
    x, y = data((3,), 2, regression=True)
    other = copy.deepcopy(module)
    optimizers = unit(module, x, base), unit(other, x, base)
    for start in range(0, 30, 10):
        for one, optimizer in zip((module, other), optimizers, strict=True):
            train(one, optimizer, x, y, range(start, start + 10))
            optimizer.refresh()
        group = optimizers[1].group
        assert group is not None
        log_scale = torch.randn(group.num_units, dtype=torch.float64)
        group.act_(log_scale)
        # What the base holds are covectors, and squares of them.
        for power, entry in ((1, "momentum_buffer"), (1, "exp_avg"), (2, "exp_avg_sq"), (2, "max_exp_avg_sq")):
            tensors = {name: optimizers[1].state[p].get(entry) for name, p in other.named_parameters()}
            group.rescale_(tensors, log_scale, power=-power)
    for optimizer in optimizers:
        only_refresh(optimizer)
    assert distance(module, other, x) < 1e-10
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


class Stack(nn.Module):
    """Layers of any widths, each with or without a block around it that is skipped."""

    def __init__(self, widths: list[int], blocks: list[int], bias: bool, slope: float) -> None:
        super().__init__()
        self.slope = slope
        sizes = [3, *widths]
        self.layers = nn.ModuleList(nn.Linear(sizes[k], sizes[k + 1], bias=bias) for k in range(len(widths)))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(w, inner, bias=bias), nn.ReLU(), nn.Linear(inner, w, bias=bias))
            if inner
            else nn.Identity()
            for w, inner in zip(widths, blocks, strict=True)
        )
        self.head = nn.Linear(widths[-1], 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x = F.leaky_relu(layer(x), self.slope)
            x = F.leaky_relu(x + block(x), self.slope)
        return self.head(x)


@examples(8, phases=[Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=3),
    bias=st.booleans(),
    slope=st.sampled_from([0.0, 0.2]),
    base=st.sampled_from(sorted(WITH_FORMULAS)),
    refresh_interval=st.sampled_from([2, 5, None]),
)
def test_a_run_of_any_stack_depends_on_the_class_alone(
    seed: int, sizes: list[tuple[int, int]], bias: bool, slope: float, base: str, refresh_interval: int | None
) -> None:
    torch.manual_seed(seed)
    widths, blocks = [size for size, _ in sizes], [inner for _, inner in sizes]
    module = Stack(widths, blocks, bias, slope).double()
    x, y = data((3,), 2, regression=True)
    other = rescaled(module, x)
    start = copy.deepcopy(module)
    for one in (module, other):
        optimizer = unit(one, x, base, refresh_interval=refresh_interval)
        train(one, optimizer, x, y, range(12))
        only_refresh(optimizer)
    assert distance(module, other, x) < 1e-9
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert distance(start, module, x) > 1e-6


def test_staying_at_the_current_weights_is_not_invariant() -> None:
    module, x, y = problem(4, 6, 2)
    other = rescaled(module, x)
    for one in (module, other):
        train(one, unit(one, x, "sgd", representative="current"), x, y, range(20))
    assert distance(module, other, x) > 1e-3


class BiasedNorm(nn.Module):
    """A bias that a batch norm takes out again: its gradient is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw"])
def test_a_gradient_that_is_rounding_alone_moves_nothing(base: str) -> None:
    torch.manual_seed(0)
    module = BiasedNorm().double()
    x, y = data((1, 6, 6), 3, regression=False)
    other = rescaled(module, x)
    before = module.conv.bias.detach().clone()
    for one in (module, other):
        plain = WITH_FORMULAS[base](one.parameters())
        for options in plain.param_groups:
            options["weight_decay"] = 0.0
        train(one, EquivalentClassOptimizer(plain, scaling_group(one, x), rule="unit"), x, y, range(32))
    assert distance(module, other, x) < 1e-8
    torch.testing.assert_close(module.conv.bias.detach(), before, rtol=0, atol=1e-6)
