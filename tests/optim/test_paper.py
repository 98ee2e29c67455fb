"""EC-SGD as Meng et al., arXiv:1802.03713, write it, with every basis path followed by hand.

An equal-width multi-layer perceptron without biases whose skeleton weights, the diagonals, are one. The basis paths are
the paths along the diagonals, and for every other weight the path that contains it and otherwise skeleton weights.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt import ECSGD, ECAdamW, EquivalentClassOptimizer, ec_adamw, ec_sgd, scaling_group
from lightning_ecopt import set_skeleton_to_one_ as set_to_one_
from lightning_ecopt.optim.options import Options
from tests.networks import mlp, norm_cnn
from tests.optim.training import RULES, problem, same_bits, train
from tests.selection import few

#: What ``rule="paper"`` stands for.
SETTING: dict[str, Any] = {
    "rule": "path",
    "refresh_interval": None,
    "representative": "current",
    "skeleton": "diagonal",
    "max_path_ratio": None,
    "free_start": 1.0,
}

Path = tuple[tuple[int, int, int], ...]  # layer, output, input of the weights on it


def basis_paths(width: int, layers: int) -> tuple[list[Path], list[Path]]:
    """The path along the diagonals from each input, and the path of every other weight."""
    skeleton = [tuple((layer, i, i) for layer in range(layers)) for i in range(width)]
    others = []
    for layer in range(layers):
        for i in range(width):
            for j in range(width):
                if i != j:
                    before = tuple((k, i, i) for k in range(layer))
                    after = tuple((k, j, j) for k in range(layer + 1, layers))
                    others.append((*before, (layer, j, i), *after))
    return skeleton, others


def places(paths: list[Path], width: int) -> Tensor:
    """The weights on each path, ``[paths, layers]``, as places in the vector of all weights."""
    return torch.tensor([[(layer * width + j) * width + i for layer, j, i in path] for path in paths])


def path_values(weights: list[Tensor], paths: list[Path]) -> Tensor:
    flat = torch.cat([weight.flatten() for weight in weights])
    return flat[places(paths, len(weights[0]))].prod(1)


def path_jacobian(weights: list[Tensor], paths: list[Path]) -> Tensor:
    """dv/dw, ``[paths, weights]``: for a weight on a path the product of the others on it."""
    flat = torch.cat([weight.flatten() for weight in weights])
    at = places(paths, len(weights[0]))
    jacobian = flat.new_zeros(len(paths), len(flat))
    for layer in range(len(weights)):
        others = [k for k in range(len(weights)) if k != layer]
        jacobian[torch.arange(len(paths)), at[:, layer]] = flat[at[:, others]].prod(1)
    return jacobian


def linear_weights(module: nn.Sequential) -> list[Tensor]:
    return [p.detach() for p in module.parameters()]


class LiteralECSGD:
    """Inverse chain rule, a step of SGD on the values of the basis paths, weight allocation."""

    def __init__(self, weights: list[Tensor], lr: float, momentum: float) -> None:
        self.weights, self.lr, self.momentum = weights, lr, momentum
        self.skeleton, self.others = basis_paths(len(weights[0]), len(weights))
        self.buffer: Tensor | None = None

    def path_gradients(self, gradients: list[Tensor]) -> Tensor:
        """dL/dv from dL/dw = sum over p of dL/dv_p dv_p/dw."""
        jacobian = path_jacobian(self.weights, self.skeleton + self.others)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        solution = torch.linalg.lstsq(jacobian.T, flat[:, None]).solution[:, 0]
        # There are more equations than paths; that they have a solution is what makes the paths a basis.
        torch.testing.assert_close(jacobian.T @ solution, flat, rtol=0, atol=1e-10 * float(flat.abs().max()))
        return solution

    def step(self, gradients: list[Tensor]) -> None:
        values = path_values(self.weights, self.skeleton + self.others)
        gradient = self.path_gradients(gradients)
        self.buffer = gradient if self.buffer is None else self.momentum * self.buffer + gradient
        ratio = (values - self.lr * self.buffer) / values
        of_skeleton, of_others = ratio[: len(self.skeleton)], ratio[len(self.skeleton) :]
        assert float(of_skeleton.min()) > 0
        for path, own in zip(self.others, of_others, strict=True):
            (layer, j, i) = next(place for place in path if place[1] != place[2])
            # The first layer's skeleton weight is on the path of every later weight.
            self.weights[layer][j, i] *= own if layer == 0 else own / of_skeleton[i]
        for i, own in enumerate(of_skeleton):
            self.weights[0][i, i] *= own


@pytest.mark.parametrize("layers", few([2, 3, 4], [3]))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_agrees_with_the_papers_own_algorithm(layers: int, momentum: float) -> None:
    torch.manual_seed(layers)
    width, lr = 5, 0.02
    module = mlp(*[width] * (layers + 1), bias=False).double()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_diagonal_(1.0)
    literal_module = copy.deepcopy(module)
    literal = LiteralECSGD(linear_weights(literal_module), lr, momentum)
    paths = literal.skeleton + literal.others
    assert len(paths) == layers * width**2 - (layers - 1) * width
    x = torch.randn(16, width, dtype=torch.float64)
    y = torch.randn(16, width, dtype=torch.float64)
    group = scaling_group(module, x)
    assert group.dimension == len(paths)
    base = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
    optimizer = EquivalentClassOptimizer(base, group, rule="paper")
    start = path_values(linear_weights(module), paths)
    for _ in range(50):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        optimizer.step()
        loss = (literal_module(x) - y).square().mean()
        literal.step(list(torch.autograd.grad(loss, list(literal_module.parameters()))))
        values = path_values(linear_weights(module), paths)
        expected = path_values(literal.weights, paths)
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(module(x), literal_module(x), rtol=1e-10, atol=1e-10)
    assert float((values - start).abs().max()) > 0.05
    for i in range(width):
        # The same functions, but other members of their classes: which skeleton weights move differs.
        assert all(float(weight[i, i]) == 1.0 for weight in linear_weights(module)[:-1])
        assert all(float(weight[i, i]) == 1.0 for weight in literal.weights[1:])
    assert not torch.equal(module[0].weight, literal_module[0].weight)


class MatrixECSGD:
    """The same algorithm with a matrix for each layer, as in the authors' experiment: H hidden units in every layer.

    The skeleton weights are the diagonals, and in the last layer those from unit i to output i modulo the number of
    outputs. All but the first layer's stay one, so that these are the values of the H paths along the skeleton.
    """

    def __init__(self, weights: list[Tensor], lr: float) -> None:
        self.weights, self.lr, self.units = weights, lr, torch.arange(len(weights[0]))
        self.masks = []
        for weight in weights:
            mask = torch.zeros_like(weight)
            mask[self.units % len(weight), self.units] = 1
            self.masks.append(mask)

    def step(self, gradients: list[Tensor]) -> None:
        value = self.weights[0][self.units, self.units].clone()
        slope = gradients[0][self.units, self.units] * value
        for weight, gradient, mask in zip(self.weights[1:], gradients[1:], self.masks[1:], strict=True):
            slope -= (weight * gradient * (1 - mask)).sum(0)
        ratio = 1 - self.lr * slope / value**2
        self.weights[0] -= self.lr * gradients[0] * (1 - self.masks[0])
        self.weights[0][self.units, self.units] = value * ratio
        for weight, gradient, mask in zip(self.weights[1:], gradients[1:], self.masks[1:], strict=True):
            moved = (weight - self.lr * gradient / value**2) / ratio
            weight.copy_(torch.where(mask == 1, weight, moved))


def test_training_agrees_with_the_authors_network_and_start() -> None:
    torch.manual_seed(0)
    module = mlp(9, 5, 5, 5, 3, bias=False).double()
    x = torch.randn(16, 9, dtype=torch.float64)
    y = torch.randint(0, 3, (16,))
    set_to_one_(scaling_group(module, x))
    other = copy.deepcopy(module)
    literal = MatrixECSGD(linear_weights(other), 0.05)
    optimizer = ec_sgd(module, lr=0.05, rule="paper")
    before = module(x).detach()
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        loss = nn.functional.cross_entropy(other(x), y)
        literal.step(list(torch.autograd.grad(loss, list(other.parameters()))))
        torch.testing.assert_close(module(x), other(x), rtol=1e-10, atol=1e-10)
    assert float((module(x).detach() - before).abs().max()) > 0.5


# One word for the setting ---------------------------------------------------------------------------------------------


def _attributes(optimizer: Any) -> dict[str, Any]:
    return {name: getattr(optimizer, name) for name in SETTING}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("make", [ECSGD, ECAdamW, ec_sgd, ec_adamw, "wrapper"])
def test_one_word_trains_as_the_options_that_it_stands_for_bit_for_bit(make: Any, momentum: float) -> None:
    weights = []
    for options in ({"rule": "paper"}, SETTING):
        module, x, y = problem(4, 6, 6, 2)
        if make == "wrapper":
            base = torch.optim.SGD(module.parameters(), lr=0.1, momentum=momentum)
            optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), **options)
        else:
            of_base = {"betas": (momentum, 0.9)} if make in (ECAdamW, ec_adamw) else {"momentum": momentum}
            optimizer = make(module.parameters() if isinstance(make, type) else module, lr=0.01, **of_base, **options)
        assert _attributes(optimizer) == SETTING
        train(module, optimizer, x, y, range(20))
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)
    default, x, y = problem(4, 6, 6, 2)
    train(default, ec_sgd(default, lr=0.1, momentum=momentum, rule="path"), x, y, range(20))
    assert not torch.equal(weights[0], torch.cat([p.detach().flatten() for p in default.parameters()]))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("refresh_interval", "epoch"),
        ("refresh_interval", 100),
        ("skeleton", "max"),
        ("representative", "balanced"),
        ("max_path_ratio", 3.0),
        ("free_start", 0.5),
    ],
)
def test_another_value_of_an_option_that_the_word_sets_is_an_error(name: str, other: Any) -> None:
    module = mlp(4, 6, 2)
    ec_sgd(module, rule="paper", **{name: SETTING[name]})
    optimizer = ec_sgd(module, rule="path", **{name: other})
    if other in ("max", "balanced"):  # the defaults, which command lines give, too
        assert _attributes(ec_sgd(module, rule="paper", **{name: other})) == SETTING
    else:
        with pytest.raises(ValueError, match=f"ECSGD: rule='paper' sets {name} to .*, got .*: leave {name} out"):
            ec_sgd(module, rule="paper", **{name: other})
    optimizer.rule = "paper"  # whoever says it later means all of it
    assert _attributes(optimizer) == SETTING
    setattr(optimizer, name, other)
    assert _attributes(optimizer) == {**SETTING, name: other}


#: What these options are if nobody says anything of them.
DEFAULT = {name: value for name, value in Options().arguments().items() if name in SETTING}


@pytest.mark.parametrize("make", [ECSGD, ec_sgd, "wrapper"])
@RULES
def test_another_rule_that_is_set_later_is_trained_as_if_it_had_been_given(make: Any, rule: str) -> None:
    module, x, y = problem(4, 6, 6, 2)
    group = scaling_group(module, x)
    if make == "wrapper":
        optimizer = EquivalentClassOptimizer(torch.optim.SGD(module.parameters(), lr=0.02), group, rule="paper")
    else:
        optimizer = make(module.parameters() if isinstance(make, type) else module, lr=0.02, rule="paper")
        optimizer.bind(group)
    train(module, optimizer, x, y, range(5))
    optimizer.rule = rule
    assert _attributes(optimizer) == {**DEFAULT, "rule": rule}
    optimizer.refresh()
    other = copy.deepcopy(module)
    given = EquivalentClassOptimizer(torch.optim.SGD(other.parameters(), lr=0.02), scaling_group(other, x), rule=rule)
    assert train(module, optimizer, x, y, range(5, 15)) == train(other, given, x, y, range(5, 15))
    assert same_bits(module, other)


@RULES
def test_another_rule_leaves_what_the_user_has_set_himself(rule: str) -> None:
    module = mlp(4, 6, 2)
    optimizer = ec_sgd(module, rule="paper", representative="current", check=None)  # the first as the word has it
    optimizer.free_start = 3.0
    optimizer.implementation = "wrapped"
    with pytest.raises(ValueError, match="got 'paths'"):
        optimizer.rule = "paths"
    assert _attributes(optimizer) == {**SETTING, "free_start": 3.0}
    optimizer = copy.deepcopy(optimizer)
    optimizer.rule = rule
    assert _attributes(optimizer) == {**DEFAULT, "rule": rule, "representative": "current", "free_start": 3.0}
    assert (optimizer.check, optimizer.implementation) == (None, "wrapped")
    optimizer.skeleton = "diagonal"
    optimizer.rule = "unit"  # there is nothing more to put back
    assert _attributes(optimizer) == {**DEFAULT, "representative": "current", "free_start": 3.0, "skeleton": "diagonal"}


@RULES
def test_the_word_and_another_rule_take_turns(rule: str) -> None:
    optimizer = ec_sgd(mlp(4, 6, 2), rule="path", free_start=3.0, refresh_interval="epoch")
    before = _attributes(optimizer)
    for _ in range(2):
        optimizer.rule = "paper"
        optimizer.rule = "paper"
        assert _attributes(optimizer) == SETTING
        optimizer.rule = rule
        assert _attributes(optimizer) == {**before, "rule": rule}
    optimizer.rule = "paper"
    optimizer.max_path_ratio = 5.0
    optimizer.rule = "paper"
    assert _attributes(optimizer) == SETTING
    optimizer.rule = rule
    assert _attributes(optimizer) == {**before, "rule": rule, "max_path_ratio": 5.0}


def test_checkpoints_of_the_word_and_of_its_options_are_the_same() -> None:
    module, x, y = problem(4, 6, 6, 2)
    optimizer = ec_sgd(module, lr=0.1, momentum=0.9, rule="paper")
    train(module, optimizer, x, y, range(5))
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module.state_dict())
    assert state["equivalent_class"]["rule"] == "path"
    train(module, optimizer, x, y, range(5, 20))
    for options in ({"rule": "paper"}, SETTING):
        other, _, _ = problem(4, 6, 6, 2)
        other.load_state_dict(weights)
        resumed = EquivalentClassOptimizer(
            torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), scaling_group(other, x), **options
        )
        resumed.load_state_dict(copy.deepcopy(state))
        train(other, resumed, x, y, range(5, 20))
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))


def test_a_network_without_diagonal_says_what_covers_it() -> None:
    module, x, y = problem(4, 6, 6, 2)
    with torch.no_grad():
        module[0].weight[1, 1] = 0
    with pytest.raises(ValueError, match=r"needs non-zero diagonals .* use rule='path' with skeleton='max'"):
        train(module, ec_sgd(module, rule="paper"), x, y, range(2))


# The start ------------------------------------------------------------------------------------------------------------


def ones_of(module: nn.Module) -> dict[str, set[tuple[int, ...]]]:
    """What the start changes, and that it becomes one."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    shape = (2, 1, 8, 8) if any(isinstance(part, nn.Conv2d) for part in module) else (2, module[0].weight.shape[1])
    x = torch.randn(shape, dtype=torch.float64)
    outputs = module(x).detach()
    set_to_one_(scaling_group(module, x))
    assert not torch.allclose(module(x), outputs)
    changed = {name: p != before[name] for name, p in module.named_parameters()}
    assert all(bool((p[changed[name]] == 1).all()) for name, p in module.named_parameters())
    return {name: set(map(tuple, where.nonzero().tolist())) for name, where in changed.items() if bool(where.any())}


def test_the_start_sets_one_weight_on_each_side_of_each_unit() -> None:
    diagonal = {(i, i) for i in range(4)}
    found = ones_of(mlp(9, 4, 4, 3).double())
    assert found == {"0.weight": diagonal, "2.weight": diagonal, "4.weight": {(i % 3, i) for i in range(4)}}
    wide_to_narrow = {(i % 3, i) for i in range(6)}
    narrow_to_wide = {(i, i % 3) for i in range(6)}
    found = ones_of(mlp(2, 6, 3, 6, 1).double())
    last = {(0, i) for i in range(6)}
    first = {(i, i % 2) for i in range(6)}
    assert found == {"0.weight": first, "2.weight": wide_to_narrow, "4.weight": narrow_to_wide, "6.weight": last}


def test_the_start_takes_the_centre_of_kernels_and_one_of_several_positions() -> None:
    convolutions = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, (5, 3)), nn.ReLU()]
    found = ones_of(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(24, 5)).double())
    assert found["0.weight"] == {(0, 0, 1, 1), (1, 0, 1, 1)}
    assert found["2.weight"] == {(0, 0, 2, 1), (1, 1, 2, 1), (2, 0, 2, 1)}
    assert len(found["5.weight"]) == 3


def test_the_start_is_where_the_paper_chooses_its_skeleton() -> None:
    module, x, y = problem(9, 5, 5, 3)
    set_to_one_(scaling_group(module, x))
    optimizer = ec_sgd(module, lr=0.1, rule="paper")
    train(module, optimizer, x, y, range(30))
    skeleton = optimizer.state_dict()["equivalent_class"]["skeleton"]
    couplings = optimizer.group.couplings
    for number, index in zip(skeleton["fixed_coupling"].tolist(), skeleton["fixed_index"].tolist(), strict=True):
        weight = couplings[number].view(optimizer.group.parameters[couplings[number].parameter])
        assert float(weight.detach().flatten()[index]) == 1.0  # it is held fixed


class Gate(nn.Module):
    """A layer behind a product, whose weights scale with two units each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.hidden, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gated = self.first(x).relu() * self.second(x).relu()
        return self.last(self.hidden(gated).relu())


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.Linear(3, 2), (1, 3), "the network has no units"),
        (norm_cnn(), (2, 1, 8, 8), "some units have no diagonal weight"),
        (Gate(), (1, 4), "8 of 12 units are in products"),
    ],
    ids=["no units", "norms", "products"],
)
def test_where_the_start_does_not_fit_nothing_is_changed(module: nn.Module, shape: Any, message: str) -> None:
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=f"set_skeleton_to_one_: .*{message}"):
        set_to_one_(scaling_group(module, torch.randn(shape)))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_units_of_another_kind_can_be_left_out() -> None:
    module = Gate()
    before = copy.deepcopy(module.state_dict())
    group = scaling_group(module, torch.randn(1, 4))
    set_to_one_(group.without(~group.monomials.simple))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"hidden.weight", "last.weight"}
