"""Parameters of every kind are traced, and the module is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_ecopt.symmetry import scaling_group
from lightning_ecopt.symmetry.scales import Operation
from tests.networks import ResidualMLP, ResNet, mlp, norm_cnn
from tests.symmetry.helpers import assert_same, evaluate
from tests.symmetry.trace.networks import Net, assert_untouched, by_hand, signature, snapshot

# Parameters -----------------------------------------------------------------------------------------------------------


def test_only_the_parameters_given_are_rescaled(x: Tensor) -> None:
    module = mlp(2, 4, 5, 3).double()
    group = scaling_group(module, x, parameters=[*module[0].parameters(), module[2].weight])
    assert set(group.parameters) == {"0.weight", "0.bias", "2.weight"}
    assert group.num_parameters == 12 + 20
    assert group.num_units == 4


def test_the_order_of_the_parameters_given_does_not_matter(x: Tensor) -> None:
    module = mlp(2, 4, 5, 3).double()
    expected = signature(scaling_group(module, x))
    assert signature(scaling_group(module, x, parameters=reversed(list(module.parameters())))) == expected
    assert signature(scaling_group(module, x, parameters=[*module.parameters(), *module.parameters()])) == expected


def test_frozen_parameters_are_left_out_even_if_given(x: Tensor) -> None:
    module = mlp(2, 4, 3).double()
    module[0].bias.requires_grad_(False)
    group = scaling_group(module, x, parameters=module.parameters())
    assert "0.bias" not in group.parameters
    assert group.num_units == 0


def test_parameters_of_another_module_are_refused(x: Tensor) -> None:
    module = mlp(2, 4, 3).double()
    foreign = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="2 of the given parameters are not parameters of Sequential"):
        scaling_group(module, x, parameters=[*module.parameters(), *foreign])


def test_no_parameters_give_an_empty_group(x: Tensor) -> None:
    group = scaling_group(Net(), x, parameters=[])
    assert (group.num_units, group.num_parameters, group.dimension) == (0, 0, 0)
    assert group.unit_sets() == []


def test_parameters_that_the_call_does_not_use_are_listed(x: Tensor) -> None:
    module = Net()
    module.spare = nn.Linear(2, 2)
    group = scaling_group(module, x)
    assert group.unseen == ("spare.weight", "spare.bias")
    assert group.num_units == 4


def test_a_frozen_bias_grounds_its_unit_alone(x: Tensor) -> None:
    module = nn.ModuleDict({"a": mlp(2, 4, 3), "b": mlp(2, 5, 3)}).double()
    module["a"][0].bias.requires_grad_(False)
    module.forward = lambda x: module["a"](x) + module["b"](x)  # type: ignore[method-assign]
    group = scaling_group(module, x)
    assert group.num_units == 5
    assert group.costs[Operation("addmm", "a.0")] == 4


def test_a_scalar_parameter_carries_a_scale_of_its_own(x: Tensor) -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
            self.head = nn.Linear(2, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.gain * x).relu())

    module = Scalar()
    group = scaling_group(module, x)
    before = evaluate(module, (x,))
    assert group.num_units == 1
    group.act_(torch.tensor([1.5], dtype=torch.float64))
    torch.testing.assert_close(module.gain.detach(), torch.tensor(2.0 * 2.718281828459045**1.5, dtype=torch.float64))
    assert_same(evaluate(module, (x,)), before)


@pytest.mark.parametrize("joined", [False, True], ids=["one after the other", "side by side"])
def test_a_parameter_used_twice_agrees_with_itself(joined: bool, x: Tensor) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight  # but not the bias
            self.head = nn.Linear(8 if joined else 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).relu()
            a = self.a(h).relu()
            return self.head(torch.cat([a, self.b(h).relu()], 1) if joined else self.b(a).relu())

    module = Shared().double()
    group = scaling_group(module, x)
    # In a row, the hidden features may grow by one factor from each layer to the next.
    assert group.num_units == (8 if joined else 4 + 1)
    assert [c.parameter for c in group.couplings].count("a.weight") == 1
    before = evaluate(module, (x,))
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    assert_same(evaluate(module, (x,)), before)


def test_overlapping_parts_of_a_parameter_agree_where_they_overlap(x: Tensor) -> None:
    class Parts(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return F.linear(h[:, :3], self.head.weight[:, :3]) + F.linear(h[:, 1:], self.head.weight[:, 1:])

    assert scaling_group(Parts(), x).num_units == 4


def test_the_first_rows_of_a_table_stand_for_all(x: Tensor) -> None:
    """Sequences of two lengths read a table of places, and others may be longer."""

    class Places(Net):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(9, 4))

        def forward(self, long: Tensor, short: Tensor) -> Tensor:
            return torch.cat([self.head(self.body[0](x) + self.places[: len(x)]) for x in (long, short)])

    module = Places().double()
    group = scaling_group(module, x, x[:2])
    assert group.num_units == 4
    longer = torch.randn(8, 2, dtype=torch.float64)
    before = evaluate(module, (longer, x))
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    assert_same(evaluate(module, (longer, x)), before)


@pytest.mark.parametrize("hit", [[0, 1, 2], [0, 2], [0, 1], [1]], ids=str)
def test_experts_that_an_example_leaves_idle_fit_the_next_one(hit: list[int]) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(2, 4), nn.Linear(4, 2)
            self.up, self.down = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: Tensor) -> Tensor:
            h, experts = self.stem(x).relu(), (x > 0).sum(1)
            y = torch.zeros_like(h)
            for k in experts.unique():
                rows = (experts == k).nonzero()[:, 0]
                y.index_add_(0, rows, (h[rows] @ self.up[k].t()).relu() @ self.down[k].t())
            return self.head(y)

    module = Loop().double()
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    some = x[[int(k) in hit for k in (x > 0).sum(1)]]
    group = scaling_group(module, some)
    assert group.num_units == 4 + 4 + 5 * len(hit)
    before = evaluate(module, (x,))
    group.act_(torch.linspace(-1, 1, group.num_units, dtype=torch.float64))
    assert_same(evaluate(module, (x,)), before)


def test_many_overlapping_parts_hold_a_parameter_fixed(x: Tensor) -> None:
    class Windows(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gains = nn.Parameter(torch.randn(200))
            self.count = 0

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x).mean(1, keepdim=True)
            return self.head(sum((h * self.gains[k : 200 - k])[:, :4] for k in range(self.count)))

    module = Windows()
    for module.count, is_fixed in ((30, False), (80, True)):
        group = scaling_group(module, x)
        before = module.gains.detach().clone()
        group.act_(torch.linspace(-1, 1, group.num_units))
        assert torch.allclose(module.gains, before) == is_fixed


def test_unit_sets_gather_the_units_of_one_layer(x: Tensor) -> None:
    module = ResidualMLP(2).double()
    sets = scaling_group(module, x).unit_sets()
    stream = ["stem.weight", "stem.bias", "up.weight", "down.weight", "down.bias", "head.weight"]
    assert [(s.units.tolist(), s.powers) for s in sets] == [
        ([0, 1, 2, 3], tuple(zip(stream, (1, 1, -1, 1, 1, -1), strict=True))),
        ([4, 5, 6, 7, 8], (("up.weight", 1), ("up.bias", 1), ("down.weight", -1))),
    ]


def test_couplings_say_what_leads_in_what_comes_out_and_what_is_added(x: Tensor) -> None:
    group = scaling_group(mlp(2, 3, 1).double(), x)
    assert signature(group) == [
        ("0.weight", (slice(0, 3, 1), slice(0, 2, 1)), [[0], [1], [2]], [[-1]], False),
        ("0.bias", (slice(0, 3, 1),), [0, 1, 2], [-1], True),
        ("2.weight", (slice(0, 1, 1), slice(0, 3, 1)), [[-1]], [[0, 1, 2]], False),
        ("2.bias", (slice(0, 1, 1),), [-1], [-1], True),
    ]


# The module is left as it was -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ResNet, norm_cnn])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("real", [False, True], ids=["", "real call"])
def test_tracing_leaves_the_module_untouched(make: Callable[[], nn.Module], training: bool, real: bool) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = make(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            y = F.dropout(self.net(x), 0.5, True) + torch.rand(3)
            return by_hand(self, y) if real else y

    module = Noisy().train(training)
    image = torch.randn(2, 1, 8, 8)
    module(image).sum().backward()
    before = snapshot(module)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    assert scaling_group(module, image).num_units > 0
    assert_untouched(module, before)
    for name, p in module.named_parameters():
        assert torch.equal(p.grad, gradients[name])
        assert p._version == before["tensors"][name][1]


def test_fake_and_real_calls_find_the_same_group(x: Tensor) -> None:
    fake, real = Net(), Net(by_hand)
    assert signature(scaling_group(real, x)) == signature(scaling_group(fake, x))


def test_control_flow_that_depends_on_data_follows_the_data(x: Tensor) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = mlp(2, 4, 3), mlp(2, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) if x.sum() > 0 else self.right(x)

    module = Branches().double()
    assert scaling_group(module, x.abs()).num_units == 4
    assert scaling_group(module, -x.abs()).num_units == 5
    assert scaling_group(module, -x.abs()).unseen == tuple(f"left.{n}.{p}" for n in (0, 2) for p in ("weight", "bias"))


def test_branching_on_hidden_features_grounds_them(x: Tensor) -> None:
    group = scaling_group(Net(lambda m, h: h if h.sum() > 1 else 2 * h), x)
    assert group.num_units == 0


def test_a_module_that_raises_shows_its_own_error(x: Tensor) -> None:
    class Broken(Exception):
        pass

    def fail(m: Any, h: Tensor) -> None:
        m.hidden = h
        m.wide.add_(1)
        raise Broken("the message of the user")

    module = Net(fail)
    before = snapshot(module)
    with pytest.raises(Broken, match="the message of the user"):
        scaling_group(module, x)
    assert _get_current_dispatch_mode() is None
    assert_untouched(module, before)


def test_wrong_inputs_show_the_error_of_the_module() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        scaling_group(Net(), torch.zeros(5, 7, dtype=torch.float64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("real", [False, True], ids=["", "real call"])
def test_the_callers_gradient_mode_does_not_matter(mode: Callable[[], Any], real: bool) -> None:
    module = nn.Sequential(ResNet().double(), Net(by_hand if real else lambda m, h: h))
    module[1].body[0] = nn.Linear(3, 4).double()
    image = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    expected = scaling_group(module, image)
    with mode():
        group = scaling_group(module, image)
    assert signature(group) == signature(expected)
    assert group.num_units == 14 + 3 + 4


def test_no_hooks_stay_behind(x: Tensor) -> None:
    from torch.nn.modules import module as registry

    before = len(registry._global_forward_pre_hooks), len(registry._global_forward_hooks)
    scaling_group(Net(by_hand), x)
    assert (len(registry._global_forward_pre_hooks), len(registry._global_forward_hooks)) == before
