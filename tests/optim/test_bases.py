"""Any base optimizer takes the steps of the definition, and keeps its state through rescalings and checkpoints."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_ecopt import EquivalentClassOptimizer, MuonAdamW, scaling_group
from lightning_ecopt.steps.state import entries_of as state_entries
from tests.optim.base_runs import A_FEW, BOUND, EVERY_BASE, LIMIT, backward, error_of, problem, wrap
from tests.optim.bases import (
    BASES,
    DEFINITIONS,
    FREE_START,
    Base,
    Definition,
    Lamb,
    Lion,
    Make,
    Orthogonal,
    ScheduleFree,
)
from tests.optim.training import RULES, batches, distance, loss_of, same_bits, through_a_file, train, weights_of
from tests.selection import few

# The definition -------------------------------------------------------------------------------------------------------


CLIPPING = (None, "norm", "value")
VARIANTS = list(itertools.product(("path", "unit"), (torch.float64, torch.float32)))
#: Of every two of base, rule, precision, accumulation and clipping, each with each.
MATRIX = [
    (name, rule, dtype, 1 + (j + i // 3) % 2, CLIPPING[(i + j) % 3])
    for i, name in enumerate(BASES)
    for j, (rule, dtype) in enumerate(VARIANTS)
]


MISSING = {0: "0.weight", 4: "2.weight"}


def clip_(gradients: list[Tensor], clipping: str | None) -> None:
    """By definition."""
    if clipping == "norm":
        norm = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        for gradient in gradients:
            gradient.mul_(min(1.0, LIMIT["norm"] / (norm + 1e-6)))
    elif clipping == "value":
        for gradient in gradients:
            gradient.clamp_(-LIMIT["value"], LIMIT["value"])


def errors(
    base: Base,
    optimizer: EquivalentClassOptimizer,
    module: nn.Module,
    batches_of: Callable[[int], list[tuple[Tensor, Tensor]]],
    clipping: str | None = None,
    steps: int = 6,
) -> list[float]:
    """How far a run is from its definition after every step, relative to the largest weight.

    Gradients of some parameters are missing in the first step, and in one between two refreshes.
    """
    x = batches_of(0)[0][0]
    exact: Definition = DEFINITIONS[optimizer.rule](base, copy.deepcopy(module).double(), x.double())
    found = []
    for step in range(steps):
        parts = batches_of(step)
        backward(module, parts, clipping)
        gradients = exact.gradients([(a.double(), b.double()) for a, b in parts])
        before = copy.deepcopy(gradients)
        clip_(list(gradients.values()), clipping)
        assert (clipping is None) == all(torch.equal(before[name], gradients[name]) for name in before)
        if step in MISSING:
            module.get_parameter(MISSING[step]).grad = None
            del gradients[MISSING[step]]
        optimizer.step()
        exact.step(gradients, refresh=step % 3 == 0)
        found.append(error_of(module, exact))
    return found


def test_the_matrix_has_every_pair() -> None:
    for first, second in itertools.combinations(zip(*MATRIX, strict=True), 2):
        assert len(set(zip(first, second, strict=True))) == len(set(first)) * len(set(second))


@pytest.mark.parametrize(
    ("name", "rule", "dtype", "accumulation", "clipping"), few(MATRIX, [row for row in MATRIX if row[0] in A_FEW])
)
def test_a_run_is_that_of_the_definition(
    name: str, rule: str, dtype: torch.dtype, accumulation: int, clipping: str | None
) -> None:
    module, x, y = problem(BASES[name], dtype)
    start = copy.deepcopy(module)
    found = errors(
        BASES[name],
        wrap(name, module, x, rule, max_path_ratio=None, free_start=FREE_START),
        module,
        lambda step: [batches(x, y, accumulation * step + k) for k in range(accumulation)],
        clipping,
    )
    assert max(found) < BOUND[dtype]
    assert distance(start, module, x) > 1e-2


@RULES
def test_parameter_groups_with_options_of_their_own_are_those_of_the_definition(rule: str) -> None:
    def make(params: Iterable[Any]) -> Optimizer:
        first, *others = params
        return optim.SGD(
            [{"params": [first], "momentum": 0.8, "nesterov": True}, {"params": others, "lr": 0.02}],
            lr=0.05,
            weight_decay=0.01,
        )

    base = Base(make, {"momentum_buffer": 1})
    module, x, y = problem(base)
    optimizer = EquivalentClassOptimizer(
        make(module.parameters()), scaling_group(module, x), rule=rule, refresh_interval=3, max_path_ratio=None
    )
    assert max(errors(base, optimizer, module, lambda step: [batches(x, y, step)])) < BOUND[torch.float64]


# What a rescaling does to the state -----------------------------------------------------------------------------------


#: Steps that are as good as none, without decay, and nothing that is added to gradients.
STILL: dict[str, Make] = {
    "nesterov": lambda params: optim.SGD(params, lr=1e-12, momentum=0.9, nesterov=True),
    "adam": lambda params: optim.Adam(params, lr=1e-12, eps=0.0),
    "adamw": lambda params: optim.AdamW(params, lr=1e-12, weight_decay=0.0, amsgrad=True, eps=0.0),
    "nadam": lambda params: optim.NAdam(params, lr=1e-12, eps=0.0),
    "radam": lambda params: optim.RAdam(params, lr=1e-12, eps=0.0),
    "adamax": lambda params: optim.Adamax(params, lr=1e-12, eps=0.0),
    "adagrad": lambda params: optim.Adagrad(params, lr=1e-12, eps=0.0),
    "adadelta": lambda params: optim.Adadelta(params, lr=1e-12, eps=1e-30),
    "rmsprop": lambda params: optim.RMSprop(params, lr=1e-12, eps=0.0),
    "rmsprop_centered": lambda params: optim.RMSprop(params, lr=1e-12, eps=0.0, momentum=0.9, centered=True),
    "rprop": lambda params: optim.Rprop(params, lr=1e-12, step_sizes=(1e-13, 1e-11)),
    "asgd": lambda params: optim.ASGD(params, lr=1e-12, lambd=0.0, t0=1),
    "adafactor": lambda params: optim.Adafactor(params, lr=1e-12, eps=(1e-30, 1.0)),
    "lion": lambda params: Lion(params, lr=1e-12),
    "orthogonal": lambda params: Orthogonal(params, lr=1e-12),
    "lamb": lambda params: Lamb(params, lr=1e-12),
    "schedule_free": lambda params: ScheduleFree(params, lr=1e-12),
}
if "muon" in BASES:
    STILL["muon"] = lambda params: optim.Muon(params, lr=1e-12, weight_decay=0.0)
    STILL["muon_adamw"] = lambda params: MuonAdamW(
        [{"params": params[:1], "use_muon": True}, {"params": params[1:], "use_muon": False}],
        lr=1e-12,
        weight_decay=0.0,
        eps=0.0,
    )


@pytest.mark.parametrize("name", STILL)
def test_larger_weights_divide_the_state_by_the_power_that_is_known_for_it(name: str) -> None:
    torch.manual_seed(0)
    shapes = [(3, 2)] if BASES[name].matrices else [(3, 2), (4,)]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    factors = [torch.randn_like(weight).exp() for weight in weights]
    plain = [nn.Parameter(weight.clone()) for weight in weights]
    larger = [nn.Parameter(weight * factor) for weight, factor in zip(weights, factors, strict=True)]
    first, second = STILL[name](plain), STILL[name](larger)
    for _ in range(7):
        for p, q, factor in zip(plain, larger, factors, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad / factor
        first.step()
        second.step()
    powers = {}
    for number, factor in enumerate(factors):
        (ours, unknown), (theirs, _) = (
            state_entries(optimizer.state, {"p": params[number]}, {})
            for optimizer, params in ((first, plain), (second, larger))
        )
        assert not unknown
        for entry, moment in ours.items():
            powers[entry] = moment.degree
            assert bool((moment.tensors["p"] != 0).any())
            expected = moment.tensors["p"] / factor**moment.degree
            torch.testing.assert_close(theirs[entry].tensors["p"], expected, rtol=1e-7, atol=0)
        held = {
            entry for entry, value in first.state[plain[number]].items() if getattr(value, "shape", ()) == factor.shape
        }
        assert ours.keys() == held
    assert powers == BASES[name].powers


def test_every_base_with_a_state_is_among_those() -> None:
    held = {frozenset(base.powers) for base in BASES.values() if base.powers}
    assert held == {frozenset(BASES[name].powers) for name in STILL}


# The class alone ------------------------------------------------------------------------------------------------------


@RULES
@EVERY_BASE
def test_a_run_that_is_rescaled_at_the_start_and_on_the_way_ends_in_the_same_function(name: str, rule: str) -> None:
    module, x, y = problem(BASES[name])
    other, start = copy.deepcopy(module), copy.deepcopy(module)
    for one in (module, other):
        optimizer = wrap(name, one, x, rule)
        group = optimizer.group
        assert group is not None
        rescale = one is other
        if rescale:
            group.act_(torch.randn(group.num_units, dtype=torch.float64))
            assert distance(start, other, x) < 1e-12
        train(one, optimizer, x, y, range(2))
        if rescale:
            log_scale = torch.randn(group.num_units, dtype=torch.float64)
            group.act_(log_scale)
            for entry, power in BASES[name].powers.items():
                held = {key: optimizer.state[p].get(entry) for key, p in one.named_parameters()}
                group.rescale_(held, log_scale, power=-power)
        optimizer.refresh()
        train(one, optimizer, x, y, range(2, 6))
    assert distance(module, other, x) < 1e-8
    assert distance(start, module, x) > 1e-2


# Checkpoints ----------------------------------------------------------------------------------------------------------


@RULES
@EVERY_BASE
def test_a_run_that_is_resumed_between_two_refreshes_has_the_same_bits(name: str, rule: str) -> None:
    module, x, y = problem(BASES[name], torch.float32)
    optimizer = wrap(name, module, x, rule)
    train(module, optimizer, x, y, range(5))
    saved = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    other, plain = copy.deepcopy(module), copy.deepcopy(module)
    losses = train(module, optimizer, x, y, range(5, 8))

    other.load_state_dict(saved["module"])
    resumed = wrap(name, other, x, rule)
    resumed.load_state_dict(saved["optimizer"])
    assert train(other, resumed, x, y, range(5, 8)) == losses
    assert same_bits(module, other)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert optimizer.state.get(p, {}).keys() == resumed.state.get(q, {}).keys()
        for entry, value in optimizer.state.get(p, {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[q][entry])), entry

    base = BASES[name].make(list(plain.parameters()))
    base.load_state_dict(saved["optimizer"])
    before = weights_of(plain)
    losses = train(plain, base, x, y, range(5, 8))
    assert all(torch.tensor(losses).isfinite())
    assert all(not torch.equal(p, before[key]) and bool(p.isfinite().all()) for key, p in plain.named_parameters())


@pytest.mark.parametrize("name", ["rmsprop_centered", "muon", "muon_adamw"])
def test_what_a_loaded_state_knows_of_gradients_does_not_depend_on_the_size_of_the_loss(name: str) -> None:
    """These have an entry of the name that SGD's momentum has, and another meaning."""
    if name not in BASES:
        pytest.skip("this torch has no Muon")
    runs = []
    for factor in (1.0, 2.0**-20):
        module, x, y = problem(BASES[name])
        base = BASES[name].make(list(module.parameters()))
        for options in base.param_groups:
            options["eps"] = 0.0
        for step in range(8):
            if step == 4:
                state = base.state_dict()
                base = EquivalentClassOptimizer(base, scaling_group(module, x))
                base.load_state_dict(state)
            base.zero_grad()
            (factor * loss_of(module, *batches(x, y, step))).backward()
            base.step()
        runs.append((module, base.statistics().clipped_share))
    assert runs[0][1] == runs[1][1]
    assert distance(runs[0][0], runs[1][0], x) < 1e-9


def test_an_average_of_weights_is_carried_whatever_has_been_read_of_the_state() -> None:
    """To look up the state of a parameter without one leaves an empty entry behind."""
    runs = []
    for read in (False, True):
        module, x, y = problem(BASES["asgd"])
        module[0].weight.requires_grad_(False)
        optimizer = wrap("asgd", module, x, "unit")
        if read:
            assert len(optimizer.state[module[0].weight]) == 0
        train(module, optimizer, x, y, range(5))
        runs.append([optimizer.state[p]["ax"] for p in module.parameters() if p.requires_grad])
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)
