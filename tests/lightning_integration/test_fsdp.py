"""Networks that fully_shard (FSDP2) has spread over several processes have the group of the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn import functional as F
from torch.optim import SGD

from lightning_ecopt import EquivalentClassOptimizer, ec_sgd, scaling_group
from lightning_ecopt.common import tensors
from lightning_ecopt.common.sharding import Ranks, exchange_device, layout_of
from tests.lightning_integration import fsdp_script as script
from tests.lightning_integration.runs import launch
from tests.networks import ResidualMLP, mlp, norm_cnn
from tests.selection import full
from tests.symmetry.helpers import assert_same, evaluate, squares
from tests.symmetry.zoo.case import Case, Use

SIZES = (2, 4)
RUNS = [(case, size) for case in script.CASES for size in SIZES if size == 2 or Use.FOUR_SHARDS in case.good_for]

calls = pytest.mark.skipif(script.NO_CALLS, reason=script.WHY)
every_run = pytest.mark.parametrize(("case", "size"), RUNS, ids=[f"{case.name}-{size}" for case, size in RUNS])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """For each number of processes the results of all ranks."""
    if script.NO_CALLS:
        pytest.skip(script.WHY)
    folder = tmp_path_factory.mktemp("fsdp")
    launch("fsdp_script", folder)
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """The results of one process that holds everything."""
    return {case.name: script.results(*script.build(case)) for case in script.CASES}


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """All elements are the same, relative to the largest of all tensors."""
    assert actual.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        assert float((actual[name] - tensor).abs().max()) <= tolerance * largest, name


@full
@every_run
def test_the_group_is_that_of_the_whole_network(found: Any, alone: Any, case: Case, size: int) -> None:
    for rank in range(size):
        assert found[size][rank]["cases"][case.name]["group"] == alone[case.name]["group"]
    assert alone[case.name]["group"]["units"] == case.units


@full
@every_run
def test_acting_changes_weights_as_in_one_process_and_no_output(found: Any, alone: Any, case: Case, size: int) -> None:
    result = found[size][-1]["cases"][case.name]
    _assert_close(result["acted"], alone[case.name]["acted"])
    for outputs in result["outputs"]:
        assert_same(outputs, alone[case.name]["outputs"][0])


@full
@every_run
def test_gradients_are_rescaled_as_in_one_process(found: Any, alone: Any, case: Case, size: int) -> None:
    for rank in range(size):
        _assert_close(found[size][rank]["cases"][case.name]["gradients"], alone[case.name]["gradients"])


@full
@every_run
def test_the_balance_is_that_of_one_process(found: Any, alone: Any, case: Case, size: int) -> None:
    result, expected = found[size][0]["cases"][case.name], alone[case.name]
    assert torch.equal(result["alive"], expected["alive"])
    assert float((result["log_scale"] - expected["log_scale"]).abs().max()) <= 1e-12
    _assert_close(result["balanced"], expected["balanced"])
    assert float(expected["log_scale"].abs().max()) > 0.1
    assert result["to_gains"].shape == expected["to_gains"].shape
    torch.testing.assert_close(result["to_gains"], expected["to_gains"], rtol=0, atol=1e-12)


@full
@every_run
def test_all_ranks_find_the_same_balance_bit_for_bit(found: Any, case: Case, size: int) -> None:
    first, *others = (found[size][rank]["cases"][case.name] for rank in range(size))
    for other in others:
        assert torch.equal(other["log_scale"], first["log_scale"])
        assert all(torch.equal(other["balanced"][name], tensor) for name, tensor in first["balanced"].items())


@full
@pytest.mark.parametrize("damage", script.DAMAGES)
@pytest.mark.parametrize("size", SIZES)
def test_units_are_dormant_wherever_their_weights_are(found: Any, size: int, damage: str) -> None:
    net = script.damaged(damage)
    expected = script.balance(net, scaling_group(net, torch.zeros(1, 3, dtype=torch.float64)))
    assert expected["alive"].any()
    assert not expected["alive"].all()
    for rank in range(size):
        result = found[size][rank]["damages"][damage]
        assert torch.equal(result["alive"], expected["alive"])
        assert float((result["log_scale"] - expected["log_scale"]).abs().max()) <= 1e-12


@full
@pytest.mark.parametrize("number", range(len(script.REGIONS)), ids=map(str, script.REGIONS))
@pytest.mark.parametrize("size", SIZES)
def test_the_parts_of_a_region_are_the_region(found: Any, size: int, number: int) -> None:
    length, region = script.REGIONS[number]
    parts = [found[size][rank]["parts"][number] for rank in range(size)]
    assert all(torch.equal(part["viewed"], part["cut"]) for part in parts)
    assert all(part["uniform"].shape == (1, 1) for part in parts)
    whole = torch.arange(2.0 * length).view(length, 2)
    assert torch.equal(torch.cat([part["viewed"] for part in parts]), whole[region, 1:])


@full
@pytest.mark.parametrize(
    "layout", ["one module", "together", "two replicas", "beside a plain layer", "traced before", "copies"]
)
def test_the_balance_does_not_depend_on_the_layout(found: Any, layout: str) -> None:
    net, (x,) = script.build(script.CASES[0])
    expected = script.balance(net, scaling_group(net, x))
    first, *others = (found[4][rank]["layouts"][layout] for rank in range(4))
    assert torch.equal(first["alive"], expected["alive"])
    _assert_close(first["balanced"], expected["balanced"])
    assert all(torch.equal(other["log_scale"], first["log_scale"]) for other in others)


@full
@pytest.mark.parametrize("size", SIZES)
def test_copies_follow_sharded_or_whole(found: Any, size: int) -> None:
    expected = script.followed(None)
    assert expected["lines"] == ["target follows net", "plain follows net", "shadow follows net"]
    for rank in found[size]:
        assert rank["followed"].pop("lines") == expected["lines"]
        _assert_close(rank["followed"], {name: value for name, value in expected.items() if name != "lines"})


@full
@pytest.mark.parametrize("size", SIZES)
def test_ranks_decide_together_what_one_of_them_sees(found: Any, size: int) -> None:
    expected = {"failed": False, "one has it": False, "all have it": True, "due": True, "passed": {"shake_step"}}
    assert [rank["apart"] for rank in found[size]] == [expected] * size


@full
@pytest.mark.parametrize(("device", "expected"), [("cuda", "cuda"), ("cpu", "cpu")])
def test_what_is_offloaded_is_agreed_on_where_the_mesh_is(mesh: Any, device: str, expected: str) -> None:
    sharded = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)]))
    with patch.object(type(mesh), "device_type", PropertyMock(return_value=device)):
        assert exchange_device([nn.Parameter(torch.ones(1)), sharded]).type == expected


@full
def test_parameters_over_different_ranks_are_refused_by_name(found: Any) -> None:
    assert found[4][0]["refusal"].startswith("2.weight is sharded over the ranks [0, 1] and 0.weight over [0, 2]")


@full
@pytest.mark.parametrize("size", SIZES)
def test_a_trace_does_not_communicate(found: Any, size: int) -> None:
    for rank in range(size):
        traced, called = found[size][rank]["collectives"]
        assert traced == 0
        assert called > 0


# One process is enough for what happens to the module --------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of this process alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class Thresholds(nn.Module):
    """Control flow that depends on data, and a method beside forward."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 2)
        self.log: list[Tensor] = []
        self.fails = fails

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        self.log.append(x)
        if self.fails:
            raise ArithmeticError("of the module itself")
        return self.two(x) if x.sum() >= 0 else self.two(-x)


class Encoder(Thresholds):
    """Calls its method as others call forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.encode(x))


def _state(module: nn.Module) -> list[tuple[Any, Any]]:
    """Where the parameters, buffers, hooks and attributes of a module are, and which objects these are."""
    found: list[tuple[Any, Any]] = []
    for part in module.modules():
        found.append(("type", type(part)))
        for items in (part._parameters, part._buffers, part._forward_pre_hooks, part._forward_hooks, vars(part)):
            found += items.items()
    return found


def _assert_same(first: list[tuple[Any, Any]], second: list[tuple[Any, Any]]) -> None:
    assert [place for place, _ in first] == [place for place, _ in second]
    assert all(a is b for (_, a), (_, b) in zip(first, second, strict=True))


X = torch.zeros(2, 3)


def test_a_trace_leaves_the_module_as_it_was(mesh: Any) -> None:
    net = script.shard(mlp(3, 4, 2), mesh)
    before = _state(net)
    group = scaling_group(net, X)
    _assert_same(_state(net), before)
    assert list(group.parameters.values()) == list(net.parameters())
    assert all(isinstance(p, DTensor) for p in group.parameters.values())


@pytest.mark.parametrize("fails", [True, False])
def test_a_sharded_module_that_only_a_real_call_can_trace_says_what_to_do(mesh: Any, fails: bool) -> None:
    net = script.shard(Thresholds(fails), mesh)
    before = _state(net)
    with pytest.raises(ValueError, match=r"cannot be called with fake tensors.*trace the module before") as caught:
        scaling_group(net, X)
    assert isinstance(caught.value.__cause__, ArithmeticError) == fails
    _assert_same(_state(net), before)
    assert net.log == []


@calls
def test_a_group_that_was_traced_before_fits_the_sharded_module(mesh: Any) -> None:
    net = Thresholds()
    before = scaling_group(net, X)
    script.shard(net, mesh)
    group = before.of(net)
    assert script.described(group) == script.described(before)
    assert list(group.parameters.values()) == list(net.parameters())
    output = evaluate(net, (X + 1,))
    group.act_(torch.ones(group.num_units))
    assert_same(evaluate(net, (X + 1,)), output, 1e-6)
    assert not any(isinstance(p, DTensor) for p in before.parameters.values())


def test_a_group_of_another_module_is_refused_by_name(mesh: Any) -> None:
    group = scaling_group(mlp(3, 4, 2), X)
    with pytest.raises(
        ValueError, match=r"parameter 0.weight of shape \[4, 3\], and Sequential has one of .* \[5, 3\]"
    ):
        group.of(mlp(3, 5, 2))
    with pytest.raises(ValueError, match=r"ResidualMLP has no such parameter"):
        group.of(ResidualMLP())


def test_a_module_on_the_meta_device_is_traced_before_and_after_it_is_sharded(mesh: Any) -> None:
    with torch.device("meta"):
        net = mlp(3, 4, 2)
    before = scaling_group(net, X.to("meta"))
    script.shard(net, mesh)
    after = scaling_group(net, X.to("meta"))
    assert script.described(before) == script.described(after)
    with pytest.raises(RuntimeError, match="on the meta device"):
        after.balance_()
    net.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(distribute_tensor(torch.randn(p.shape), mesh))
    after.balance_()  # of the same parameters
    incoming, outgoing = squares(scaling_group(_unsharded(net), X))
    assert_same(incoming, outgoing, 1e-6)


def _unsharded(net: nn.Module) -> nn.Module:
    copy = mlp(3, 4, 2)
    copy.load_state_dict({name: p.full_tensor() for name, p in net.state_dict().items()})
    return copy


# Without inputs, from the calls that training makes ----------------------------------------------------------------


class Pair(nn.Module):
    """Is called as a whole, part by part, twice in a step, or by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = mlp(3, 5, 4), mlp(4, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


CALLS: dict[str, Callable[[Pair, Tensor], Tensor]] = {
    "whole": lambda net, x: net(x),
    "parts": lambda net, x: net.two(net.one(x)),
    "twice": lambda net, x: net(x) + net(-x),
    "evaluated before": lambda net, x: _evaluated(net, x) + net(x),
}
MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "ec_sgd": lambda net: ec_sgd(net, lr=0.1, momentum=0.9),
    "no module": lambda net: EquivalentClassOptimizer(SGD(net.parameters(), lr=0.1, momentum=0.9)),
}


def _evaluated(net: Pair, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


@calls
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("call", "layout"),
    [(call, layout) for call in CALLS for layout in ("root", "layers") if (call, layout) != ("parts", "root")],
)
def test_the_first_calls_of_a_sharded_module_are_traced_before_they_are_made(
    mesh: Any, call: str, maker: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "FEW", 0)  # without shards a small network adds up in another order
    found = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        net = Pair().double()
        if is_sharded:
            script.shard(net, mesh) if layout == "layers" else fully_shard(net, mesh=mesh)
        optimizer, x = MAKERS[maker if is_sharded else "no module"](net), torch.randn(5, 3).double()
        for _ in range(3):
            optimizer.zero_grad()
            CALLS[call](net, x).square().sum().backward()
            optimizer.step()
        group = optimizer.group
        found.append(script.whole(dict(net.named_parameters())) | {"units": torch.tensor(group.num_units)})
        assert not group.unseen
    _assert_close(found[1], found[0], 0.0)
    assert found[0]["units"] == (11 if call == "parts" else 15)  # what one call returns must not change


@calls
def test_a_sharded_call_that_is_impossible_with_fake_tensors_trains_plainly(mesh: Any) -> None:
    found = []
    for make in (lambda p: EquivalentClassOptimizer(SGD(p, lr=0.1)), lambda p: SGD(p, lr=0.1)):
        torch.manual_seed(0)
        net = script.shard(Thresholds(), mesh)
        optimizer = make(net.parameters())
        for step in range(2):
            optimizer.zero_grad()
            expected = isinstance(optimizer, EquivalentClassOptimizer) and step == 0
            with pytest.warns(UserWarning, match="All of .*Thresholds is held") if expected else nullcontext():
                loss = net(X + 1).square().sum()
            loss.backward()
            optimizer.step()
        found.append(script.whole(dict(net.named_parameters())))
    _assert_close(*found, 0.0)


def test_a_method_that_gathers_parameters_is_traced(mesh: Any) -> None:
    net = Encoder()
    expected = script.described(scaling_group(net, X))
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, "encode")
    before = _state(net)
    assert script.described(scaling_group(net, X)) == expected
    _assert_same(_state(net), before)


def test_casts_to_a_lower_precision_change_no_group(mesh: Any) -> None:
    net = norm_cnn()
    x = torch.zeros(2, 1, 8, 8)
    expected = script.described(scaling_group(net, x))
    fully_shard(net, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    assert script.described(scaling_group(net, x)) == expected


def test_parameters_are_sharded_along_the_axis_that_the_user_chooses(mesh: Any) -> None:
    net = mlp(3, 4, 2)
    before = scaling_group(net, X)
    fully_shard(net, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p is net[2].weight else None)
    for group in (scaling_group(net, X), before.of(net)):
        assert script.described(group) == script.described(before)
        group.balance_()
        assert float(group.imbalance()) < 1 + 1e-5


def test_parameters_that_are_partial_sums_are_refused_by_name(mesh: Any) -> None:
    net = mlp(3, 4, 2)
    before = scaling_group(net, X)
    net[2].weight = nn.Parameter(DTensor.from_local(net[2].weight.detach(), mesh, [Partial()]))
    for trace in (lambda: scaling_group(net, X), lambda: before.of(net)):
        with pytest.raises(ValueError, match=r"2.weight is placed as \(Partial\(sum\),\).*requires_grad_\(False\)"):
            trace()
    net[2].weight.requires_grad_(False)
    assert scaling_group(net, X).num_units == 0  # what a frozen weight reads must stay


def test_a_local_tensor_that_does_not_fit_its_placements_is_refused(mesh: Any) -> None:
    wrong = DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0)], run_check=False, shape=(4, 2), stride=(2, 1))
    with pytest.raises(
        ValueError, match=r"shape \[4, 2\] .* local tensor of shape \[3, 2\], where \[4, 2\] is expected"
    ):
        layout_of(wrong)


def test_only_the_given_parameters_are_rescaled(mesh: Any) -> None:
    net = script.shard(mlp(3, 4, 5, 2), mesh)
    group = scaling_group(net, X, parameters=[*net[0].parameters(), *net[2].parameters()])
    assert list(group.parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert group.num_units == 4
    with pytest.raises(ValueError, match="1 of the given parameters are not parameters"):
        scaling_group(net, X, parameters=[nn.Parameter(torch.zeros(1))])


@calls
@pytest.mark.parametrize("method", ["act_", "balance_"])
def test_a_call_after_a_change_uses_the_new_weights(mesh: Any, method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    net = fully_shard(mlp(3, 4, 2), mesh=mesh)  # the outermost module keeps what it has gathered
    group = scaling_group(net, X)
    hidden: list[Tensor] = []
    net[1].register_forward_hook(lambda module, args, output: hidden.append(output))
    with torch.no_grad():
        net(x)
        log_scale = group.balance_() if method == "balance_" else torch.arange(4.0)
        if method == "act_":
            group.act_(log_scale)
        net(x)
    assert_same(hidden[1], hidden[0] * log_scale.exp(), 1e-6)
    assert (log_scale.abs() > 0.01).sum() > 2
    assert (hidden[0] > 0).any(0).all()


@calls
def test_a_network_that_keeps_what_it_has_gathered_is_traced_by_its_sharded_parameters(mesh: Any) -> None:
    net = fully_shard(mlp(3, 4, 2), mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters())
    with torch.no_grad():
        net(X)
    assert not isinstance(net[0].weight, DTensor)
    own = [p for options in optimizer.param_groups for p in options["params"]]
    assert list(scaling_group(net, X, parameters=own).parameters.values()) == own


def test_nothing_is_added_up_where_nothing_is_sharded() -> None:
    tensor = torch.arange(3.0)
    ranks = Ranks({"weight": tensor})
    assert ranks.counts(tensor)
    assert torch.equal(ranks.sum_(tensor.clone()), tensor)
    assert ranks.any_(tensor > 1).tolist() == [False, False, True]
