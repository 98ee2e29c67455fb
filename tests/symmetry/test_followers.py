"""Copies of weights: which are found, what a traced call says of them, and what rescales them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ecopt import EquivalentClassOptimization, ec_sgd
from lightning_ecopt.symmetry import GroupFromNextCall, ScalingGroup, nearness, scaling_group
from lightning_ecopt.symmetry.followers import Followers
from tests.networks import mlp, norm_cnn
from tests.symmetry.helpers import assert_same

RATE = 0.1
X = torch.linspace(-2, 2, 24, dtype=torch.double).view(8, 3)


def frozen(module: nn.Module) -> Any:
    return copy.deepcopy(module).requires_grad_(False)


class Pair(nn.Module):
    """A network that is trained, and something beside it."""

    def __init__(self, net: nn.Module | None = None, **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = (mlp(3, 4, 5, 2) if net is None else net).double()
        for name, make in parts.items():
            setattr(self, name, make(self.net))


def found(module: nn.Module, **options: Any) -> list[str]:
    """What is found to follow the parameters that require a gradient."""
    followers, parameters = Followers(module, **options), dict(module.named_parameters())
    followers.look(parameters)
    return followers.lines(parameters)


# What is found --------------------------------------------------------------------------------------------------------


class Holder:
    """An object of the user's that keeps an average."""

    def __init__(self, values: Any) -> None:
        self.values = values


class Wrapper(nn.Module):
    """Copies as parts of a module of another class."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second.requires_grad_(False)


def constants(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        nn.init.constant_(p, 0.5)
    return frozen(net)


def other_activation(net: nn.Module) -> nn.Module:
    other = mlp(3, 4, 5, 2, activation=nn.Tanh).double()
    other.load_state_dict(net.state_dict())
    return other.requires_grad_(False)


def nearly(net: nn.Module) -> nn.Module:
    other = frozen(net)
    for p in other.parameters():
        p.mul_(1 - RATE).add_(p / (1 - RATE), alpha=RATE)  # a running mean of equal tensors, which has rounded
    return other


def moved(net: nn.Module) -> nn.Module:
    other = frozen(net)
    for p in other.parameters():
        p += 0.1 * p.std() * torch.randn_like(p)
    return other


def averaged(net: nn.Module) -> nn.Module:
    average = AveragedModel(net)
    for p in average.parameters():
        p.data.mul_(3)
    return average


FOUND: dict[str, tuple[Callable[[nn.Module], Any], list[str]]] = {
    "copy": (frozen, ["other follows net"]),
    "rounded": (nearly, ["other follows net"]),
    "moved": (moved, ["other follows net"]),
    "a part": (lambda net: frozen(net[:3]), ["other follows net"]),
    "parts of a wrapper": (
        lambda net: Wrapper(frozen(net[0]), frozen(net[2])),
        ["other.first follows net.0", "other.second follows net.2"],
    ),
    "list": (lambda net: [p.detach().clone() for p in net.parameters()], ["other follows net"]),
    "dictionary": (lambda net: {n: p.detach().clone() for n, p in net.named_parameters()}, ["other follows net"]),
    "in a list": (lambda net: [frozen(net)], ["other.0 follows net"]),
    "in an object": (lambda net: Holder([p.detach().clone() for p in net.parameters()]), ["other.values follows net"]),
    "average of torch": (averaged, ["other.module follows net"]),
    "nothing": (lambda net: None, []),
    "trained": (copy.deepcopy, []),
    "constants": (constants, []),
    "other activation": (other_activation, []),
    "another of the same form": (lambda net: mlp(3, 4, 5, 2).double().requires_grad_(False), []),
    "a wrapper with something else": (lambda net: Wrapper(frozen(net[0]), mlp(4, 5)), []),
    "the parameters": (lambda net: list(net.parameters()), []),
    "views of them": (lambda net: [p.detach() for p in net.parameters()], []),
    "one weight": (lambda net: frozen(net[0]), ["other follows net.0"]),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_equal_to_a_whole_trained_part_follows_it(name: str) -> None:
    make, expected = FOUND[name]
    assert found(Pair(other=make)) == expected


def test_registered_buffers_follow_in_the_order_of_the_parameters() -> None:
    module = Pair()
    for number, p in enumerate(module.net.parameters()):
        module.register_buffer(f"average_{number}", p.detach().clone())
    assert found(module) == ["_buffers follows net"]


def test_layers_of_one_list_that_begin_alike_do_not_follow_each_other() -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3)
    module.layers[1].requires_grad_(False)
    assert found(module) == []


def test_of_equal_leaders_the_one_of_like_name_is_followed() -> None:
    module = Pair()
    module.critic_2, module.critic_1 = copy.deepcopy(module.net), copy.deepcopy(module.net)
    module.target_critic_1, module.target_critic_2 = frozen(module.net), frozen(module.net)
    assert found(module) == ["target_critic_1 follows critic_1", "target_critic_2 follows critic_2"]


def test_an_average_of_all_has_a_copy_of_the_target_too() -> None:
    module = Pair(target=frozen)
    average = frozen(module)
    followers, parameters = (
        Followers(module, beside=lambda: {"Callback": Holder(average)}),
        dict(module.named_parameters()),
    )
    followers.look(parameters)
    assert followers.lines(parameters) == ["target follows net", "Callback.values follows the module"]
    names = [name for name, p in parameters.items() if p.requires_grad]
    assert sorted(name for name, _ in followers.of(parameters)) == sorted(names * 3)


def test_what_two_names_lead_to_is_rescaled_once() -> None:
    module = Pair(target=frozen)
    module.also, module.tensors = module.target, list(module.target.parameters())
    assert_follow(module, lambda: module.target(X))


# What is rescaled -----------------------------------------------------------------------------------------------------


def assert_follow(module: nn.Module, function: Callable[[], Tensor], spread: float = 1.0, **options: Any) -> None:
    """A follower is multiplied by what its leader is multiplied by, and its function stays."""
    followers = Followers(module, **options)
    group = scaling_group(module.net, X)
    followers.look(group.parameters)
    before = function()
    log_scale = spread * torch.randn(group.num_units, dtype=torch.double)
    ones = {name: torch.ones_like(p) for name, p in group.parameters.items()}
    group.rescale_(ones, log_scale)
    tensors = followers.of(group.parameters)
    kept = [tensor.clone() for _, tensor in tensors]
    group.act_(log_scale)
    followers.rescale_(group, log_scale)
    assert len(tensors) == len(group.parameters)
    for (name, tensor), old in zip(tensors, kept, strict=True):
        torch.testing.assert_close(
            tensor.double(), old.double() * ones[name], rtol=1e-9 if old.dtype == torch.double else 1e-2, atol=0
        )
    assert_same(function(), before, 1e-9)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize(
    "name", [name for name in FOUND if len(FOUND[name][1]) == 1 and name not in ("a part", "one weight")]
)
def test_what_follows_is_rescaled_with_what_it_follows(name: str) -> None:
    module = Pair(other=FOUND[name][0])
    call = module.other if isinstance(module.other, nn.Module) else module.net
    assert_follow(module, lambda: call(X))


def test_a_follower_of_another_type_is_rescaled_in_its_own() -> None:
    module = Pair(other=lambda net: frozen(net).to(torch.bfloat16))
    assert_follow(module, lambda: module.net(X), spread=0.1)


def test_a_follower_that_is_replaced_or_gone_loses_nothing() -> None:
    module = Pair(target=frozen)
    followers, parameters = Followers(module), dict(module.named_parameters())
    group = scaling_group(module.net, X)
    followers.look(parameters)
    module.target = mlp(3, 9, 2).double()
    assert followers.of(parameters) == []
    followers.rescale_(group, torch.ones(group.num_units))
    module.target = frozen(module.net)
    assert len(followers.of(parameters)) == 6
    del module.target
    assert followers.of(parameters) == []
    assert followers.saved() == [("target", "net")]


# What is told by hand -------------------------------------------------------------------------------------------------


def with_buffers(module: Pair) -> Pair:
    for name, p in module.net.named_parameters():
        module.register_buffer(f"ema_net_{name.replace('.', '_')}", p.detach() * 3)
    return module


GIVEN: dict[str, tuple[Callable[[], Pair], Callable[[Pair], Any]]] = {
    "names": (lambda: Pair(other=lambda net: mlp(3, 4, 5, 2).double()), lambda m: {"other": "net"}),
    "modules": (lambda: Pair(other=lambda net: mlp(3, 4, 5, 2).double()), lambda m: {m.other: m.net}),
    "tensors": (
        lambda: Pair(other=lambda net: [p * 2 for p in net.parameters()]),
        lambda m: dict(zip(m.other, m.net.parameters(), strict=True)),
    ),
    "a list by name": (
        lambda: Pair(other=lambda net: [p.detach() * 2 for p in net.parameters()]),
        lambda m: {"other": "net"},
    ),
    "buffers by the start of their names": (lambda: with_buffers(Pair()), lambda m: {"ema_net_": "net"}),
    "one tensor by name": (
        lambda: with_buffers(Pair()),
        lambda m: {f"ema_net_{n.replace('.', '_')}": f"net.{n}" for n, _ in m.net.named_parameters()},
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_followers_can_be_told_by_hand(name: str) -> None:
    make, given = GIVEN[name]
    module = make()
    followers = Followers(module, given(module))
    followers.check(module.net.parameters())
    assert_follow(module, lambda: module.net(X), given=given(module))


WRONG: dict[str, tuple[Any, str]] = {
    "no such name": ({"targt": "net"}, "Pair has no targt. It has net, target, fixed"),
    "the start of a name": ({"target": "ne"}, "Pair has no ne. It has net, target, fixed"),
    "the start of another name": ({"targ": "net"}, "Pair has no targ. It has net, target, fixed"),
    "swapped": ({"net": "target"}, r"an optimizer trains it.*did you mean {'target': 'net'}\?"),
    "other shapes": ({"target": "other"}, r"0.weight has shape \[4, 3\], and not \[9, 3\]"),
    "other names": ({"target": "odd"}, "0.weight.* is not among weight, bias"),
    "not trained": ({"target": "fixed"}, "target follows fixed, but no optimizer trains fixed"),
    "trained itself": ({"net": "other_net"}, "net follows other_net, but an optimizer trains it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_what_does_not_fit(name: str) -> None:
    given, message = WRONG[name]
    module = Pair(
        target=frozen,
        fixed=frozen,
        other=lambda net: mlp(3, 9, 5, 2),
        odd=lambda net: nn.Linear(3, 4),
        other_net=copy.deepcopy,
    )
    with pytest.raises(ValueError, match=message):
        Followers(module, given).check([*module.net.parameters(), *module.other_net.parameters()])


@pytest.mark.parametrize(
    ("given", "message"), [([1], "is a mapping"), ({"target": "net"}, "know no module"), ({3: 4}, "3 is not")]
)
def test_what_is_no_follower_at_all_is_refused(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Followers(None, given)


def test_what_is_near_another_part_than_it_is_told_to_follow_is_doubted() -> None:
    module = Pair(target=frozen, predictor=copy.deepcopy)
    for p in module.predictor.parameters():
        nn.init.normal_(p)
    trained = [*module.net.parameters(), *module.predictor.parameters()]
    followers = Followers(module, {"target": "predictor"})
    with pytest.warns(UserWarning, match="target is near net and not predictor.* is {'target': 'net'} meant?") as told:
        followers.check(trained)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        followers.check(trained)
        Followers(module, {"target": "net"}).check(trained)
        nn.init.normal_(module.target[0].weight)
        Followers(module, {"target": "predictor"}).check(trained)


@pytest.mark.parametrize("given", ["", "target", ["target"], 3])
def test_what_is_no_mapping_is_refused_at_once(given: Any) -> None:
    with pytest.raises(TypeError, match=r"followers is a mapping, as in followers={'target': 'online'}, got"):
        EquivalentClassOptimization(followers=given)
    with pytest.raises(TypeError, match="followers is a mapping"):
        ec_sgd(mlp(3, 4, 2), lr=0.1, followers=given)


# What a traced call says of them --------------------------------------------------------------------------------------


def ema_lerp(p: Tensor, t: Tensor) -> None:
    t.lerp_(p, RATE)


def ema_data(p: Tensor, t: Tensor) -> None:
    t.data.mul_(1 - RATE).add_(p.data, alpha=RATE)


def ema_assigned(p: Tensor, t: Tensor) -> None:
    t.data = t.data * (1 - RATE) + p.data * RATE


def ema_copied(p: Tensor, t: Tensor) -> None:
    t.copy_(RATE * p + (1 - RATE) * t)


def ema_difference(p: Tensor, t: Tensor) -> None:
    t -= RATE * (t - p)


def ema_by_tensor(p: Tensor, t: Tensor) -> None:
    t.mul_(torch.tensor(1 - RATE)).add_(p / torch.tensor(1 / RATE))


def hard(p: Tensor, t: Tensor) -> None:
    t.copy_(p)


def by_rows(p: Tensor, t: Tensor) -> None:
    for k in range(len(t)):
        t[k].copy_(p[k])


def one_by_one(change: Callable[[Tensor, Tensor], None]) -> Callable[[Any], None]:
    def update(module: Any) -> None:
        for p, t in zip(module.net.parameters(), module.target.parameters(), strict=True):
            change(p, t)

    return update


def foreach(name: str, *arguments: Any, **options: Any) -> Callable[[Any], None]:
    def update(module: Any) -> None:
        first, second = list(module.target.parameters()), list(module.net.parameters())
        getattr(torch, f"_foreach_{name}")(first, second, *arguments, **options)

    return update


def foreach_divided(module: Any) -> None:
    first, second = list(module.target.parameters()), list(module.net.parameters())
    difference = torch._foreach_sub(second, first)
    torch._foreach_addcdiv_(first, difference, [torch.full_like(p, 10) for p in first])


def state_dict(module: Any) -> None:
    module.target.load_state_dict(module.net.state_dict())


def replaced(module: Any) -> None:
    module.target = frozen(module.net)


UPDATES: dict[str, Callable[[Any], None]] = {
    **{
        f.__name__: one_by_one(f) for f in (ema_lerp, ema_data, ema_assigned, ema_copied, ema_difference, ema_by_tensor)
    },
    **{f.__name__: one_by_one(f) for f in (hard, by_rows)},
    "foreach lerp": foreach("lerp_", RATE),
    "foreach add": foreach("add_", alpha=RATE),
    "foreach copy": foreach("copy_"),
    "foreach divide": foreach_divided,
    "state dict": state_dict,
    "replaced": replaced,
}


class Step(Pair):
    """A step of training that moves the target, before or after the loss is computed, which may look at it."""

    def __init__(self, update: Callable[[Any], None], comes_first: bool, look: Any = None) -> None:
        super().__init__(norm_cnn() if look == "norm" else None, target=frozen)
        self.update, self.comes_first = update, comes_first
        self.look = look if callable(look) else lambda m, x: m.target(x)
        self.x = torch.randn(4, 1, 8, 8, dtype=torch.double) if look == "norm" else X

    def forward(self, x: Tensor) -> Tensor:
        if self.comes_first:
            with torch.no_grad():
                self.update(self)
        loss = F.mse_loss(self.net(x), self.look(self, x).detach() + 1)
        if not self.comes_first:
            with torch.no_grad():
                self.update(self)
        return loss


def watched(module: nn.Module, *inputs: Tensor, parameters: Iterable[Tensor] | None = None) -> ScalingGroup:
    """The group from a call that is watched in view of the module's followers."""
    deferred = GroupFromNextCall(module, "forward", parameters)
    deferred.followers = Followers(module)
    module(*inputs)
    group = deferred.settle()
    assert group is not None
    return group


def units_of(module: Step) -> int:
    group = watched(module, module.x, parameters=module.net.parameters())
    assert not group.unseen
    return group.num_units


@pytest.mark.parametrize("comes_first", [False, True])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_in_the_traced_step_costs_no_freedom(name: str, comes_first: bool) -> None:
    assert units_of(Step(UPDATES[name], comes_first)) == 9


def test_an_update_of_a_network_with_norms_costs_no_freedom() -> None:
    module = Step(one_by_one(ema_lerp), True, "norm")
    assert units_of(module) == scaling_group(module.net, module.x).num_units > 0


def nothing(module: Any) -> None:
    pass


#: What a loss may see of a target that follows, and how many of the 4 and 5 units it leaves free.
LOOKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "outputs": (lambda m, x: m.target(x), 9),
    "hidden features": (lambda m, x: m.target[:2](x).sum(1, keepdim=True), 5),
    "features of one by the other": (lambda m, x: m.net[2:](m.target[:2](x)), 9),
    "a weight": (lambda m, x: m.target[2].weight.square().sum(), 1),  # one for both layers together
    "a distance": (lambda m, x: (m.target[0].weight - m.net[0].weight).square().sum(), 5),
    "tanh": (lambda m, x: m.target[4](torch.tanh(m.target[2](m.target[1](m.target[0](x))))), 4),
}


@pytest.mark.parametrize("name", LOOKS)
def test_uses_of_a_follower_are_uses_of_its_leader(name: str) -> None:
    look, expected = LOOKS[name]
    assert units_of(Step(nothing, False, look)) == expected


def test_a_plain_copy_of_one_weight_that_the_loss_reads_is_no_follower() -> None:
    class Reads(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.zeros(4, 3, dtype=torch.double))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.kept.copy_(self.net[0].weight)
            return self.net(x).sum() + self.kept.square().sum()

    module = Reads()
    group = watched(module, X)
    assert group.num_units == 5


def test_what_only_a_follower_uses_is_unseen() -> None:
    """A branch that this step skips, but for its copy: its weights are held fixed until they are used."""

    class Skips(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.branch = mlp(3, 4, 2).double()
            self.target = frozen(self.branch)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for p, t in zip(self.branch.parameters(), self.target.parameters(), strict=True):
                    t.lerp_(p, RATE)
                seen = self.target(x)
            return F.mse_loss(self.net(x), seen)

    module = Skips()
    group = watched(module, X)
    assert group.num_units == 9
    assert set(group.unseen) == {f"branch.{name}" for name, _ in module.branch.named_parameters()}


def test_the_average_of_torch_can_be_updated_in_the_step() -> None:
    def update(module: Any) -> None:
        module.average.update_parameters(module.net)

    module = Step(update, False)
    module.average = AveragedModel(module.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    module.average.update_parameters(module.net)
    assert units_of(module) == 9


# What nobody sees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", ["balanced", "as they are"])
def test_balanced_weights_can_be_mixed_whatever_members_of_their_classes_were_saved(mixed: str) -> None:
    """As for weights on disk: the mean of two models depends on their functions alone, and lies between near ones."""
    results, first = [], mlp(3, 8, 7, 2).double()
    for spread in (0.0, 1.0):
        one, other = copy.deepcopy(first), copy.deepcopy(first)
        with torch.no_grad():
            for p in other.parameters():
                p += 1e-6
        group = scaling_group(other, X)
        torch.manual_seed(3)
        group.act_(spread * torch.randn(group.num_units))
        if mixed == "balanced":
            for each in (one, other):
                scaling_group(each, X).balance_()
        with torch.no_grad():
            for p, q in zip(one.parameters(), other.parameters(), strict=True):
                p.lerp_(q, 0.5)
        results.append(one(X).detach())
    agree = torch.allclose(*results, rtol=1e-9, atol=1e-9)
    assert agree == (mixed == "balanced")
    assert torch.allclose(results[1], first(X), atol=1e-4) == (mixed == "balanced")


# What it costs to look ------------------------------------------------------------------------------------------------


class Cost(TorchDispatchMode):
    """Counts how often a device is waited for, and the elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_what_is_far_from_all_costs_little_each_time() -> None:
    nets = [nn.Sequential(*(nn.Linear(200, 200) for _ in range(4))) for _ in range(2)]
    module = Pair(nets[0], backbone=lambda _: nets[1].double().requires_grad_(False))
    followers, parameters = Followers(module), dict(module.named_parameters())
    with Cost() as cost:
        assert not followers.look(parameters)
    assert cost.waits == 0  # but for one list of numbers
    assert 4000 < cost.largest < 40000 / 2


@pytest.mark.parametrize("write", ["data", "leader", "version"])
def test_what_was_far_is_found_once_it_is_near(write: str) -> None:
    """Writes to ``data`` have no version."""
    module = Pair(other=lambda net: mlp(3, 4, 5, 2).double().requires_grad_(False))
    followers, parameters = Followers(module), dict(module.named_parameters())
    assert not followers.look(parameters)
    for p, t in zip(module.net.parameters(), module.other.parameters(), strict=True):
        if write == "data":
            t.data.copy_(p.data)
        else:
            with torch.no_grad():
                _ = p.copy_(t) if write == "leader" else t.copy_(p)
    assert followers.look(parameters)


def test_a_device_without_float64_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearness, "widest", lambda device: torch.float32)
    module = Pair(other=frozen).float()
    dtypes = set()

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            dtypes.update({result.dtype} if isinstance(result, Tensor) else ())
            return result

    with Types():
        assert Followers(module).look(dict(module.named_parameters()))
    assert torch.float64 not in dtypes
