"""A resumed run knows the group of the run that was interrupted, whatever its own first call shows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ec_adamw, ec_sgd, scaling_group
from lightning_ecopt.symmetry.saved_equations import packed, unpacked
from lightning_ecopt.symmetry.trace import select_parameters, solved, trace
from tests.networks import mlp
from tests.optim.training import RULES, problem, same_bits, through_a_file, train
from tests.selection import few
from tests.symmetry.zoo import FAST, ZOO
from tests.symmetry.zoo.case import Case

WAYS: dict[str, Any] = {
    "ec_sgd": lambda m, rule: ec_sgd(m, lr=0.05, momentum=0.9, rule=rule, refresh_interval=5),
    "ec_adamw": lambda m, rule: ec_adamw(m, lr=0.01, rule=rule, refresh_interval=5),
    "ECSGD": lambda m, rule: ECSGD(m.parameters(), lr=0.05, momentum=0.9, rule=rule, refresh_interval=5),
}


class Skips(nn.Module):
    """Each of its blocks is used in every few steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = 0
        self.blocks = nn.ModuleList(mlp(4, 6, 4) for _ in range(5))
        self.head = mlp(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks, 2):
            if self.step % number < number // 2:
                x = x + block(x)
        return self.head(x)


def go(module: Skips, optimizer: Any, start: int, stop: int) -> None:
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    for module.step in range(start, stop):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("way", few(list(WAYS), ["ec_sgd", "ECSGD"]))
@RULES
@pytest.mark.parametrize("at", few([1, 2, 3, 5, 8, 13], [3, 8]))
@pytest.mark.filterwarnings("ignore:No traced call has used")
def test_a_run_that_skips_layers_is_resumed_bit_identical(way: str, rule: str, at: int) -> None:
    whole = Skips()
    optimizer = WAYS[way](whole, rule)
    go(whole, optimizer, 0, at)
    weights, state = copy.deepcopy(whole.state_dict()), through_a_file(optimizer.state_dict())
    go(whole, optimizer, at, 25)
    resumed = Skips()
    resumed.load_state_dict(weights)
    again = WAYS[way](resumed, rule)
    again.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The checkpoint")
        go(resumed, again, at, 25)
    assert same_bits(whole, resumed)


@RULES
@pytest.mark.filterwarnings("ignore:No traced call has used")
def test_an_early_state_may_be_put_back_when_more_is_known(rule: str) -> None:
    module = Skips()
    optimizer = WAYS["ec_sgd"](module, rule)
    go(module, optimizer, 0, 1)
    early = copy.deepcopy(optimizer.state_dict())
    go(module, optimizer, 1, 20)
    optimizer.load_state_dict(early)
    units = optimizer.group.num_units
    go(module, optimizer, 20, 30)
    assert optimizer.group.num_units == units  # nothing is unlearnt
    assert all(p.isfinite().all() for p in module.parameters())


@RULES
def test_a_network_of_the_same_shapes_and_other_freedoms_is_refused(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = EquivalentClassOptimizer(SGD(module.parameters(), lr=0.05), scaling_group(module, x), rule=rule)
    train(module, optimizer, x, y, range(2))
    other = copy.deepcopy(module)
    other[1] = nn.Sigmoid()
    for way in (lambda m: scaling_group(m, x), None):
        base = SGD(other.parameters(), lr=0.05, momentum=0.9)
        if way is not None:
            ours = EquivalentClassOptimizer(base, way(other), rule=rule)
            with pytest.raises(ValueError, match="made with 11 units, this network has 5"):
                ours.load_state_dict(optimizer.state_dict())
            assert not base.state
            continue
        waiting = ec_sgd(other, lr=0.05, rule=rule)
        waiting.load_state_dict(optimizer.state_dict())
        with pytest.warns(UserWarning, match="other freedoms, so that the rule begins anew"):
            train(other, waiting, x, y, range(1))
        assert waiting.group is not None
        assert waiting.group.num_units == 5


@pytest.mark.parametrize(
    "entry", ["steps_since_refresh", "parameters", "trained", "active", "equations", "rule", "rho", "own"]
)
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("value", few([None, "damaged", 1.5, [], torch.zeros(3)], ["damaged"]), ids=str)
def test_a_damaged_state_is_refused_or_begins_anew(entry: str, value: Any, waits: bool) -> None:
    module, x, y = problem(4, 6, 3)
    make = partial(ec_adamw, lr=0.01) if entry == "own" else partial(ec_sgd, lr=0.05, momentum=0.9)
    optimizer = make(module)
    train(module, optimizer, x, y, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    assert entry in state["equivalent_class"]
    state["equivalent_class"][entry] = value
    other, _, _ = problem(4, 6, 3)
    ours = make(other)
    if not waits:
        train(other, ours, x, y, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(ValueError):
            ours.load_state_dict(state)
        train(other, ours, x, y, range(2))
    assert all(p.isfinite().all() for p in other.parameters())


@pytest.mark.parametrize("case", few(ZOO, FAST), ids=lambda case: case.name)
def test_equations_survive_a_checkpoint(case: Case) -> None:
    module = case.build().eval()
    parameters = select_parameters(module)
    equations = trace(module, parameters, *case.inputs(torch.Generator().manual_seed(0)))
    before = solved(parameters, equations)
    after = solved(parameters, unpacked(through_a_file({"packed": packed(equations)})["packed"]))
    assert after.fingerprint() == before.fingerprint()
    assert after.costs == before.costs


def test_equations_that_are_damaged_are_an_error() -> None:
    with pytest.raises(ValueError, match="equations in the checkpoint are damaged"):
        unpacked(torch.zeros(9, dtype=torch.uint8))


# Parameter groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW])
def test_rates_are_those_of_the_present_parameter_groups(base: Any) -> None:
    module, x, y = problem(4, 6, 3)
    group = scaling_group(module, x)
    optimizer = EquivalentClassOptimizer(base(module.parameters(), lr=0.05), group, implementation="eager")
    train(module, optimizer, x, y, range(3))
    parameters, (options,) = list(module.parameters()), optimizer.param_groups
    optimizer.param_groups = [{**options, "params": parameters[:2]}, {**options, "params": parameters[2:], "lr": 0.0}]
    before = copy.deepcopy(module)
    train(module, optimizer, x, y, range(3, 4))
    moved = [not torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True)]
    assert moved == [True, True, False, False]


@RULES
def test_parameters_that_are_added_to_a_given_group_get_rows_and_are_saved(rule: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    group = scaling_group(module, x)
    optimizer = EquivalentClassOptimizer(SGD(module[4].parameters(), lr=0.05, momentum=0.9), group, rule=rule)
    train(module, optimizer, x, y, range(2))
    optimizer.add_param_group({"params": list(module[:4].parameters())})
    train(module, optimizer, x, y, range(2, 4))
    assert int(optimizer.usable_units().sum()) == 11
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(module, optimizer, x, y, range(4, 6))
    expected = copy.deepcopy(module)
    module.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(module, optimizer, x, y, range(4, 6))
    assert same_bits(module, expected)


def test_an_empty_first_batch_costs_no_freedom() -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = ec_sgd(module, lr=0.05)
    for batch in (x[:0], x, x):
        optimizer.zero_grad()
        (module(batch) - y[: len(batch)]).square().sum().backward()
        optimizer.step()
    assert optimizer.group is not None
    assert optimizer.group.num_units == 6


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """The only process of its kind."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda net: net,
    "ddp": nn.parallel.DistributedDataParallel,
    "compile": lambda net: torch.compile(net, backend="eager"),
}


@pytest.mark.parametrize("before", WRAPPERS)
@pytest.mark.parametrize("behind", WRAPPERS)
@pytest.mark.usefixtures("one_process")
def test_a_run_goes_on_whatever_wraps_its_module(before: str, behind: str) -> None:
    """Parameters have the names that they have without DDP and ``torch.compile``."""
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    ends = []
    for stop in (None, 4):
        torch.manual_seed(0)
        net = mlp(6, 9, 8, 3)
        wrapped = WRAPPERS[before](net)
        optimizer = ec_sgd(wrapped, lr=0.02, momentum=0.9)
        for step in range(8):
            if step == stop:
                state, net = optimizer.state_dict(), copy.deepcopy(net)
                wrapped = WRAPPERS[behind](net)
                optimizer = ec_sgd(wrapped, lr=0.02, momentum=0.9)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    optimizer.load_state_dict(state)
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
        ends.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(ends[1], ends[0])
