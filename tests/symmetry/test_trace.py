"""What one traced call sees, what it grounds, and that it leaves nothing behind."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_ecopt.common.segment_sum import SegmentSum
from lightning_ecopt.symmetry import GroupFromNextCall, ScalingGroup, scaling_group
from lightning_ecopt.symmetry.equations import Operation
from lightning_ecopt.symmetry.rules import RULES
from tests.networks import ResidualMLP, ResNet, mlp, norm_cnn
from tests.symmetry.helpers import assert_same, draw_, evaluate

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    logits: Tensor


class Net(nn.Module):
    """Linear, relu, linear; what happens to the hidden features in between is up to the test."""

    def __init__(self, between: Callable[[Any, Tensor], Any] = lambda m, h: h) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        self.between = between
        self.head = nn.Linear(4, 3)
        self.register_buffer("state", torch.zeros(4))
        self.register_buffer("wide", torch.zeros(5, 4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        y = self.between(self, h)
        return self.head(h if y is None else y)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def signature(group: ScalingGroup) -> list[Any]:
    return [(c.parameter, c.region, c.incoming.tolist(), c.outgoing.tolist(), c.additive) for c in group.couplings]


def snapshot(module: nn.Module) -> dict[str, Any]:
    tensors = module.state_dict(keep_vars=True)
    return {
        "tensors": {name: (id(t), t._version, t.detach().clone()) for name, t in tensors.items()},
        "grads": {name: p.grad for name, p in module.named_parameters()},
        "attributes": {name: dict(vars(part)) for name, part in module.named_modules()},
        "training": [part.training for part in module.modules()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(module: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(module)
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, _, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity, f"{name} is another tensor"
        torch.testing.assert_close(after["tensors"][name][2], value, rtol=0, atol=0, msg=name)
    assert after["grads"] == before["grads"]
    assert after["attributes"] == before["attributes"]
    assert after["training"] == before["training"]
    assert torch.equal(after["random"], before["random"])


def by_hand(m: Any, h: Tensor) -> Tensor | None:
    """Control flow that depends on data, so that only a real call will do; it touches nothing else."""
    return h if bool(torch.zeros(()) == 0) else None


# What is is_fixed, and what it cost -----------------------------------------------------------------------------------


def test_an_operation_without_a_rule_grounds_what_it_touches_and_is_charged(x: Tensor) -> None:
    class Wavy(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.erf()

    layers = [nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 6), Wavy(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    group = scaling_group(nn.Sequential(*layers).double(), x)
    assert group.num_units == 4 + 5
    assert dict(group.costs) == {Operation("erf", "3"): 6, Operation("output", ""): 3}


def test_the_operation_that_comes_first_is_charged(x: Tensor) -> None:
    group = scaling_group(nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Tanh(), nn.Linear(4, 1)).double(), x)
    assert dict(group.costs) == {Operation("gelu", "1"): 4, Operation("output", ""): 1}


def test_outputs_are_charged_to_the_output(x: Tensor) -> None:
    assert dict(scaling_group(Net(), x).costs) == {Operation("output", ""): 3}


def test_an_unknown_operation_that_writes_grounds_what_it_writes_to(x: Tensor) -> None:
    group = scaling_group(Net(lambda m, h: torch.zeros_like(h).copysign_(h)), x)
    assert group.num_units == 0
    assert group.costs[Operation("copysign", "")] == 4


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(lambda m, h: setattr(m, "hidden", h), id="attribute"),
        pytest.param(lambda m, h: setattr(m, "hidden", {"a": [h.detach()]}), id="nested attribute"),
        pytest.param(lambda m, h: setattr(m.body, "hidden", h), id="attribute of a submodule"),
        pytest.param(lambda m, h: setattr(m, "hidden", Result(h)), id="dataclass attribute"),
        pytest.param(lambda m, h: m.state.copy_(h.detach()[0]), id="buffer"),
        pytest.param(lambda m, h: m.state.mul_(0.9).add_(h.detach().mean(0)), id="running mean"),
        pytest.param(lambda m, h: m.wide[1].copy_(h.detach()[0]), id="part of a buffer"),
        pytest.param(lambda m, h: m.wide.__setitem__((slice(0, 5)), h.detach()), id="assigned part of a buffer"),
        pytest.param(lambda m, h: setattr(m, "state", h.detach()[0]), id="rebound buffer"),
        pytest.param(lambda m, h: setattr(m, "state", m.state + h.detach().mean(0)), id="rebound running mean"),
    ],
)
@pytest.mark.parametrize("real", [False, True], ids=["", "real call"])
def test_what_the_module_keeps_stays_as_it_is(keep: Callable[[Any, Tensor], Any], real: bool, x: Tensor) -> None:
    def between(m: Any, h: Tensor) -> None:
        keep(m, h)
        if real:
            by_hand(m, h)

    module = Net(between)
    before = snapshot(module)
    assert scaling_group(module, x).num_units == 0
    assert_untouched(module, before)


@pytest.mark.parametrize("real", [False, True], ids=["", "real call"])
def test_lists_and_dicts_of_the_module_are_put_back(real: bool, x: Tensor) -> None:
    def between(m: Any, h: Tensor) -> None:
        m.history.append(h.detach())
        m.features["hidden"] = h
        if real:
            by_hand(m, h)

    module = Net(between)
    module.history, module.features = [], {}
    assert scaling_group(module, x).num_units == 0
    assert module.history == []
    assert module.features == {}


def test_data_that_leaves_as_a_number_is_grounded(x: Tensor) -> None:
    group = scaling_group(Net(lambda m, h: h * float(h.sum())), x)
    assert group.num_units == 0


@pytest.mark.parametrize("wrap", [
    pytest.param(lambda y: {"logits": y, "extra": [1, None]}, id="dict"),
    pytest.param(lambda y: (y, "text"), id="tuple"),
    pytest.param(lambda y: Pair(0, y), id="namedtuple"),
    pytest.param(Result, id="dataclass"),
    pytest.param(lambda y: [Result(y)], id="dataclass in a list"),
])  # fmt: skip
def test_all_tensors_of_the_output_stay_as_they_are(wrap: Callable[[Tensor], Any], x: Tensor) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(2, 4, 3).double()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.net(x))

    assert scaling_group(Wrapped(), x).num_units == 4


def test_hidden_features_among_the_outputs_are_grounded(x: Tensor) -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.body(x)
            return {"logits": self.head(h), "hidden": {"features": [h[:, :2]]}}

    assert scaling_group(Both(), x).num_units == 2


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_inputs_may_be_given_by_keyword_and_in_any_structure(x: Tensor) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = mlp(2, 4, 3).double(), mlp(2, 5, 3).double()

        def forward(self, batch: dict[str, Tensor], *, other: Result, scale: float = 1.0) -> Tensor:
            return self.one(batch["x"]) * scale + self.two(other.logits)

    group = scaling_group(Keywords(), {"x": x}, other=Result(x), scale=2.0)
    assert group.num_units == 9


def test_inputs_are_left_as_they_are_even_if_the_module_writes_to_them(x: Tensor) -> None:
    before = x.clone()
    scaling_group(Net(), x)
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_values_of_inputs_do_not_matter(x: Tensor) -> None:
    module = Net()
    assert signature(scaling_group(module, x)) == signature(scaling_group(module, torch.full_like(x, float("nan"))))


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


def test_a_parameter_used_in_overlapping_parts_is_grounded(x: Tensor) -> None:
    class Parts(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return F.linear(h[:, :3], self.head.weight[:, :3]) + F.linear(h[:, 1:], self.head.weight[:, 1:])

    assert scaling_group(Parts(), x).num_units == 0


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


# A group from the next real call --------------------------------------------------------------------------------------


class Trained(nn.Module):
    """A module with a training step, as a Lightning module has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResidualMLP().double()
        self.skip = self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        if self.fail:
            raise RuntimeError("no data")
        return None if self.skip else F.mse_loss(self(batch), torch.ones(len(batch), 2, dtype=torch.float64))


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_training_step_gives_the_group_of_the_module(batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "training_step")
    assert pending.group is None
    expected = type(module).training_step(module, batch, 0)
    loss = module.training_step(batch, 0)
    assert torch.equal(loss, expected)
    assert loss.requires_grad
    assert isinstance(pending.group, ScalingGroup)
    assert signature(pending.group) == signature(scaling_group(module, batch))
    assert pending.group.unseen == ()
    assert "training_step" not in vars(module)
    assert _get_current_dispatch_mode() is None


def test_a_forward_call_gives_the_same_group_as_a_trace(batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "forward")
    module(batch)
    assert pending.group is not None
    expected = scaling_group(module, batch)
    assert signature(pending.group) == signature(expected)
    assert sum(pending.group.costs.values()) == sum(expected.costs.values()) == 2
    assert "forward" not in vars(module)
    first = pending.group
    module(batch)
    assert pending.group is first


def test_gradients_of_a_watched_step_are_those_of_an_unwatched_one(batch: Tensor) -> None:
    module, other = Trained(), Trained()
    other.load_state_dict(module.state_dict())
    GroupFromNextCall(module, "training_step")
    module.training_step(batch, 0).backward()
    other.training_step(batch, 0).backward()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_loss_is_watched_too(batch: Tensor) -> None:
    class Penalised(Trained):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            h = F.relu(self.net.stem(batch))
            return self(batch).sum() + h[:, :2].square().mean()

    module = Penalised()
    pending = GroupFromNextCall(module, "training_step")
    module.training_step(batch, 0)
    assert pending.group is not None
    assert pending.group.num_units == 2 + 5


def test_a_step_without_output_keeps_waiting(batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "training_step")
    module.skip = True
    assert module.training_step(batch, 0) is None
    assert pending.group is None
    module.skip = False
    module.training_step(batch, 1)
    assert pending.group is not None
    assert pending.group.num_units == 9


def test_an_exception_leaves_nothing_behind(batch: Tensor) -> None:
    from torch.nn.modules import module as registry

    module = Trained()
    pending = GroupFromNextCall(module, "training_step")
    hooks = len(registry._global_forward_pre_hooks), len(registry._global_forward_hooks)
    module.fail = True
    with pytest.raises(RuntimeError, match="no data"):
        module.training_step(batch, 0)
    assert _get_current_dispatch_mode() is None
    assert (len(registry._global_forward_pre_hooks), len(registry._global_forward_hooks)) == hooks
    assert pending.group is None
    module.fail = False
    module.training_step(batch, 0)
    assert pending.group is not None
    assert pending.group.num_units == 9


def test_the_users_own_attribute_is_put_back(batch: Tensor) -> None:
    module = Trained()
    calls = []

    def own(batch: Tensor, index: int) -> Tensor:
        calls.append(index)
        return module(batch).sum()

    module.training_step = own  # type: ignore[method-assign]
    pending = GroupFromNextCall(module, "training_step")
    module.training_step(batch, 7)
    assert pending.group is not None
    assert vars(module)["training_step"] is own
    assert calls == [7]


def test_a_cancelled_watch_gives_the_method_back(batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "forward")
    pending.cancel()
    assert "forward" not in vars(module)
    module(batch)
    assert pending.group is None


def test_cancelling_spares_what_someone_else_has_put_there_since() -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "forward")
    module.forward = own = lambda x: x  # type: ignore[method-assign]
    pending.cancel()
    assert vars(module)["forward"] is own


def test_a_pending_group_refuses_foreign_parameters_before_it_touches_the_module() -> None:
    module = Trained()
    with pytest.raises(ValueError, match="not parameters of Trained"):
        GroupFromNextCall(module, "forward", [nn.Parameter(torch.zeros(1))])
    assert "forward" not in vars(module)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_watched_call_without_gradients_finds_the_same_group(mode: Callable[[], Any], batch: Tensor) -> None:
    module = Trained()
    pending = GroupFromNextCall(module, "forward")
    with mode():
        module(batch)
    assert pending.group is not None
    assert signature(pending.group) == signature(scaling_group(module, batch))


def test_what_a_watched_call_keeps_in_attributes_is_grounded_and_kept(x: Tensor) -> None:
    module = Net(lambda m, h: setattr(m, "hidden", h))
    pending = GroupFromNextCall(module, "forward")
    module(x)
    assert pending.group is not None
    assert pending.group.num_units == 0
    assert module.hidden.shape == (5, 4)


def test_a_watched_call_updates_running_statistics_once() -> None:
    module = norm_cnn()
    other = deepcopy(module)
    image = torch.randn(4, 1, 8, 8)
    pending = GroupFromNextCall(module, "forward")
    assert torch.equal(module(image), other(image))
    for (name, a), (_, b) in zip(module.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert pending.group is not None
    assert pending.group.num_units == 9


def test_the_group_of_a_watched_call_moves_the_module_itself(batch: Tensor) -> None:
    module = Trained()
    draw_(module, torch.Generator().manual_seed(0))
    pending = GroupFromNextCall(module, "forward")
    before = module(batch).detach()
    assert pending.group is not None
    weight = module.net.stem.weight.detach().clone()
    pending.group.act_(torch.ones(9))
    assert not torch.equal(module.net.stem.weight, weight)
    assert_same(module(batch).detach(), before)


# Sums over segments ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 200)), max_size=8), st.randoms(use_true_random=False))
def test_segment_sums_are_those_of_index_add(sizes: list[int], random: Any) -> None:
    entries = [group for group, size in enumerate(sizes) for _ in range(size)]
    random.shuffle(entries)
    groups = torch.tensor(entries, dtype=torch.long)
    # Whole numbers add up exactly in any order.
    values = torch.arange(1, len(entries) + 1, dtype=torch.float64)
    expected = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, groups, values)
    assert torch.equal(SegmentSum(groups, len(sizes))(values), expected)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 65, 512, 513, 5000])
def test_segment_sums_at_the_edges_of_their_levels(size: int) -> None:
    groups = torch.arange(3 * size) % 3
    values = torch.arange(3 * size, dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64).index_add_(0, groups, values)
    assert torch.equal(SegmentSum(groups, 4)(values), expected)


def test_segment_sums_are_the_same_bit_by_bit_wherever_other_groups_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, generator=generator)
    alone = SegmentSum(torch.zeros(300, dtype=torch.long), 1)(values)
    groups = torch.cat([torch.zeros(300, dtype=torch.long), torch.ones(77, dtype=torch.long)])
    assert torch.equal(SegmentSum(groups, 2)(torch.cat([values, torch.ones(77)]))[0], alone[0])


def test_segment_sums_pass_gradients_on() -> None:
    values = torch.ones(40, dtype=torch.float64, requires_grad=True)
    groups = torch.arange(40) % 2
    (SegmentSum(groups, 2)(values) * torch.tensor([1.0, 3.0], dtype=torch.float64)).sum().backward()
    assert torch.equal(values.grad, 1.0 + 2.0 * groups)


def test_a_rule_that_fails_costs_freedoms_and_warns(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    def broken(call: Any) -> Any:
        raise RuntimeError("no such form")

    monkeypatch.setitem(RULES, "relu", broken)
    with pytest.warns(UserWarning, match="rule for relu failed.*no such form"):
        group = scaling_group(Net(), x)
    assert group.num_units == 0
    assert "relu" in {operation.name for operation in group.costs}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["script", "trace"])
def test_scripted_modules_are_called_for_real(compiler: str, x: Tensor) -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    scripted = torch.jit.script(module) if compiler == "script" else torch.jit.trace(module, x)
    group = scaling_group(scripted, x)
    assert (group.num_units, group.unseen) == (4, ())
    before = scripted(x)
    group.act_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    torch.testing.assert_close(scripted(x), before, rtol=1e-12, atol=1e-12)
