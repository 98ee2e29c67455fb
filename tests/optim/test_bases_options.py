"""Options, parameters, hooks and attributes of any base optimizer go on as without the equivalent-class space."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_ecopt import EquivalentClassOptimizer, ScalingGroup, scaling_group
from lightning_ecopt.steps.skeleton import Skeleton
from tests.optim.base_runs import EVERY_BASE, backward, error_of, problem, wrap
from tests.optim.bases import BASES, DEFINITIONS, Base, Make, UsersSGD, entries_of
from tests.optim.training import (
    RULES,
    batches,
    distance,
    loss_of,
    only_refresh,
    same_bits,
    through_a_file,
    train,
    weights_of,
)
from tests.paths.explicit import place_of
from tests.selection import few

# Options --------------------------------------------------------------------------------------------------------------


def with_option(option: str) -> list[str]:
    """The bases that have it."""
    return [name for name in BASES if option in BASES[name].make([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]]


def run(
    make: Make, rule: str, options: Mapping[str, Any] | None = None, *, sign: float = 1.0, matrices: bool = False
) -> nn.Module:
    """A network after a few steps, with options of the base that are set afterwards."""
    module, x, y = problem(Base(make, matrices=matrices))
    base = make(list(module.parameters()))
    for group in base.param_groups:
        group.update(options or {})
    optimizer = EquivalentClassOptimizer(
        base, scaling_group(module, x), rule=rule, refresh_interval=3, state_powers={"row_var": 0, "col_var": 0}
    )
    for step in range(5):
        optimizer.zero_grad()
        (sign * loss_of(module, *batches(x, y, step))).backward()
        optimizer.step()
    return module


def assert_alike(first: nn.Module, second: nn.Module) -> None:
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.fixture
def rates_in_float64() -> Iterator[None]:
    """ASGD keeps its rate in a tensor of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def alternating(names: list[str]) -> list[tuple[str, str]]:
    return [(name, ("unit", "path")[number % 2]) for number, name in enumerate(names)]


@pytest.mark.usefixtures("rates_in_float64")
@pytest.mark.parametrize(("name", "rule"), few(alternating(with_option("foreach")), 3))
def test_one_tensor_or_many_at_a_time_are_the_same(name: str, rule: str) -> None:
    assert_alike(*(run(BASES[name].make, rule, {"foreach": foreach}) for foreach in (True, False)))


# Torch's Muon cannot maximise.
@pytest.mark.parametrize(
    ("name", "rule"), few(alternating([name for name in with_option("maximize") if name != "muon_adamw"]), 3)
)
def test_maximizing_is_minimizing_the_opposite(name: str, rule: str) -> None:
    make, matrices = BASES[name].make, BASES[name].matrices
    opposite = run(make, rule, {"maximize": True}, sign=-1.0, matrices=matrices)
    assert_alike(run(make, rule, matrices=matrices), opposite)


@RULES
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad])
def test_fused_steps_and_rates_in_tensors_are_the_same(kind: Any, rule: str) -> None:
    expected = run(lambda params: kind(params, lr=0.02, weight_decay=0.01), rule)
    assert_alike(run(lambda params: kind(params, lr=0.02, weight_decay=0.01, fused=True), rule), expected)
    rate = torch.tensor(0.02, dtype=torch.float64)
    assert_alike(run(lambda params: kind(params, lr=rate, weight_decay=0.01), rule), expected)


def failure(optimizer: Optimizer) -> tuple[type, str] | None:
    try:
        optimizer.step()
    except Exception as error:
        return type(error), str(error)
    return None


@RULES
def test_a_capturable_base_takes_its_steps_where_it_can_and_fails_as_it_does_elsewhere(rule: str) -> None:
    for name in ("adam", "nadam", "rmsprop_centered", "rprop", "asgd"):
        outcomes = []
        for wrapped in (False, True):
            module, x, y = problem(BASES[name])
            group = scaling_group(module, x)
            group.balance_()
            optimizer: Optimizer = BASES[name].make(list(module.parameters()))
            optimizer.param_groups[0]["capturable"] = True
            if wrapped:
                optimizer = EquivalentClassOptimizer(optimizer, group, rule=rule)
            before = weights_of(module)
            loss_of(module, x, y).backward()
            outcomes.append(failure(optimizer))
            for key, p in module.named_parameters():
                if outcomes[-1] is None:
                    assert not torch.equal(p, before[key])
                else:
                    torch.testing.assert_close(p.detach(), before[key], rtol=1e-13, atol=0)
        assert outcomes[0] == outcomes[1]


@RULES
def test_gradients_may_be_cleared_to_zeros(rule: str) -> None:
    modules = []
    for set_to_none in (True, False):
        module, x, y = problem(BASES["adam"])
        optimizer = wrap("adam", module, x, rule)
        for step in range(5):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(module, *batches(x, y, step)).backward()
            optimizer.step()
        modules.append(module)
    assert same_bits(*modules)


# Parameters come and go -----------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("name", ["nesterov", "adamw", "asgd"])
def test_units_are_found_again_for_the_parameters_of_an_added_group(name: str, rule: str) -> None:
    module, x, y = problem(BASES[name])
    other = copy.deepcopy(module)
    group = scaling_group(other, x)
    log_scale = torch.zeros(11, dtype=torch.float64)
    log_scale[group.couplings[0].incoming.flatten()] = torch.randn(6, dtype=torch.float64)
    group.act_(log_scale)  # of what may be rescaled before the last layer is trained
    frozen = weights_of(module[4])
    for one in (module, other):
        one[4].requires_grad_(False)
        base = BASES[name].make([*one[0].parameters(), *one[2].parameters()])
        optimizer = EquivalentClassOptimizer(
            base, lambda params, one=one: scaling_group(one, x, parameters=params), rule=rule
        )
        train(one, optimizer, x, y, range(3))
        assert optimizer.group.num_units == 6
        assert all(torch.equal(p, frozen[key]) for key, p in one[4].named_parameters())
        held = {
            key: {e: v.clone() for e, (_, v) in entries_of(BASES[name], base, p).items()}
            for key, p in one.named_parameters()
        }
        one[4].requires_grad_(True)
        optimizer.add_param_group({"params": list(one[4].parameters())})
        assert optimizer.group.num_units == 11
        only_refresh(optimizer)
        assert int(optimizer.usable_units().sum()) == 11
        for key, entries in held.items():
            for entry, value in entries.items():
                now = base.state[one.get_parameter(key)][entry]
                assert int((now != 0).sum()) >= int((value != 0).sum()) // 2, (key, entry)
        train(one, optimizer, x, y, range(3, 8))
        assert all(not torch.equal(p, frozen[key]) for key, p in one[4].named_parameters())
    assert distance(module, other, x) < 1e-9


@RULES
@pytest.mark.parametrize("kind", ["generator", "named", "one"])
def test_a_group_is_added_in_every_form_that_the_base_takes(kind: str, rule: str) -> None:
    module, x, y = problem(BASES["adam"])
    others = [p for name, p in module.named_parameters() if name != "4.weight"]
    named = [(name, p) for name, p in module.named_parameters() if name != "4.weight"]
    base = optim.AdamW(named if kind == "named" else others, lr=0.01)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule)
    train(module, optimizer, x, y, range(2))
    last = module[4].weight
    forms = {"generator": (p for p in [last]), "named": [("4.weight", last)], "one": last}
    optimizer.add_param_group({"params": forms[kind], "lr": 0.02})
    assert [len(options["params"]) for options in optimizer.param_groups] == [5, 1]
    before = last.detach().clone()
    train(module, optimizer, x, y, range(2, 4))
    assert not torch.equal(last, before)
    assert int(optimizer.usable_units().sum()) == 11


@RULES
def test_units_are_found_again_when_parameters_of_the_optimizer_thaw(rule: str) -> None:
    module, x, y = problem(BASES["adam"])
    module[0].requires_grad_(False)
    asked: list[int] = []

    def find(params: Sequence[Tensor]) -> ScalingGroup:
        asked.append(len(params))
        return scaling_group(module, x, parameters=params)

    optimizer = EquivalentClassOptimizer(
        BASES["adam"].make(list(module.parameters())), find, rule=rule, refresh_interval=3
    )
    train(module, optimizer, x, y, range(4))
    assert asked == [6]
    assert optimizer.group.num_units == 5
    module[0].requires_grad_(True)
    train(module, optimizer, x, y, range(4, 5))
    assert asked == [6, 6]
    assert optimizer.group.num_units == 11


@EVERY_BASE
def test_fixed_skeleton_weights_are_moved_by_nothing(name: str) -> None:
    module, x, y = problem(BASES[name])
    optimizer = wrap(name, module, x, "path", refresh_interval=None)
    for options in optimizer.param_groups:
        if "weight_decay" in options:
            options["weight_decay"] = 0.5
    train(module, optimizer, x, y, range(1))
    skeleton = Skeleton.from_state_dict(optimizer.state_dict()["equivalent_class"]["skeleton"])
    places = [
        place_of(optimizer.group, int(skeleton.fixed_coupling[unit]), int(skeleton.fixed_index[unit]))
        for unit in range(11)
    ]
    before = weights_of(module)
    train(module, optimizer, x, y, range(1, 5))
    for key, index in places:
        assert torch.equal(module.get_parameter(key)[index], before[key][index])
    for key, p in module.named_parameters():
        fixed = torch.zeros(p.shape, dtype=torch.bool)
        for other, index in places:
            if other == key:
                fixed[index] = True
        assert bool((p != before[key])[~fixed].all())


# Hooks and attributes -------------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("early", [True, False])
def test_hooks_of_steps_see_weights_and_gradients_once_and_can_be_removed(rule: str, early: bool) -> None:
    module, x, y = problem(BASES["nesterov"])
    scaling_group(module, x).balance_()
    base = BASES["nesterov"].make(list(module.parameters()))
    seen: list[tuple[str, dict[str, Tensor], dict[str, Tensor]]] = []

    def hook(kind: str) -> Callable[..., None]:
        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            seen.append((kind, weights_of(module), gradients))

        return note

    def register(optimizer: Optimizer) -> list[Any]:
        return [
            optimizer.register_step_pre_hook(hook("before")),
            optimizer.register_step_post_hook(hook("after")),
        ]

    handles = register(base) if early else []
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, refresh_interval=None)
    handles = handles or register(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, *batches(x, y, step)).backward()
        weights = weights_of(module)
        gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
        assert [kind for kind, _, _ in seen] == ["before", "after"]
        for (_, held, shown), expected in zip(seen, (weights, weights_of(module)), strict=True):
            for name in gradients:
                torch.testing.assert_close(held[name], expected[name], rtol=0, atol=0)
                torch.testing.assert_close(shown[name], gradients[name], rtol=1e-12, atol=0)
        seen.clear()
    for handle in handles:
        handle.remove()
    train(module, optimizer, x, y, range(3, 5))
    assert seen == []


@pytest.mark.parametrize("early", [True, False])
def test_hooks_of_checkpoints_run(early: bool) -> None:
    module, x, y = problem(BASES["adam"])
    base = BASES["adam"].make(list(module.parameters()))
    calls: list[str] = []

    def register(optimizer: Optimizer) -> None:
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
        optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append(f"loading {state.get('note')}"))
        optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))

    if early:
        register(base)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x))
    if not early:
        register(optimizer)
    train(module, optimizer, x, y, range(2))
    state = optimizer.state_dict()
    assert calls == ["saving"]
    assert state["note"] == 1
    assert "equivalent_class" in state
    optimizer.load_state_dict(state)
    assert calls == ["saving", "loading 1", "loaded"]


@RULES
def test_a_schedule_free_optimizer_is_evaluated_at_its_average_as_by_definition(rule: str) -> None:
    base = BASES["schedule_free"]
    module, x, y = problem(base)
    optimizer = wrap("schedule_free", module, x, rule, max_path_ratio=None)
    exact = DEFINITIONS[rule](base, module, x)
    for step in range(5):
        backward(module, [batches(x, y, step)], None)
        exact.step(exact.gradients([batches(x, y, step)]), refresh=step % 3 == 0)
        optimizer.step()
    trained = weights_of(module)
    optimizer.eval()
    exact.optimizer.eval()
    exact.allocate()
    assert error_of(module, exact) < 1e-12
    assert max(float((p - trained[key]).abs().max()) for key, p in weights_of(module).items()) > 1e-3
    optimizer.train()
    for key, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), trained[key], rtol=1e-11, atol=1e-13)


@RULES
def test_a_run_that_is_saved_at_its_average_goes_on_as_if_it_had_not_been(rule: str) -> None:
    module, x, y = problem(BASES["schedule_free"])
    optimizer = wrap("schedule_free", module, x, rule)
    train(module, optimizer, x, y, range(5))
    other = copy.deepcopy(module)
    optimizer.eval()
    saved = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.train()
    train(module, optimizer, x, y, range(5, 8))

    other.load_state_dict(saved["module"])
    resumed = wrap("schedule_free", other, x, rule)
    resumed.load_state_dict(saved["optimizer"])
    resumed.train()
    train(other, resumed, x, y, range(5, 8))
    assert_alike(module, other)


def test_what_no_optimizer_has_is_missing_from_ours_too() -> None:
    module, x, _ = problem(BASES["sgd"])
    optimizer = wrap("sgd", module, x, "unit")
    assert not hasattr(optimizer, "train")
    with pytest.raises(AttributeError):
        optimizer.warmup  # noqa: B018


class Velocity(UsersSGD):
    """Keeps its last gradient under a name of its own, and the largest in each row."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for options in self.param_groups:
            for p in options["params"]:
                if p.grad is not None:
                    self.state[p]["velocity"] = p.grad.clone()
                    self.state[p]["largest"] = p.grad.abs().amax(-1)
                    self.state[p]["count"] = torch.tensor(1.0)
        super().step(closure)


@RULES
def test_an_entry_of_the_state_that_nobody_knows_is_named_once(rule: str) -> None:
    module, x, y = problem(BASES["sgd"])
    optimizer = EquivalentClassOptimizer(
        Velocity(module.parameters(), lr=0.01), scaling_group(module, x), rule=rule, refresh_interval=2
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, optimizer, x, y, range(6))
        optimizer.state_dict()
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1
    assert "largest, velocity in the state of Velocity" in texts[0]
    assert "state_powers=" in texts[0]


@RULES
def test_an_entry_of_the_state_whose_power_is_told_is_carried_without_a_word(rule: str) -> None:
    module, x, y = problem(BASES["sgd"])
    group = scaling_group(module, x)
    optimizer = EquivalentClassOptimizer(
        Velocity(module.parameters(), lr=0.01), group, rule=rule, state_powers={"velocity": 1, "largest": 0}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module, optimizer, x, y, range(2))
        held = {key: optimizer.state[p]["velocity"].clone() for key, p in module.named_parameters()}
        before = weights_of(module)
        group.act_(torch.randn(11, dtype=torch.float64))
        drawn = weights_of(module)
        only_refresh(optimizer)
    assert any(not torch.allclose(drawn[key], before[key], rtol=0.1) for key in drawn)
    if rule == "unit":
        for key, p in module.named_parameters():
            expected = held[key] * drawn[key] / p.detach()
            torch.testing.assert_close(optimizer.state[p]["velocity"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("powers", [{"velocity": 3}, {"velocity": 1.0}, {"velocity": True}, {"velocity": "1"}])
def test_powers_out_of_range_are_errors(powers: Any) -> None:
    module, x, _ = problem(BASES["sgd"])
    with pytest.raises(ValueError, match="state_powers must be whole numbers from -2 to 2"):
        EquivalentClassOptimizer(UsersSGD(module.parameters(), lr=0.1), scaling_group(module, x), state_powers=powers)
