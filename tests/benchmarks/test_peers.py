"""The competing methods of the benchmarks: what their papers say of them, checked from outside."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt import ScalingGroup, scaling_group
from tests.networks import DenseNet, ResidualMLP, mlp, norm_cnn, plain_cnn
from tests.selection import full

pytestmark = full
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import peers  # noqa: E402
from peers import path_norms  # noqa: E402


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class SelfResidual(nn.Module):
    """A stream with a weight that leads from its units to themselves."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width, bias=False)
        self.inner = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.inner(x)))


def pooled_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2, 2),
    )


def bias_free_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2, bias=False),
    )


VECTORS, IMAGES = (5, 3), (5, 1, 8, 8)
WITHOUT_NORMS = [
    pytest.param(lambda: mlp(3, 6, 5, 2), VECTORS, id="mlp"),
    pytest.param(ResidualMLP, VECTORS, id="residual"),
    pytest.param(plain_cnn, IMAGES, id="cnn"),
    pytest.param(DenseNet, IMAGES, id="dense"),
]
BIAS_FREE = [
    pytest.param(lambda: mlp(3, 6, 5, 2, bias=False), VECTORS, id="mlp"),
    pytest.param(bias_free_cnn, IMAGES, id="cnn"),
    pytest.param(SelfResidual, VECTORS, id="self-residual"),
]
networks = pytest.mark.parametrize(("build", "shape"), WITHOUT_NORMS)
bias_free = pytest.mark.parametrize(("build", "shape"), BIAS_FREE)
Build = Callable[[], nn.Module]


def rescaled(net: nn.Module, x: Tensor, spread: float = 0.7) -> tuple[nn.Module, ScalingGroup, Tensor]:
    """A copy of the net with its units rescaled, its group and the log-scales."""
    other = copy.deepcopy(net)
    group = scaling_group(other, x)
    log_scale = spread * torch.randn(group.num_units)
    group.act_(log_scale)
    return other, group, log_scale


def train(net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, after: Callable[[], None], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(net(x).shape, generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(x), target).backward()
        optimizer.step()
        after()


def weights_of(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


# Path-SGD

Key = tuple[str, int]
Paths = dict[Any, list[tuple[Key, ...]]]  # node to the elements of each path that ends there


def through(paths: Paths, edges: list[tuple[Any, Any, Key | None]], biases: list[tuple[Any, Key]] = ()) -> Paths:
    result: Paths = {}
    for source, target, key in edges:
        own = () if key is None else (key,)
        result.setdefault(target, []).extend(path + own for path in paths[source])
    for target, key in biases:
        result.setdefault(target, []).append((key,))
    return result


def linear(paths: Paths, name: str, layer: nn.Linear) -> Paths:
    rows, columns = layer.weight.shape
    edges = [(j, i, (f"{name}.weight", i * columns + j)) for i in range(rows) for j in range(columns)]
    return through(paths, edges, [(i, (f"{name}.bias", i)) for i in range(rows)])


def convolution(paths: Paths, name: str, layer: nn.Conv2d) -> Paths:
    outputs, inputs, height, width = layer.weight.shape
    rows, columns = (1 + max(node[axis] for node in paths) for axis in (1, 2))
    pad = layer.padding[0]
    edges, biases = [], []
    for o in range(outputs):
        for y in range(rows + 2 * pad - height + 1):
            for x in range(columns + 2 * pad - width + 1):
                biases.append(((o, y, x), (f"{name}.bias", o)))
                for i in range(inputs):
                    for dy in range(height):
                        for dx in range(width):
                            source = (i, y + dy - pad, x + dx - pad)
                            if source in paths:
                                flat = ((o * inputs + i) * height + dy) * width + dx
                                edges.append((source, (o, y, x), (f"{name}.weight", flat)))
    return through(paths, edges, biases)


def explicit_kappa(net: nn.Module, paths: Paths) -> dict[str, Tensor]:
    parameters = dict(net.named_parameters())
    squares = {name: p.detach().square().reshape(-1).tolist() for name, p in parameters.items()}
    kappa = {name: [0.0] * p.numel() for name, p in parameters.items()}
    for path in (path for ending in paths.values() for path in ending):
        for place, (name, index) in enumerate(path):
            value = 1.0
            for other, (other_name, other_index) in enumerate(path):
                value *= 1.0 if other == place else squares[other_name][other_index]
            kappa[name][index] += value
    return {name: torch.tensor(values).view_as(parameters[name]) for name, values in kappa.items()}


def starts(*nodes: Any) -> Paths:
    return {node: [()] for node in nodes}


def test_kappa_of_an_mlp_is_that_of_its_paths() -> None:
    net = mlp(3, 4, 3, 2)
    paths = starts(*range(3))
    for name in ("0", "2", "4"):
        paths = linear(paths, name, net.get_submodule(name))
    torch.testing.assert_close(peers.path_kappa(net, torch.randn(VECTORS)), explicit_kappa(net, paths))


def test_kappa_of_a_pooled_cnn_is_that_of_its_paths() -> None:
    net = pooled_cnn()
    paths = convolution(starts(*((0, y, x) for y in range(4) for x in range(4))), "0", net[0])
    paths = through(paths, [(node, (node[0], node[1] // 2, node[2] // 2), None) for node in paths])
    paths = convolution(paths, "3", net[3])
    paths = linear(through(paths, [(node, node[0], None) for node in paths]), "6", net[6])
    torch.testing.assert_close(peers.path_kappa(net, torch.randn(2, 1, 4, 4)), explicit_kappa(net, paths))


def test_kappa_of_a_residual_network_is_that_of_its_paths() -> None:
    net = ResidualMLP(3, 2, 3, 2)
    stream = linear(starts(*range(3)), "stem", net.stem)
    block = linear(linear(stream, "up", net.up), "down", net.down)
    stream = {node: stream[node] + block[node] for node in stream}
    torch.testing.assert_close(
        peers.path_kappa(net, torch.randn(VECTORS)), explicit_kappa(net, linear(stream, "head", net.head))
    )


def test_kappa_leaves_the_network_as_it_is_and_knows_no_dropout() -> None:
    net = mlp(3, 4, 2)
    dropping = nn.Sequential(net[0], net[1], nn.Dropout(0.5), net[2])
    before = weights_of(net)
    kappa = peers.path_kappa(dropping, torch.randn(VECTORS))
    torch.testing.assert_close(list(kappa.values()), list(peers.path_kappa(net, torch.randn(VECTORS)).values()))
    assert torch.equal(weights_of(net), before)
    assert all(p.grad is None for p in net.parameters())


@networks
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)])
@pytest.mark.parametrize("normalize", [True, False])
def test_path_sgd_depends_on_the_class_alone(
    build: Build, shape: tuple[int, ...], momentum: float, weight_decay: float, normalize: bool
) -> None:
    x = torch.randn(shape)
    net = build()
    start = net(x).detach()
    other, group, log_scale = rescaled(net, x)
    for each in (net, other):
        optimizer = peers.PathSGD(each, x, 0.01, momentum, weight_decay, normalize)
        train(each, x, optimizer, lambda: None, 20)
    torch.testing.assert_close(other(x), net(x), rtol=1e-8, atol=1e-8)
    assert float((net(x).detach() - start).abs().max()) > 1e-2
    # Not only the outputs: the weights are still the first ones', rescaled, and so are the momentum buffers.
    group.act_(-log_scale)
    torch.testing.assert_close(weights_of(other), weights_of(net), rtol=1e-7, atol=1e-8)


def test_path_sgd_with_equal_kappa_is_sgd() -> None:
    net = nn.Linear(3, 2)
    other = copy.deepcopy(net)
    x = torch.randn(VECTORS)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    train(net, x, torch.optim.SGD(net.parameters(), **settings), lambda: None, 10)
    train(other, x, peers.PathSGD(other, x, **settings), lambda: None, 10)
    torch.testing.assert_close(weights_of(other), weights_of(net))


def test_the_first_step_has_the_length_of_an_sgd_step_at_the_balanced_member() -> None:
    x = torch.randn(VECTORS)
    net, _, _ = rescaled(mlp(3, 6, 5, 2), x)
    balanced = copy.deepcopy(net)
    group = scaling_group(balanced, x)
    log_scale = group.balance_()
    start = weights_of(balanced)
    other = copy.deepcopy(balanced)
    before, kappa = weights_of(net), peers.path_kappa(net, x)
    optimizer = peers.PathSGD(net, x, 0.1)
    train(net, x, optimizer, lambda: None, 1)
    train(other, x, torch.optim.SGD(other.parameters(), 0.1), lambda: None, 1)
    moved = dict(zip(group.parameters, (p.detach().clone() for p in net.parameters()), strict=True))
    group.rescale_(moved, log_scale)
    length = (torch.cat([p.reshape(-1) for p in moved.values()]) - start).norm()
    torch.testing.assert_close(length, (weights_of(other) - start).norm())
    # Finding the constant left the weights alone: they moved by the step and nothing else.
    step = torch.cat([(p.grad / k).reshape(-1) for p, k in zip(net.parameters(), kappa.values(), strict=True)])
    torch.testing.assert_close(before - weights_of(net), 0.1 * optimizer.param_groups[0]["constant"] * step)


def test_path_sgd_passes_over_elements_on_no_path() -> None:
    x = torch.randn(VECTORS)
    net = mlp(3, 6, 5, 2)
    nn.init.zeros_(net[4].weight)
    with torch.no_grad():
        net[2].weight[1] = 0.0
    hidden = net[0].weight.detach().clone()
    optimizer = peers.PathSGD(net, x, 0.01, momentum=0.9)
    train(net, x, optimizer, lambda: None, 1)
    assert torch.equal(net[0].weight, hidden)
    train(net, x, optimizer, lambda: None, 5)
    assert bool(weights_of(net).isfinite().all())
    assert not torch.equal(net[0].weight, hidden)


def test_path_sgd_resumes() -> None:
    x = torch.randn(VECTORS)
    net = mlp(3, 6, 2)
    optimizer = peers.PathSGD(net, x, 0.01, momentum=0.9)
    train(net, x, optimizer, lambda: None, 3)
    other = copy.deepcopy(net)
    resumed = peers.PathSGD(other, x, 0.01, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, x, optimizer, lambda: None, 3)
    train(other, x, resumed, lambda: None, 3)
    assert torch.equal(weights_of(other), weights_of(net))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm1d(4)])
def test_path_norms_are_refused_where_they_are_not_defined(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 4), layer, nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(VECTORS)
    message = f"normalisation layer 1, a {type(layer).__name__}: use a network without"
    with pytest.raises(ValueError, match="Path-SGD .*" + message):
        peers.PathSGD(net, x, 0.1)
    with pytest.raises(ValueError, match="PathCond .*" + message):
        peers.path_condition_(net, x)


@pytest.mark.parametrize("pool", [nn.AdaptiveMaxPool2d(1), nn.MaxPool2d(2, dilation=2)])
def test_a_maximum_that_has_no_sum_is_refused(pool: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"gamma has no sum in place of .*: use"):
        peers.path_kappa(nn.Sequential(nn.Conv2d(1, 2, 3), pool), torch.randn(IMAGES))


@pytest.mark.parametrize("setting", ["lr", "momentum", "weight_decay"])
def test_negative_settings_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must not be negative, got -1"):
        peers.PathSGD(mlp(3, 2, 2), torch.randn(VECTORS), **({"lr": 0.1} | {setting: -1.0}))


# ENorm


@pytest.mark.parametrize(("build", "shape"), [*WITHOUT_NORMS, *BIAS_FREE, pytest.param(norm_cnn, IMAGES, id="norms")])
@pytest.mark.parametrize("asymmetry", [1.0, 1.2])
def test_enorm_keeps_the_function(build: Build, shape: tuple[int, ...], asymmetry: float) -> None:
    x = torch.randn(shape)
    net, group, _ = rescaled(build().eval(), x)
    expected, before = net(x), weights_of(net)
    peers.ENorm(group, torch.optim.SGD(net.parameters(), 0.1), asymmetry).step()
    torch.testing.assert_close(net(x), expected)
    assert float((weights_of(net) - before).abs().max()) > 1e-2


@bias_free
def test_repeated_cycles_of_enorm_lead_to_the_balanced_member(build: Build, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    net, group, _ = rescaled(build(), x)
    balanced = copy.deepcopy(net)
    scaling_group(balanced, x).balance_()
    enorm = peers.ENorm(group, torch.optim.SGD(net.parameters(), 0.1))
    square = float(weights_of(net).square().sum())
    for _ in range(300):
        enorm.step()
        before, square = square, float(weights_of(net).square().sum())
        assert square <= before * (1 + 1e-14)
    torch.testing.assert_close(weights_of(net), weights_of(balanced), rtol=1e-8, atol=1e-10)


@networks
def test_the_squares_of_the_weights_never_grow_where_there_are_biases(build: Build, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    net, group, _ = rescaled(build(), x)
    enorm = peers.ENorm(group, torch.optim.SGD(net.parameters(), 0.1))
    squares = []
    for _ in range(20):
        squares.append(sum(float(p.detach().square().sum()) for name, p in net.named_parameters() if "weight" in name))
        enorm.step()
    assert all(after <= before * (1 + 1e-14) for before, after in pairwise(squares))
    assert squares[-1] < 0.9 * squares[0]


def test_weights_from_a_layer_to_itself_do_not_make_the_squares_grow() -> None:
    x = torch.randn(VECTORS)
    net = SelfResidual(2)
    with torch.no_grad():
        net.inner.weight.copy_(torch.tensor([[0.0, 10.0], [0.1, 0.0]]))
        net.stem.weight.mul_(0.1)
        net.head.weight.mul_(0.1)
    expected = net(x)
    enorm = peers.ENorm(scaling_group(net, x), torch.optim.SGD(net.parameters(), 0.1))
    squares = [float(weights_of(net).square().sum())]
    for _ in range(10):
        enorm.step()
        squares.append(float(weights_of(net).square().sum()))
    assert all(after <= before * (1 + 1e-14) for before, after in pairwise(squares))
    assert squares[-1] < 3
    torch.testing.assert_close(net(x), expected)


def test_a_weight_from_a_unit_to_itself_does_not_count() -> None:
    x = torch.randn(VECTORS)
    net, group, _ = rescaled(SelfResidual(1), x)
    peers.ENorm(group, torch.optim.SGD(net.parameters(), 0.1)).step()
    torch.testing.assert_close(net.stem.weight.norm(), net.head.weight.norm())


def cycle(net: nn.Sequential, asymmetry: float, momentum: dict[nn.Parameter, Tensor] | None = None) -> None:
    """The paper's cycle on an MLP, layer by layer, biases rescaled but not counted."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for first, second in pairwise(layers):
            ratio = (second.weight.norm(dim=0) / (asymmetry * first.weight.norm(dim=1))).sqrt()
            for parameter, factor in (
                (first.weight, ratio[:, None]),
                (first.bias, ratio),
                (second.weight, 1 / ratio),
            ):
                parameter *= factor
                if momentum is not None:
                    momentum[parameter] /= factor


@pytest.mark.parametrize("asymmetry", [1.0, 1.2])
def test_a_cycle_is_that_of_the_paper(asymmetry: float) -> None:
    net, group, _ = rescaled(mlp(3, 6, 5, 4, 2), torch.randn(VECTORS))
    other = copy.deepcopy(net)
    peers.ENorm(group, torch.optim.SGD(net.parameters(), 0.1), asymmetry).step()
    cycle(other, asymmetry)
    torch.testing.assert_close(weights_of(net), weights_of(other))


def test_momentum_is_rescaled_as_gradients_are() -> None:
    x = torch.randn(VECTORS)
    net, group, _ = rescaled(mlp(3, 6, 5, 2), x)
    other = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    train(net, x, optimizer, peers.ENorm(group, optimizer).step, 20)

    momentum = {p: torch.zeros_like(p) for p in other.parameters()}

    class ByHand:
        def zero_grad(self) -> None:
            other.zero_grad()

        def step(self) -> None:
            with torch.no_grad():
                for p in other.parameters():
                    momentum[p] = 0.9 * momentum[p] + p.grad
                    p -= 0.02 * momentum[p]

    train(other, x, ByHand(), lambda: cycle(other, 1.0, momentum), 20)
    torch.testing.assert_close(weights_of(net), weights_of(other), rtol=1e-9, atol=1e-10)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], momentum[q], rtol=1e-8, atol=1e-10)


def test_enorm_leaves_units_with_a_zero_side_alone() -> None:
    x = torch.randn(VECTORS)
    net = mlp(3, 6, 5, 2)
    with torch.no_grad():
        net[2].weight[:, 0] = 0.0
        net[0].weight[1] = 0.0
    before, expected = copy.deepcopy(net), net(x)
    peers.ENorm(scaling_group(net, x), torch.optim.SGD(net.parameters(), 0.1)).step()
    torch.testing.assert_close(net(x), expected)
    assert torch.equal(net[0].weight[0], before[0].weight[0])
    assert torch.equal(net[0].bias[:2], before[0].bias[:2])
    assert bool(weights_of(net).isfinite().all())


def test_enorm_says_what_it_cannot_do() -> None:
    net = mlp(3, 4, 2)
    group = scaling_group(net, torch.randn(VECTORS))
    with pytest.raises(ValueError, match=r"momentum of SGD, not the state of Adam: use torch\.optim\.SGD"):
        peers.ENorm(group, torch.optim.Adam(net.parameters()))
    with pytest.raises(ValueError, match="asymmetry must be positive, got 0"):
        peers.ENorm(group, torch.optim.SGD(net.parameters(), 0.1), 0)


# PathCond


def criterion(group: ScalingGroup, kappa: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """F as the docstring has it, element by element."""

    def value(log_scale: Tensor) -> Tensor:
        levels = []
        for coupling in group.couplings:
            region = coupling.view(kappa[coupling.parameter])
            padded = torch.cat([log_scale, log_scale.new_zeros(1)])
            factor = (padded[coupling.incoming] - padded[coupling.outgoing]).expand_as(region)
            levels.append(torch.stack([region, factor]).reshape(2, -1))
        kappas, factors = torch.cat(levels, 1)
        kappas, factors = kappas[kappas > 0], factors[kappas > 0]
        return len(kappas) * (kappas * (-2 * factors).exp()).sum().log() + 2 * factors.sum()

    return value


@networks
def test_path_conditioning_keeps_the_function_and_minimises_its_criterion(build: Build, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    net, group, _ = rescaled(build(), x)
    expected = net(x)
    value = criterion(group, peers.path_kappa(net, x))

    def with_gradient(scale: Any) -> tuple[float, Any]:
        at = torch.tensor(scale, requires_grad=True)
        result = value(at)
        (gradient,) = torch.autograd.grad(result, at)
        return float(result.detach()), gradient.numpy()

    start = torch.zeros(group.num_units)
    found = minimize(with_gradient, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-5})
    log_scale = peers.path_condition_(net, x, group)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(log_scale, torch.tensor(found.x), rtol=1e-4, atol=1e-4)
    assert float(value(log_scale)) <= found.fun + 1e-9
    assert float(value(log_scale)) < float(value(start)) - 1
    # At the new weights, by their own kappa: nothing is left to gain.
    at = torch.zeros(group.num_units, requires_grad=True)
    (gradient,) = torch.autograd.grad(criterion(group, peers.path_kappa(net, x))(at), at)
    assert float(gradient.abs().max()) < 1e-8


@networks
def test_path_conditioning_depends_on_the_class_alone(build: Build, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    net = build()
    other, _, _ = rescaled(net, x, spread=2.0)
    peers.path_condition_(net, x)
    peers.path_condition_(other, x)
    torch.testing.assert_close(weights_of(other), weights_of(net), rtol=1e-8, atol=1e-10)
    assert float(peers.path_condition_(net, x).abs().max()) < 1e-9


def test_path_conditioning_solves_the_published_equation_of_a_unit() -> None:
    # With kappa B after, C before the unit, D elsewhere, A = incoming less outgoing elements and p elements:
    # B (A + p) x^2 + D A x + C (A - p) = 0 has the root x = 1.
    net = mlp(3, 6, 2)
    x = torch.randn(VECTORS)
    peers.path_condition_(net, x)
    kappa = peers.path_kappa(net, x)
    total = sum(float(k.sum()) for k in kappa.values())
    number = sum(k.numel() for k in kappa.values())
    for unit in range(6):
        before = float(kappa["0.weight"][unit].sum() + kappa["0.bias"][unit])
        after = float(kappa["2.weight"][:, unit].sum())
        surplus = 4 - 2
        equation = after * (surplus + number) + (total - before - after) * surplus + before * (surplus - number)
        assert abs(equation) < 1e-9 * total * number


def test_path_conditioning_leaves_dormant_units_alone() -> None:
    x = torch.randn(VECTORS)
    net = mlp(3, 6, 5, 2)
    with torch.no_grad():
        net[2].weight[:, 0] = 0.0
        net[2].weight[3] = 0.0
        net[2].bias[3] = 0.0
    expected = net(x)
    log_scale = peers.path_condition_(net, x)
    torch.testing.assert_close(net(x), expected)
    assert (log_scale == 0).nonzero().reshape(-1).tolist() == [0, 9]
    # Elements without a path do not count for the others.
    at = torch.zeros(11, requires_grad=True)
    (gradient,) = torch.autograd.grad(criterion(scaling_group(net, x), peers.path_kappa(net, x))(at), at)
    assert float(gradient[log_scale != 0].abs().max()) < 1e-8


def test_path_conditioning_does_single_precision_networks() -> None:
    x = torch.randn(VECTORS, dtype=torch.float32)
    net = mlp(3, 6, 2).float()
    expected = net(x)
    log_scale = peers.path_condition_(net, x)
    assert log_scale.dtype == torch.float64
    assert net[0].weight.dtype == torch.float32
    torch.testing.assert_close(net(x), expected)


def test_path_conditioning_without_freedoms_moves_nothing() -> None:
    assert peers.path_condition_(nn.Linear(3, 2), torch.randn(VECTORS)).shape == (0,)


def test_path_conditioning_finds_its_minimum_from_far_away() -> None:
    x = torch.randn(VECTORS)
    net = mlp(3, 6, 5, 2)
    other, _, _ = rescaled(net, x, spread=8.0)
    peers.path_condition_(net, x)
    peers.path_condition_(other, x)
    torch.testing.assert_close(weights_of(other), weights_of(net), rtol=1e-8, atol=1e-10)


def test_path_conditioning_says_when_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(VECTORS)
    net, group, _ = rescaled(mlp(3, 6, 2), x)
    monkeypatch.setattr(path_norms, "NEWTON_STEPS", 1)
    with pytest.raises(RuntimeError, match=r"no minimum in 1 steps: call group\.balance_\(\) first"):
        peers.path_condition_(net, x, group)
    with torch.no_grad():
        net[0].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite: check that all weights are finite and moderate"):
        peers.path_condition_(net, x, group)
